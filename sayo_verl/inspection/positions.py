"""Where the boxes of all rows are. Boxes of a wrong format can be valid: all together they can show the mistake.

Shape suffixes: N boxes; G cells along a side of a grid over the image, the top row first.
"""

from collections.abc import Sequence

import numpy as np

from sayo_verl.data import boxes

MIN_BOXES, NEARLY_ALL = 20, 0.98  # fewer boxes show no pattern; this share of them counts as all


def covered(boxes_N4: np.ndarray, cells: int) -> np.ndarray:
    """Share of the boxes that cover a place, for the places of each cell: float64 [G, G] in [0, 1].

    Args:
        boxes_N4: ``x0, y0, x1, y1`` as shares of their images.
        cells: G.
    """
    edges, sum_GG = np.arange(cells + 1) / cells, np.zeros((cells, cells))
    for part_N4 in np.array_split(boxes_N4, len(boxes_N4) // 2**16 + 1):
        low_N21, high_N21 = np.split(part_N4[:, :, None], 2, axis=1)
        x_NG, y_NG = np.clip(np.minimum(high_N21, edges[1:]) - np.maximum(low_N21, edges[:-1]), 0, None).swapaxes(0, 1)
        sum_GG += y_NG.T @ x_NG * cells**2
    return sum_GG / max(len(boxes_N4), 1)


def figures(boxes_N4: np.ndarray) -> dict[str, str]:
    """Name -> value, to print; empty without boxes."""
    if not len(boxes_N4):
        return {}
    low_N2, high_N2 = np.split(boxes_N4, 2, axis=1)
    x_N, y_N = ((low_N2 + high_N2) / 2).T
    area_33 = covered(boxes_N4, 3)
    return {
        "area of a box, in %": quantiles(100 * (high_N2 - low_N2).prod(axis=1), "{:.2g}"),
        "centre of a box, from left": quantiles(x_N, "{:.2f}"),
        "centre of a box, from top": quantiles(y_N, "{:.2f}"),
        "area of boxes, by place": "\n".join(" ".join(f"{s:4.0%}" for s in row) for row in area_33 / area_33.sum()),
    }


def doubt(boxes_N4: np.ndarray) -> str | None:
    """What is strange about all boxes: nearly all are the same, or what ``sayo_verl.data.boxes.doubt`` finds."""
    kinds, counts = np.unique(boxes_N4.round(3), axis=0, return_counts=True)
    if len(boxes_N4) >= MIN_BOXES and counts.max() > NEARLY_ALL * len(boxes_N4):
        return f"{counts.max()} of {len(boxes_N4)} boxes are the same, {kinds[counts.argmax()].round(3).tolist()}"
    return boxes.doubt(boxes_N4, "xyxy_unit")


def quantiles(values: Sequence[float] | np.ndarray, form: str = "{:.4g}") -> str:
    """Smallest, median, 90 % and largest of some values, each written by ``form``."""
    if not len(values):
        return "-"
    found = zip(("min", "median", "90 %", "max"), np.percentile(values, [0, 50, 90, 100]), strict=True)
    return ", ".join(f"{name} {form.format(value)}" for name, value in found)
