"""Steady tokens: visual tokens that draw attention whatever the question is.

Attention of vision-language models gathers on the border of the image, above all at the top left
(QwenLM/Qwen3-VL#1551), and on a few other tokens. Such a map says little about the question. So a page shows it
without them as well. A neutral question tells which tokens they are, as in mllms_know (arXiv 2502.17422).

Shape suffixes: V visual tokens.
"""

import numpy as np

NEUTRAL = "Describe the image."
STEADY = 10.0  # multiple of the median over the visual tokens that attention must exceed [ours]


def steady_mask(response_V: np.ndarray, neutral_V: np.ndarray, multiple: float = STEADY) -> np.ndarray:
    """bool [V]: tokens that get more than ``multiple`` times the median in both maps.

    Args:
        response_V: attention of the response.
        neutral_V: attention of the last prompt token, for the question ``NEUTRAL`` and the same images.
        multiple: of each map's own median.
    """
    high = [map_V > multiple * np.median(map_V) for map_V in (response_V, neutral_V)]
    return high[0] & high[1]
