"""A picture of where a model looked, for papers and slides: PNG, 1,600 pixels wide."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from sayo_verl.view.figure import style
from sayo_verl.view.seen import SeenImage, SeenPrompt, SeenResponse
from sayo_verl.view.viewer import grids_of

DPI, WIDTH = 100, 16.0  # inches
PICTURES, GAP, LINE = (
    9.8,
    0.6,
    0.31,
)  # inches: of all pictures beside the text, for the title of a word, of a line of text
MOST_WORDS, ACROSS = 8, 4
TOP, COARSE = 0.995, 100  # as on the page: quantile at which the colour scale ends; tokens of a picture with few cells
BOX = "#5dfdff"
SIDE = 1200  # pixels of a picture's longer side in the figure


def save_png(prompt: SeenPrompt, response: SeenResponse, path: Path | str) -> None:
    """Draw the images with the response's map and boxes, and below the words with most attention to the image.

    The map is the response's first. Words are drawn where their maps are stored.
    """
    drawn = [(image, grid) for image, grid in _drawings(prompt) if not grid["thumbnail"]]
    maps = response.maps[0] if response.maps else None
    total_V = maps.total.unpack()[0] if maps else np.zeros(prompt.tokens)
    words_WV = maps.words.unpack() if maps and maps.words else np.zeros((0, prompt.tokens))
    best = [int(w) for w in np.argsort(-words_WV.sum(1), kind="stable")[:MOST_WORDS]]
    rows = -(-len(best) // ACROSS)
    shape = max(image.picture.height / image.picture.width for image, _ in drawn)
    # inches: the pictures beside the text, then one row per four words
    wide = PICTURES / len(drawn)
    high = min(wide * shape, 8.0)
    upper = max(high, 4.5)
    small = min((WIDTH - 1.6) / ACROSS * shape, 3.2)
    height = 0.8 + upper + 0.3 + (rows * (small + GAP) + 0.4 if best else 0)
    with matplotlib.rc_context({**style(), "font.size": 13}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        title = " ".join(prompt.question.split())
        figure.text(
            0.025, 1 - 0.4 / height, textwrap.shorten(title, 120, placeholder=" ..."), fontsize=15, weight="bold"
        )
        top = _top(total_V)
        for i, (image, grid) in enumerate(drawn):
            left = 0.025 + i * (wide + 0.15) / WIDTH
            axis = figure.add_axes((left, 1 - (0.8 + high) / height, wide / WIDTH, high / height))
            scale = _draw(axis, image, grid, total_V, top, names=True)
        left = 0.025 + len(drawn) * (wide + 0.15) / WIDTH + 0.02
        bar = figure.add_axes((left, 1 - 1.1 / height, 0.93 - left, 0.2 / height))
        figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[0, top / 4, top], format=_percent)
        bar.tick_params(labelsize=11)
        bar.set_title("Attention per visual token, square-root scale", fontsize=13)
        room = int(9 * (0.98 - left) * WIDTH), int((upper - 1.1) / LINE)  # letters and lines
        figure.text(left, 1 - 1.75 / height, _lines(prompt, response, total_V, *room), va="top", linespacing=1.6)
        if best:
            heading = f"The {len(best)} words with most attention on the image, each on a colour scale of its own"
            figure.text(0.025, (rows * (small + GAP) + 0.15) / height, heading, fontsize=14, weight="bold")
        for i, w in enumerate(best):
            start, end = response.words[w]
            image, grid = max(drawn, key=lambda one: _share(one[1], words_WV[w]))
            column, row = i % ACROSS, rows - 1 - i // ACROSS
            place = (0.025 + column * 0.95 / ACROSS, row * (small + GAP) / height)
            axis = figure.add_axes((*place, 0.93 / ACROSS, small / height))
            _draw(axis, image, grid, words_WV[w], _top(words_WV[w]), names=False)
            word = textwrap.shorten("".join(response.pieces[start:end]), 24, placeholder="...") or "(space)"
            axis.set_title(f"{word}   {_percent(words_WV[w].sum())}", fontsize=13)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})


def _drawings(prompt: SeenPrompt) -> list[tuple[SeenImage, dict[str, Any]]]:
    start, drawings = 0, []
    for image in prompt.images:
        drawings += [(image, grid) for grid in grids_of(image, start)]
        start += image.tokens
    return drawings


def _top(map_V: np.ndarray) -> float:
    return max(float(np.quantile(map_V, TOP, method="higher") or map_V.max()), 2 * float(map_V.mean())) or 1.0


def _draw(
    axis: Axes, image: SeenImage, grid: dict[str, Any], map_V: np.ndarray, top: float, *, names: bool
) -> ScalarMappable:
    """One picture with its map. Cold cells show the darkened picture."""
    picture = image.picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    # few cells cover the objects, so their colours stay
    grey, strength = (0.0, 0.5) if grid["rows"] * grid["cols"] < COARSE else (0.8, 0.8)
    grey_RC1 = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    dark_RC3 = 0.65 * (grey * grey_RC1 + (1 - grey) * np.asarray(picture, dtype=np.float32)) / 255
    map_RC = np.zeros((grid["rows"], grid["cols"]))
    for start, rows, cols, row, col in grid["tiles"]:
        map_RC[row : row + rows, col : col + cols] = map_V[start : start + rows * cols].reshape(rows, cols)
    colours = matplotlib.colormaps["inferno"]
    norm = PowerNorm(0.5, 0, top, clip=True)
    extent = (0, picture.width, picture.height, 0)
    axis.imshow(dark_RC3, extent=extent, interpolation="antialiased")
    alpha_RC = np.clip(0.08 + 1.25 * norm(map_RC).filled(0), 0, 1) * strength
    axis.imshow(colours(norm(map_RC)), extent=extent, interpolation="nearest", alpha=alpha_RC)
    for i, (x0, y0, x1, y1) in enumerate(image.boxes):
        corner = (x0 * picture.width, y0 * picture.height)
        size = ((x1 - x0) * picture.width, (y1 - y0) * picture.height)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=4))
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=BOX, linewidth=2))
        if names:
            label = " ".join([str(i + 1), *image.names[i : i + 1]])
            axis.text(
                *corner,
                textwrap.shorten(label, 32, placeholder="..."),
                fontsize=12,
                weight="bold",
                color="#001a1a",
                va="top" if y0 < 0.07 else "bottom",
                bbox={"facecolor": BOX, "edgecolor": "none", "pad": 2},
            )
    axis.set_xlim(0, picture.width)
    axis.set_ylim(picture.height, 0)
    axis.set_anchor("NW")
    axis.set_axis_off()
    return ScalarMappable(norm, colours)


def _lines(prompt: SeenPrompt, response: SeenResponse, total_V: np.ndarray, letters: int, count: int) -> str:
    """Numbers of the whole response, and as much of its text as there is room."""
    image = float(total_V.sum())
    lines = [f"{_percent(image)} of the attention is on the image"]
    if not response.maps:
        lines = ["No map was measured"]
    elif prompt.region is not None and 0 < prompt.region_tokens < prompt.tokens:
        boxes, even = float(total_V[prompt.region].sum()), image * prompt.chance
        lines += [
            f"{_percent(boxes)} is on the boxes",
            f"(spread evenly: {_percent(even)}; {boxes / even:.1f} times as much)",
        ]
    if image and response.maps and prompt.has_inside:
        border = float(total_V[prompt.border].sum())
        lines += [
            f"{_percent(border)} is on the image's border",
            f"(spread evenly: {_percent(image * prompt.border.mean())})",
        ]
    written = textwrap.wrap(response.text, letters, max_lines=max(1, count - len(lines) - 1), placeholder=" ...")
    return "\n".join([*lines, "", *written])


def _share(grid: dict[str, Any], map_V: np.ndarray) -> float:
    return float(sum(map_V[start : start + rows * cols].sum() for start, rows, cols, _, _ in grid["tiles"]))


def _percent(share: float, _: Any = None) -> str:
    return f"{100 * share:.2g} %"
