"""The cases of ``probe_cost.py``: model, batch and variants, and the measurement of one case.

Shape suffixes: B = 1, L tokens of all sequences back to back, S tokens of one sequence, H query heads, G key heads, D
head dimension.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

from cost.attention import ATTENTION, causal_mask
from cost.meter import Meter, Timed, copy_rate, in_rounds, machine, matmul_rate, meter_of, peaks
from cost.shapes import REAL, REAL_LENGTHS, SMALL, TINY, Lengths, Shape
from cost.store import Store
from cost.workload import (
    TextStack,
    Workload,
    cosine_request,
    in_chunks,
    masses_request,
    profile_request,
    some_layers,
)
from sayo_verl.probe.measure import kernels
from sayo_verl.probe.reference import Span

Report = Callable[[str], None]
SHORT = Lengths(2, (2, 2), 2, 8)  # to run a function before its memory is measured
TOLERANCE = 1e-3  # largest difference of a mass between two ways to compute it from the same queries and keys


@dataclass(frozen=True)
class Case:
    """One model and one batch.

    Attributes:
        part: the table of the case, ``"cpu"`` or ``"card"``.
        shape: of the model.
        lengths: of each sequence.
        sequences: their number; 0: as many as fit, see ``fitting_sequences``.
        paths: of the probe.
        chunks: chunk sizes of the reference path to try in all layers.
        extras: whether profile statistics and the hidden-state cosine are measured too.
        rounds: of the probe; eager attention runs in the first ``slow_rounds``.
        brief: without the slowest variants: four layers, the reference path in several layers and without a pass, and
            kept eager weights.
    """

    part: str
    shape: Shape
    lengths: Lengths
    sequences: int
    paths: tuple[str, ...]
    chunks: tuple[int, ...]
    extras: bool
    rounds: int
    slow_rounds: int
    brief: bool = False

    @property
    def key(self) -> str:
        n = self.lengths
        return f"{self.part}: {self.shape.name}, {n.image_tokens} image + {n.response} response tokens"


def cpu_cases(quick: bool) -> list[Case]:
    """Three lengths, 800 tokens a pass; the middle one has the real ratio of tokens to width and every variant."""
    if quick:
        lengths = Lengths(2, (3, 3), 2, 7)
        return [Case("cpu", TINY[0], lengths, 2, ("reference",), (3,), True, 2, 1)]
    small = functools.partial(Case, "cpu", SMALL, paths=("reference",), slow_rounds=3)
    return [
        small(Lengths(4, (8, 8), 4, 128), 4, chunks=(), extras=False, rounds=5),
        small(Lengths(8, (8, 16), 8, 256), 2, chunks=(32, 512), extras=True, rounds=5),
        small(Lengths(16, (16, 16), 16, 512), 1, chunks=(), extras=False, rounds=5),
    ]


def card_cases(quick: bool, models: Sequence[str], rounds: int) -> list[Case]:
    """The true shapes with as many packed sequences as fit."""
    if quick:
        lengths = Lengths(2, (3, 3), 2, 7)
        return [Case("card", shape, lengths, 2, ("fast", "reference"), (), True, 1, 1) for shape in TINY]
    card = functools.partial(
        Case, "card", sequences=0, paths=("fast", "reference"), chunks=(), extras=True, rounds=rounds, slow_rounds=3
    )
    return [card(shape=shape, lengths=lengths) for shape in REAL for lengths in REAL_LENGTHS if shape.name in models]


def scaling_lengths(part: str, quick: bool) -> list[Lengths]:
    """Lengths of one sequence, doubled each time, in fixed proportions."""
    if quick:
        return [Lengths(1 * n, (2 * n, 2), n, 6 * n) for n in (1, 2, 4)]
    sides = [(8, 16), (16, 16), (16, 32), (32, 32)] if part == "cpu" else [(16, 32), (32, 32), (32, 64), (64, 64)]
    return [Lengths(rows * cols // 16, (rows, cols), rows * cols // 16, rows * cols * 2) for rows, cols in sides]


def fitting_sequences(stack: TextStack, case: Case, meter: Meter, max_tokens: int) -> tuple[int, str]:
    """Number of sequences of a pass and its limit: 80 % of free memory or ``max_tokens`` (0: no limit)."""
    if case.sequences:
        return case.sequences, ""
    need = meter.peak_bytes(Workload(stack, case.lengths, 1).plain)
    torch.cuda.empty_cache()
    by_memory = int(0.8 * torch.cuda.mem_get_info(stack.device)[0]) // need
    by_tokens = max_tokens // case.lengths.total if max_tokens else by_memory
    n = max(1, min(by_memory, by_tokens))
    by_limit = f"{max_tokens:,} tokens a pass (memory would allow {by_memory} sequences)"
    return n, "memory" if by_memory <= by_tokens else by_limit


def passes(case: Case, work: Workload) -> dict[str, Timed]:
    """Every whole pass of a case, by name; ``pass`` is the plain one, ``pass again`` shows its noise."""
    n_layers = work.stack.shape.layers
    timed = {"pass": Timed(work.plain), "pass again": Timed(work.plain)}
    for path in case.paths:
        slow = case.brief and path == "reference"
        for count in (1,) if slow else (1, n_layers) if case.brief else (1, 4, n_layers):
            request = masses_request(some_layers(n_layers, count), path)
            timed[f"probe {path} {count}"] = Timed(functools.partial(work.probed, request))
        if case.extras and not slow:
            timed[f"profile {path} 1"] = Timed(functools.partial(work.probed, profile_request(path)))
    for chunk in case.chunks:
        request = masses_request(range(n_layers), "reference")
        function = functools.partial(work.probed, request, chunk)
        timed[f"probe reference {n_layers} chunk {chunk}"] = Timed(function)
    if case.extras:
        timed["cosine"] = Timed(functools.partial(work.probed, cosine_request("auto")))
    for name, layers, keep in (
        ("eager 1", [n_layers - 1], False),
        (f"eager {n_layers}", range(n_layers), False),
        (f"eager {n_layers} kept", range(n_layers), True),
    ):
        if not (case.brief and keep):
            timed[name] = Timed(functools.partial(work.eager, layers, keep), rounds=case.slow_rounds)
    return timed


def pieces(case: Case, work: Workload) -> dict[str, Timed]:
    """Parts of the probe without a pass, on queries and keys of the last layer, because a pass's noise hides them.

    ``alone`` is the whole probe for one layer; ``plan`` is its part before the pass, on the host, and ``read`` the part
    of every further layer; ``masses`` and ``profile`` are the functions of a path.
    """
    layer = work.stack.shape.layers - 1
    query, key, scale = work.queries_and_keys(layer)
    sets, columns_V = work.key_sets(), work.plan(masses_request([layer], "auto"))[0].image_columns.to(work.stack.device)
    timed: dict[str, Timed] = {}
    for path in case.paths[:1] if case.brief else case.paths:
        of_path, measurement = kernels(path, work.stack.device), work.measurement(masses_request([layer], path))
        masses = functools.partial(of_path.attention_masses, query, key, work.spans, sets, 2, scale=scale)
        functions: dict[str, Callable[[], Any]] = {
            "alone": functools.partial(work.alone, masses_request([layer], path), layer, query, key, scale),
            "plan": functools.partial(work.measurement, masses_request([layer], path)),
            "read": functools.partial(measurement.read, layer, query, key, scale),
            "masses": masses,
            "profile": functools.partial(_profiles, of_path, work, query, key, masses().lse, columns_V, scale),
        }
        timed |= {f"{name} {path}": Timed(function, whole=False) for name, function in functions.items()}
    return timed


def _profiles(
    of_path: ModuleType,
    work: Workload,
    query: torch.Tensor,
    key: torch.Tensor,
    lse_QH: torch.Tensor,
    columns_V: torch.Tensor,
    scale: float,
) -> None:
    for span, lse_TH in zip(work.spans, lse_QH.split(work.lengths.response), strict=True):
        of_path.attention_profile(query, key, span, lse_TH, columns_V, scale=scale)


def agreement(case: Case, work: Workload) -> dict[str, float]:
    """Largest differences of the masses between ways to compute them.

    Raises:
        RuntimeError: for one above ``TOLERANCE``, because a wrong path must not be timed.
    """
    layer = work.stack.shape.layers - 1
    query, key, scale = work.queries_and_keys(layer)
    sets = work.key_sets()
    found = {
        path: kernels(path, work.stack.device).attention_masses(query, key, work.spans, sets, 2, scale=scale).mass
        for path in case.paths
    }
    differences = {f"{path} - reference": found[path] - found["reference"] for path in found if path != "reference"}
    if query.dtype == torch.float32:  # in bfloat16 eager attention itself is too coarsely rounded for a comparison
        n = work.lengths
        in_set = torch.stack([sets[0] & 1, sets[0] >> 1 & 1]).float()
        _, weights = work.eager([layer], keep=True)
        for i, ((a, b), weight) in enumerate(zip(work.bounds, weights, strict=True)):
            eager_KHT = torch.einsum("hts,ks->kht", weight[0, :, n.prompt :], in_set[:, a:b])
            ours = found["reference"][:, i * n.response : (i + 1) * n.response]
            differences[f"eager - reference, sequence {i}"] = eager_KHT.transpose(1, 2) - ours
    largest = {name: float(difference.abs().max()) for name, difference in differences.items()}
    if not all(value <= TOLERANCE for value in largest.values()):
        raise RuntimeError(f"the ways to compute attention masses disagree: {largest}")
    return largest


def measure_case(case: Case, stack: TextStack, store: Store, max_tokens: int, what: str, report: Report) -> None:
    """Measure time or memory (``what``) of one case, or ``"both"``, and store it."""
    say, meter = functools.partial(_say, report, case.key), meter_of(stack.device)
    sequences, limit = fitting_sequences(stack, case, meter, max_tokens)
    work = Workload(stack, case.lengths, sequences)
    if what != "memory":
        say(f"{sequences} sequences, {work.tokens} tokens" + (f", limited by {limit}" if limit else ""))
        work.check_sequences_are_apart()
        differences = agreement(case, work)
        facts = {
            "part": case.part,
            "machine": machine(stack.device, ATTENTION.backend(stack.device)),
            "dtype": str(stack.dtype).removeprefix("torch."),
            "shape": dataclasses.asdict(case.shape),
            "lengths": dataclasses.asdict(case.lengths) | {"total": case.lengths.total, "pairs": case.lengths.pairs},
            "image_tokens": case.lengths.image_tokens,
            "sequences": sequences,
            "limit": limit,
            "paths": case.paths,
            "chunks": case.chunks,
            "agreement": differences,
        }
        times = in_rounds(meter, passes(case, work) | pieces(case, work), case.rounds, say)
        store.update("cases", case.key, facts | {"times": times}, replace=True)
    if what != "time":
        functions = {name: timed.function for name, timed in passes(case, work).items()}
        if what == "memory":  # with "both", timing has run everything
            for timed in passes(case, Workload(stack, SHORT, 2)).values():
                timed.function()
            work.plain()
        functions |= {name: timed.function for name, timed in pieces(case, work).items()}
        store.update("cases", case.key, {"memory": peaks(meter, functions, say)})


def measure_scaling(
    part: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    store: Store,
    quick: bool,
    what: str,
    report: Report,
) -> None:
    """Measure the probe's kernels and one eager layer on random queries and keys of one sequence, doubled each time."""
    key, meter = f"{part}: {shape.name}", meter_of(device)
    if what != "memory":
        side = 64 if quick else {"cpu": 1024, "card": 8192}[part]
        copied = 2**16 if quick else {"cpu": 2**28, "card": 2**31}[part]
        rates = {
            "matmul_operations": matmul_rate(meter, side, device, dtype),
            "copy_bytes": copy_rate(meter, copied, device),
        }
        facts = {"part": part, "machine": machine(device, ATTENTION.backend(device)), "rates": rates, "rows": {}}
        store.update("scaling", key, facts, replace=True)
    rows = store.read()["scaling"][key]["rows"]
    for lengths in scaling_lengths(part, quick):
        timed = _growing(part, shape, lengths, device, dtype)
        row = rows.setdefault(str(lengths.total), {"tokens": lengths.total, "pairs": lengths.pairs})
        say = functools.partial(_say, report, f"{key}, one sequence of {lengths.total} tokens")
        if what != "memory":
            row["times"] = in_rounds(meter, timed, 1 if quick else 7, say)
        if what == "memory":
            for entry in timed.values():
                entry.function()  # with "both", timing has run it
        if what != "time":
            row["memory"] = peaks(meter, {name: entry.function for name, entry in timed.items()}, say)
        store.update("scaling", key, {"rows": rows})


