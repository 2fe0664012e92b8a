"""Bar charts and the questions about them: bars of distinct colours and heights on a grid of whole numbers.

    kind      question                                     answer    needed: the region   wrong-box control
    highest   Which bar is the highest? ... the lowest?    a colour  that bar             another bar
    height    How high is the red bar?                     a number  that bar             another bar
    higher    Which bar is higher, the red or the blue?    a colour  both bars            up to two other bars

For ``highest`` all bars have to be looked at; the region is the bar that answers, else no bar were left for the
control. The numbers of the scale are drawn as pixels and have no box. A box is exact: the bar, from its top line to the
base line. A bar of height k is as high as line k of the grid.
"""

import random

from sayo_verl.data.scenes.config import SceneConfig
from sayo_verl.data.scenes.drawing import COLOURS, blank, chart_frame, draw_bar, draw_chart
from sayo_verl.data.scenes.kinds import distractors_of
from sayo_verl.data.scenes.types import Scene, SceneObject


def bars(rng: random.Random, config: SceneConfig, kind: str) -> Scene:
    """A chart and a question of ``kind`` about it."""
    n_bars = rng.randint(config.min_bars, config.max_bars)
    colours = rng.sample(tuple(COLOURS), n_bars)
    heights = rng.sample(range(1, config.bar_levels + 1), n_bars)
    image = blank(config.image_size)
    frame = chart_frame(config.image_size, config.bar_levels)
    draw_chart(image, frame, config.bar_levels)
    slot = frame.width // n_bars
    objects = []
    needed: tuple[int, ...]
    for place, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        width = rng.randint(max(3, slot // 2), slot - 2)
        x0 = frame.left + place * slot + 1 + rng.randint(0, slot - 2 - width)
        objects.append(SceneObject("bar", colour, draw_bar(image, frame, colour, x0, width, height), str(height)))
    if kind == "highest":
        word = rng.choice(("highest", "lowest"))
        target = heights.index(max(heights) if word == "highest" else min(heights))
        question, answer, needed = f"Which bar is the {word}?", colours[target], (target,)
    elif kind == "height":
        target = rng.randrange(n_bars)
        question, answer, needed = f"How high is the {colours[target]} bar?", str(heights[target]), (target,)
    elif kind == "higher":
        a, b = rng.sample(range(n_bars), 2)
        question = f"Which bar is higher, the {colours[a]} or the {colours[b]}?"
        needed = (a, b) if heights[a] > heights[b] else (b, a)
        answer = colours[needed[0]]
    else:
        raise AssertionError(f"no question about bars: {kind}")
    roles = ("answer", "other") if kind == "higher" else ()
    distractors = distractors_of(rng, n_bars, needed)
    return Scene(image, image, tuple(objects), kind, question, answer, needed, distractors, "colour", "value", roles)
