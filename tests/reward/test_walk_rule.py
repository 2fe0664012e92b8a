"""The rule of the reward function for rows of walks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.reward import compute_score
from sayo_verl.reward.walk import WALK_SOURCES, is_walk, walk_of
from sayo_verl.scenes.walk import WalkConfig, demonstration, sample_walk

WALK = {"grid": 3, "start": 4, "directions": [0, 0, 0, 0, 1, 2, 0, 0, 1], "steps": 2, "moves": []}
RIGHT = " then b2 right , so c2 down , answer c3"


def scored(response: str, truth: str = "c3", source: str = "sayo/walk", **changes):
    return compute_score(source, response, truth, {"walk": WALK | changes, "num_turns": 2})


@pytest.mark.parametrize(
    ("response", "score", "format", "marks"),
    [
        (RIGHT, 1.0, 1.0, "..P...P..."),
        ("then  b2 right ,\nso c2 down , answer c3 ", 1.0, 1.0, "..P...P..."),
        (RIGHT.replace("down", "up"), 1.0, 1.0, "..P...E..x"),  # the answer contradicts the text and is the end
        (RIGHT.replace("c3", "b3"), 0.0, 1.0, "..P...P..x"),
        (f"{RIGHT} c3", 0.0, 0.0, "..P...P...x"),
        (RIGHT.removesuffix(" c3"), 0.0, 0.0, "..P...P.."),
        (RIGHT.replace(" ,", ""), 0.0, 0.0, "..PxxxEx"),
        (f"<think>{RIGHT}</think><answer> c3</answer>", 0.0, 0.0, None),
        ("", 0.0, 0.0, ""),
    ],
)
def test_the_score_of_a_response_by_hand(response, score, format, marks):
    found = scored(response)
    assert (found["score"], found["acc"], found["format"]) == (score, score, format)
    assert marks is None or found["walk_marks"] == marks


@given(st.integers(0, 10**6), st.sampled_from(("image", "text")), st.sampled_from((0.0, 0.4)))
def test_the_score_is_the_truth_of_the_walk(seed, moves, slip):
    walk = sample_walk(random.Random(seed), WalkConfig(moves=moves, steps=4))
    words = demonstration(walk, random.Random(seed), slip)
    given_ = {
        "grid": 4,
        "start": walk.start,
        "directions": list(walk.directions),
        "steps": 4,
        "moves": list(walk.moves),
    }
    truth = walk.truth(words)
    assert compute_score("sayo/walk", " ".join(words), walk.answer, {"walk": given_}) == {
        "score": float(truth.rewarded),
        "acc": float(truth.rewarded),
        "format": 1.0,
        "walk_marks": truth.marks,
    }


def test_only_the_data_source_selects_the_rule():
    assert all(scored(RIGHT, source=source)["score"] == 1.0 for source in WALK_SOURCES)
    assert not is_walk("sayo/scenes")
    answered = "<think>x</think><answer>c3</answer>"
    assert scored(answered, source="sayo/scenes") == {"score": 2.0, "acc": 1.0, "format": 1.0}


def test_no_setting_changes_the_score():
    settings = {"format_weight": 0.5, "accuracy_weight": 0.0, "format": "released", "think_opened": True}
    assert compute_score("sayo/walk", RIGHT, "c3", {"walk": WALK}, **settings) == scored(RIGHT)


def test_a_long_response_costs_its_length():
    found = scored("then " * 100_000)
    assert found["score"] == 0.0
    assert len(found["walk_marks"]) < 20_000


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": 2},
        {"grid": "3"},
        {"start": 9},
        {"start": -1},
        {"steps": 0},
        {"steps": 9},
        {"steps": True},
        {"directions": [0] * 8},
        {"directions": [4] * 9},
        {"directions": None},
        {"directions": [1.0] * 9},
        {"moves": [1]},
        {"moves": [1, 9]},
    ],
)
def test_an_impossible_walk_is_refused(changes):
    with refusal("D81", "no valid walk"):
        scored(RIGHT, **changes)


def test_a_row_without_its_walk_or_with_another_end_is_refused():
    for info in (None, {}, {"walk": None}, {"walk": [1]}):
        with refusal("D81", "no valid walk"):
            compute_score("sayo/walk", RIGHT, "c3", info)
    with refusal("D81", "is not its end.*got 'b3', wanted 'c3'"):
        scored(RIGHT, truth="b3")
    assert walk_of({"walk": WALK | {"moves": [3, 3]}}, "c2").moves == (3, 3)
