"""Training curves as a PNG, with one panel per kind of metric and one colour per run."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from sayo_verl.errors import SayoError
from sayo_verl.metrics import Metric, Panel
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.runs import Run, Series

WINDOW = 5  # steps of the running mean
_INK, _GREY, _FAINT, _WARN = "#1f2328", "#59636e", "#d1d9e0", "#9a3412"
# Okabe and Ito's colours, which readers with any colour vision can distinguish. The order gives two runs most contrast.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# DejaVu Sans comes with matplotlib, so figures look the same everywhere.
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": _GREY,
    "axes.labelsize": 8.5,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _GREY,
    "ytick.labelcolor": _GREY,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": _INK,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
_SECOND: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (4, 2))}
_BAND: dict[str, Any] = {"alpha": 0.16, "linewidth": 0}
_WIDTH, _AXES_HEIGHT, _GAP = 10, 1.8, 0.66  # inches
_DOTS: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6, "markeredgecolor": "white"}


def plot_run(run: Run, out_png: Path | str) -> Path:
    """Draw one run with its id, estimator and steps in the title; return the written file (2000 px wide)."""
    # A run without run.json is identified by its folder.
    run_id = f"run unknown, folder {run.path.resolve().name}" if run.run_id == r.UNKNOWN else run.run_id
    return _plot({"": run}, f"{run_id}  ·  {c.estimator_of(run)}  ·  {_steps(run)}", Path(out_png))


def plot_runs(runs: dict[str, Run], out_png: Path | str) -> Path:
    """Draw several runs in the same panels, one colour per label; return the written file (2000 px wide).

    Raises:
        SayoError: R05 for no run, or for more runs than colours (seven).
    """
    if not 1 <= len(runs) <= len(_COLOURS):
        raise SayoError(
            "R05",
            "a figure cannot show this number of runs",
            where="plot_runs",
            got=len(runs),
            wanted=f"1 to {len(_COLOURS)}",
            fix="draw fewer runs at once",
        )
    return _plot(runs, f"{len(runs)} run{'s' if len(runs) > 1 else ''}", Path(out_png))


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and the ``window - 1`` before it, without NaN; NaN if all of them are NaN."""
    means = []
    for end in range(1, len(values) + 1):
        numbers = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(numbers) / len(numbers) if numbers else math.nan)
    return means


def _steps(run: Run) -> str:
    last = run.steps[-1]
    if run.total_steps not in (None, last):
        return f"{last} of {run.total_steps} steps"
    return f"{last} step" if last == 1 else f"{last} steps"


