"""The part of the image that each visual token covers.

Every family resizes the *whole* image before it cuts patches, without keeping its aspect ratio to the pixel. So token
(r, c) of an R x C grid over a rectangle of the image covers the cell (r, c) of that rectangle after any resize.
Families differ in the number of grids per image:

- Qwen2.5-VL and Qwen3-VL: one grid over the whole image. ``image_grid_thw`` counts patches; ``merge_size`` x
  ``merge_size`` of them are merged into a token. The patches of a token lie side by side in ``pixel_values``, so tokens
  are row-major.
- InternVL in the Hugging Face format: the image is stretched to ``columns x rows`` tiles, each of ``side x side``
  tokens after the pixel shuffle. Tiles come row-major, tokens row-major within a tile, and a *thumbnail*, one more grid
  over the whole image, comes last when there is more than one tile.

Nothing here computes a resize. The size of the grid comes from the processor that made the pixels
(``image_grid_thw``; ``get_optimal_tiled_canvas`` of InternVL's image processor), never from the size of the file.

Shape suffixes: V visual tokens of one image, in token order.
"""

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sayo_verl.errors import SayoError

SAME = 1e-6  # relative tolerance of cell sizes and areas


@dataclass(frozen=True)
class Tile:
    """A rectangle of the image that became a grid of visual tokens, row-major.

    Args:
        rows: visual tokens down.
        cols: visual tokens across.
        x0: left side of the rectangle in [0, 1], as a share of the image's width; likewise ``x1``, its right side.
        y0: upper side of the rectangle in [0, 1], as a share of the image's height; likewise ``y1``, its lower side.
    """

    rows: int
    cols: int
    x0: float = 0.0
    y0: float = 0.0
    x1: float = 1.0
    y1: float = 1.0

    @property
    def tokens(self) -> int:
        """Visual tokens of this tile."""
        return self.rows * self.cols


def merged_grid(t: int, h: int, w: int, merge_size: int, *, where: str) -> tuple[Tile, ...]:
    """Return the single tile of an image of the Qwen families.

    Args:
        t: frames; 1 for an image.
        h: patches down, as in ``image_grid_thw``.
        w: patches across.
        merge_size: patches merged per side, so the grid is h/merge_size x w/merge_size tokens.
        where: names the image in errors.

    Raises:
        SayoError: P07 unless t is 1 and h and w are positive multiples of the merge size.
    """
    if t != 1 or merge_size < 1 or h < 1 or w < 1 or h % merge_size or w % merge_size:
        raise SayoError(
            "P07",
            "an image grid does not belong to a still image",
            where=where,
            got=f"(t, h, w) = ({t}, {h}, {w}), merge size {merge_size}",
            wanted="t = 1, h and w positive multiples of the merge size",
            fix="remove videos from the data; only images are supported",
        )
    return (Tile(int(h // merge_size), int(w // merge_size)),)


def tile_grid(columns: int, rows: int, side: int, *, thumbnail: bool = True, where: str) -> tuple[Tile, ...]:
    """Return the tiles of an InternVL image, with its thumbnail last.

    Args:
        columns: tiles across.
        rows: tiles down.
        side: visual tokens per side of a tile (16: 448 px, patches of 14 px, pixel shuffle by 1/2).
        thumbnail: whether the processor adds the whole image as another tile; it never does for a single tile.
        where: names the image in errors.

    Returns:
        ``columns * rows`` tiles in row-major order, then the thumbnail if there is one.

    Raises:
        SayoError: V05 for a count that is not an integer of at least 1.
    """
    _check_counts(where, columns=columns, rows=rows, side=side)
    tiles = [
        Tile(side, side, c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
        for r in range(rows)
        for c in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(Tile(side, side))
    return tuple(tiles)


def _check_counts(where: str, **counts: int) -> None:
    """Refuse a count of cells that is not a positive integer; V05."""
    if not all(isinstance(n, numbers.Integral) and n >= 1 for n in counts.values()):
        raise SayoError(
            "V05",
            "a grid of tiles or of visual tokens has an invalid size",
            where=where,
            got=", ".join(f"{name}={n}" for name, n in counts.items()),
            wanted="integers of at least 1",
            fix="take the grid from the image processor, for the size of the image that it processed",
        )


def token_levels(tiles: Sequence[Tile], *, where: str) -> np.ndarray:
    """Return the resolution level of each visual token.

    A level is the set of tiles whose cells are equally large in the image. InternVL's tiles are one level and its
    thumbnail another. Qwen's grid is the only level.

    Args:
        tiles: all tiles of one image, in token order.
        where: names the image in errors.

    Returns:
        int64 [V]: 0 for tokens of the first tile's level, 1 for the next level, and so on.

    Raises:
        SayoError: V05 for a tile without tokens, V06 when the tiles of a level do not cover each part of the image
            exactly once. This check guarantees that every box meets at least one token of each level.
    """
    levels: list[list[Tile]] = []
    level_of_tile = []
    for tile in tiles:
        _check_counts(where, rows=tile.rows, cols=tile.cols)
        level = next((i for i, others in enumerate(levels) if _same_cells(tile, others[0])), len(levels))
        if level == len(levels):
            levels.append([])
        levels[level].append(tile)
        level_of_tile.append(level)
    for level_tiles in levels or [[]]:
        _check_partition(level_tiles, where)
    return np.repeat(np.array(level_of_tile), [tile.tokens for tile in tiles])


def _same_cells(tile: Tile, other: Tile) -> bool:
    """Whether the cells of two tiles have the same width and height in the image."""
    return all(
        math.isclose(size, other_size, rel_tol=SAME)
        for size, other_size in (
            ((tile.x1 - tile.x0) / tile.cols, (other.x1 - other.x0) / other.cols),
            ((tile.y1 - tile.y0) / tile.rows, (other.y1 - other.y0) / other.rows),
        )
    )


def _check_partition(tiles: Sequence[Tile], where: str) -> None:
    """Refuse tiles that do not cover each part of the image exactly once; V06."""
    proper = all(0 <= tile.x0 < tile.x1 <= 1 and 0 <= tile.y0 < tile.y1 <= 1 for tile in tiles)
    area = sum((tile.x1 - tile.x0) * (tile.y1 - tile.y0) for tile in tiles)
    twice = sum(
        max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
        for a, b in itertools.combinations(tiles, 2)
    )
    if not proper or not math.isclose(area, 1, rel_tol=SAME) or twice > SAME:
        raise SayoError(
            "V06",
            "the tiles of one resolution do not cover each part of the image exactly once",
            where=where,
            got=f"{len(tiles)} tiles of {area:.6g} of the image's area, {twice:.6g} of it more than once",
            wanted="rectangles within [0, 1] that partition the image",
            fix="build the tiles of one image with merged_grid or tile_grid and pass all of them",
        )
