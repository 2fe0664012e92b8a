"""One panel of curves: a small diagram of one kind of metric, for the PNG of curves.py and for pages."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sayo_verl.metrics import Metric, Panel
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.runs import Run, Series
from sayo_verl.report.seeds import over_seeds
from sayo_verl.view.figure import COLOURS, GREY, GRID, WARN, inline

BESIDE = "display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.6rem 1.6rem"
WINDOW = 5  # steps of the running mean
SECOND: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (4, 2))}
BAND: dict[str, Any] = {"alpha": 0.16, "linewidth": 0}
_DOTS: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6, "markeredgecolor": "white"}


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and the ``window - 1`` before it, without NaN; NaN if all of them are NaN."""
    means = []
    for end in range(1, len(values) + 1):
        numbers = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(numbers) / len(numbers) if numbers else math.nan)
    return means


def line_of(colour: str, **style: Any) -> Line2D:
    return Line2D([], [], **{"color": colour, "linewidth": 2, "solid_capstyle": "round", **style})


def panel_figure(panel: Panel, runs: Mapping[str, Sequence[Run]], label: str = "training step") -> Figure:
    """One panel as a figure of a page, to be drawn and written under ``view.figure.style()``; ``runs`` as there."""
    figure = Figure(figsize=(4.6, 2.5))
    figure.subplots_adjust(left=0.155, right=0.97, top=0.885, bottom=0.185)
    axis = figure.subplots()
    set_steps(axis, runs)
    draw_panel(axis, panel, runs)
    axis.set_xlabel(label)
    return figure


def set_steps(axis: Axes, runs: Mapping[str, Sequence[Run]]) -> None:
    """Let the horizontal axis hold the steps of all runs."""
    first = min(run.steps[0] for group in runs.values() for run in group)
    last = max(run.steps[-1] for group in runs.values() for run in group)
    pad = max(0.5, 0.02 * (last - first))
    axis.set_xlim(first - pad, last + pad)


def draw_panel(axis: Axes, panel: Panel, runs: Mapping[str, Sequence[Run]]) -> None:
    """Draw curves.

    Args:
        axis: an empty one with its horizontal limits, see ``set_steps``.
        panel: what to draw.
        runs: label -> one run, or several seeds, which are drawn as their mean with its interval. The label of a single
            run is ``""``; its resumed attempts are marked by vertical lines.
    """
    _draw_frame(axis, panel)
    alone = "" in runs
    shade = COLOURS[0] if alone else GREY
    names = [metric.name for metric in panel.every]
    absent = [label for label, seeds in runs.items() if not any(run.training(name) for run in seeds for name in names)]
    kinds: dict[str, Line2D | Patch] = {}
    remarks = []
    for colour, (label, seeds) in zip(COLOURS, runs.items(), strict=False):
        kinds |= _draw_run(axis, panel, seeds, colour, shade, faint=len(runs) - len(absent))
        for run, metric in product(seeds, panel.every):
            if missing := r.nan_count(run.training(metric.name)):
                name = _plain(metric.line) if metric in panel.metrics else metric.label
                of_seed = label if len(seeds) == 1 else f"{label} ({run.path.name})"
                remarks.append(f"{of_seed}, {name}: {missing}" if label else f"{name}: {missing}")
    kinds = dict(sorted(kinds.items(), key=lambda kind: kind[0].startswith("validation")))
    if not kinds:
        axis.text(0.5, 0.5, r.NOT_MEASURED, transform=axis.transAxes, ha="center", va="center", color=GREY)
        axis.set_yticks([])
        return
    for seam in (seam for seeds in runs.values() if alone for run in seeds for seam in run.seams):
        axis.axvline(seam + 0.5, color=GREY, linewidth=0.8, alpha=0.7, linestyle=(0, (6, 3)), zorder=1)
    if absent and panel in c.COMMON.panels:
        remarks.append(f"training: {r.NOT_MEASURED}" if alone else f"{r.NOT_MEASURED}: {', '.join(absent)}")
    elif absent:  # some runs use other methods
        what = "groups" if any(len(seeds) > 1 for seeds in runs.values()) else "runs"
        note = f"{len(runs) - len(absent)} of {len(runs)} {what}"
        axis.set_title(note, loc="right", fontsize=8, color=GREY, pad=7)
    if panel.guide is not None:
        _draw_guide(axis, *panel.guide)
    _draw_text(axis, panel, kinds if kinds.keys() != {"training"} else {}, remarks)