def _plot(runs: dict[str, Run], title: str, out_png: Path) -> Path:
    """Draw all panels; the label of a single run is ``""``."""
    panels = c.panels_of(list(runs.values()))
    columns = 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        labels = (
            [] if "" in runs else [f"{label}  ({c.estimator_of(run)}, {_steps(run)})" for label, run in runs.items()]
        )
        per_row = max(1, min(3, 150 // (8 + max(map(len, labels), default=0))))  # 150 characters fit in the width
        header = 0.78 + 0.2 * math.ceil(len(labels) / per_row)  # inches
        height = header + rows * _AXES_HEIGHT + (rows - 1) * _GAP + 0.5
        figure = Figure(figsize=(_WIDTH, height), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns).flat)
        figure.subplots_adjust(
            left=0.08,
            right=0.985,
            bottom=0.5 / height,
            top=1 - header / height,
            wspace=0.19 if columns == 2 else 0.32,
            hspace=_GAP / _AXES_HEIGHT,
        )
        first = min(run.steps[0] for run in runs.values())
        last = max(run.steps[-1] for run in runs.values())
        pad = max(0.5, 0.02 * (last - first))
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
            _draw_panel(axis, panel, runs)
            axis.set_xlim(first - pad, last + pad)
            if place + columns >= len(panels):  # lowest panel of its column
                axis.set_xlabel("training step")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.align_ylabels()
        _draw_header(figure, title, labels, per_row, 1 - 0.27 / height, 1 - 0.46 / height)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        # Without matplotlib's version in the file, the same run gives the same bytes.
        figure.savefig(out_png, metadata={"Software": None})
    return out_png


def _draw_header(figure: Figure, title: str, labels: list[str], per_row: int, title_y: float, labels_y: float) -> None:
    """Draw the title, the legend of faint and bold lines on its right, and the legend of runs below it."""
    figure.text(0.012, title_y, title, fontsize=13 * min(1, 64 / len(title)), fontweight="bold", va="center_baseline")
    shade = _GREY if labels else _COLOURS[0]
    key = {"each step": _line(shade, alpha=0.4, linewidth=1), f"mean of the last {WINDOW} steps": _line(shade)}
    style: dict[str, Any] = {"labelcolor": _GREY, "handlelength": 1.6, "columnspacing": 1.6, "borderaxespad": 0}
    figure.legend(key.values(), key.keys(), loc="center right", bbox_to_anchor=(0.988, title_y), ncols=2, **style)
    if labels:
        lines = [_line(colour) for colour in _COLOURS[: len(labels)]]
        figure.legend(lines, labels, loc="upper left", bbox_to_anchor=(0.006, labels_y), ncols=per_row, **style)


def _line(colour: str, **style: Any) -> Line2D:
    return Line2D([], [], **{"color": colour, "linewidth": 2, "solid_capstyle": "round", **style})


def _draw_panel(axis: Axes, panel: Panel, runs: dict[str, Run]) -> None:
    _draw_frame(axis, panel)
    shade = _COLOURS[0] if "" in runs else _GREY
    absent = [label for label, run in runs.items() if not any(run.training(metric.name) for metric in panel.every)]
    kinds: dict[str, Line2D | Patch] = {}
    remarks = []
    for colour, (label, run) in zip(_COLOURS, runs.items(), strict=False):
        kinds |= _draw_run(axis, panel, run, colour, shade, faint=len(runs) - len(absent))
        for metric in panel.every:
            if missing := r.nan_count(run.training(metric.name)):
                name = metric.line if metric in panel.metrics else metric.label
                remarks.append(f"{label}, {name}: {missing}" if label else f"{name}: {missing}")
    kinds = dict(sorted(kinds.items(), key=lambda kind: kind[0].startswith("validation")))
    if not kinds:
        axis.text(0.5, 0.5, r.NOT_MEASURED, transform=axis.transAxes, ha="center", va="center", color=_GREY)
        axis.set_yticks([])
        return
    if absent and panel in c.COMMON.panels:
        remarks.append(f"training: {r.NOT_MEASURED}" if "" in runs else f"{r.NOT_MEASURED}: {', '.join(absent)}")
    elif absent:  # some runs use other methods
        note = f"{len(runs) - len(absent)} of {len(runs)} runs"
        axis.set_title(note, loc="right", fontsize=8, color=_GREY, pad=7)
    if panel.guide is not None:
        _draw_guide(axis, *panel.guide)
    _draw_text(axis, panel, kinds if kinds.keys() != {"training"} else {}, remarks)


def _draw_frame(axis: Axes, panel: Panel) -> None:
    size = 10 * min(1, 8.5 * _inches(axis) / len(panel.title))  # room for a note on its right
    axis.set_title(panel.title, loc="left", fontsize=size, fontweight="bold", pad=7)
    axis.set_ylabel(panel.unit)
    axis.grid(axis="y", color="#eef0f2", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.ticklabel_format(axis="y", useOffset=False)


def _inches(axis: Axes) -> float:
    return _WIDTH * axis.get_position().width


def _draw_run(axis: Axes, panel: Panel, run: Run, colour: str, shade: str, *, faint: int) -> dict[str, Line2D | Patch]:
    """Draw one run and return its legend: name -> handle, in the colour ``shade``."""
    kinds: dict[str, Line2D | Patch] = {}
    for metric, style in zip(panel.metrics, ({}, _SECOND), strict=False):
        if series := run.training(metric.name):
            _draw_series(axis, series, colour, style)
            kinds[metric.line] = _line(shade, **style)
    if panel.band and _draw_band(axis, run, panel.band, colour, faint=faint):
        kinds["smallest to largest"] = Patch(color=shade, **_BAND)
    validation = run.validation_accuracy() if c.ACCURACY in panel.metrics else {}
    for source, pairs in validation.items():
        axis.plot(*zip(*pairs, strict=True), color=colour, clip_on=False, zorder=5, **_DOTS)
        kinds["validation" if len(validation) == 1 else f"validation {source}"] = _line(shade, **_DOTS)
    return kinds


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
            labelcolor=_GREY,
            handlelength=1.7,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    axis.text(0.02, 0.02, "\n".join(lines), transform=axis.transAxes, va="bottom", fontsize=7.5, color=_WARN)


def _draw_series(axis: Axes, series: Series, colour: str, style: dict[str, Any]) -> None:
    steps, values = zip(*series, strict=True)
    if style:
        means = running_mean(values)
        axis.plot(steps, means, color=colour, zorder=3, **style, **_dots_alone(means))
        return
    axis.plot(steps, values, color=colour, linewidth=1, alpha=0.4, **_dots_alone(values))
    axis.plot(steps, running_mean(values), color=colour, linewidth=2, zorder=4, solid_capstyle="round")


def _draw_band(axis: Axes, run: Run, band: tuple[Metric, Metric], colour: str, *, faint: int) -> bool:
    """Shade between the running means at steps with both ends; return False if there are none."""
    low, high = (dict(run.training(metric.name)) for metric in band)
    steps = [step for step in low if step in high]
    lower, upper = (running_mean([end[step] for step in steps]) for end in (low, high))
    if steps:
        # Bands of several runs overlap.
        axis.fill_between(steps, lower, upper, color=colour, zorder=2, **_BAND | {"alpha": _BAND["alpha"] / faint})
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
    axis.axhline(level, color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
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
        color=_GREY,
        zorder=6,
        path_effects=[withStroke(linewidth=2, foreground="white")],
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
