"""Draw docs/images/walk.png, a walk and two responses with their marks: `python docs/draw_walk.py`."""

import random
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sayo_verl.scenes.walk import Walk, WalkConfig, demonstration, sample_walk
from sayo_verl.scenes.walk_truth import cell_names
from sayo_verl.view.figure import GREY, INK, style

PAGE = Path(__file__).parent / "images" / "walk.png"
SEED = 3
GROUND = {".": "#f0f2f4", "x": "#f7c9b6", "P": "#bfe3d3", "E": "#f0743e"}
SAID = {"P": "perceptual, right", "E": "perceptual, wrong", ".": "from the text, right"}
OFFSETS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # x, y of the directions


def draw_scene(axes: Axes, walk: Walk, side: int) -> None:
    """The picture, and the path with the numbers of its steps; a step over an edge leaves and enters."""
    axes.imshow(np.asarray(walk.image), interpolation="nearest", extent=(0, walk.grid, walk.grid, 0))
    outline, lines = [withStroke(linewidth=4.5, foreground="black")], []
    for step, cell in enumerate(walk.path[:-1]):
        x, y = cell % walk.grid + 0.5, cell // walk.grid + 0.5
        dx, dy = OFFSETS[walk.directions[cell]]
        inside = 0 < x + dx < walk.grid and 0 < y + dy < walk.grid
        reach = 1.0 if inside else 0.5
        lines.append(((x, x + reach * dx), (y, y + reach * dy)))
        if not inside:
            x1, y1 = (x + dx) % walk.grid, (y + dy) % walk.grid
            lines.append(((x1 - 0.5 * dx, x1), (y1 - 0.5 * dy, y1)))
        axes.text(x - 0.42, y - 0.28, str(step + 1), color="white", weight="bold", fontsize=11, path_effects=outline)
    for colour, width in (("black", 4.5), ("white", 2)):
        for xs, ys in lines:
            axes.plot(xs, ys, color=colour, linewidth=width, solid_capstyle="round")
    x, y = walk.path[-1] % walk.grid + 0.5, walk.path[-1] // walk.grid + 0.5
    axes.plot(x, y, "o", color="white", markersize=11, path_effects=outline)
    axes.set_xticks(np.arange(walk.grid) + 0.5, [name[0] for name in cell_names(walk.grid)[: walk.grid]])
    axes.set_yticks(np.arange(walk.grid) + 0.5, [str(row + 1) for row in range(walk.grid)])
    axes.set(xlim=(0, walk.grid), ylim=(walk.grid, 0))
    axes.tick_params(length=0, labelsize=11, labelcolor=INK)
    axes.set_title(walk.question, loc="left", pad=10)


def draw_response(axes: Axes, walk: Walk, words: list[str], top: float, title: str) -> float:
    """A response, one step a line in two columns; returns the row below it."""
    truth = walk.truth(words)
    axes.text(-0.6, top, title, weight="bold", color=INK, fontsize=10, va="center")
    rows = (walk.steps + 1) // 2
    for at, (word, mark) in enumerate(zip(words, truth.marks, strict=True)):
        step, slot = divmod(at, 4)
        column, row = divmod(step, rows) if step < walk.steps else (0, rows)
        x, y = column * 5.4 + (0, 1.4, 2.4, 3.9)[slot], top + 1.1 + row
        if slot == 0 and step < walk.steps:
            axes.text(x - 0.6, y, str(step + 1), fontsize=9, color=GREY, va="center")
        box = {"boxstyle": "round,pad=0.22", "facecolor": GROUND[mark], "edgecolor": "none"}
        if at == truth.first_error:
            box |= {"edgecolor": INK, "linewidth": 1.8}
        axes.text(x, y, word, fontsize=10, color=INK, va="center", bbox=box)
    return top + rows + 2.8


def main() -> None:
    config = WalkConfig(noise=12)
    walk = sample_walk(random.Random(SEED), config)
    clean, slipped = demonstration(walk, random.Random(0)), demonstration(walk, random.Random(2), 0.3)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 5.2), dpi=110, facecolor="white", layout="constrained")
        scene, text = figure.subplots(1, 2, width_ratios=(1, 1.15))
        draw_scene(scene, walk, config.cell_pixels)
        text.axis("off")
        below = draw_response(text, walk, clean, 0, "A right response: reward 1")
        reward = int(walk.truth(slipped).rewarded)
        below = draw_response(text, walk, slipped, below, f"A response with slips: reward {reward}")
        for i, (mark, said) in enumerate(SAID.items()):
            box = {"boxstyle": "round,pad=0.22", "facecolor": GROUND[mark], "edgecolor": "none"}
            text.text(3.7 * i - 0.5, below, said, fontsize=9, color=INK, va="center", bbox=box)
        text.text(
            -0.6, below + 1, "outlined: the first error; after it the walk goes on from there", fontsize=9, color=GREY
        )
        text.set(xlim=(-0.7, 10.4), ylim=(below + 1.3, -0.6))
        FigureCanvasAgg(figure)
        figure.savefig(PAGE, bbox_inches="tight", pad_inches=0.12)


if __name__ == "__main__":
    main()
