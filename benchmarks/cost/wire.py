"""Bytes that a method adds to TransferQueue: what its request declares, what verl sends itself, and the page's section.

A row has S tokens: P of the prompt, V of them visual, and T of the response.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cost.cells import table
from sayo_verl.methods import METHODS, Mix, Needs
from sayo_verl.probe.statistics import PER_ROW, Statistic

FLOAT = 4  # bytes; indices of neighbours and patches are float32 too
LONG = 8
SMALL = 64  # GPUs of a second run on the page, with as many rows per GPU


class Row(NamedTuple):
    """Lengths in tokens."""

    prompt: int
    visual: int
    response: int


class Fleet(NamedTuple):
    """An assumed run, for the arithmetic of the page."""

    gpus: int = 1024
    prompts: int = 8192
    rollouts: int = 8
    step_seconds: float = 300.0
    row: Row = Row(1280, 1024, 1024)
    # of a visual token of Qwen3-VL: 4 patches, 3 colours, 2 frames, 16 x 16 pixels, float32
    pixel_bytes: int = 4 * 3 * 2 * 16 * 16 * FLOAT


def methods() -> dict[str, Needs]:
    """Every registered method with its defaults, and a mix of two."""
    built: dict[str, Any] = {name: cls() for name, cls in METHODS.items()}
    built["attn_mix [region,dual]"] = Mix((METHODS["attn_region"](), METHODS["attn_dual"]()))
    return {name: method.needs() for name, method in built.items()}


def width(statistic: Statistic, heads: int = 0) -> int:
    """Declared values per response token; 0 for a statistic with one value per visual token.

    Args:
        statistic: of a request.
        heads: query heads of the model, for ``per_head``.
    """
    if statistic.name == "patch_sums":
        return 0
    return heads if statistic.per_head else statistic.size or 1


def declared(needs: Needs, row: Row, heads: int = 0) -> int:
    """Bytes of one row that leave a worker for a method."""
    statistics = needs.statistics.statistics
    tokens = sum(width(statistic, heads) for statistic in statistics) + len(needs.interventions)
    grids = sum(statistic.name == "patch_sums" for statistic in statistics)
    return FLOAT * (tokens * row.response + grids * max(row.visual, 1) + len(PER_ROW))


def verl_tensors(row: Row, pixel_bytes: int) -> dict[str, int]:
    """Bytes of one row in verl's own tensor fields of a GRPO step without a reference policy, by who writes them.

    Not counted: ``raw_prompt`` and other columns of the data, which are pickled.

    Args:
        row: of a family with mRoPE positions, as the agent loop stores it.
        pixel_bytes: of ``pixel_values`` per visual token.
    """
    S, T = row.prompt + row.response, row.response
    tokens = LONG * (row.prompt + 3 * T + S)  # prompts, responses, response_mask, loss_mask, input_ids
    return {
        "token ids, masks": tokens,
        "position_ids": 4 * LONG * S,
        "scores, rollout_log_probs": 2 * FLOAT * T,
        "pixel_values": pixel_bytes * row.visual,
        "log_probs, entropy of the whole sequence": 2 * FLOAT * S,
        "old_log_probs, entropy, advantages, returns": 4 * FLOAT * T,
    }


def section(measured: Mapping[str, Any]) -> list[str]:
    """The section of the page.

    Args:
        measured: of ``benchmarks/wire_bytes.py``: ``method`` -> ``rows``, each with lengths and bytes; empty: not run.
    """
    lines = ["## What travels through TransferQueue", ""]
    if not measured:
        return [*lines, "Not measured. `python benchmarks/wire_bytes.py` does it in a minute on a CPU.\n"]
    lines += [INTRODUCTION]
    rows = [[f"`{name}`", *_cells(entry)] for name, entry in measured.items()]
    lines += table(["method", "statistics", "bytes per response token", "bytes per row", "measured = declared"], rows)
    return [*lines, *_fleet(Fleet())]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    rows = sorted(entry["rows"], key=lambda row: row["response"])
    first, last = rows[0], rows[-1]
    slope = (last["bytes"] - first["bytes"]) / (last["response"] - first["response"])
    fixed = first["bytes"] - slope * first["response"]
    exact = all(row["bytes"] == row["declared"] for row in rows)
    return [", ".join(entry["statistics"]), f"{slope:g}", f"{fixed:g}", f"{'yes' if exact else 'NO'}, {len(rows)} rows"]


def _fleet(fleet: Fleet) -> list[str]:
    row, rows = fleet.row, fleet.prompts * fleet.rollouts
    own = verl_tensors(row, fleet.pixel_bytes)
    total = sum(own.values())
    lines = [
        f"At {fleet.gpus:,} GPUs, an assumed run: {fleet.prompts:,} prompts x {fleet.rollouts} = {rows:,} rows a step, "
        f"{row.prompt:,} prompt tokens ({row.visual:,} visual) and\n{row.response:,} response tokens each, a step of "
        f"{fleet.step_seconds:g} s. verl's own tensors of one such row, written once:",
        "",
        *table(["fields", "bytes per row", "share"], _shares(own, total)),
        "Token ids and masks are 8 bytes x (prompt + 3 x response + both together), position_ids 4 x 8 bytes a token.",
        f"All in all {total:,} bytes a row, x {rows:,} rows = {_gb(total * rows)} a step.",
        "",
        *table(
            [
                "method",
                "bytes per row",
                f"x {rows:,} rows",
                "per second of the step",
                "share of verl's",
                "without pixels",
                f"{SMALL} GPUs: x {rows * SMALL // fleet.gpus:,} rows",
                "per second",
            ],
            [_fleet_row(name, needs, fleet, total, own["pixel_values"]) for name, needs in methods().items()],
        ),
    ]
    return [*lines, READS.format(gb=_gb(total * rows))]


def _shares(own: Mapping[str, int], total: int) -> list[list[str]]:
    return [[name, f"{value:,}", f"{100 * value / total:.2f} %"] for name, value in own.items()]


def _fleet_row(name: str, needs: Needs, fleet: Fleet, total: int, pixels: int) -> Sequence[str]:
    one, rows = declared(needs, fleet.row), fleet.prompts * fleet.rollouts
    shares = [f"{100 * one / of:.3f} %" for of in (total, total - pixels)]
    large, small = (
        [f"{step / 1e9:.2f} GB", f"{step / fleet.step_seconds / 1e6:.2f} MB"]
        for step in (one * rows, one * rows * SMALL // fleet.gpus)
    )
    return [f"`{name}`", f"{one:,}", *large, *shares, *small]


def _gb(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"


INTRODUCTION = """\
Written by `python benchmarks/wire_bytes.py`: a real training worker of verl on a CPU, a tiny random Qwen3-VL, rows of
four lengths. Counted are the tensors that a worker returns for a method, beside verl's own. Values are float32. They
exist for response tokens only, so neither the prompt nor its visual tokens add to them. Half the size would cost
accuracy: it rounds a mass of 0.1 by up to 2e-4 in bfloat16 and 3e-5 in float16, and the probe is within 1e-6 of
float64. Each row also has three numbers (12 bytes): its visual tokens, its region's, and the probe's time.
`patch_sums`, which no method requests, has one value per visual token instead. `attn_faithful` and
`attn_evidence` also return the log-probs of their passes with a changed image.
"""
READS = """\
That is what is written. A worker that runs a pass reads all fields of its rows. So the values are read once by the
trainer and once in each later pass of workers (reference, critic, update). A pass with a changed image, of which
`attn_faithful` has one and `attn_evidence` four, is such a pass too. Each reads verl's tensors once more: {gb} a step,
most of it pixel values.
"""
