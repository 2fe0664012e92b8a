"""Training curves as a PNG: one small panel per metric, one colour per run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from sayo_verl.errors import SayoError
from sayo_verl.report import runs as r
from sayo_verl.report.runs import Run, Series

WINDOW = 5  # steps of the running mean
_INK, _GREY, _FAINT, _WARN = "#1f2328", "#59636e", "#d1d9e0", "#9a3412"
# Okabe and Ito: told apart by readers with any colour vision; ordered so that two runs contrast most.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# DejaVu Sans comes with matplotlib, so a figure looks alike everywhere.
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
_DOTS: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6, "markeredgecolor": "white"}


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    name: str
    line: str = "training"  # what the line is called where the panel holds another kind too
    second: str | None = None  # the same over all response tokens: a thinner dashed line
    guide: float | None = None  # the value that means 'no preference'
    limits: tuple[float | None, float | None] = (None, None)


_PANELS = (
    _Panel("Total reward", "mean per response", r.REWARD),
    _Panel("Region reward $r_v$", "mean, from -1 to 1", r.REGION_REWARD, guide=0.0),
    _Panel(
        "Target attention $R_a$",
        "mean, from 0 to 1",
        r.TARGET_ATTENTION,
        line="high-entropy tokens",
        second=r.TARGET_ATTENTION_ALL,
        guide=0.5,
    ),
    _Panel("Accuracy", "share of answers", r.ACCURACY, limits=(0, 1)),
    _Panel("Entropy", "nats per token", r.ENTROPY, limits=(0, None)),
    _Panel("Response length", "tokens", r.RESPONSE_LENGTH),
)


def plot_run(run: Run, out_png: Path | str) -> Path:
    """Draw one run, its id, estimator and steps in the title; returns the file written (2000 px wide)."""
    estimator = "estimator unknown" if run.estimator == r.UNKNOWN else run.estimator
    # A run without run.json still has a folder to be recognised by.
    run_id = f"run unknown, folder {run.path.resolve().name}" if run.run_id == r.UNKNOWN else run.run_id
    return _plot({"": run}, f"{run_id}  ·  {estimator}  ·  {_steps(run)}", Path(out_png))


def plot_runs(runs: dict[str, Run], out_png: Path | str) -> Path:
    """Draw runs over one another, one colour per label; returns the file written (2000 px wide).

    Raises:
        SayoError: R05 for no run, or for more runs than can be told apart (seven).
    """
    if not 1 <= len(runs) <= len(_COLOURS):
        raise SayoError(
            "R05",
            "this many runs do not fit one figure",
            where="plot_runs",
            got=len(runs),
            wanted=f"1 to {len(_COLOURS)}",
            fix="draw fewer runs at once",
        )
    return _plot(runs, f"{len(runs)} run{'s' if len(runs) > 1 else ''}", Path(out_png))


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and the ``window - 1`` before it, over those that are numbers; NaN where none is."""
    means = []
    for end in range(1, len(values) + 1):
        numbers = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(numbers) / len(numbers) if numbers else math.nan)
    return means


def _steps(run: Run) -> str:
    last = run.steps[-1]
    return f"{last} of {run.total_steps} steps" if run.total_steps not in (None, last) else f"{last} steps"


