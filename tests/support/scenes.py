"""Drawn scenes, for tests of them."""

import numpy as np

from sayo_verl.scenes.drawing import COLOURS, SHAPES


def pixels_of(image: np.ndarray, colour: str) -> np.ndarray:
    return (image == np.array(COLOURS[colour], np.uint8)).all(-1)


A_COLOUR, A_SHAPE = "|".join(COLOURS), "|".join(SHAPES)
