"""The first and the last steps of a run side by side, for a terminal or a README."""

import math
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from sayo_verl.report import runs as r
from sayo_verl.report.runs import Run, Series

_NONE = "–"  # noqa: RUF001 (a dash in an empty cell)


@dataclass(frozen=True)
class _Row:
    label: str
    name: str
    decimals: int = 3


_ROWS = (
    _Row("reward", r.REWARD),
    _Row("region reward r_v", r.REGION_REWARD),
    _Row("target attention R_a, high-entropy tokens", r.TARGET_ATTENTION),
    _Row("target attention R_a, all tokens", r.TARGET_ATTENTION_ALL),
    _Row("accuracy", r.ACCURACY),
    _Row("format", r.FORMAT),
    _Row("attention mass on the image", r.IMAGE_MASS),
    _Row("entropy (nats per token)", r.ENTROPY),
    _Row("response length (tokens)", r.RESPONSE_LENGTH, 1),
    _Row("probe's share of the log-prob pass", r.PROBE_SHARE),
    _Row("share of rows with a region", r.REGION_ROWS),
)


def first_last_table(run: Run, k: int = 5) -> Table:
    """Mean of the first ``k`` and of the last ``k`` training steps per metric, and the change, as a rich table.

    Below ``2 k`` steps the two windows shrink so that they do not overlap, and the header says so. A window with a NaN
    has no mean: it reads ``NaN (3 of 40)``, counted over the whole run; a NaN elsewhere is told beside the name.
    """
    header, rows = _cells(run, k)
    table = Table(title=escape(f"{run.run_id} ({run.estimator})"), title_justify="left", header_style="bold")
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row, style="dim" if row[1] == r.NOT_MEASURED else None)
    return table


def first_last_markdown(run: Run, k: int = 5) -> str:
    """The table of :func:`first_last_table` in Markdown, padded so that it also reads as plain text."""
    header, rows = _cells(run, k)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [_markdown(header, widths)]
    lines.append("|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|")
    lines += [_markdown(row, widths) for row in rows]
    return "\n".join(lines) + "\n"


def _markdown(row: list[str], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"


def _cells(run: Run, k: int) -> tuple[list[str], list[list[str]]]:
    steps = [step for step in run.steps if step > 0]
    window = _window(len(steps), k)
    plural = "s" if window > 1 else ""
    header = ["metric", f"first {window} step{plural}", f"last {window} step{plural}", "change"]
    return header, [_row(row, run.training(row.name), len(steps), k) for row in _ROWS]


def _window(points: int, k: int) -> int:
    return max(1, min(k, points // 2))


def _row(row: _Row, series: Series, steps: int, k: int) -> list[str]:
    if not series:
        return [row.label, r.NOT_MEASURED, r.NOT_MEASURED, r.NOT_MEASURED]
    # A metric that is not logged in every step has windows of its own points.
    label = row.label if len(series) == steps else f"{row.label} ({len(series)} of {steps} steps)"
    window = _window(len(series), k)
    means = [sum(value for _, value in part) / window for part in (series[:window], series[-window:])]
    missing = r.nan_count(series)
    if missing and not any(map(math.isnan, means)):
        label += f", {missing}"
    cells = [missing if math.isnan(mean) else f"{mean:.{row.decimals}f}" for mean in means]
    change = means[1] - means[0]
    if len(series) == 1:
        return [label, *cells, _NONE]
    return [label, *cells, "NaN" if math.isnan(change) else f"{change:+.{row.decimals}f}"]
