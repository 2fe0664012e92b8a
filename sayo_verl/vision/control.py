"""Which visual tokens an intervention of boxes fills: those of the boxes, or a matched control region.

A control region (kind ``elsewhere``) answers whether a change of the boxes matters more than a change of the same size
at another place. It has exactly as many visual tokens as the boxes, and none of them lies in a box. The pattern of each
box is moved to a place of the same image and the same resolution (``sayo_verl.vision.grids.token_levels``) that neither
a box nor an earlier pattern touches. Among the places that fit, one is drawn by the seed and the prompt, as masks are.
Where no place fits, as many single tokens are drawn at random, first of the same resolution and image, then of the row.

A row whose boxes cover more than half of its visual tokens has no control region of their size (``has_room``). It stays
as it is. A method that compares must treat it as neutral; ``has_room`` tells it so from the counts that it has.

Evidence-RL (arXiv 2608.08021) moves one box, over pixels, to places that it may overlap by an IoU of at most 0.05, and
falls back to random tokens too.

Shape suffixes: V visual tokens of one image in token order, N boxes of one image, G rows and C columns of the grid of a
resolution, R visual tokens of all images of a row.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from sayo_verl.vision.grids import Tile, token_levels
from sayo_verl.vision.intervention import Intervention, hash63
from sayo_verl.vision.masks import box_masks

Count = TypeVar("Count", int, torch.Tensor)


def has_room(region_tokens: Count, image_tokens: Count) -> Any:
    """Whether a row has a control region: numbers of visual tokens, of one row or [B] -> a bool, or bool [B]."""
    return 2 * region_tokens <= image_tokens


def filled_tokens(
    intervention: Intervention,
    boxes: Sequence[Sequence[Sequence[float]]],
    tiles: Sequence[Sequence[Tile]],
    coverage: float,
    *,
    key: int,
    where: str,
) -> list[torch.Tensor] | None:
    """The visual tokens of a row that an intervention fills.

    Args:
        intervention: only ``region`` and ``elsewhere`` fill tokens by boxes.
        boxes: of each image, as ``sayo_verl.vision.masks.check_boxes`` returns them; empty: the row has none.
        tiles: of each image.
        coverage: share of a visual token's cell that a box must cover, see ``sayo_verl.vision.masks``.
        key: ``prompt_key`` of the row.
        where: names the row in errors.

    Returns:
        For each image bool [V]; None for other kinds and for a row without boxes.

    Raises:
        SayoError: the errors of ``box_masks``.
    """
    if not intervention.of_boxes or not boxes:
        return None
    masks = [
        box_masks(of_image, grids, coverage, where=where) for of_image, grids in zip(boxes, tiles, strict=True)
    ]  # [N, V] each
    if intervention.kind == "elsewhere":
        regions = control_region(masks, tiles, seed=intervention.seed, key=key, draw=intervention.draw, where=where)
    else:
        regions = [np.logical_or.reduce(mask_NV, axis=0) for mask_NV in masks]
    return [torch.from_numpy(region_V) for region_V in regions]


def control_region(
    masks: Sequence[np.ndarray], tiles: Sequence[Sequence[Tile]], *, seed: int, key: int, draw: int, where: str
) -> list[np.ndarray]:
    """The control region of a row.

    Args:
        masks: for each image bool [N, V], the visual tokens of each box.
        tiles: of each image.
        seed, key: of the draw.
        draw: its number. Of a row with one box the draws differ as long as there are other places.
        where: names the row in errors.

    Returns:
        For each image bool [V], together as many tokens as the boxes have; all False if there is no room.
    """
    taken: list[np.ndarray] = [
        np.logical_or.reduce(mask_NV, axis=0) for mask_NV in masks
    ]  # of a box or of the control region
    region_tokens, image_tokens = sum(int(t.sum()) for t in taken), sum(t.size for t in taken)
    control = [np.zeros_like(t) for t in taken]
    if not has_room(region_tokens, image_tokens):
        return control
    shared = torch.Generator().manual_seed(hash63(f"{seed}:{key}:elsewhere"))
    own = torch.Generator().manual_seed(hash63(f"{seed}:{key}:elsewhere:{draw}"))
    missing = 0
    for mask_NV, grids, taken_V, control_V in zip(masks, tiles, taken, control, strict=True):
        level_V = token_levels(grids, where=where)
        for level in range(level_V.max() + 1):
            wanted = int((mask_NV.any(0) & (level_V == level)).sum())
            index_GC = _level_grid(grids, level_V, level)
            placed = _place(mask_NV, index_GC, taken_V, shared, own, draw)
            control_V[placed] = taken_V[placed] = True
            rest = _random_tokens(~taken_V & (level_V == level), wanted - len(placed), own)
            control_V[rest] = taken_V[rest] = True
            missing += wanted - len(placed) - len(rest)
    if missing:
        free_R = _random_tokens(~np.concatenate(taken), missing, own)
        control_R = np.concatenate(control)
        control_R[free_R] = True
        control = np.split(control_R, np.cumsum([len(c) for c in control])[:-1])
    return control


def _level_grid(tiles: Sequence[Tile], level_V: np.ndarray, level: int) -> np.ndarray:
    """int64 [G, C]: the visual token at each place of the grid that the tiles of a level form."""
    starts = np.cumsum([0, *(tile.tokens for tile in tiles)])
    own = [(start, tile) for start, tile in zip(starts[:-1], tiles, strict=True) if level_V[start] == level]
    height, width = ((own[0][1].y1 - own[0][1].y0) / own[0][1].rows, (own[0][1].x1 - own[0][1].x0) / own[0][1].cols)
    index_GC = np.empty((round(1 / height), round(1 / width)), dtype=np.int64)
    for start, tile in own:
        row, col = round(tile.y0 / height), round(tile.x0 / width)
        cells = np.arange(start, start + tile.tokens).reshape(tile.rows, tile.cols)
        index_GC[row : row + tile.rows, col : col + tile.cols] = cells
    return index_GC


def _place(
    mask_NV: np.ndarray,
    index_GC: np.ndarray,
    taken_V: np.ndarray,
    shared: torch.Generator,
    own: torch.Generator,
    draw: int,
) -> np.ndarray:
    """Tokens of the patterns that found a place on one grid, largest patterns first.

    The place of the largest pattern is number ``draw`` of an order that all draws share, so that draws differ.
    """
    blocked_GC, rest_NGC = taken_V[index_GC], mask_NV[:, index_GC]
    for n in range(1, len(rest_NGC)):  # a token of two boxes counts once
        rest_NGC[n] &= ~rest_NGC[:n].any(0)
    found: list[np.ndarray] = []
    for n in sorted(range(len(rest_NGC)), key=lambda n: -int(rest_NGC[n].sum())):
        rows, cols = rest_NGC[n].nonzero()
        if not len(rows):
            continue
        rows, cols = rows - rows.min(), cols - cols.min()
        G, C = blocked_GC.shape[0] - rows.max(), blocked_GC.shape[1] - cols.max()
        fits_GC = np.ones((G, C), dtype=bool)
        for row, col in zip(rows, cols, strict=True):
            fits_GC &= ~blocked_GC[row : row + G, col : col + C]
        places = np.argwhere(fits_GC)
        if not len(places):
            continue
        order, number = (own, 0) if found else (shared, draw)
        row, col = places[int(torch.randperm(len(places), generator=order)[number % len(places)])]
        blocked_GC[rows + row, cols + col] = True
        found.append(index_GC[rows + row, cols + col])
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _random_tokens(free: np.ndarray, count: int, generator: torch.Generator) -> np.ndarray:
    """Up to ``count`` of the free tokens: free is bool [V] or [R]."""
    tokens = free.nonzero()[0]
    return tokens[torch.randperm(len(tokens), generator=generator)[:count].numpy()]
