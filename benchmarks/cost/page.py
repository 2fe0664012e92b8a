"""The page from the raw numbers: every figure on it is computed here, from a file or from ``cost.shapes``."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from cost.cells import (
    MISSING,
    Entry,
    duration,
    exponent,
    floor_cell,
    more_cell,
    ratio_cell,
    ratios,
    seconds,
    share_cell,
    size_cell,
    span,
    table,
)
from cost.shapes import REAL, REAL_LENGTHS, TINY, masses_operations, pass_operations, qwen3_vision_operations

Raw = Mapping[str, Mapping[str, Entry]]
ONE_LAYER, ALL_LAYERS = 0.1, 3.0  # the target, per cent of the pass

HEAD = """\
Written by `benchmarks/probe_cost.py` from `benchmarks/results/*.json`; its `--help` says how to add a device.

Everything stands beside the pass that the probe rides on: verl's old-log-prob pass over one packed micro-batch, without
gradient, with `lm_head`, log-softmax and entropy of every token. Weights are random, which changes no cost. The vision
tower is left out of every measured pass: that makes the pass shorter and every ratio here larger than in training.
"""
SELF_CHECK = "**SELF-CHECK: models this small measure nothing. Do not read the figures.**\n"
ARITHMETIC = """\
Multiplications and additions of one sequence at the shape of Qwen3-VL-8B, with 128 tokens of text in the prompt. The
fast path goes over the keys once and computes the log-sum-exp anew over all causal keys, so a layer takes 2 x H x D x
pairs: H query heads of D dimensions, pairs = response rows x mean number of causal keys. If every operation took the
same time, this would be the probe's share of the pass. Exponentials, memory traffic, launches and work on the host are
not in it.
"""
TIME = """\
"/ pass" is the ratio to the plain pass of the same round: median (least to most) of {rounds} rounds, of {slow} for
eager attention. "Alone" is all that the probe adds to a pass for one layer, run by itself in the same rounds: planning
on the host, once per micro-batch, then reading the layer, then laying out the results. The floor of a kernel is the
larger of two times: its operations at the measured rate of a matrix product, its bytes at the measured rate of a copy.
"""
MEMORY = """\
Peak of the plain pass over what it starts from (weights, batch), how much higher it is with each variant, and the peak
of the probe's parts by themselves. Most of a pass's peak is logits, under which what happens inside a layer hides.
"""
GROWTH = """\
One layer, one sequence, random queries and keys: time, peak memory. The exponents are least-squares slopes of
logarithms over {tokens}x the tokens and {pairs}x the pairs: of time against pairs (response rows x mean number of
causal keys), of memory against tokens; 1 is linear. A chunk is the number of query rows that the reference path handles
at once; where it is longer than the response, memory grows with the response too.
"""
LIMITS = """\
## Limits

- CPU figures are those of the reference path (plain torch, float32) on one thread. They show how the cost grows and how
  the probe stands beside eager attention on the same processor. They are no forecast for a GPU, where products are
  cheap beside exponentials, memory traffic, launches and work on the host, and where the path is another one.
- The small model has heads of 64 dimensions, the real one of 128: twice the exponentials for the same products.
- A whole pass varies by a per cent or more from round to round, so a ratio of passes can lie below 1. What one layer
  adds is read from "alone".
- The pass runs in one process: gathering sharded weights would make the pass longer, not the probe.
- Eager attention runs sequence by sequence here. Over a packed row at once it would take the square of the whole row.
- Log-softmax and entropy are verl's formulas over 2,048 tokens at once, without its loop over rows and without
  flash-attn's kernel.