def _draw_frame(axis: Axes, panel: Panel) -> None:
    size = 10 * min(1, 8.5 * _inches(axis) / len(panel.title))  # room for a note on its right
    axis.set_title(panel.title, loc="left", fontsize=size, fontweight="bold", pad=7, parse_math=True)
    axis.set_ylabel(panel.unit)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.ticklabel_format(axis="y", useOffset=False)


def _inches(axis: Axes) -> float:
    figure = axis.get_figure(root=True)
    assert figure is not None
    return float(figure.get_figwidth() * axis.get_position().width)


def _draw_run(
    axis: Axes, panel: Panel, seeds: Sequence[Run], colour: str, shade: str, *, faint: int
) -> dict[str, Line2D | Patch]:
    """Draw one run, or the mean of several seeds; return the legend: name -> handle, in the colour ``shade``."""
    kinds: dict[str, Line2D | Patch] = {}
    for metric, style in zip(panel.metrics, ({}, SECOND), strict=False):
        several = [series for run in seeds if (series := run.training(metric.name))]
        if len(several) == 1:
            _draw_series(axis, several[0], colour, style)
        elif several:
            _draw_seeds(axis, several, colour, style, faint=faint)
        if several:
            kinds[_plain(metric.line)] = line_of(shade, **style)
    if panel.band and _draw_band(axis, seeds, panel.band, colour, faint=faint):
        kinds["smallest to largest"] = Patch(color=shade, **BAND)
    validation = [run.validation_accuracy() if c.ACCURACY in panel.metrics else {} for run in seeds]
    for source in dict.fromkeys(chain(*validation)):
        of_seeds = [one[source] for one in validation if source in one]
        axis.plot(*mean_series(of_seeds), color=colour, clip_on=False, zorder=5, **_DOTS)
        kinds["validation" if len(set(chain(*validation))) == 1 else f"validation {source}"] = line_of(shade, **_DOTS)
    return kinds


def mean_series(seeds: Sequence[Series]) -> tuple[list[int], list[float]]:
    """Steps that all seeds have, and the means of their values; the first seed's NaN stay NaN if it is alone."""
    of_step = [dict(series) for series in seeds]
    steps = [step for step, _ in seeds[0] if all(step in values for values in of_step)]
    return steps, [float(np.mean([values[step] for values in of_step])) for step in steps]


def _draw_seeds(axis: Axes, several: Sequence[Series], colour: str, style: dict[str, Any], *, faint: int) -> None:
    """Draw the mean of the seeds' running means, and its t interval."""
    smooth = [
        list(zip([step for step, _ in one], running_mean([value for _, value in one]), strict=True)) for one in several
    ]
    steps, means = mean_series(smooth)
    of_step = [dict(one) for one in smooth]
    axis.plot(steps, means, color=colour, zorder=4, **({"linewidth": 2} | style), **_dots_alone(means))
    if style:  # one shaded range per panel and group
        return
    ends = [over_seeds([values[step] for values in of_step]) for step in steps]
    low, high = [end.low for end in ends], [end.high for end in ends]
    axis.fill_between(steps, low, high, color=colour, zorder=2, **BAND | {"alpha": max(0.08, BAND["alpha"] / faint)})


