"""A drawn scene and its objects. A box is ``(x0, y0, x1, y1)`` in pixels, with x1 and y1 exclusive."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sayo_verl.scenes.config import SceneConfig
from sayo_verl.scenes.drawing import BACKGROUND, draw


@dataclass(frozen=True)
class SceneObject:
    """One drawn object. ``value`` is "large" or "small" (kind ``"size"``), the height of a bar ("4") or ""."""

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
        image, drawing: uint8 [image_size, image_size, 3], RGB, with and without clutter and noise.
        objects: what is in it.
        needed: indices of the objects that the question needs; the first is the target, whose word answers.
        distractors: indices of random other objects, as many as are needed or as there are.
        kind, question, answer: of ``config.KINDS``, its text, and the word or number that answers it.
        key, asks: the words by which a response names an object and says something of it: fields of ``SceneObject``.
    """

    image: np.ndarray
    drawing: np.ndarray
    objects: tuple[SceneObject, ...]
    needed: tuple[int, ...]
    distractors: tuple[int, ...]
    kind: str
    question: str
    answer: str
    key: str
    asks: str

    @property
    def target(self) -> int:
        return self.needed[0]

    def key_word(self, index: int) -> str:
        """The word by which this question names object ``index``: its shape or its colour."""
        return str(getattr(self.objects[index], self.key))

    def attribute(self, index: int) -> str:
        """The word that this question asks for, of object ``index``."""
        return str(getattr(self.objects[index], self.asks))


_Aligned = tuple[int, SceneObject] | None


class Canvas:
    """A scene while it is drawn."""

    def __init__(self, rng: random.Random, config: SceneConfig) -> None:
        self.rng, self.config = rng, config
        self.image = np.full((config.image_size, config.image_size, 3), BACKGROUND, np.uint8)
        self.objects: list[SceneObject] = []
        self.free = set(range(config.grid**2))  # cells

    def put(
        self, cell: int, look: tuple[str, str], radius: int = 0, value: str = "", aligned: _Aligned = None
    ) -> SceneObject:
        """Draw an object of (shape, colour) somewhere in ``cell``, with a random radius at 0.

        ``aligned``: (axis, other): along this axis (0: x, 1: y), the centre of the smaller is within the larger one.
        """
        radius = radius or self.rng.randint(self.config.min_radius, self.config.max_radius)
        side, grid = self.config.image_size // self.config.grid, self.config.grid
        slack = side // 2 - radius - 1
        centre = [at * side + side // 2 + self.rng.randint(-slack, slack) for at in (cell % grid, cell // grid)]
        if aligned is not None:
            axis, other = aligned
            low, high = other.box[axis], other.box[axis + 2] - 1
            middle, reach = (low + high) // 2, max(radius, (high - low) // 2)
            centre[axis] = min(max(centre[axis], middle - reach), middle + reach)
        self.free.discard(cell)
        self.objects.append(SceneObject(*look, draw(self.image, *look, centre, radius), value))
        return self.objects[-1]

    def fill(self, up_to: int, shapes: Sequence[str], colours: Sequence[str]) -> None:
        """Draw random objects into free cells until there are ``up_to``."""
        for cell in self.rng.sample(sorted(self.free), up_to - len(self.objects)):
            self.put(cell, (self.rng.choice(shapes), self.rng.choice(colours)))

    def n_objects(self) -> int:
        return self.rng.randint(self.config.min_objects, self.config.max_objects)

    def others(self, needed: Sequence[int]) -> tuple[int, ...]:
        """Random objects that are not needed, as many as are needed or as there are."""
        others = [i for i in range(len(self.objects)) if i not in needed]
        return tuple(self.rng.sample(others, min(len(needed), len(others))))

    def scene(self, needed: tuple[int, ...], *words: str, distractors: tuple[int, ...] | None = None) -> Scene:
        """The finished scene; ``words`` are kind, question, answer, key, asks."""
        others = self.others(needed) if distractors is None else distractors
        return Scene(self.image, self.image, tuple(self.objects), needed, others, *words)
