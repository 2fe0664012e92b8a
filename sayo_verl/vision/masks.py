"""Boxes to visual tokens.

A visual token is one cell of a grid over a rectangle of its image (``sayo_verl.vision.grids.Tile``). The processor
resizes the *whole* image before it cuts patches, so the cell is the same share of the image whatever the resize did.
Boxes are therefore stored normalised to [0, 1], and the only grid that is trusted is the one the processor returned.

``check_boxes`` judges the boxes of a row, for the row contract (``sayo_verl.data.contract``), the probe and the <Focus>
stage alike. It stands here because the probe does not import the data room.

Shape suffixes: R grid rows, C grid columns, V visual tokens of one image in token order, N boxes.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from sayo_verl.errors import SayoError
from sayo_verl.vision.grids import Tile, token_levels

ROUNDING = 1e-9  # cells and boxes are compared to within this, in cells and in shares of the image


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


def check_nesting(boxes: Any, n_images: int, *, where: str) -> None:
    """Raise unless ``boxes`` is one list of boxes for each image.

    Raises:
        SayoError: D05.
    """
    lists = isinstance(boxes, list | tuple) and all(
        isinstance(of_image, list | tuple) and all(isinstance(box, list | tuple) for box in of_image)
        for of_image in boxes
    )
    if not lists or len(boxes) != n_images:
        raise SayoError(
            "D05",
            "boxes are not nested by image",
            where=where,
            got=f"{len(boxes) if lists else type(boxes).__name__} entries for {n_images} images: {str(boxes)[:80]}",
            wanted="boxes[image][box] = [x0, y0, x1, y1]",
            fix="write one list of boxes per image, empty for an image without one",
        )


def check_boxes(boxes: Any, n_images: int, *, where: str) -> list[Any]:
    """The boxes of a row, nested by image; an empty list for a row without boxes.

    Args:
        boxes: ``extra_info.boxes``; None and an empty list are no boxes.
        n_images: of the row.
        where: names the row.

    Raises:
        SayoError: D05 for boxes that are not nested by image, V01-V03 for a malformed box.
    """
    if not boxes:
        return []
    where = f"{where}, extra_info.boxes"
    check_nesting(boxes, n_images, where=where)
    for i, of_image in enumerate(boxes):
        for j, box in enumerate(of_image):
            check_box(box, where=f"{where}[{i}][{j}]")
    return boxes


def not_an_image(where: str, got: object) -> SayoError:
    """The error D66 of a video or an audio, in a row whose boxes would be looked at."""
    return SayoError(
        "D66",
        "a row has a video or an audio, and boxes lie in images only",
        where=where,
        got=got,
        fix="remove it",
    )


def cell_coverage(box: Sequence[float], rows: int, cols: int) -> np.ndarray:
    """Share of each cell's area that one box covers.

    Args:
        box: ``[x0, y0, x1, y1]``, where the grid is [0, 1] x [0, 1]; the box may reach beyond it.
        rows: grid rows R.
        cols: grid columns C.

    Returns:
        float64 [R, C] in [0, 1]; the sum times the area of a cell is the area of the box within the grid.
    """
    x0, y0, x1, y1 = box
    edges_x = np.arange(cols + 1, dtype=np.float64)
    edges_y = np.arange(rows + 1, dtype=np.float64)
    width_C = np.clip(np.minimum(x1 * cols, edges_x[1:]) - np.maximum(x0 * cols, edges_x[:-1]), 0, None)
    height_R = np.clip(np.minimum(y1 * rows, edges_y[1:]) - np.maximum(y0 * rows, edges_y[:-1]), 0, None)
    return np.minimum(height_R[:, None] * width_C[None, :], 1.0)


def token_coverage(box: Sequence[float], tiles: Sequence[Tile]) -> np.ndarray:
    """Share of each visual token's cell that one box covers: float64 [V] in [0, 1], over all tiles in token order."""
    shares = []
    for tile in tiles:
        width, height = tile.x1 - tile.x0, tile.y1 - tile.y0
        x0, x1 = ((float(x) - tile.x0) / width for x in (box[0], box[2]))
        y0, y1 = ((float(y) - tile.y0) / height for y in (box[1], box[3]))
        shares.append(cell_coverage((x0, y0, x1, y1), tile.rows, tile.cols).reshape(-1))
    return np.concatenate(shares)


