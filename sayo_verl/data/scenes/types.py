"""A drawn scene and its objects, and how an object is put into a cell of the grid.

Coordinates: pixels are ``(x0, y0, x1, y1)`` with x1 and y1 exclusive.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sayo_verl.data.scenes.config import SceneConfig
from sayo_verl.data.scenes.drawing import draw


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; ``box`` is ``(x0, y0, x1, y1)`` in pixels.

    ``value`` is what only some kinds have: "large" or "small" (kind ``"size"``), the height of a bar ("4").
    """

    shape: str
    colour: str
    box: tuple[int, ...]
    value: str = ""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and one question about it.

    Attributes:
        image: uint8 [image_size, image_size, 3], RGB.
        drawing: the same without clutter and noise.
        objects: what is in it.
        kind: kind of question.
        question, answer: its text and the word or number that answers it.
        needed: indices of the objects that the question needs; the first is the target.
        distractors: indices of random other objects, as many as are needed or as there are.
        key, asks: the words by which a response names an object and says something of it: fields of ``SceneObject``.
        roles: of the needed objects, where they differ ("answer", "reference"); else empty.
    """

    image: np.ndarray
    drawing: np.ndarray
    objects: tuple[SceneObject, ...]
    kind: str
    question: str
    answer: str
    needed: tuple[int, ...]
    distractors: tuple[int, ...]
    key: str
    asks: str
    roles: tuple[str, ...] = ()

    @property
    def target(self) -> int:
        """Index of the object that the question is about: the answer's where there are several."""
        return self.needed[0]

    @property
    def distractor(self) -> int | None:
        """Index of a random other object; None when there is none."""
        return self.distractors[0] if self.distractors else None

    def key_word(self, index: int) -> str:
        """The word by which this question's kind names object ``index``: its shape or its colour."""
        return self._word(self.key, index)

    def attribute(self, index: int) -> str:
        """The word this question's kind asks for, of object ``index``."""
        return self._word(self.asks, index)

    def _word(self, field: str, index: int) -> str:
        thing = self.objects[index]
        return {"shape": thing.shape, "colour": thing.colour, "value": thing.value}[field]

    def box_names(self, indices: Sequence[int]) -> list[str]:
        """A name for each of these objects; the needed ones with their role, where they have one."""
        role = dict(zip(self.needed, self.roles, strict=True)) if self.roles else {}
        return [f"{role[i]}: {self.objects[i].name}" if i in role else self.objects[i].name for i in indices]


def put(
    rng: random.Random,
    config: SceneConfig,
    image: np.ndarray,
    cell: int,
    shape: str,
    colour: str,
    *,
    radius: int | None = None,
    value: str = "",
    aligned: tuple[int, SceneObject] | None = None,
) -> SceneObject:
    """Draw one object somewhere in ``cell``.

    Args:
        radius: None: random, within the configuration's.
        value: of the object.
        aligned: (axis, other): along this axis (0: x, 1: y), on which the cells of both are one band, the centre of
            the smaller of the two lies within the extent of the larger.
    """
    if radius is None:
        radius = rng.randint(config.min_radius, config.max_radius)
    side = config.image_size // config.grid
    slack = side // 2 - radius - 1
    row, col = divmod(cell, config.grid)
    centre_x = col * side + side // 2 + rng.randint(-slack, slack)
    centre_y = row * side + side // 2 + rng.randint(-slack, slack)
    if aligned is not None:
        axis, other = aligned
        low, high = other.box[axis], other.box[axis + 2] - 1
        middle, reach = (low + high) // 2, max(radius, (high - low) // 2)
        if axis == 0:
            centre_x = min(max(centre_x, middle - reach), middle + reach)
        else:
            centre_y = min(max(centre_y, middle - reach), middle + reach)
    return SceneObject(shape, colour, draw(image, shape, colour, centre_x, centre_y, radius), value)
