"""The page from the raw numbers; every figure on it is computed here, from a file or from ``cost.shapes``."""

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
from cost.forecast import IN_TURN, SHAPE, arithmetic, forecast_cell, in_turn_limit, size
from cost.shapes import REAL, REAL_LENGTHS, TINY
from cost.wire import section

Raw = Mapping[str, Mapping[str, Entry]]
ONE_LAYER, ALL_LAYERS = 0.1, 3.0  # the target, per cent of the pass

HEAD = """\
Written by `benchmarks/probe_cost.py` from `benchmarks/results/*.json`. `benchmarks/on_gpu.py` measures a card in a
quarter of an hour and writes a file for that folder. See the `--help` of both.

All costs are compared with the pass that contains the probe: verl's old-log-prob pass over one packed micro-batch,
without gradient, with `lm_head`, log-softmax and entropy of every token. Weights are random, which does not change the
cost. The measured passes have no vision tower. This makes the pass shorter and every ratio here larger than in
training.
"""
SELF_CHECK = "**SELF-CHECK: these models are too small for a measurement. Ignore the figures.**\n"
TARGET = """\
{name}, bfloat16, one H100 (an H200 computes as fast), the fast path (Triton), added to the old-log-prob pass.
The forecast covers the four sizes below. It is for a kernel whose exponentials wait for its products. The card's rates
limit such a kernel to {limit:.0f} T operations a second (the column "in turn" of the next section). No kernel reaches
its limit, so the forecast uses {slow:.0f} to {fast:.0f} T, and its shares are larger than those at the limit.
"""
FORECAST = """\
By this forecast the kernel misses the target. At {size} tokens, relative to a pass with the vision tower:

- one layer takes {one}, {layers} layers {all};
- with a given log-sum-exp, one layer takes {one_given}, {layers} layers {all_given}.
"""
FIGURES = """\
From the other stages of `benchmarks/on_gpu.py`. Weights are random. The list below the table names the other
replacements. The lines of the report are in `benchmarks/results/cuda_report.jsonl`. The card: {cards}.
"""
NOT_RUN = "Not run, because there was no card. `python benchmarks/on_gpu.py` measures it in a quarter of an hour.\n"
TIME = """\
"/ pass" is the ratio to the plain pass of the same round: median (minimum to maximum) of {rounds} rounds, of {slow} for
eager attention. "Alone" is the whole probe for one layer without a pass, in the same rounds. It plans on the host, once
per micro-batch, then reads the layer, then lays out the results. On a GPU "alone" is an upper bound, because in a pass
the host works while the device computes, and only reading the layer takes time of the device. The floor of a kernel is
the larger of two times: its operations at the measured rate of a matrix product, its bytes at the rate of a copy.
"""
MEMORY = """\
Peak of the plain pass above the memory in use at its start (weights, batch), the difference of each variant, and the
peaks of the probe's parts without a pass. Most of a pass's peak is logits, which hide the memory of a single layer.
"""
GROWTH = """\
Time and peak memory of one layer and one sequence, with random queries and keys. The exponents are least-squares slopes
of logarithms over {tokens}x the tokens and {pairs}x the pairs: of time against pairs (response rows x mean number of
causal keys), of memory against tokens. An exponent of 1 is linear. A chunk is the number of query rows that the
reference path handles at once. If it is longer than the response, memory grows with the response too.
"""
LIMITS = """\
## Limits

- CPU figures are those of the reference path (plain torch, float32) on one thread. They show the growth of the cost and
  a comparison with eager attention on the same processor. They do not forecast a GPU, which uses another path, and on
  which products are cheap compared with exponentials, memory traffic, launches and work on the host.
- The small model has heads of 64 dimensions and the real one of 128, so the small one computes twice the exponentials
  for the same products.
- A whole pass varies by a per cent or more from round to round, as "the same pass again" shows. A ratio of passes can
  therefore be below 1. The cost of one layer is "alone" on a CPU and "reading the layer" on a GPU.
- The pass runs in one process. Gathering sharded weights would make the pass longer, but not the probe.
- Eager attention runs sequence by sequence here. Over a whole packed row its cost would be the square of that row.
- Log-softmax and entropy are verl's formulas over 2,048 tokens at once, without its loop over rows and without
  flash-attn's kernel.
"""


