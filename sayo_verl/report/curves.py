"""Training curves as a PNG, with one panel per kind of metric and one colour per run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sayo_verl.errors import SayoError
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.panels import WINDOW, draw_panel, line_of, set_steps
from sayo_verl.report.runs import Run
from sayo_verl.view.figure import COLOURS, GREY, style

_WIDTH, _AXES_HEIGHT, _GAP = 10, 1.8, 0.66  # inches


def plot_run(run: Run, out_png: Path | str) -> Path:
    """Draw one run with its id, estimator and steps in the title; return the written file (2000 px wide)."""
    # A run without run.json is identified by its folder.
    run_id = f"run unknown, folder {run.path.resolve().name}" if run.run_id == r.UNKNOWN else run.run_id
    return _plot({"": run}, f"{run_id}  ·  {c.estimator_of(run)}  ·  {_steps(run)}", Path(out_png))


def plot_runs(runs: Mapping[str, Run], out_png: Path | str) -> Path:
    """Draw several runs in the same panels, one colour per label; return the written file (2000 px wide).

    Raises:
        SayoError: R05 for no run, or for more runs than colours (seven).
    """
    if not 1 <= len(runs) <= len(COLOURS):
        raise SayoError(
            "R05",
            "a figure cannot show this number of runs",
            where="plot_runs",
            got=len(runs),
            wanted=f"1 to {len(COLOURS)}",
            fix="draw fewer runs at once",
        )
    return _plot(runs, f"{len(runs)} run{'s' if len(runs) > 1 else ''}", Path(out_png))


def _steps(run: Run) -> str:
    return _steps_done(run) + "".join(f", resumed after step {seam}" for seam in run.seams)


def _steps_done(run: Run) -> str:
    last = run.steps[-1]
    if run.total_steps not in (None, last):
        return f"{last} of {run.total_steps} steps"
    return f"{last} step" if last == 1 else f"{last} steps"


def _plot(runs: Mapping[str, Run], title: str, out_png: Path) -> Path:
    """Draw all panels; the label of a single run is ``""``."""
    panels = c.panels_of(list(runs.values()))
    groups = {label: [run] for label, run in runs.items()}
    columns = 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(style()):
        labels = (
            []
            if "" in runs
            else [f"{label}  ({c.estimator_of(run)}, {_steps_done(run)})" for label, run in runs.items()]
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
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
            set_steps(axis, groups)
            draw_panel(axis, panel, groups)
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
    shade = GREY if labels else COLOURS[0]
    key = {"each step": line_of(shade, alpha=0.4, linewidth=1), f"mean of the last {WINDOW} steps": line_of(shade)}
    shown: dict[str, Any] = {"labelcolor": GREY, "handlelength": 1.6, "columnspacing": 1.6, "borderaxespad": 0}
    figure.legend(key.values(), key.keys(), loc="center right", bbox_to_anchor=(0.988, title_y), ncols=2, **shown)
    if labels:
        lines = [line_of(colour) for colour in COLOURS[: len(labels)]]
        figure.legend(lines, labels, loc="upper left", bbox_to_anchor=(0.006, labels_y), ncols=per_row, **shown)