def _growing(part: str, shape: Shape, lengths: Lengths, device: torch.device, dtype: torch.dtype) -> dict[str, Timed]:
    S = lengths.total
    make = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    query, key = (make(1, heads, S, shape.head_dim) for heads in (shape.heads, shape.kv_heads))
    sets = torch.zeros(1, S, dtype=torch.int32, device=device)
    sets[0, lengths.before : lengths.before + lengths.image_tokens] = 1
    span, scale = Span(0, lengths.prompt, lengths.response, lengths.prompt, 0, 0, S), shape.head_dim**-0.5
    chosen: dict[str, Any] = {f"reference, chunk {chunk}": in_chunks(chunk) for chunk in (32, 128, 512)}
    if part == "card":
        chosen = {"fast": kernels("fast", device), **chosen}
    timed = {
        name: Timed(functools.partial(of.attention_masses, query, key, [span], sets, 1, scale=scale), whole=False)
        for name, of in chosen.items()
    }
    module: Any = SimpleNamespace(num_key_value_groups=shape.heads // shape.kv_heads, training=False)
    mask = causal_mask(S, dtype, device)
    eager = functools.partial(eager_attention_forward, module, query, key, key, mask, scale)
    return timed | {"eager attention": Timed(torch.no_grad()(eager), whole=False)}


def _say(report: Report, key: str, text: str) -> None:
    report(f"{key}: {text}")
