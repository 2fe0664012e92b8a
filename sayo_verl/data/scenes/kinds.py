"""Scenes on a grid, and the questions about them. Each is unambiguous by construction.

    kind       question                                                  needed: the region       wrong-box control
    colour     What colour is the ring?                                  the ring                 another object
    shape      What shape is the red object?                             the red object           another object
    place      What colour is the ring in the top left?                  that ring                another object
    size       Is the red ring large or small?                           the red ring             another object
    count      How many red objects are there? How many rings are there? every counted object     uncounted objects
    relation   What colour is the object directly left of the red ring?  the answer's object and  two objects that are
               What shape is the object directly below the red ring?     the named one            neither

The wrong-box control has as many boxes as the region, or all other objects where they are fewer (count).

 - colour, shape: shapes and colours are distinct within a scene.
 - place: the object lies in that quarter of the grid; no other of its shape does, nor in the middle row or column that
   bounds it. ``repeat`` others of its shape, in other colours, lie elsewhere.
 - size: an object is as small or as large as the configuration allows, both occur, and only one is a red ring.
   ``repeat`` others share its colour or its shape.
 - count: 1 to ``max_count`` objects, never all of the scene and never none, since there would be no region.
 - relation: in the row (left, right) or column (above, below) of the named object, exactly one object lies on the asked
   side; further rows and columns and the other side are free. The two are lined up. ``repeat`` others share the colour
   or the shape of the named object, which alone has both; the answer's shares neither.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sayo_verl.data.scenes.config import QUESTIONS, SceneConfig
from sayo_verl.data.scenes.drawing import COLOURS, SHAPES, blank
from sayo_verl.data.scenes.types import Scene, SceneObject, put

# Of each place, whether its rows and its columns are the last ones of the grid.
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
# Of each direction, its axis (0: x, 1: y) and its sign.
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def one_object(rng: random.Random, config: SceneConfig, kinds: Sequence[str]) -> Scene:
    """The scenes of version 1, of one of ``kinds``: it is chosen last, and the order of the draws must stay."""
    n_objects = rng.randint(config.min_objects, config.max_objects)
    cells = rng.sample(range(config.grid**2), n_objects)
    shapes = rng.sample(SHAPES, n_objects)
    colours = rng.sample(tuple(COLOURS), n_objects)
    image = blank(config.image_size)
    objects = [put(rng, config, image, *what) for what in zip(cells, shapes, colours, strict=True)]
    target = rng.randrange(n_objects)
    others = [i for i in range(n_objects) if i != target]
    distractors = (rng.choice(others),) if others else ()
    kind = rng.choice(kinds)
    key, asks = ("shape", "colour") if kind == "colour" else ("colour", "shape")
    words = {"shape": shapes[target], "colour": colours[target]}
    question = QUESTIONS[kind].format(key=words[key])
    return Scene(image, image, tuple(objects), kind, question, words[asks], (target,), distractors, key, asks)


def place(rng: random.Random, config: SceneConfig) -> Scene:
    """What colour is the ring in the top left?"""
    where = rng.choice(tuple(PLACES))
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    inside, near = (_quarter(config.grid, where, wide=wide) for wide in (False, True))
    target = rng.choice(inside)
    far = [cell for cell in range(config.grid**2) if cell not in near]
    twins = rng.sample(far, config.repeat)
    image = blank(config.image_size)
    objects = [put(rng, config, image, target, shape, colour)]
    objects += [put(rng, config, image, cell, shape, _other(rng, COLOURS, colour)) for cell in twins]
    n_objects = rng.randint(config.min_objects, config.max_objects)
    _fill(rng, config, image, objects, n_objects, [target, *twins], shapes=_without(SHAPES, shape), colours=COLOURS)
    question = f"What colour is the {shape} in the {where}?"
    return _scene(rng, image, objects, "place", question, colour, needed=(0,), key="shape", asks="colour")


def size(rng: random.Random, config: SceneConfig) -> Scene:
    """Is the red ring large or small?"""
    radius = {"small": config.min_radius, "large": config.max_radius}
    n_objects = rng.randint(config.min_objects, config.max_objects)
    values = [rng.choice(("small", "large"))]
    values.append("large" if values[0] == "small" else "small")  # without both there is nothing to compare with
    values += [rng.choice(("small", "large")) for _ in range(n_objects - 2)]
    looks = _looks(rng, config, n_objects)
    order = [0, *rng.sample(range(1, n_objects), n_objects - 1)]  # the other size is not always that of the look-alike
    cells = rng.sample(range(config.grid**2), n_objects)
    image = blank(config.image_size)
    objects = [
        put(rng, config, image, cell, *looks[look], radius=radius[value], value=value)
        for cell, look, value in zip(cells, order, values, strict=True)
    ]
    question = f"Is the {objects[0].name} large or small?"
    return _scene(rng, image, objects, "size", question, values[0], needed=(0,), key="colour", asks="value")


def count(rng: random.Random, config: SceneConfig) -> Scene:
    """How many red objects are there? How many rings are there?"""
    n_objects = rng.randint(config.min_objects, config.max_objects)
    n_counted = rng.randint(1, min(config.max_count, n_objects - 1))
    by = rng.choice(("colour", "shape"))
    word = rng.choice(tuple(COLOURS) if by == "colour" else SHAPES)
    counted_shapes, counted_colours = ((word,), COLOURS) if by == "shape" else (SHAPES, (word,))
    shapes, colours = (_without(SHAPES, word), COLOURS) if by == "shape" else (SHAPES, _without(COLOURS, word))
    image = blank(config.image_size)
    objects: list[SceneObject] = []
    taken = _fill(rng, config, image, objects, n_counted, [], shapes=counted_shapes, colours=counted_colours)
    _fill(rng, config, image, objects, n_objects, taken, shapes=shapes, colours=colours)
    things = f"{word} objects" if by == "colour" else f"{word}es" if word.endswith("s") else f"{word}s"
    return _scene(
        rng,
        image,
        objects,
        "count",
        f"How many {things} are there?",
        str(n_counted),
        needed=tuple(range(n_counted)),
        key=by,
        asks="shape" if by == "colour" else "colour",
    )


def relation(rng: random.Random, config: SceneConfig) -> Scene:
    """What colour is the object directly left of the red ring?"""
    direction = rng.choice(tuple(DIRECTIONS))
    axis, sign = DIRECTIONS[direction]
    along, across = rng.randrange(config.grid - 1), rng.randrange(config.grid)
    if sign < 0:
        along += 1
    line = [_cell(config.grid, step, across, axis) for step in range(config.grid)]
    side = line[along + 1 :] if sign > 0 else line[:along]
    answer_cell, reference_cell = rng.choice(side), line[along]
    n_objects = rng.randint(config.min_objects, config.max_objects)
    looks = _looks(rng, config, n_objects, n_unlike=1)  # the named object, its look-alikes, the rest; the last answers
    free = [cell for cell in range(config.grid**2) if cell not in (*side, reference_cell)]
    image = blank(config.image_size)
    reference = put(rng, config, image, reference_cell, *looks[0])
    answer = put(rng, config, image, answer_cell, *looks[-1], aligned=(1 - axis, reference))
    cells = rng.sample(free, n_objects - 2)
    rest = [put(rng, config, image, cell, *look) for cell, look in zip(cells, looks[1:-1], strict=True)]
    key, asks = rng.choice((("shape", "colour"), ("colour", "shape")))
    question = f"What {asks} is the object directly {direction} the {reference.name}?"
    return _scene(
        rng,
        image,
        [answer, reference, *rest],
        "relation",
        question,
        answer.colour if asks == "colour" else answer.shape,
        needed=(0, 1),
        key=key,
        asks=asks,
        roles=("answer", "reference"),
    )


SAMPLERS: Mapping[str, Callable[[random.Random, SceneConfig], Scene]] = {
    "place": place,
    "size": size,
    "count": count,
    "relation": relation,
}


def distractors_of(rng: random.Random, n_objects: int, needed: Sequence[int]) -> tuple[int, ...]:
    """Random objects that are not needed, as many as are needed or as there are."""
    others = [i for i in range(n_objects) if i not in needed]
    return tuple(rng.sample(others, min(len(needed), len(others))))


def _scene(
    rng: random.Random,
    image: np.ndarray,
    objects: Sequence[SceneObject],
    kind: str,
    question: str,
    answer: str,
    *,
    needed: tuple[int, ...],
    key: str,
    asks: str,
    roles: tuple[str, ...] = (),
) -> Scene:
    distractors = distractors_of(rng, len(objects), needed)
    return Scene(image, image, tuple(objects), kind, question, answer, needed, distractors, key, asks, roles)


def _fill(
    rng: random.Random,
    config: SceneConfig,
    image: np.ndarray,
    objects: list[SceneObject],
    up_to: int,
    taken: Sequence[int],
    *,
    shapes: Sequence[str],
    colours: Mapping[str, object] | Sequence[str],
) -> list[int]:
    """Draw random objects into free cells until there are ``up_to``; return the cells that are taken then."""
    free = [cell for cell in range(config.grid**2) if cell not in taken]
    cells = rng.sample(free, up_to - len(objects))
    objects += [put(rng, config, image, cell, rng.choice(shapes), rng.choice(tuple(colours))) for cell in cells]
    return [*taken, *cells]


def _looks(rng: random.Random, config: SceneConfig, n_objects: int, n_unlike: int = 0) -> list[tuple[str, str]]:
    """(shape, colour) of each object: the named one, ``repeat`` that share one of its words, others that share none.

    ``n_unlike``: how many at the end share none in any case.
    """
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    looks = [(shape, colour)]
    for _ in range(min(config.repeat, n_objects - 1 - n_unlike)):
        by_shape = rng.random() < 0.5
        looks.append((shape, _other(rng, COLOURS, colour)) if by_shape else (_other(rng, SHAPES, shape), colour))
    looks += [(_other(rng, SHAPES, shape), _other(rng, COLOURS, colour)) for _ in range(n_objects - len(looks))]
    return looks


def _without(words: Mapping[str, object] | Sequence[str], word: str) -> tuple[str, ...]:
    return tuple(other for other in words if other != word)


def _other(rng: random.Random, words: Mapping[str, object] | Sequence[str], word: str) -> str:
    return rng.choice(_without(words, word))


def _cell(grid: int, along: int, across: int, axis: int) -> int:
    """The cell at ``along`` on the axis (0: x, 1: y) and ``across`` on the other."""
    return across * grid + along if axis == 0 else along * grid + across


def _quarter(grid: int, where: str, *, wide: bool) -> list[int]:
    """Cells of a quarter of the grid; ``wide``: with the middle row and column, which an odd grid has."""
    half = grid - grid // 2 if wide else grid // 2
    rows, columns = (range(grid - half, grid) if last else range(half) for last in PLACES[where])
    return [row * grid + column for row in rows for column in columns]
