"""The probe's kernels on the card: accuracy against float64, repeatability, large offsets, compilation, real sizes.

Shape suffixes: H query heads, G key heads, S tokens, D head dimension, Q query rows, T of one sequence, N its keys, K
sets of keys, V chosen keys.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cost.cells import duration
from cost.shapes import HEADS, REAL, REAL_LENGTHS, Lengths, masses_operations, profile_operations

from gpu.report import Stage
from sayo_verl.probe import fast, reference
from sayo_verl.probe.reference import Span
from sayo_verl.probe.selfcheck import check_path

LIMITS = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-5}  # largest error of a value
# Candidates that may be faster on a card than the kernel's own tiling
SIZES = (
    (128, 64, 4, 3),
    (128, 64, 4, 2),
    (128, 128, 4, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (64, 128, 4, 2),
    (128, 32, 4, 4),
    (256, 64, 8, 2),
)
TILINGS = tuple(fast._Tiling(*sizes) for sizes in SIZES)
FAR_TOKENS = 600_000  # x 32 heads x 128, beyond 2^31 elements


def run(stage: Stage, part: str = "") -> None:
    """Run first what training uses, then the other types. ``part`` is ``"tilings"`` for those only."""
    if part == "tilings":
        for tiling in TILINGS[:1] if stage.tiny else TILINGS:
            title = f"tiles of {tiling.lanes} x {tiling.keys}, {tiling.warps} warps, {tiling.stages} stages"
            stage.run(title, _other_tiles, stage, tiling, needs=4)
        return
    shapes = (("tiny", 4, 2, 16),) if stage.tiny else HEADS
    found = [
        stage.run(f"float64: {name}, {torch.bfloat16}", _exactness, stage, H, G, D, torch.bfloat16, i)
        for i, (name, H, G, D) in enumerate(shapes)
    ]
    errors = [max(facts["errors"].values()) for facts in found if facts]
    stage.figure(
        f"largest error against float64, {len(errors)} of {len(found)} head shapes in bfloat16",
        f"{max(errors, default=float('nan')):.1e}",
    )
    if stage.device.type == "cuda":
        stage.run("offsets beyond 2^31", _far, stage, needs=10)
    for shape in REAL[:1] if stage.tiny else REAL:
        for n in (Lengths(4, (2, 3), 2, 9),) if stage.tiny else REAL_LENGTHS:
            title = f"{shape.name}, {n.image_tokens} image + {n.response} response tokens"
            stage.run(title, _real_size, stage, shape, n)
    stage.run("kernels compiled for many lengths", _variants, stage, needs=10)
    for name, H, G, D in shapes:
        stage.run(f"self-check of the handshake: {name}", _handshake, stage, H, G, D)
    for dtype in () if stage.tiny else (torch.float16, torch.float32):
        for i, (name, H, G, D) in enumerate(shapes):
            stage.run(f"float64: {name}, {dtype}", _exactness, stage, H, G, D, dtype, i)


def packed(*sequences: tuple[int, int]) -> list[Span]:
    """Spans of sequences of (prompt, response) tokens, back to back."""
    spans, start = [], 0
    for prompt, response in sequences:
        spans.append(Span(0, start + prompt, response, prompt, 0, start, prompt + response))
        start += prompt + response
    return spans


def random_case(
    stage: Stage, H: int, G: int, D: int, S: int, dtype: torch.dtype, n_sets: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys in a model's layout, and sets; half of the keys belong to almost no set."""
    generator = torch.Generator(stage.device).manual_seed(seed)
    query, key = (torch.randn(1, S, n, D, generator=generator, device=stage.device) for n in (H, G))
    sets = torch.randint(0, 2**n_sets, (1, S), generator=generator, device=stage.device, dtype=torch.int32)
    sets[:, S // 2 :] *= torch.rand(1, S - S // 2, generator=generator, device=stage.device) < 0.05
    return (1.5 * query).to(dtype).transpose(1, 2), key.to(dtype).transpose(1, 2), sets


def dense(query: torch.Tensor, key: torch.Tensor, span: Span, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [H, T, N] and log-sum-exp [H, T] of one sequence in float64, without code of the kernels."""
    T, N = span.n_queries, span.n_keys
    query_HTD = query[span.query_batch, :, span.query_start : span.query_start + T].double()
    key_GND = key[span.key_batch, :, span.key_start : span.key_start + N].double()
    logits_HTN = query_HTD @ key_GND.repeat_interleave(query.shape[1] // key.shape[1], 0).transpose(1, 2) * scale
    later_TN = torch.ones(T, N, dtype=torch.bool, device=query.device).triu(span.position + 1)
    logits_HTN.masked_fill_(later_TN, float("-inf"))
    return logits_HTN.softmax(-1), logits_HTN.logsumexp(-1)


def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference; infinite for NaN."""
    return float((found.double() - wanted.double()).abs().nan_to_num(float("inf")).max())


def _errors(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], spans: Sequence[Span], n_sets: int, scale: float
) -> dict[str, float]:
    """Largest errors of every output of the fast path on some sequences."""
    query, key, sets = case
    found = fast.attention_masses(query, key, spans, sets, n_sets, scale=scale)
    errors = dict.fromkeys(("mass", "lse", "profile", "mass, lse given"), 0.0)
    done = 0
    for span in spans:
        at = slice(done, done + span.n_queries)
        weights_HTN, lse_HT = dense(query, key, span, scale)
        sets_N = sets[span.key_batch, span.key_start : span.key_start + span.n_keys]
        member_KN = torch.stack([(sets_N >> k) & 1 for k in range(n_sets)]).double()
        mass_KTH = torch.einsum("htn,kn->kth", weights_HTN, member_KN)
        columns = torch.randperm(span.n_keys, device=query.device)[: 1 + span.n_keys // 3]
        profile = fast.attention_profile(query, key, span, found.lse[at], columns, scale=scale)
        given = lse_HT.T.float().contiguous()
        again = fast.attention_masses(query, key, [span], sets, n_sets, scale=scale, lse=given)
        pairs = {
            "mass": (found.mass[:, at], mass_KTH),
            "lse": (found.lse[at], lse_HT.T),
            "profile": (profile, weights_HTN.mean(0)[:, columns]),
            "mass, lse given": (again.mass, mass_KTH),
        }
        errors = {name: max(errors[name], largest(*pair)) for name, pair in pairs.items()}
        done += span.n_queries
    return errors


def _exactness(stage: Stage, H: int, G: int, D: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    spans = packed((40, 20), (1, 3), (25, 30)) if stage.tiny else packed((640, 256), (1, 5), (1900, 333))
    n_sets, scale = (2, 3, 6)[seed % 3], D**-0.5
    case = random_case(stage, H, G, D, spans[-1].key_start + spans[-1].n_keys, dtype, n_sets, seed)
    stage.sync()
    begin = time.monotonic()
    first = fast.attention_masses(case[0], case[1], spans, case[2], n_sets, scale=scale)
    stage.sync()
    took = time.monotonic() - begin
    second = fast.attention_masses(case[0], case[1], spans, case[2], n_sets, scale=scale)
    same = torch.equal(first.mass, second.mass) and torch.equal(first.lse, second.lse)
    errors = _errors(case, spans, n_sets, scale)
    wrong = not same or not all(error <= LIMITS[dtype] for error in errors.values())
    facts = {"errors": errors, "limit": LIMITS[dtype], "same_bits_twice": same, "first_call_s": round(took, 2)}
    return facts | {"wrong": wrong}


def _handshake(stage: Stage, H: int, G: int, D: int) -> dict[str, Any]:
    """Run the self-check of a run's handshake, which raises if it fails."""
    path, difference = check_path("fast", heads=H, key_heads=G, head_dim=D, device=stage.device)
    return {"path": path, "difference": difference}


def _far(stage: Stage) -> dict[str, Any]:
    """Check statistics of the last sequence in a row with more elements than an int32 can index."""
    H, G, D, n_keys = 32, 8, 128, 800
    make = functools.partial(torch.empty, device=stage.device, dtype=torch.bfloat16)
    query, key = (make(1, FAR_TOKENS, n, D).transpose(1, 2) for n in (H, G))
    for x in (query, key):
        x[:, :, -n_keys:].normal_()
    sets = torch.randint(0, 4, (1, FAR_TOKENS), device=stage.device, dtype=torch.int32)
    span = Span(0, FAR_TOKENS - 200, 200, n_keys - 200, 0, FAR_TOKENS - n_keys, n_keys)
    errors = _errors((query, key, sets), [span], 2, D**-0.5)
    return {"elements": query.numel(), "errors": errors, "wrong": max(errors.values()) > LIMITS[torch.bfloat16]}


def _variants(stage: Stage) -> dict[str, Any]:
    """Count kernels compiled for batches of forty different lengths."""
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    lengths = 3 if stage.tiny else 40
    H, G, D = (4, 2, 16) if stage.tiny else (32, 8, 128)
    before, begin = len(list(cache.rglob("*.cubin"))), time.monotonic()
    for n in range(lengths):
        spans = packed((20 + 13 * n, 15 + 7 * n), (31 + n, 5 + n))
        query, key, sets = random_case(stage, H, G, D, spans[-1].key_start + spans[-1].n_keys, torch.bfloat16, 2, n)
        lse = fast.attention_masses(query, key, spans, sets, 2, scale=0.1).lse
        fast.attention_masses(query, key, spans, sets, 2, scale=0.1, lse=lse)
        fast.attention_profile(
            query, key, spans[1], lse[spans[0].n_queries :], torch.arange(3 + n, device=stage.device), scale=0.1
        )
    stage.sync()
    new = "not counted (interpreted)" if stage.tiny else len(list(cache.rglob("*.cubin"))) - before
    stage.figure(f"kernels compiled for {lengths} lengths, in addition to those of the head shapes", str(new))
    return {
        "lengths": lengths,
        "new_kernels": new,
        "in_cache_before": before,
        "all_s": round(time.monotonic() - begin, 1),
    }


@dataclass(frozen=True)
class _Sized:
    """One layer at some 16,000 packed tokens; all rows have one size, an image and a box."""

    masses: Callable[..., Any]  # takes spans and a log-sum-exp
    profile: Callable[..., Any]  # takes a span, its log-sum-exp and columns
    spans: list[Span]
    marked: list[Span]
    columns: torch.Tensor
    reference: Callable[[], Any]


def _sized(stage: Stage, shape: Any, n: Lengths) -> _Sized:
    H, G, D = (4, 2, 16) if stage.tiny else (shape.heads, shape.kv_heads, shape.head_dim)
    sequences = 2 if stage.tiny else 16384 // n.total
    spans = packed(*[(n.prompt, n.response)] * sequences)
    query, key, sets = random_case(stage, H, G, D, sequences * n.total, torch.bfloat16, 2, seed=0)
    image = torch.ones(n.image, dtype=torch.int32)
    rows, cols = n.image
    image[3 * rows // 10 : 8 * rows // 10, 2 * cols // 10 : 7 * cols // 10] |= 2  # the box of the other stages
    sets.zero_()
    first, end = n.before, n.before + n.image_tokens
    for span in spans:
        sets[0, span.key_start + first : span.key_start + end] = image.flatten().to(stage.device)
    given = {"scale": D**-0.5}
    return _Sized(
        functools.partial(fast.attention_masses, query, key, sets=sets, n_sets=2, **given),
        functools.partial(fast.attention_profile, query, key, **given),
        spans,
        [span._replace(marked=((first, end),)) for span in spans],
        torch.arange(first, end, device=stage.device),
        functools.partial(reference.attention_masses, query, key, spans, sets, 2, **given),
    )


def _other_tiles(stage: Stage, tiling: Any) -> dict[str, Any]:
    """Time one layer with these tiles in milliseconds, with the log-sum-exp computed and given."""
    facts: dict[str, Any] = {}
    own, fast._MASSES = fast._MASSES, tiling
    try:
        for n in (Lengths(4, (2, 3), 2, 9),) if stage.tiny else REAL_LENGTHS:
            case = _sized(stage, REAL[0], n)
            given = {"spans": case.marked, "lse": case.masses(spans=case.spans).lse}
            facts[f"{n.image_tokens} + {n.response}"] = [
                round(stage.milliseconds(functools.partial(case.masses, **arguments)), 4)
                for arguments in ({"spans": case.spans}, given)
            ]
    finally:
        fast._MASSES = own
    times = ", ".join(f"{size}: {computed:.3f} / {with_lse:.3f}" for size, (computed, with_lse) in facts.items())
    what = f"tiles of {tiling.lanes} x {tiling.keys}, {tiling.warps} warps, {tiling.stages} stages"
    chosen = " (chosen)" if tiling == own else ""
    stage.figure(f"{what}{chosen}: ms a layer, log-sum-exp computed / given", times)
    return facts


def _real_size(stage: Stage, shape: Any, n: Lengths) -> dict[str, Any]:
    """Time masses with the log-sum-exp computed and given, and the profile."""
    case = _sized(stage, shape, n)
    sequences = len(case.spans)
    lse = case.masses(spans=case.spans).lse

    def profiles() -> None:
        for span, lse_TH in zip(case.spans, lse.split(n.response), strict=True):
            case.profile(span, lse_TH, case.columns)

    pieces: dict[str, tuple[Callable[[], Any], int]] = {
        "masses": (lambda: case.masses(spans=case.spans), masses_operations(shape, n)),
        "masses, lse given": (lambda: case.masses(spans=case.marked, lse=lse), profile_operations(shape, n)),
        "profile": (profiles, profile_operations(shape, n)),
    }
    facts: dict[str, Any] = {"sequences": sequences}
    for name, (function, operations) in pieces.items():
        took = stage.milliseconds(function)
        rate = sequences * operations / took / 1e9
        facts[name] = {"ms": round(took, 4), "tflops": round(rate, 1)}
        what = f"{name}, one layer, {shape.name}, {sequences} x ({n.image_tokens:,} + {n.response:,})"
        stage.figure(what, f"{duration(took / 1000)}, {rate:.0f} TFLOP/s")
    wanted = case.reference().mass
    facts["errors"] = {
        "masses": largest(case.masses(spans=case.spans).mass, wanted),
        "masses, lse given": largest(case.masses(spans=case.marked, lse=lse).mass, wanted),
    }
    facts["wrong"] = not max(facts["errors"].values()) <= LIMITS[torch.bfloat16]
    return facts