def _box_mask(box: Sequence[float], tiles: Sequence[Tile], level_V: np.ndarray, coverage: float) -> np.ndarray:
    """bool [V]: the tokens of one box by the rule of ``box_masks``; at least one of each level."""
    covered_V = token_coverage(box, tiles)
    # a box whose border lies exactly on the threshold counts, despite rounding; a cell it only touches does not
    mask_V = covered_V >= max(coverage - ROUNDING, ROUNDING)
    for level in range(level_V.max() + 1):
        here_V = level_V == level
        if mask_V[here_V].any():
            continue
        if not covered_V[here_V].any():  # a box thinner than rounding: as if it were just thick enough to see
            x0, y0, x1, y1 = (float(v) for v in box)
            seen_V = token_coverage((x0 - ROUNDING, y0 - ROUNDING, x1 + ROUNDING, y1 + ROUNDING), tiles)
        else:
            seen_V = covered_V
        mask_V |= here_V & (seen_V >= seen_V[here_V].max() * (1 - 1e-6))
    return mask_V


def box_masks(
    boxes: Sequence[Sequence[float]], tiles: Sequence[Tile], coverage: float = 0.5, *, where: str = "box_masks"
) -> np.ndarray:
    """The visual tokens of each box of one image.

    A token belongs to a box when the box covers at least ``coverage`` of its cell. When no cell of a *level of
    resolution* (``token_levels``) reaches that, the cells of the level that the box covers most are taken, so that a
    box never vanishes (a rule by box centres loses about half of the boxes that are smaller than a cell). They are one
    cell for a small box and several for a long thin one, such as a line of text, which covers a row of cells alike.

    Why per level. An image with a thumbnail is shown to the model twice, and attention to a thing may go to either
    picture of it: a box that is large enough for a tile's token but not for a thumbnail's would lose what goes to the
    thumbnail. So each level keeps its most covered cells, at the price that the thumbnail's token is much larger than
    a small box. Why not per tile: a box that leans over a tile's border by a sliver would mark that sliver's cell only
    because it is the largest piece within its tile. All tiles of a level are one grid, and their borders do not matter.

    Args:
        boxes: N boxes ``[x0, y0, x1, y1]`` in [0, 1] of the image; N may be 0.
        tiles: all tiles of the image in token order, from ``merged_grid`` or ``tile_grid``.
        coverage: threshold in (0, 1].
        where: names the image in errors.

    Returns:
        bool [N, V]; each row has at least one token of each level.

    Raises:
        SayoError: V01-V03 for a malformed box, V04 for a threshold out of range, V05 for a tile without tokens, V06 for
            tiles that are not the whole image.
    """
    if not 0 < coverage <= 1:
        raise SayoError(
            "V04",
            "coverage threshold out of range",
            where=where,
            got=f"coverage={coverage}",
            wanted="0 < coverage <= 1",
            fix="set algorithm.attn.region.coverage within (0, 1]",
        )
    level_V = token_levels(tiles, where=where)
    masks_NV = np.zeros((len(boxes), len(level_V)), dtype=bool)
    for i, box in enumerate(boxes):
        check_box(box, where=f"{where}, box {i}")
        masks_NV[i] = _box_mask(box, tiles, level_V, coverage)
    return masks_NV


def region_mask(
    boxes: Sequence[Sequence[float]], tiles: Sequence[Tile], coverage: float = 0.5, *, where: str = "region_mask"
) -> np.ndarray:
    """The union of some boxes as visual tokens of one image: bool [V], all False only when there is no box.

    Arguments, rule and errors are those of ``box_masks``.
    """
    return np.logical_or.reduce(box_masks(boxes, tiles, coverage, where=where), axis=0)
