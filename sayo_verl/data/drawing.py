"""Coloured shapes on grey, pixel by pixel: the same configuration gives the same image everywhere."""

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


def blank(size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the empty canvas."""
    return np.full((size, size, 3), BACKGROUND, np.uint8)


def draw(image: np.ndarray, shape: str, colour: str, centre_x: int, centre_y: int, radius: int) -> tuple[int, ...]:
    """Paint one object into ``image`` and return its box in pixels, ``(x0, y0, x1, y1)`` with x1 and y1 exclusive.

    The box is exact: every one of its four sides is touched by the shape.
    """
    box = (centre_x - radius, centre_y - radius, centre_x + radius + 1, centre_y + radius + 1)
    image[box[1] : box[3], box[0] : box[2]][stencil(shape, radius)] = COLOURS[colour]
    return box


def stencil(shape: str, radius: int) -> np.ndarray:
    """bool [2 * radius + 1, 2 * radius + 1]: the pixels of its box that a shape covers."""
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    ax, ay = np.abs(dx), np.abs(dy)
    distance2 = dx * dx + dy * dy
    if shape == "circle":
        return distance2 <= radius**2
    if shape == "square":
        return np.ones_like(ax, dtype=bool)
    if shape == "triangle":
        return 2 * ax <= dy + radius
    if shape == "cross":
        return np.minimum(ax, ay) <= max(2.5, radius / 3)
    if shape == "diamond":
        return ax + ay <= radius
    if shape == "ring":
        return (distance2 <= radius**2) & (distance2 >= (0.55 * radius) ** 2)
    raise ValueError(f"no stencil for {shape!r}")