def write_page(path: Path, raw: Raw) -> None:
    """Write the page.

    Args:
        path: the output file.
        raw: ``cases``, ``scaling`` and ``failures`` of all devices and ``wire``, see ``cost.store``.
    """
    tiny = {shape.name for shape in TINY}
    self_check = [SELF_CHECK] if any(case["shape"]["name"] in tiny for case in raw["cases"].values()) else []
    lines = ["# What the probe costs", "", *self_check, HEAD, *_target(raw), *arithmetic(), "## On a GPU", ""]
    models = [shape.name for shape in REAL] if not self_check else sorted(tiny)
    run = [model for model in models if _cases(raw, "card", model) or _failures(raw, "card", model)]
    for model in run:
        lines += [f"### {model}", "", *_part(raw, "card", model)]
    lines += [*_figures(raw), *(f"{model}: not run.\n" for model in models if model not in run)] if run else [NOT_RUN]
    lines += ["## On a CPU", "", *_part(raw, "cpu", None), *section(raw.get("wire", {})), LIMITS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _target(raw: Raw) -> list[str]:
    cases = _cases(raw, "card", SHAPE.name)
    one = [100 * statistics.median(found) for c in cases if (found := ratios(c, "read fast"))]
    whole = [100 * statistics.median(found) - 100 for c in cases if (found := ratios(c, f"probe fast {SHAPE.layers}"))]
    series = raw["scaling"].get(f"card: {SHAPE.name}")
    grows = None if series is None else exponent(series, "fast", "memory")
    forecasts = [
        [forecast_cell(REAL_LENGTHS, layers, digits, lse_given=False, vision=vision) for vision in (True, False)]
        for layers, digits in ((1, 3), (SHAPE.layers, 1))
    ]
    linear = "linear, some numbers per response token and head"
    rows = [
        ["one layer", f"at most {ONE_LAYER:g} %", *forecasts[0], _verdict(one, ONE_LAYER)],
        [f"all {SHAPE.layers} layers", f"at most {ALL_LAYERS:g} %", *forecasts[1], _verdict(whole, ALL_LAYERS)],
        ["memory", "linear in tokens", linear, "", MISSING if grows is None else f"exponent {grows:.2f} over tokens"],
    ]
    longest = REAL_LENGTHS[-1:]
    shares = {
        name + given: forecast_cell(longest, layers, digits, lse_given=bool(given), vision=True)
        for name, layers, digits in (("one", 1, 3), ("all", SHAPE.layers, 1))
        for given in ("", "_given")
    }
    rates = {"slow": IN_TURN[0] / 1e12, "fast": IN_TURN[1] / 1e12, "limit": in_turn_limit() / 1e12}
    forecast = ["forecast, pass with vision tower", "forecast, text model only"]
    header = ["", "target", *forecast, "measured, text model only"]
    return [
        "## Target",
        "",
        TARGET.format(name=SHAPE.name, **rates),
        *table(header, rows),
        FORECAST.format(size=size(longest[0]), layers=SHAPE.layers, **shares),
    ]


def _verdict(values: Sequence[float], target: float) -> str:
    if not values:
        return MISSING
    return f"{span(values, '%', 3)}: {'met' if max(values) <= target else 'missed'}"


def _part(raw: Raw, part: str, model: str | None) -> list[str]:
    """All measurements of one model (None: all models) in one part, or a line that there are none."""
    cases = _cases(raw, part, model)
    failed = _failures(raw, part, model)
    if not cases:
        return [*failed, f"{MISSING.capitalize()}.\n"]
    name = cases[0]["shape"]["name"]
    series = raw["scaling"].get(f"{part}: {name}")
    lines = [*failed, *_about(cases), *_times(cases, series), *_memory(cases)]
    return lines if series is None else [*lines, *_growth(name, series)]


def _failures(raw: Raw, part: str, model: str | None) -> list[str]:
    return [
        f"The last run failed ({entry['date']}): `{entry['error']}`\n"
        for key, entry in raw["failures"].items()
        if key.startswith(part) and (model is None or model in key)
    ]


def _figures(raw: Raw) -> list[str]:
    """Figures of the stages of ``on_gpu.py`` other than the passes."""
    found = [entry for entry in raw.get("figures", {}).values() if "tiny" not in entry["stood_in"]]
    if not found:
        return []
    rows = [[x["stage"], x["what"], x["value"]] for x in found]
    replaced: dict[str, list[str]] = {}
    for x in found:
        replacements = "; ".join(f"{k}: {v}" for k, v in x["stood_in"].items() if k != "weights")
        stages = replaced.setdefault(replacements, []) if replacements else []
        stages += [x["stage"]] * (x["stage"] not in stages)
    cards = ", ".join(sorted({x["card"] for x in found}))
    return [
        "### Other figures",
        "",
        FIGURES.format(cards=cards),
        *table(["stage", "what", "measured"], rows),
        *(f"- {', '.join(stages)}: {replacements}" for replacements, stages in replaced.items()),
        "",
    ]


def _about(cases: Sequence[Entry]) -> list[str]:
    """Machine, versions and model of the cases."""
    shape, lines = cases[0]["shape"], []
    for case in cases:
        m = case["machine"]
        if m["device"] == "cuda":
            where = f"{m['name']} ({m['memory'] / 2**30:.0f} GiB), CUDA {m['cuda']}, Triton {m['triton']}"
        else:
            where = f"{m['name']}, {m['cores']} cores, {m['threads']} thread used, process CPU time"
        versions = f"torch {m['torch']}, transformers {m['transformers']}"
        lines.append(f"{where}, {versions}, {case['dtype']}, {m['date']}. Attention of the pass: {m['attention']}.\n")
        lines += [case["note"] + "\n"] if "note" in case else []
    largest, which = max(((v, name) for case in cases for name, v in case["agreement"].items()), default=(0.0, "none"))
    return [
        *dict.fromkeys(lines),
        f"{shape['name']}: {shape['layers']} layers, hidden size {shape['hidden']}, {shape['heads']} query heads on "
        f"{shape['kv_heads']} key heads of {shape['head_dim']} dimensions, FFN {shape['ffn']}, vocabulary "
        f"{shape['vocabulary']}. Largest difference of an attention mass between two ways to compute it, on the "
        f"timed batches: {largest:.1e} ({which.split(',')[0]}).\n",
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
        rows.append([f"no pass: {title.removesuffix(' / pass')}", *(size_cell(c["memory"], name) for c in cases)])
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
    """Names and titles of the whole passes of any case, except the plain one."""
    n = cases[0]["shape"]["layers"]
    titles = {"pass again": "the same pass again / pass"}
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
    return _measured(cases, titles)


def _shares(cases: Sequence[Entry]) -> list[tuple[str, str]]:
    parts = {"alone": "probe alone, 1 layer", "plan": "of it planning", "read": "of it reading the layer"}
    titles = {
        f"{part} {path}": f"{title}, {path} path / pass" for path in cases[0]["paths"] for part, title in parts.items()
    }
    return _measured(cases, titles)


def _kernels(cases: Sequence[Entry]) -> list[tuple[str, str]]:
    parts = [(part, path) for path in cases[0]["paths"] for part in ("masses", "profile")]
    return _measured(cases, {f"{part} {path}": f"{part} kernel of the {path} path" for part, path in parts})


def _measured(cases: Sequence[Entry], titles: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and titles that occur in any case."""
    return [(name, title) for name, title in titles.items() if any(name in case["times"] for case in cases)]


def _cases(raw: Raw, part: str, model: str | None) -> list[Entry]:
    found = [c for c in raw["cases"].values() if c["part"] == part and model in (None, c["shape"]["name"])]
    return sorted(found, key=lambda c: (c["image_tokens"], c["lengths"]["response"]))
