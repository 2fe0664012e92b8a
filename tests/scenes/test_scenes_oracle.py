"""An oracle that sees pixels and question alone answers every drawn scene."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scenes import A_COLOUR, A_SHAPE, pixels_of

from sayo_verl.errors import SayoError
from sayo_verl.reward import compute_score
from sayo_verl.scenes import QUESTIONS, SceneConfig, sample_scene
from sayo_verl.scenes.config import BAR_KINDS, KINDS
from sayo_verl.scenes.drawing import BACKGROUND, COLOURS, GRID_LINE, INK, SHAPES, stencil


def _tight(mask: np.ndarray) -> tuple[int, ...]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _seen_objects(image: np.ndarray, grid: int) -> list[dict]:
    """One object for each cell that is not empty: its colour, shape and tight box."""
    side = len(image) // grid
    found = []
    for row in range(grid):
        for column in range(grid):
            cell = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
            colours = [colour for colour in COLOURS if pixels_of(cell, colour).any()]
            assert len(colours) <= 1
            for colour in colours:
                mask = pixels_of(cell, colour)
                x0, y0, x1, y1 = _tight(mask)
                shapes = [s for s in SHAPES if np.array_equal(stencil(s, (x1 - x0) // 2), mask[y0:y1, x0:x1])]
                assert len(shapes) == 1
                dx, dy = column * side, row * side
                found.append({"shape": shapes[0], "colour": colour, "box": (x0 + dx, y0 + dy, x1 + dx, y1 + dy)})
    assert sum(pixels_of(image, c).sum() for c in COLOURS) == (image != BACKGROUND).any(-1).sum()
    return found


def _seen_bars(image: np.ndarray) -> list[dict]:
    """Every bar: its colour, its box, and its height read off the lines at the right edge."""
    edge = image[:, -2, 0].astype(int)  # right of every bar: lines alone
    (base,) = np.nonzero(edge == INK)[0]
    lines = [base, *sorted(np.nonzero(edge == GRID_LINE)[0], reverse=True)]
    assert len(set(np.diff(lines))) == 1
    found = []
    for colour in COLOURS:
        mask = pixels_of(image, colour)
        if mask.any():
            x0, y0, x1, y1 = box = _tight(mask)
            assert mask[y0:y1, x0:x1].all()
            assert y1 == base
            found.append({"shape": "bar", "colour": colour, "box": box, "height": lines.index(y0)})
    return found


def _one(things: list) -> dict:
    (thing,) = things
    return thing


def _named(seen: list[dict], colour: str, shape: str) -> dict:
    return _one([o for o in seen if (o["colour"], o["shape"]) == (colour, shape)])


def _size_answer(seen, size, colour, shape):
    widths = sorted({o["box"][2] - o["box"][0] for o in seen})
    assert len(widths) == 2
    thing = _named(seen, colour, shape)
    return ("small", "large")[widths.index(thing["box"][2] - thing["box"][0])], [thing]


def _place_answer(seen, size, shape, vertical, horizontal):
    half = size / 2
    x0, y0 = (half if horizontal == "right" else 0), (half if vertical == "bottom" else 0)

    def touches(box):
        return box[0] < x0 + half and box[2] > x0 and box[1] < y0 + half and box[3] > y0

    thing = _one([o for o in seen if o["shape"] == shape and touches(o["box"])])
    box = thing["box"]
    assert x0 <= box[0] < box[2] <= x0 + half
    assert y0 <= box[1] < box[3] <= y0 + half
    return thing["colour"], [thing]


def _count_answer(seen, size, colour, shape):
    counted = [o for o in seen if (o["colour"] == colour if colour else o["shape"] == shape)]
    assert 0 < len(counted) < len(seen)
    return str(len(counted)), counted


def _relation_answer(seen, size, asked, direction, colour, shape):
    named = _named(seen, colour, shape)
    axis = 0 if direction in ("left of", "right of") else 1
    low, high = named["box"][axis], named["box"][axis + 2]
    cross = 1 - axis

    def qualifies(other):
        box = other["box"]
        lined_up = box[cross] < named["box"][cross + 2] and box[cross + 2] > named["box"][cross]
        return lined_up and (box[axis + 2] <= low if direction in ("left of", "above") else box[axis] >= high)

    answer = _one([o for o in seen if qualifies(o)])
    return answer[asked], [answer, named]


def _extreme_answer(seen, size, word):
    ordered = sorted(seen, key=lambda bar: bar["height"], reverse=word == "highest")
    assert ordered[0]["height"] != ordered[1]["height"]
    return ordered[0]["colour"], [ordered[0]]


def _higher_answer(seen, size, first, second):
    a, b = (_named(seen, colour, "bar") for colour in (first, second))
    assert a["height"] != b["height"]
    return max((a, b), key=lambda bar: bar["height"])["colour"], sorted((a, b), key=lambda bar: -bar["height"])


def _word_answer(key, asked):
    def answer(seen, size, word):
        thing = _one([o for o in seen if o[key] == word])
        return str(thing[asked]), [thing]

    return answer


ORACLE = {
    "colour": (rf"What colour is the ({A_SHAPE})\?", _word_answer("shape", "colour")),
    "shape": (rf"What shape is the ({A_COLOUR}) object\?", _word_answer("colour", "shape")),
    "place": (rf"What colour is the ({A_SHAPE}) in the (top|bottom) (left|right)\?", _place_answer),
    "size": (rf"Is the ({A_COLOUR}) ({A_SHAPE}) large or small\?", _size_answer),
    "count": (rf"How many (?:({A_COLOUR}) objects|({A_SHAPE})(?:s|(?<=cross)es)) are there\?", _count_answer),
    "relation": (
        rf"What (colour|shape) is the object directly (left of|right of|above|below) the ({A_COLOUR}) ({A_SHAPE})\?",
        _relation_answer,
    ),
    "highest": (r"Which bar is the (highest|lowest)\?", _extreme_answer),
    "height": (rf"How high is the ({A_COLOUR}) bar\?", _word_answer("colour", "height")),
    "higher": (rf"Which bar is higher, the ({A_COLOUR}) or the ({A_COLOUR})\?", _higher_answer),
}


CONFIGS = {
    "default": {},
    "small": {"image_size": 64, "grid": 2, "min_objects": 3, "max_objects": 4},
    "crowded": {"image_size": 167, "grid": 5, "min_objects": 8, "max_objects": 20, "min_radius": 4, "max_radius": 13},
}
MORE = {
    ("crowded", "place"): {"repeat": 5},
    ("crowded", "size"): {"repeat": 7},
    ("crowded", "relation"): {"repeat": 6},
    ("crowded", "count"): {"max_count": 9},
    ("small", "count"): {"max_count": 3},
    ("small", "relation"): {"repeat": 0},
}
BAR_CONFIGS = {
    "small": {"bar_levels": 5, "min_bars": 2},
    "crowded": {"bar_levels": 12, "min_bars": 6, "max_bars": 6},
}


def _config(name: str, kind: str, **more) -> SceneConfig:
    chosen = dict(CONFIGS[name])
    if kind in QUESTIONS:
        chosen["max_objects"] = min(6, chosen.get("max_objects", 6))
        chosen["min_objects"] = min(5, chosen.get("min_objects", 5))
    chosen |= BAR_CONFIGS.get(name, {}) if kind in BAR_KINDS else MORE.get((name, kind), {})
    return SceneConfig(question_kinds=(kind,), **{**chosen, **more})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_pixels_and_question_alone_give_the_answer_and_the_boxes(kind, name, seed):
    config = _config(name, kind)
    scene = sample_scene(random.Random(seed), config)
    seen = _seen_bars(scene.image) if kind in BAR_KINDS else _seen_objects(scene.image, config.grid)
    said = [{"shape": o.shape, "colour": o.colour, "box": o.box} for o in scene.objects]
    order = sorted(said, key=lambda o: o["box"])
    assert [{key: o[key] for key in ("shape", "colour", "box")} for o in sorted(seen, key=lambda o: o["box"])] == order
    pattern, answer_of = ORACLE[kind]
    answer, needed = answer_of(seen, config.image_size, *re.fullmatch(pattern, scene.question).groups())
    assert scene.answer == answer
    boxes = [scene.objects[i].box for i in scene.needed]
    if kind == "count":
        assert sorted(boxes) == sorted(thing["box"] for thing in needed)
    else:  # the answer's comes first
        assert boxes == [thing["box"] for thing in needed]
    n_others = len(scene.objects) - len(scene.needed)
    assert len(set(scene.distractors)) == len(scene.distractors) == min(len(scene.needed), n_others)
    assert not set(scene.distractors) & set(scene.needed)
    assert scene.target == scene.needed[0]
    response = f"<think>x</think><answer>{scene.answer}</answer>"
    assert compute_score("", response, scene.answer)["score"] == 2.0
    assert re.fullmatch("[a-z]+|[1-9][0-9]*", scene.answer)


@settings(derandomize=True, deadline=None, max_examples=250)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True),
    sizes=st.fixed_dictionaries(
        {"image_size": st.integers(40, 200), "grid": st.integers(1, 5), "min_objects": st.integers(2, 6)},
        optional={
            "repeat": st.integers(0, 3),
            "max_count": st.integers(1, 4),
            "min_bars": st.integers(2, 4),
            "max_bars": st.integers(3, 6),
            "bar_levels": st.integers(3, 16),
            "clutter": st.integers(0, 20),
            "noise": st.integers(0, 32),
        },
    ),
    more_objects=st.integers(0, 2),
    min_radius=st.integers(3, 8),
    more_radius=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_whatever_is_not_refused_can_be_drawn(kinds, sizes, more_objects, min_radius, more_radius, seed):
    counts = {"max_objects": sizes["min_objects"] + more_objects, "max_radius": min_radius + more_radius}
    try:
        config = SceneConfig(question_kinds=tuple(kinds), min_radius=min_radius, **sizes, **counts)
    except SayoError:
        return
    scene = sample_scene(random.Random(seed), config)
    assert scene.image.shape == (config.image_size, config.image_size, 3)
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        assert 0 <= x0 < x1 <= config.image_size
        assert 0 <= y0 < y1 <= config.image_size
        inside = pixels_of(scene.drawing[y0:y1, x0:x1], thing.colour)
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["place", "size", "relation"])
def test_as_many_look_alikes_as_asked_for(kind, name):
    config = _config(name, kind)
    for seed in range(40):
        scene = sample_scene(random.Random(seed), config)
        named = scene.objects[scene.needed[-1]]  # of a relation the reference
        others = [o for o in scene.objects if o is not named]
        if kind == "place":
            shared = [o.shape == named.shape for o in others]
            assert all(o.colour != named.colour for o in others if o.shape == named.shape)
        else:
            shared = [o.shape == named.shape or o.colour == named.colour for o in others]
        assert sum(shared) == config.repeat


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_rare_and_none_stands_out(kind):
    """Nothing but the picture gives the answer away: each occurs about as often as the others."""
    words = {"shape": set(SHAPES), "size": {"large", "small"}, "relation": {*COLOURS, *SHAPES}}
    wanted = (words | {"count": set("1234"), "height": set("123456")}).get(kind, set(COLOURS))
    config = SceneConfig(question_kinds=(kind,))
    answers = Counter(sample_scene(random.Random(f"{kind}/{i}"), config).answer for i in range(600))
    assert set(answers) == wanted
    assert min(answers.values()) > 0.6 * 600 / len(wanted)
    assert max(answers.values()) < 1.4 * 600 / len(wanted)


@pytest.mark.parametrize("kind", ["size", "relation", "higher"])
def test_the_order_of_words_and_the_place_do_not_give_the_answer_away(kind):
    config = SceneConfig(question_kinds=(kind,))
    scenes = [sample_scene(random.Random(i), config) for i in range(600)]
    if kind == "higher":
        shares = [sum(re.search(r"the (\w+) or", s.question).group(1) == s.answer for s in scenes) / 600]
        halves = [0.5]
    elif kind == "size":  # a look-alike of the other size must not be the rule
        alike = [
            o.value != s.answer
            for s in scenes
            for i, o in enumerate(s.objects)
            if i and {o.shape, o.colour} & {s.objects[0].shape, s.objects[0].colour}
        ]
        shares, halves = [sum(alike) / len(alike)], [0.6]  # 1 of 4 or 5 others is of the other size for certain
    else:
        found = Counter(re.search(r"directly (left of|right of|above|below)", s.question).group(1) for s in scenes)
        shares, halves = [found[word] / 600 for word in ("left of", "right of", "above", "below")], [0.25] * 4
    assert shares == pytest.approx(halves, abs=0.08)