def _draw_text(axis: Axes, panel: Panel, kinds: dict[str, Line2D | Patch], remarks: list[str]) -> None:
    """Draw the legend above the curves and the remarks below them, each in free space."""
    per_row = 2 if sum(map(len, kinds)) < 13 * _inches(axis) else 1
    lines = [line for remark in remarks for line in textwrap.wrap(remark, int(17 * _inches(axis)))]
    _set_limits(axis, panel.limits, above=0.16 * math.ceil(len(kinds) / per_row), below=0.09 * len(lines))
    if kinds:
        axis.legend(
            kinds.values(),
            kinds.keys(),
            loc="upper left",
            ncols=per_row,
            labelcolor=GREY,
            handlelength=1.7,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    axis.text(0.02, 0.02, "\n".join(lines), transform=axis.transAxes, va="bottom", fontsize=7.5, color=WARN)


def _draw_series(axis: Axes, series: Series, colour: str, style: dict[str, Any]) -> None:
    steps, values = zip(*series, strict=True)
    if style:
        means = running_mean(values)
        axis.plot(steps, means, color=colour, zorder=3, **style, **_dots_alone(means))
        return
    axis.plot(steps, values, color=colour, linewidth=1, alpha=0.4, **_dots_alone(values))
    axis.plot(steps, running_mean(values), color=colour, linewidth=2, zorder=4, solid_capstyle="round")


def _draw_band(axis: Axes, seeds: Sequence[Run], band: tuple[Metric, Metric], colour: str, *, faint: int) -> bool:
    """Shade between the running means at steps with both ends; return False if there are none."""
    ends = [[run.training(metric.name) for run in seeds if run.training(metric.name)] for metric in band]
    low, high = (dict(zip(*mean_series(end), strict=True)) if end else {} for end in ends)
    steps = [step for step in low if step in high]
    lower, upper = (running_mean([end[step] for step in steps]) for end in (low, high))
    if steps:
        # Bands of several runs overlap.
        axis.fill_between(steps, lower, upper, color=colour, zorder=2, **BAND | {"alpha": BAND["alpha"] / faint})
        for values in (lower, upper):
            axis.plot(steps, values, color=colour, linewidth=1, zorder=3, **_dots_alone(values))
    return bool(steps)


def _dots_alone(values: Sequence[float]) -> dict[str, Any]:
    """Style that marks values between two NaN, which have no line."""
    gap = [True, *map(math.isnan, values), True]
    return {"marker": "o", "markersize": 4, "markevery": [i for i in range(len(values)) if gap[i] and gap[i + 2]]}


def _draw_guide(axis: Axes, level: float, meaning: str) -> None:
    """Draw a dotted line with its meaning at the place with the fewest curve points."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines]
    axis.axhline(level, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    low, high = axis.get_ylim()
    room = 0.15 * (high - low)

    def crowd(right: bool, above: bool) -> float:
        if (high - level if above else level - low) < room:
            return math.inf  # outside of the panel
        ends = [curve[-len(curve) // 2 :] if right else curve[: len(curve) // 2 + 1] for curve in curves]
        middle = level + (room if above else -room) / 2
        return sum(int(np.sum(abs(end - middle) <= room / 2)) for end in ends)

    right, above = min(((r, a) for r in (True, False) for a in (True, False)), key=lambda place: crowd(*place))
    axis.annotate(
        f"{level:g}: {meaning}",
        (1 if right else 0, level),
        xycoords=("axes fraction", "data"),
        xytext=(-1 if right else 4, 2.5 if above else -2.5),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom" if above else "top",
        fontsize=7.5,
        color=GREY,
        zorder=6,
        # not an outline of the text, which an SVG would hold as a drawing
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
    )


def _set_limits(axis: Axes, limits: tuple[float | None, float | None], *, above: float, below: float) -> None:
    """Set the given limits and keep shares of the height free for the legend above and the remarks below."""
    low, high = (now if fixed is None else fixed for fixed, now in zip(limits, axis.get_ylim(), strict=True))
    least = 0.02 * max(abs(low), abs(high))  # a smaller range would show rounding as a curve and need long tick labels
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    margin = 0.03  # a line on the edge stays visible
    ticks = [tick for tick in axis.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    axis.set_yticks(ticks)
    axis.set_ylim(low - (below + margin) * (high - low), high + (above + margin) * (high - low))


def _plain(name: str) -> str:
    """A name without mathematical markup, which pages do not draw."""
    return name.replace("$", "")


def drawn(figures: Iterable[tuple[Any, str]]) -> str:
    """Figures, each with its text for screen readers, beside each other where there is room."""
    return f'<div style="{BESIDE}">' + "".join(inline(figure, label) for figure, label in figures) + "</div>"
