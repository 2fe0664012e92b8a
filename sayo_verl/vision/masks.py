"""Boxes to visual tokens.

A visual token is one cell of the merged grid of an image. The processor resizes the *whole* image before it cuts
patches, so cell (r, c) of an R x C grid covers [c/C, (c+1)/C] x [r/R, (r+1)/R] of the image whatever the resize did.
Boxes are therefore stored normalised to [0, 1], and the only grid that is trusted is the one the processor returned.

Shape suffixes: R grid rows, C grid columns, V visual tokens (row-major, V = R * C), N boxes.
"""

import math
import numbers
from collections.abc import Sequence

import numpy as np

from sayo_verl.errors import SayoError


def check_box(box: Sequence[float], *, where: str) -> None:
    """Refuse a box that is not ``[x0, y0, x1, y1]`` with ``0 <= x0 < x1 <= 1`` and ``0 <= y0 < y1 <= 1``.

    Raises:
        SayoError: V01 for a wrong number of values or a value that is not finite, V02 for x1 <= x0 or y1 <= y0,
            V03 for a box outside the image.
    """
    if len(box) != 4 or not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in box):
        raise SayoError(
            "V01",
            "a box is not four finite numbers",
            where=where,
            got=list(box),
            wanted="[x0, y0, x1, y1]",
            fix="write boxes as corner coordinates divided by the image's width and height",
        )
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        raise SayoError(
            "V02",
            "a box has no area",
            where=where,
            got=list(box),
            wanted="x0 < x1 and y0 < y1",
            fix="this looks like [x, y, width, height]; convert it to corners [x, y, x + width, y + height]",
        )
    if min(x0, y0) < 0 or max(x1, y1) > 1:
        raise SayoError(
            "V03",
            "a box lies outside the image",
            where=where,
            got=list(box),
            wanted="coordinates in [0, 1]",
            fix="divide pixel coordinates by the image's width and height and clip them to the image",
        )


def cell_coverage(box: Sequence[float], rows: int, cols: int) -> np.ndarray:
    """Share of each cell's area that one box covers.

    Args:
        box: ``[x0, y0, x1, y1]`` in [0, 1].
        rows: grid rows R.
        cols: grid columns C.

    Returns:
        float64 [R, C] in [0, 1]; the sum times the area of a cell is the area of the box.
    """
    x0, y0, x1, y1 = box
    edges_x = np.arange(cols + 1, dtype=np.float64)
    edges_y = np.arange(rows + 1, dtype=np.float64)
    width_C = np.clip(np.minimum(x1 * cols, edges_x[1:]) - np.maximum(x0 * cols, edges_x[:-1]), 0, None)
    height_R = np.clip(np.minimum(y1 * rows, edges_y[1:]) - np.maximum(y0 * rows, edges_y[:-1]), 0, None)
    return np.minimum(height_R[:, None] * width_C[None, :], 1.0)


def _most_covered(box: Sequence[float], covered_RC: np.ndarray) -> np.ndarray:
    """bool [R, C]: the cells of the largest coverage, ties included; never empty."""
    most = covered_RC.max()
    if most > 0:
        return covered_RC >= most * (1 - 1e-6)
    inside = np.zeros(covered_RC.shape, dtype=bool)  # a box thinner than rounding: the cell of its centre
    rows, cols = covered_RC.shape
    inside[min(int((box[1] + box[3]) / 2 * rows), rows - 1), min(int((box[0] + box[2]) / 2 * cols), cols - 1)] = True
    return inside


def region_mask(
    boxes: Sequence[Sequence[float]], rows: int, cols: int, coverage: float = 0.5, *, where: str = "region_mask"
) -> np.ndarray:
    """The union of some boxes as visual tokens of one image.

    A token belongs to a box when the box covers at least ``coverage`` of its cell. When no cell reaches that, the cells
    that the box covers most are taken, so that a box never vanishes (a rule by box centres loses about half of the
    boxes that are smaller than a cell). They are one cell for a small box and several for a long thin one, such as a
    line of text, which covers a row of cells alike.

    Args:
        boxes: N boxes ``[x0, y0, x1, y1]`` in [0, 1]; N may be 0.
        rows: grid rows R of the merged grid (``grid_thw[1] // merge_size``).
        cols: grid columns C.
        coverage: threshold in (0, 1].
        where: names the image in errors.

    Returns:
        bool [V], row-major; all False only when there is no box.

    Raises:
        SayoError: V01-V03 for a malformed box, V04 for a grid or threshold out of range.
    """
    if rows < 1 or cols < 1 or not 0 < coverage <= 1:
        raise SayoError(
            "V04",
            "grid or coverage threshold out of range",
            where=where,
            got=f"rows={rows}, cols={cols}, coverage={coverage}",
            wanted="rows, cols >= 1 and 0 < coverage <= 1",
            fix="set algorithm.attn.region.coverage within (0, 1]",
        )
    mask = np.zeros((rows, cols), dtype=bool)
    for i, box in enumerate(boxes):
        check_box(box, where=f"{where}, box {i}")
        covered = cell_coverage(box, rows, cols)
        # a box whose border lies exactly on the threshold counts, despite rounding; a cell it only touches does not
        inside = covered >= max(coverage - 1e-9, 1e-9)
        if not inside.any():
            inside = _most_covered(box, covered)
        mask |= inside
    return mask.reshape(-1)