"""


def write_page(path: Path, raw: Raw) -> None:
    """Write the page.

    Args:
        path: where.
        raw: ``cases``, ``scaling`` and ``failures`` of all devices, see ``cost.store``.
    """
    tiny = {shape.name for shape in TINY}
    self_check = [SELF_CHECK] if any(case["shape"]["name"] in tiny for case in raw["cases"].values()) else []
    lines = ["# What the probe costs", "", *self_check, HEAD, *_target(raw), *_arithmetic(), "## On a GPU", ""]
    models = [shape.name for shape in REAL] if not self_check else sorted(tiny)
    for model in models:
        lines += [f"### {model}", "", *_part(raw, "card", model)]
    lines += ["## On a CPU", "", *_part(raw, "cpu", None), LIMITS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _target(raw: Raw) -> list[str]:
    shape = REAL[0]
    cases = _cases(raw, "card", shape.name)
    one = [100 * statistics.median(found) for c in cases if (found := ratios(c, "alone fast"))]
    whole = [100 * statistics.median(found) - 100 for c in cases if (found := ratios(c, f"probe fast {shape.layers}"))]
    series = raw["scaling"].get(f"card: {shape.name}")
    grows = None if series is None else exponent(series, "fast", "memory")
    share = [100 * masses_operations(shape, n) / pass_operations(shape, n) for n in REAL_LENGTHS]
    rows = [
        ["one layer", f"at most {ONE_LAYER:g} %", span(share, "%", 3), _verdict(one, ONE_LAYER)],
        [
            f"all {shape.layers} layers",
            f"at most {ALL_LAYERS:g} %",
            span([shape.layers * x for x in share], "%", 2),
            _verdict(whole, ALL_LAYERS),
        ],
        [
            "memory",
            "linear in tokens",
            "linear: some numbers per response token and head",
            MISSING if grows is None else f"exponent {grows:.2f} over tokens",
        ],
    ]
    return [
        "## Target",
        "",
        f"{shape.name}, bfloat16, one H200, the fast path (Triton), added to the old-log-prob pass:",
        "",
        *table(["", "target", "by arithmetic (operations)", "measured"], rows),
    ]


def _verdict(values: Sequence[float], target: float) -> str:
    if not values:
        return MISSING
    return f"{span(values, '%', 3)}: {'met' if max(values) <= target else 'missed'}"


def _arithmetic() -> list[str]:
    shape = REAL[0]
    rows = []
    for n in REAL_LENGTHS:
        text, probe = pass_operations(shape, n), masses_operations(shape, n)
        vision = qwen3_vision_operations(shape.hidden, n.image_tokens)
        rows.append(
            [
                f"{n.image_tokens:,} + {n.response:,}",
                f"{text / 1e12:.1f} T",
                f"{vision / 1e12:.1f} T",
                f"{probe / 1e9:.1f} G",
                f"{100 * probe / text:.3f} %",
                f"{100 * shape.layers * probe / text:.2f} %",
                f"{100 * shape.layers * probe / (text + vision):.2f} %",
            ]
        )
    header = ["image + response tokens", "pass, text model", "vision tower", "probe, one layer"]
    header += ["one layer / text model", f"{shape.layers} layers / text model", f"{shape.layers} layers / both"]
    return ["## Arithmetic, not measurement", "", ARITHMETIC, *table(header, rows)]


def _part(raw: Raw, part: str, model: str | None) -> list[str]:
    """Everything that was measured of one model (None: of all) in one part, or that it was not."""
    cases = _cases(raw, part, model)
    told = [
        f"The last run failed ({entry['date']}): `{entry['error']}`\n"
        for key, entry in raw["failures"].items()
        if key.startswith(part) and (model is None or model in key)
    ]
    if not cases:
        return [*told, *_not_measured(model)]
    name = cases[0]["shape"]["name"]
    series = raw["scaling"].get(f"{part}: {name}")
    lines = [*told, *_about(cases), *_times(cases, series), *_memory(cases)]
    return lines if series is None else [*lines, *_growth(name, series)]


def _not_measured(model: str | None) -> list[str]:
    if model is None:
        return [MISSING, ""]
    n = next(shape.layers for shape in REAL if shape.name == model)
    wanted = [f"probe, {k} layer{'s' * (k > 1)}, fast path / pass" for k in (1, 4, n)]
    wanted += [
        f"eager attention in all {n} layers / pass",
        "masses kernel of the fast path, time / floor",
        "peak memory",
    ]
    header = ["image + response tokens", *(f"{x.image_tokens:,} + {x.response:,}" for x in REAL_LENGTHS)]
    return table(header, [[row, *[MISSING] * len(REAL_LENGTHS)] for row in wanted])


def _about(cases: Sequence[Entry]) -> list[str]:
    """What was measured on what."""
    shape, lines = cases[0]["shape"], []
    for case in cases:
        m = case["machine"]
        if m["device"] == "cuda":
            where = f"{m['name']} ({m['memory'] / 2**30:.0f} GiB), CUDA {m['cuda']}, Triton {m['triton']}"
        else:
            where = f"{m['name']}, {m['cores']} cores, {m['threads']} thread used, process CPU time"
        versions = f"torch {m['torch']}, transformers {m['transformers']}"
        lines.append(f"{where}, {versions}, {case['dtype']}, {m['date']}. Attention of the pass: {m['attention']}.\n")
    largest, which = max(((v, name) for case in cases for name, v in case["agreement"].items()), default=(0.0, "none"))
    return [
        *dict.fromkeys(lines),
        f"{shape['name']}: {shape['layers']} layers, hidden size {shape['hidden']}, {shape['heads']} query heads on "
        f"{shape['kv_heads']} key heads of {shape['head_dim']} dimensions, FFN {shape['ffn']}, vocabulary "
        f"{shape['vocabulary']}. Largest difference of an attention mass between two ways to compute it, on the "
        f"batches that were timed: {largest:.1e} ({which.split(',')[0]}).\n",
    ]


def _times(cases: Sequence[Entry], series: Entry | None) -> list[str]:
    plain = [seconds(case, "pass") for case in cases]
    limits = [f"Sequences of a pass are limited by {x}.\n" for x in dict.fromkeys(c["limit"] for c in cases) if x]
    rounds = " or ".join(sorted({str(len(case["times"]["pass"]["seconds"])) for case in cases}))
    slow = max(len(case["times"]["eager 1"].get("seconds", [])) for case in cases)
    rows = [
        ["sequences x tokens", *(f"{c['sequences']} x {c['lengths']['total']:,}" for c in cases)],
        ["plain pass", *(MISSING if x is None else duration(x) for x in plain)],
        *([title, *(ratio_cell(c, name) for c in cases)] for name, title in _variants(cases)),
        *([title, *(share_cell(c, name) for c in cases)] for name, title in _shares(cases)),
        *([title + ", time / floor", *(floor_cell(c, name, series) for c in cases)] for name, title in _kernels(cases)),
    ]
    return ["#### Time", "", TIME.format(rounds=rounds, slow=slow), *limits, *table(_header(cases), rows)]


def _memory(cases: Sequence[Entry]) -> list[str]:
    cases = [case for case in cases if "memory" in case]
    if not cases:
        return ["#### Memory", "", MISSING, ""]
    rows = [["plain pass", *(size_cell(c["memory"], "pass") for c in cases)]]
    for name, title in _variants(cases):
        rows.append([title.removesuffix(" / pass"), *(more_cell(c["memory"], name) for c in cases)])
    for name, title in [*_shares(cases)[::3], *_kernels(cases)]:
        rows.append([f"by itself: {title.removesuffix(' / pass')}", *(size_cell(c["memory"], name) for c in cases)])
    return ["#### Memory", "", MEMORY, *table(_header(cases), rows)]


def _growth(name: str, series: Entry) -> list[str]:
    rows = sorted(series["rows"].values(), key=lambda row: row["tokens"])
    columns, lines = list(rows[-1]["times"]), []
    for row in rows:
        times = [seconds(row, column) for column in columns]
        cells = [
            f"{MISSING if took is None else duration(took)}, {size_cell(row.get('memory', {}), column)}"
            for took, column in zip(times, columns, strict=True)
        ]
        lines.append([f"{row['tokens']:,}", f"{row['pairs'] / 1e3:,.0f} thousand", *cells])
    slopes = [[exponent(series, column, what) for what in ("time", "memory")] for column in columns]
    lines.append(["exponents", "", *(", ".join("-" if x is None else f"{x:.2f}" for x in pair) for pair in slopes)])
    grown = {what: f"{rows[-1][what] / rows[0][what]:.0f}" for what in ("tokens", "pairs")}
    rates = series["rates"]
    return [
        f"#### How it grows: {name}",
        "",
        GROWTH.format(**grown),
        *table(["tokens", "pairs", *columns], lines),
        f"Rates for the floors, measured in the same run: {rates['matmul_operations'] / 1e12:.3g} TFLOP/s in a square "
        f"matrix product, {rates['copy_bytes'] / 1e9:.4g} GB/s in a copy (bytes read and written).\n",
    ]


def _header(cases: Sequence[Entry]) -> list[str]:
    return ["image + response tokens", *(f"{c['image_tokens']:,} + {c['lengths']['response']:,}" for c in cases)]


def _variants(cases: Sequence[Entry]) -> list[tuple[str, str]]:
    """Names and titles of the whole passes that any of the cases has, but for the plain one."""
    n = cases[0]["shape"]["layers"]
    titles: dict[str, str] = {}
    for path in cases[0]["paths"]:
        titles |= {f"probe {path} {k}": f"probe, {k} layer{'s' * (k > 1)}, {path} path / pass" for k in (1, 4, n)}
        titles[f"profile {path} 1"] = f"single visual tokens (top 8, heat map), 1 layer, {path} path / pass"
    for chunk in (chunk for case in cases for chunk in case["chunks"]):
        titles[f"probe reference {n} chunk {chunk}"] = f"probe, {n} layers, reference path, chunks of {chunk} / pass"
    titles |= {
        "cosine": "hidden-state cosine / pass",
        "eager 1": "eager attention in 1 layer / pass",
        f"eager {n}": f"eager attention in all {n} layers, weights dropped / pass",
        f"eager {n} kept": f"eager attention in all {n} layers, weights kept (`output_attentions`) / pass",
    }
    return [(name, title) for name, title in titles.items() if any(name in case["times"] for case in cases)]


def _shares(cases: Sequence[Entry]) -> list[tuple[str, str]]:
    words = {"alone": "probe alone, 1 layer", "plan": "of it planning", "read": "of it reading the layer"}
    return [
        (f"{part} {path}", f"{title}, {path} path / pass")
        for path in cases[0]["paths"]
        for part, title in words.items()
    ]


def _kernels(cases: Sequence[Entry]) -> list[tuple[str, str]]:
    return [
        (f"{part} {path}", f"{part} kernel of the {path} path")
        for path in cases[0]["paths"]
        for part in ("masses", "profile")
    ]


def _cases(raw: Raw, part: str, model: str | None) -> list[Entry]:
    found = [c for c in raw["cases"].values() if c["part"] == part and model in (None, c["shape"]["name"])]
    return sorted(found, key=lambda c: (c["image_tokens"], c["lengths"]["response"]))
