"""A table of the first and last steps of a run, for a terminal or a README."""

import math

from rich.markup import escape
from rich.table import Table

from sayo_verl.metrics import Metric
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.runs import Run, Series

_NONE = "–"  # noqa: RUF001 (a dash in an empty cell)


def first_last_table(run: Run, k: int = 5) -> Table:
    """Means of the first and last ``k`` training steps per metric, and the change, as a rich table.

    Below ``2 k`` steps the two windows shrink so that they do not overlap, and the header shows their size. A window
    with a NaN has no mean. It shows ``NaN (3 of 40)``, counted over the whole run. A NaN outside of the windows is
    shown next to the name. :func:`sayo_verl.report.catalogue.rows_of` selects the metrics.
    """
    header, rows = first_last_cells(run, k)
    table = Table(
        title=escape(", ".join(filter(None, (f"{run.run_id} ({c.estimator_of(run)})", run.resumed())))),
        title_justify="left",
        header_style="bold",
    )
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row, style="dim" if row[1] == r.NOT_MEASURED else None)
    return table


def first_last_markdown(run: Run, k: int = 5) -> str:
    """The table of :func:`first_last_table` in Markdown, padded to be readable as plain text."""
    header, rows = first_last_cells(run, k)
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


def first_last_cells(run: Run, k: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as texts."""
    steps = [step for step in run.steps if step > 0]
    window = _window(len(steps), k)
    plural = "s" if window > 1 else ""
    header = ["metric", f"first {window} step{plural}", f"last {window} step{plural}", "change"]
    return header, [_row(metric, run.training(metric.name), len(steps), k) for metric in c.rows_of(run)]


def _window(points: int, k: int) -> int:
    return max(1, min(k, points // 2))


def _row(metric: Metric, series: Series, steps: int, k: int) -> list[str]:
    if not series:
        return [metric.label, r.NOT_MEASURED, r.NOT_MEASURED, r.NOT_MEASURED]
    # The windows of a metric that is not logged in every step count its own points.
    label = metric.label if len(series) == steps else f"{metric.label} ({len(series)} of {steps} steps)"
    window = _window(len(series), k)
    means = [sum(value for _, value in part) / window for part in (series[:window], series[-window:])]
    missing = r.nan_count(series)
    if missing and not any(map(math.isnan, means)):
        label += f", {missing}"
    cells = [missing if math.isnan(mean) else f"{mean:.{metric.decimals}f}" for mean in means]
    change = means[1] - means[0]
    if len(series) == 1:
        return [label, *cells, _NONE]
    change = round(change, metric.decimals) + 0.0  # -0.0 becomes 0.0
    return [label, *cells, "NaN" if math.isnan(change) else f"{change:+.{metric.decimals}f}"]
