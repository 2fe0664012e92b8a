"""Coloured shapes on grey, pixel by pixel: the same configuration gives the same image everywhere."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "purple": (150, 40, 190),
    "orange": (245, 140, 30),
}
# Mid-grey is what the image processor maps to 0. On white, a tiny model did not come to use the image.
BACKGROUND = 127
# Grey, as no object is: what is drawn in them is never asked for.
INK, GRID_LINE = 240, 165
STROKES = (40, 80, 185, 225)
DIGIT_WIDTH, DIGIT_HEIGHT = 3, 5
# The digits from 0 to 9, one row of three pixels after the other, from the top.
_DIGITS = (
    *("111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001"),
    *("111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111"),
)


def draw(image: np.ndarray, shape: str, colour: str, centre: Sequence[int], radius: int) -> tuple[int, ...]:
    """Paint one object into ``image`` and return its box in pixels; the shape touches all four sides of it."""
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius + 1, centre[1] + radius + 1)
    image[box[1] : box[3], box[0] : box[2]][stencil(shape, radius)] = COLOURS[colour]
    return box


def stencil(shape: str, radius: int) -> np.ndarray:
    """bool [2 * radius + 1, 2 * radius + 1]: the pixels of its box that a shape covers."""
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    ax, ay = np.abs(dx), np.abs(dy)
    distance2 = dx * dx + dy * dy
    return {
        "circle": distance2 <= radius**2,
        "square": ax <= radius,
        "triangle": 2 * ax <= dy + radius,
        "cross": np.minimum(ax, ay) <= max(2.5, radius / 3),
        "diamond": ax + ay <= radius,
        "ring": (distance2 <= radius**2) & (distance2 >= (0.55 * radius) ** 2),
    }[shape]


def add_clutter(image: np.ndarray, rng: random.Random, n_strokes: int) -> None:
    """Draw up to ``n_strokes`` grey strokes, one pixel wide and three to five long, that touch nothing drawn before."""
    size = len(image)
    for _ in range(n_strokes):
        for _ in range(20):  # tries
            length, grey = rng.randint(3, 5), rng.choice(STROKES)
            dx, dy = rng.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
            x, y = rng.randrange(size), rng.randrange(size)
            xs, ys = x + dx * np.arange(length), y + dy * np.arange(length)
            if xs.max() >= size or ys.max() >= size or ys.min() < 0:
                continue
            around = image[max(ys.min() - 1, 0) : ys.max() + 2, max(xs.min() - 1, 0) : xs.max() + 2]
            if (around == BACKGROUND).all():
                image[ys, xs] = grey
                break


def add_noise(image: np.ndarray, rng: random.Random, deviation: int) -> np.ndarray:
    """uint8, as ``image``: with independent, nearly normal noise of this standard deviation on every value.

    Each is a sum of four uniform bytes, since the streams of numpy's generators may change between versions.
    """
    bytes_4 = np.frombuffer(rng.randbytes(4 * image.size), np.uint8).reshape(4, *image.shape)
    sums = bytes_4.sum(0, dtype=np.int16)
    spread = (4 * (256**2 - 1) / 12) ** 0.5
    of_sum = np.rint((np.arange(4 * 255 + 1) - 2 * 255) * (deviation / spread)).astype(np.int16)
    return np.clip(image + of_sum[sums], 0, 255).astype(np.uint8)


# Pixels of a bar chart: first column and number of columns for bars, row of level 0 (the first below the bars), rows
# from level to level, side of a pixel of a digit. Level k is the row ``base - k * step``.
Frame = NamedTuple("Frame", [("left", int), ("width", int), ("base", int), ("step", int), ("scale", int)])  # noqa: UP014


def chart_frame(size: int, levels: int) -> Frame:
    """The frame of a chart in a square picture; ``step`` is too small for its numbers where there is no room."""
    scale = max(1, min(size // 96, size // levels // (DIGIT_HEIGHT + 2)))
    margin = scale * (DIGIT_HEIGHT // 2 + 1) + 1  # half a digit and a little
    left = scale * (DIGIT_WIDTH + 1) * len(str(levels)) + 4  # numbers, the axis, a little
    return Frame(left, size - left - 2, size - 1 - margin, (size - 1 - 2 * margin) // levels, scale)


def draw_chart(image: np.ndarray, frame: Frame, levels: int) -> None:
    """Draw the lines of a chart and the numbers of its scale."""
    axis = frame.left - 2
    for level in range(levels + 1):
        y = frame.base - level * frame.step
        image[y, axis : frame.left + frame.width + 1] = INK if level == 0 else GRID_LINE
        x = axis - 1 - frame.scale * ((DIGIT_WIDTH + 1) * len(str(level)) - 1)
        for digit in str(level):
            bits = np.array(list(_DIGITS[int(digit)])).reshape(DIGIT_HEIGHT, DIGIT_WIDTH) == "1"
            glyph = bits.repeat(frame.scale, 0).repeat(frame.scale, 1)
            top = y - len(glyph) // 2
            image[top : top + len(glyph), x : x + glyph.shape[1]][glyph] = INK
            x += frame.scale * (DIGIT_WIDTH + 1)
    image[frame.base - levels * frame.step : frame.base + 1, axis] = INK