def _plot(runs: dict[str, Run], title: str, out_png: Path) -> Path:
    """Draw all panels; the one run of a figure of its own has the label ``""``."""
    with matplotlib.rc_context(_STYLE):
        labels = [] if "" in runs else [f"{label}  ({run.estimator}, {_steps(run)})" for label, run in runs.items()]
        per_row = max(1, min(3, 150 // (8 + max(map(len, labels), default=0))))  # 150 characters fit in the width
        header = 0.78 + 0.2 * math.ceil(len(labels) / per_row)  # inches
        height = 4.9 + header
        figure = Figure(figsize=(10, height), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3).flat
        figure.subplots_adjust(
            left=0.064, right=0.985, bottom=0.5 / height, top=1 - header / height, wspace=0.27, hspace=0.42
        )
        first = min(run.steps[0] for run in runs.values())
        last = max(run.steps[-1] for run in runs.values())
        pad = max(0.5, 0.02 * (last - first))
        for axis, panel in zip(axes, _PANELS, strict=True):
            _draw_panel(axis, panel, runs)
            axis.set_xlim(first - pad, last + pad)
        figure.align_ylabels()
        _draw_header(figure, title, labels, per_row, 1 - 0.27 / height, 1 - 0.46 / height)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        # Without matplotlib's version in it, the same run gives the same bytes.
        figure.savefig(out_png, metadata={"Software": None})
    return out_png


def _draw_header(figure: Figure, title: str, labels: list[str], per_row: int, title_y: float, labels_y: float) -> None:
    """The title, on its right what faint and bold lines are, and below it which colour is which run."""
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


def _draw_panel(axis: Axes, panel: _Panel, runs: dict[str, Run]) -> None:
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=7)
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("training step")
    axis.grid(axis="y", color="#eef0f2", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    shade = _COLOURS[0] if "" in runs else _GREY
    kinds: dict[str, Line2D] = {}
    remarks = []
    for colour, (label, run) in zip(_COLOURS, runs.items(), strict=False):
        series = run.training(panel.name)
        if series:
            _draw_series(axis, series, colour)
            kinds[panel.line] = _line(shade)
        second = run.training(panel.second) if panel.second else []
        if second:
            _draw_series(axis, second, colour, secondary=True)
            kinds["all tokens"] = _line(shade, **_SECOND)
        validation = run.validation_accuracy() if panel.name == r.ACCURACY else {}
        for source, pairs in validation.items():
            axis.plot(*zip(*pairs, strict=True), color=colour, clip_on=False, zorder=5, **_DOTS)
            kinds["validation" if len(validation) == 1 else f"validation {source}"] = _line(shade, **_DOTS)
        remarks += [] if series else [f"{label or panel.line}: {r.NOT_MEASURED}"]
        for kind, pairs in ((panel.line, series), ("all tokens", second)):
            if missing := r.nan_count(pairs):
                remarks.append(f"{label}, {kind}: {missing}" if label else f"{kind}: {missing}")
    if not kinds:
        axis.text(0.5, 0.5, r.NOT_MEASURED, transform=axis.transAxes, ha="center", va="center", color=_GREY)
        axis.set_yticks([])
        return
    if panel.guide is not None:
        _draw_guide(axis, panel.guide)
    legend = kinds if kinds.keys() != {panel.line} else {}
    _set_limits(axis, panel.limits, above=0.16 * math.ceil(len(legend) / 2), below=0.09 * len(remarks))
    if legend:
        axis.legend(
            legend.values(),
            legend.keys(),
            loc="upper left",
            ncols=2,
            labelcolor=_GREY,
            handlelength=1.7,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    axis.text(0.02, 0.02, "\n".join(remarks), transform=axis.transAxes, va="bottom", fontsize=7.5, color=_WARN)


def _draw_series(axis: Axes, series: Series, colour: str, *, secondary: bool = False) -> None:
    steps, values = zip(*series, strict=True)
    if secondary:
        axis.plot(steps, running_mean(values), color=colour, zorder=3, **_SECOND)
        return
    # A value between two NaN has no line to show it.
    alone = [
        i for i, v in enumerate(values) if all(math.isnan(w) for w in values[max(0, i - 1) : i] + values[i + 1 : i + 2])
    ]
    axis.plot(steps, values, color=colour, linewidth=1, alpha=0.4, marker="o", markersize=4, markevery=alone)
    axis.plot(steps, running_mean(values), color=colour, linewidth=2, zorder=4, solid_capstyle="round")


def _draw_guide(axis: Axes, level: float) -> None:
    axis.axhline(level, color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axis.annotate(
        f"{level:g}: no preference",
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-1, 2.5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7.5,
        color=_GREY,
        zorder=6,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )


def _set_limits(axis: Axes, limits: tuple[float | None, float | None], *, above: float, below: float) -> None:
    """Fix the ends that are given and keep shares of the height free for the legend above, the remarks below."""
    low, high = (now if fixed is None else fixed for fixed, now in zip(limits, axis.get_ylim(), strict=True))
    hair = 0.03  # a line on the edge stays whole
    ticks = [tick for tick in axis.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    axis.set_yticks(ticks)
    axis.set_ylim(low - (below + hair) * (high - low), high + (above + hair) * (high - low))
