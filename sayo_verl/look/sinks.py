"""Visual tokens that draw attention whatever the question is: the border of an image, and steady tokens.

Attention of vision-language models gathers on the border of the image, above all at the top left
(QwenLM/Qwen3-VL#1551), and on a few other tokens. Such a map says little about the question. So a page shows it
without them as well. A neutral question tells which tokens they are, as in mllms_know (arXiv 2502.17422).

Shape suffixes: V visual tokens.
"""

from collections.abc import Sequence

import numpy as np

from sayo_verl.vision.grids import Tile

NEUTRAL = "Describe the image."
STEADY = 10.0  # multiple of the median over the visual tokens that attention must exceed [ours]


def border_mask(tiles: Sequence[Tile]) -> np.ndarray:
    """bool [V]: the outer ring of one image.

    Args:
        tiles: its grids, in token order. A grid over a part of the image has only the sides that it shares with the
            image; the thumbnail has a ring of its own.
    """
    parts = []
    for tile in tiles:
        ring = np.zeros((tile.rows, tile.cols), dtype=bool)
        ring[0] |= tile.y0 <= 0
        ring[-1] |= tile.y1 >= 1
        ring[:, 0] |= tile.x0 <= 0
        ring[:, -1] |= tile.x1 >= 1
        parts.append(ring.reshape(-1))
    return np.concatenate(parts)


def steady_mask(response_V: np.ndarray, neutral_V: np.ndarray, multiple: float = STEADY) -> np.ndarray:
    """bool [V]: tokens that get more than ``multiple`` times the median in both maps.

    Args:
        response_V: attention of the response.
        neutral_V: attention of the last prompt token, for the question ``NEUTRAL`` and the same images.
        multiple: of each map's own median.
    """
    high = [map_V > multiple * np.median(map_V) for map_V in (response_V, neutral_V)]
    return high[0] & high[1]
