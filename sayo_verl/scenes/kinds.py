"""The questions about drawn scenes. Each is unambiguous by construction.

    kind       question                                                  needed: the region       wrong-box control
    colour     What colour is the ring?                                  the ring                 another object
    shape      What shape is the red object?                             the red object           another object
    place      What colour is the ring in the top left?                  that ring                another object
    size       Is the red ring large or small?                           the red ring             another object
    count      How many red objects are there? How many rings are there? every counted object     uncounted objects
    relation   What colour is the object directly left of the red ring?  the answer's object and  two objects that are
               What shape is the object directly below the red ring?     the named one            neither
    highest    Which bar is the highest? ... the lowest?                 that bar                 another bar
    height     How high is the red bar?                                  that bar                 another bar
    higher     Which bar is higher, the red or the blue?                 both bars                up to two other bars

The wrong-box control has as many boxes as the region, or all other objects where they are fewer.

 - colour, shape: shapes and colours are distinct within a scene.
 - place: no other object of its shape is in that quarter of the grid, nor in the middle row or column that bounds it;
   ``repeat`` others of its shape, in other colours, are elsewhere.
 - size: an object is as small or as large as the configuration allows, both occur, and only one is a red ring.
   ``repeat`` others share its colour or its shape.
 - count: 1 to ``max_count`` objects, never all of the scene and never none, since there would be no region.
 - relation: in the row (left, right) or column (above, below) of the named object, lined up with it, exactly one object
   is on the asked side. ``repeat`` others share the colour or the shape of the named object, the answer's neither.
 - highest, height, higher: bars of distinct colours and heights; a bar of height k is as high as line k of the scale,
   whose numbers have no box. For highest the region is the bar that answers: else no bar were left for the control.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sayo_verl.scenes import drawing
from sayo_verl.scenes.config import BAR_KINDS, QUESTIONS, SceneConfig
from sayo_verl.scenes.drawing import COLOURS, SHAPES
from sayo_verl.scenes.scene import Canvas, Scene, SceneObject

# place -> whether its rows and its columns are the last ones of the grid; direction -> axis (0: x, 1: y) and sign
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
COLOUR_NAMES = tuple(COLOURS)


def sample_scene(rng: random.Random, config: SceneConfig) -> Scene:
    """Draw one scene and ask one question; only ``rng`` decides which."""
    kinds = config.question_kinds
    if not set(kinds) <= set(QUESTIONS):
        kinds = (rng.choice(kinds),)
    canvas = Canvas(rng, config)
    if kinds[0] in QUESTIONS:
        scene = _one_object(canvas, kinds)
    else:
        on_grid = {"place": _place, "size": _size, "count": _count, "relation": _relation}
        scene = _bars(canvas, kinds[0]) if kinds[0] in BAR_KINDS else on_grid[kinds[0]](canvas)
    if config.clutter or config.noise:
        image = scene.drawing.copy()
        drawing.add_clutter(image, rng, config.clutter)
        scene = replace(scene, image=drawing.add_noise(image, rng, config.noise) if config.noise else image)
    return scene


def _one_object(canvas: Canvas, kinds: Sequence[str]) -> Scene:
    rng, n_objects = canvas.rng, canvas.n_objects()
    cells = rng.sample(range(canvas.config.grid**2), n_objects)
    for cell, *look in zip(cells, rng.sample(SHAPES, n_objects), rng.sample(COLOUR_NAMES, n_objects), strict=True):
        canvas.put(cell, (look[0], look[1]))
    needed = (rng.randrange(n_objects),)
    distractors, kind = canvas.others(needed), rng.choice(kinds)  # in this order: recorded results rely on it
    key, asks = ("shape", "colour") if kind == "colour" else ("colour", "shape")
    target = canvas.objects[needed[0]]
    question, answer = QUESTIONS[kind].format(key=getattr(target, key)), getattr(target, asks)
    return canvas.scene(needed, kind, question, answer, key, asks, distractors=distractors)


def _place(canvas: Canvas) -> Scene:
    rng, config = canvas.rng, canvas.config
    where = rng.choice(tuple(PLACES))
    shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
    target = rng.choice(_quarter(config.grid, where, wide=False))
    near = _quarter(config.grid, where, wide=True)
    twins = rng.sample([cell for cell in range(config.grid**2) if cell not in near], config.repeat)
    canvas.put(target, (shape, colour))
    for cell in twins:
        canvas.put(cell, (shape, _other(rng, COLOURS, colour)))
    canvas.fill(canvas.n_objects(), _without(SHAPES, shape), COLOUR_NAMES)
    question = f"What colour is the {shape} in the {where}?"
    return canvas.scene((0,), "place", question, colour, "shape", "colour")


def _size(canvas: Canvas) -> Scene:
    rng, config, n_objects = canvas.rng, canvas.config, canvas.n_objects()
    radius = {"small": config.min_radius, "large": config.max_radius}
    values = [rng.choice(("small", "large"))]
    values.append("large" if values[0] == "small" else "small")  # without both there is nothing to compare with
    values += [rng.choice(("small", "large")) for _ in range(n_objects - 2)]
    looks = _looks(rng, config, n_objects)
    order = [0, *rng.sample(range(1, n_objects), n_objects - 1)]  # the other size is not always that of the look-alike
    cells = rng.sample(range(config.grid**2), n_objects)
    for cell, look, value in zip(cells, order, values, strict=True):
        canvas.put(cell, looks[look], radius[value], value)
    question = f"Is the {canvas.objects[0].name} large or small?"
    return canvas.scene((0,), "size", question, values[0], "colour", "value")


def _count(canvas: Canvas) -> Scene:
    rng, n_objects = canvas.rng, canvas.n_objects()
    n_counted = rng.randint(1, min(canvas.config.max_count, n_objects - 1))
    key, asks = rng.choice((("colour", "shape"), ("shape", "colour")))
    word = rng.choice(COLOUR_NAMES if key == "colour" else SHAPES)
    for up_to, words in ((n_counted, (word,)), (n_objects, _without(COLOURS if key == "colour" else SHAPES, word))):
        canvas.fill(up_to, *((SHAPES, words) if key == "colour" else (words, COLOUR_NAMES)))
    things = f"{word} objects" if key == "colour" else f"{word}es" if word.endswith("s") else f"{word}s"
    question, needed = f"How many {things} are there?", tuple(range(n_counted))
    return canvas.scene(needed, "count", question, str(n_counted), key, asks)


def _relation(canvas: Canvas) -> Scene:
    rng, grid = canvas.rng, canvas.config.grid
    direction = rng.choice(tuple(DIRECTIONS))
    axis, sign = DIRECTIONS[direction]
    along, across = rng.randrange(grid - 1) + (sign < 0), rng.randrange(grid)
    line = [across * grid + step if axis == 0 else step * grid + across for step in range(grid)]
    side = line[along + 1 :] if sign > 0 else line[:along]
    answer_cell, reference_cell = rng.choice(side), line[along]
    n_objects = canvas.n_objects()
    looks = _looks(rng, canvas.config, n_objects, n_unlike=1)  # the named object, its look-alikes, the rest, the answer
    free = [cell for cell in range(grid**2) if cell not in (*side, reference_cell)]
    reference = canvas.put(reference_cell, looks[0])
    answer = canvas.put(answer_cell, looks[-1], aligned=(1 - axis, reference))
    for cell, look in zip(rng.sample(free, n_objects - 2), looks[1:-1], strict=True):
        canvas.put(cell, look)
    canvas.objects[:2] = [answer, reference]
    key, asks = rng.choice((("shape", "colour"), ("colour", "shape")))
    question = f"What {asks} is the object directly {direction} the {reference.name}?"
    return canvas.scene((0, 1), "relation", question, getattr(answer, asks), key, asks)


def _bars(canvas: Canvas, kind: str) -> Scene:
    rng, config = canvas.rng, canvas.config
    n_bars = rng.randint(config.min_bars, config.max_bars)
    colours = rng.sample(COLOUR_NAMES, n_bars)
    heights = rng.sample(range(1, config.bar_levels + 1), n_bars)
    frame = drawing.chart_frame(config.image_size, config.bar_levels)
    drawing.draw_chart(canvas.image, frame, config.bar_levels)
    slot = frame.width // n_bars
    for at, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        width = rng.randint(max(3, slot // 2), slot - 2)
        x0 = frame.left + at * slot + 1 + rng.randint(0, slot - 2 - width)
        top = frame.base - height * frame.step
        canvas.image[top : frame.base, x0 : x0 + width] = COLOURS[colour]
        canvas.objects.append(SceneObject("bar", colour, (x0, top, x0 + width, frame.base), str(height)))
    needed: tuple[int, ...]
    if kind == "higher":
        a, b = rng.sample(range(n_bars), 2)
        question = f"Which bar is higher, the {colours[a]} or the {colours[b]}?"
        needed = (a, b) if heights[a] > heights[b] else (b, a)
    elif kind == "height":
        needed = (rng.randrange(n_bars),)
        question = f"How high is the {colours[needed[0]]} bar?"
    else:
        word = rng.choice(("highest", "lowest"))
        needed = (heights.index(max(heights) if word == "highest" else min(heights)),)
        question = f"Which bar is the {word}?"
    answer = str(heights[needed[0]]) if kind == "height" else colours[needed[0]]
    return canvas.scene(needed, kind, question, answer, "colour", "value")


def _looks(rng: random.Random, config: SceneConfig, n_objects: int, n_unlike: int = 0) -> list[tuple[str, str]]:
    """(shape, colour) of the named object, of ``repeat`` that share one of its words, of others that share none.

    ``n_unlike``: how many at the end share none in any case.
    """
    shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
    looks = [(shape, colour)]
    for _ in range(min(config.repeat, n_objects - 1 - n_unlike)):
        by_shape = rng.random() < 0.5
        looks.append((shape, _other(rng, COLOURS, colour)) if by_shape else (_other(rng, SHAPES, shape), colour))
    looks += [(_other(rng, SHAPES, shape), _other(rng, COLOURS, colour)) for _ in range(n_objects - len(looks))]
    return looks


def _without(words: Iterable[str], word: str) -> tuple[str, ...]:
    return tuple(other for other in words if other != word)


def _other(rng: random.Random, words: Iterable[str], word: str) -> str:
    return rng.choice(_without(words, word))


def _quarter(grid: int, where: str, *, wide: bool) -> list[int]:
    """Cells of a quarter of the grid; ``wide``: with the middle row and column, which an odd grid has."""
    half = grid - grid // 2 if wide else grid // 2
    rows, columns = (range(grid - half, grid) if last else range(half) for last in PLACES[where])
    return [row * grid + column for row in rows for column in columns]
