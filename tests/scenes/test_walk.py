"""Walks over a grid of arrows: what is drawn and asked, and what is true of every word of a response."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.scenes.drawing import BACKGROUND, COLOURS
from sayo_verl.scenes.walk import COLOUR_NAMES, Walk, WalkConfig, arrow, demonstration, sample_walk
from sayo_verl.scenes.walk_truth import ANSWER, COMMA, DIRECTIONS, FILLERS, cell_names, neighbours, walk_truth

SEEDS = st.integers(0, 10**9)
# A 3 x 3 grid in rows from the top: a1 b1 c1 / a2 b2 c2 / a3 b3 c3. Start at b2, then c2, c3, a3.
UP, RIGHT, DOWN = 0, 1, 2
ARROWS = [UP, UP, UP, UP, RIGHT, DOWN, UP, UP, RIGHT]
CLEAN = ["then", "b2", "right", ",", "so", "c2", "down", ",", "ok", "c3", "right", ",", "answer", "a3"]
SLIPPED = ["then", "b2", "up", ",", "so", "b1", "up", ",", "ok", "b3", "up", ",", "answer", "b2"]


@st.composite
def configs(draw) -> WalkConfig:
    grid = draw(st.integers(3, 6))
    return WalkConfig(
        grid=grid,
        steps=draw(st.integers(1, grid**2 - 2)),
        more_steps=1,
        cell_pixels=draw(st.sampled_from((16, 32))),
        look_alikes=draw(st.sampled_from((0.0, 0.5))),
        jitter=draw(st.integers(0, 2)),
        clutter=draw(st.sampled_from((0, 8))),
        noise=draw(st.sampled_from((0, 32))),
        moves=draw(st.sampled_from(("image", "text"))),
    )


def truth_of(words: list[str], **changes):
    return walk_truth(words, **({"grid": 3, "start": 4, "directions": ARROWS, "steps": 3} | changes))


def changed(at: int, word: str) -> list[str]:
    return [word if i == at else other for i, other in enumerate(CLEAN)]


# ------------------------------------------------------------------------------------------------------------ the walk


@given(configs(), SEEDS, st.booleans(), st.booleans())
def test_a_path_follows_its_arrows_and_visits_no_cell_twice(config, seed, longer, new_pairs):
    walk = sample_walk(random.Random(seed), config, longer=longer, new_pairs=new_pairs)
    assert len(set(walk.path)) == len(walk.path) == config.steps + longer + 1
    following = neighbours(config.grid)
    for here, there in zip(walk.path, walk.path[1:], strict=False):
        assert following[here][walk.directions[here]] == there
    names = cell_names(config.grid)
    assert (walk.path[0], names[walk.path[-1]]) == (walk.start, walk.answer)
    assert walk.question.startswith(f"Start at {names[walk.start]} . Walk ")


@given(configs(), SEEDS)
def test_the_boxes_are_exactly_the_cells_of_the_path_in_order(config, seed):
    walk, side = sample_walk(random.Random(seed), replace(config, moves="image")), config.cell_pixels
    assert walk.image is not None
    assert walk.image.size == (config.grid * side, config.grid * side)
    cells = np.arange(config.grid**2).reshape(config.grid, config.grid).repeat(side, 0).repeat(side, 1)
    for cell, (x0, y0, x1, y1) in zip(walk.path[:-1], walk.boxes, strict=True):
        inside = np.zeros_like(cells, dtype=bool)
        inside[y0:y1, x0:x1] = True
        assert np.array_equal(inside, cells == cell)


@given(configs(), SEEDS)
def test_a_walk_depends_on_the_seed_alone(config, seed):
    one, other = (sample_walk(random.Random(seed), config) for _ in range(2))
    assert one == other
    assert one != sample_walk(random.Random(seed + 1), config)


def test_long_paths_are_found_on_every_grid():
    for grid in range(3, 9):
        config = WalkConfig(grid=grid, steps=grid**2 - 1, more_steps=0, moves="text")
        assert len(sample_walk(random.Random(0), config).path) == grid**2


def test_walks_have_min_steps_to_steps():
    config = WalkConfig(steps=5, min_steps=3, moves="text")
    assert {sample_walk(random.Random(seed), config).steps for seed in range(60)} == {3, 4, 5}
    assert sample_walk(random.Random(0), config, longer=True).steps == 9


@given(configs(), SEEDS)
def test_held_out_pairs_are_drawn_only_where_they_are_asked_for(config, seed):
    pairs = {(COLOUR_NAMES.index(c), DIRECTIONS.index(d)) for c, d in (p.split("-") for p in config.held_out_pairs)}
    known, new = (sample_walk(random.Random(seed), config, new_pairs=asked) for asked in (False, True))
    assert pairs.isdisjoint(zip(known.colours, known.directions, strict=True))
    assert {(new.colours[cell], new.directions[cell]) for cell in new.path[:-1]} <= pairs


def test_the_question_has_the_moves_where_there_is_no_image():
    walk = sample_walk(random.Random(0), WalkConfig(moves="text", steps=3))
    assert (walk.image, walk.boxes) == (None, ())
    words = walk.question.split()
    assert words[:5] == ["Start", "at", cell_names(4)[walk.start], ".", "Walk"]
    assert [DIRECTIONS.index(word) for word in words[5:-1]] == list(walk.moves)
    assert sample_walk(random.Random(0), WalkConfig(steps=3)).question.endswith("Walk 3 steps .")


# --------------------------------------------------------------------------------------------------------- the drawing


def test_an_arrow_points_in_its_direction_in_each_of_its_forms():
    for side in (16, 32, 64):
        shapes = [arrow(way, side, blunt) for way in range(4) for blunt in (False, True)]
        assert len({shape.tobytes() for shape in shapes}) == 8
        for way, blunt in ((way, blunt) for way in range(4) for blunt in (False, True)):
            rows, columns = (np.abs(axis - (side - 1) / 2) for axis in np.nonzero(arrow(way, side, blunt)))
            assert (rows.max() > columns.max()) == (DIRECTIONS[way] in ("up", "down"))
        up, blunt = arrow(0, side, False), arrow(0, side, True)
        half = side // 2
        for shape in (up, blunt):  # the wide head is at the top
            assert shape[:half].any(0).sum() > shape[half:].any(0).sum()
        assert blunt.sum() < up.sum()


def test_every_cell_shows_its_arrow_in_its_colour():
    config = WalkConfig(jitter=0, noise=0)
    walk = sample_walk(random.Random(3), config)
    image = np.asarray(walk.image)
    for cell, (way, colour) in enumerate(zip(walk.directions, walk.colours, strict=True)):
        y, x = (at * 32 for at in divmod(cell, 4))
        wanted = np.full((32, 32, 3), BACKGROUND)
        wanted[arrow(way, 32, False)] = COLOURS[COLOUR_NAMES[colour]]
        assert np.array_equal(image[y : y + 32, x : x + 32], wanted)


def test_difficulty_changes_the_pixels_and_not_the_walk():
    plain = sample_walk(random.Random(1), WalkConfig(noise=0))
    for more in ({"noise": 9}, {"clutter": 20, "noise": 0}, {"look_alikes": 1.0, "noise": 0}):
        harder = sample_walk(random.Random(1), WalkConfig(**more))
        assert replace(harder, image=plain.image) == plain
        assert harder.image.tobytes() != plain.image.tobytes()


def test_sixty_four_scenes_take_less_than_a_tenth_of_a_second():
    rng, config = random.Random(0), WalkConfig()
    sample_walk(rng, config)
    times = []
    for _ in range(3):
        before = time.process_time()
        for _ in range(64):
            sample_walk(rng, config)
        times.append(time.process_time() - before)
    assert min(times) < 0.1


# ------------------------------------------------------------------------------------------------------- the truth


@given(configs(), SEEDS)
def test_a_clean_demonstration_is_right_everywhere_and_rewarded(config, seed):
    walk = sample_walk(random.Random(seed), config)
    words = demonstration(walk, random.Random(seed))
    truth = walk.truth(words)
    assert len(words) == 4 * walk.steps + 2
    assert all(truth.right)
    assert (truth.first_error, truth.readable, truth.rewarded, truth.lucky) == (len(words), True, True, False)
    assert truth.marks == ("..P." if config.moves == "image" else "....") * walk.steps + ".."
    looked = [cell for cell in truth.region if cell >= 0]
    assert looked == (list(walk.path[:-1]) if config.moves == "image" else [])


@given(configs(), SEEDS, st.sampled_from((0.1, 0.5, 1.0)))
def test_the_first_error_of_slips_is_the_first_direction_that_is_wrong(config, seed, slip):
    walk = sample_walk(random.Random(seed), config)
    words = demonstration(walk, random.Random(seed), slip)
    names, wrong = cell_names(config.grid), []
    for at in range(2, 4 * walk.steps, 4):
        way = walk.moves[at // 4] if walk.moves else walk.directions[names.index(words[at - 1])]
        wrong += [] if words[at] == DIRECTIONS[way] else [at]
    truth = walk.truth(words)
    assert [at for at, right in enumerate(truth.right) if not right] == wrong, "the text goes on from a slip"
    assert truth.first_error == (wrong[0] if wrong else len(words))
    assert (truth.readable, truth.rewarded) == (True, words[-1] == walk.answer)


def test_there_are_lucky_answers():
    walk = sample_walk(random.Random(0), WalkConfig())
    truths = [walk.truth(demonstration(walk, random.Random(seed), 0.5)) for seed in range(200)]
    lucky = [truth for truth in truths if truth.lucky]
    assert lucky
    assert all(truth.rewarded and "E" in truth.marks for truth in lucky)
    assert any(not truth.rewarded for truth in truths)


@given(st.lists(st.sampled_from((*FILLERS, *DIRECTIONS, *cell_names(3), COMMA, ANSWER, "?")), max_size=30))
def test_every_word_of_any_text_has_its_truth(words):
    truth = truth_of(words)
    lengths = {len(truth.kinds), len(truth.perceptual), len(truth.region), len(truth.right), len(truth.marks)}
    assert lengths == {len(words)}
    assert all((cell >= 0) == seen for cell, seen in zip(truth.region, truth.perceptual, strict=True))
    assert list(truth.perceptual) == [i % 4 == 2 and i < 12 for i in range(len(words))]
    first = truth.first_error
    assert all(truth.right[:first])
    assert first == len(words) or not truth.right[first]
    assert not truth.rewarded or truth.readable


# word by word, on the walk b2 right, c2 down, c3 right (over the edge), a3
CASES = {
    "clean": (CLEAN, "..P...P...P...", True),
    "a wrong look, and the walk goes on from there": (SLIPPED, "..E...P...P...", False),
    "wrong arithmetic; the look into the named cell is right": (changed(5, "a1"), "..P..xE..xP...", True),
    "a filler that is none": (changed(0, "red"), "x.P...P...P...", False),
    "a word that is no direction is wrong; the walk goes on as if it were right": (
        changed(2, "red"),
        "..E...P...P...",
        False,
    ),
    "a word that is no cell": (changed(5, "red"), "..P..xP...P...", False),
    "no comma": (changed(3, "so"), "..Px..P...P...", False),
    "another answer": (changed(13, "b2"), "..P...P...P..x", False),
    "no answer's cell": (changed(13, "red"), "..P...P...P..x", False),
    "the answer alone is unread": (changed(12, "so"), "..P...P...P.x.", False),
    "too long": ([*CLEAN, "so"], "..P...P...P...x", False),
    "too short": (CLEAN[:-1], "..P...P...P..", False),
    "nothing": ([], "", False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_truth_of_a_response_by_hand(case):
    words, marks, rewarded = CASES[case]
    truth = truth_of(words)
    assert (truth.marks, truth.rewarded) == (marks, rewarded)


def test_the_kinds_of_words():
    assert truth_of(CLEAN[4:8]).kinds == ("filler", "cell", "direction", "comma")
    assert truth_of([*CLEAN, "so"]).kinds[-3:] == ("answer", "answer cell", "end")


def test_moves_in_the_question_need_no_look():
    moves = [UP, UP, RIGHT]
    words = [*SLIPPED[:10], "right", ",", "answer", "c3"]
    truth = truth_of(words, directions=[], moves=moves)
    assert (truth.marks, set(truth.region), truth.rewarded) == ("." * 14, {-1}, True)
    assert truth_of([*words[:2], "left", *words[3:]], directions=[], moves=moves).marks[:6] == "..x..x"


# ---------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"grid": 2}, "grid=2"),
        ({"grid": 9}, "grid=9"),
        ({"steps": 16}, "steps=16, grid=4.*1 to 15"),
        ({"steps": 0}, "steps=0"),
        ({"min_steps": 9}, "min_steps=9"),
        ({"steps": 12}, "more_steps=4, steps=12, grid=4.*0 to 3"),
        ({"cell_pixels": 8}, "cell_pixels=8"),
        ({"jitter": 5}, "jitter=5"),
        ({"look_alikes": 1.5}, "look_alikes=1.5"),
        ({"colours": 7}, "colours=7"),
        ({"clutter": 65}, "clutter=65"),
        ({"noise": 65}, "noise=65"),
        ({"moves": "sound"}, "moves='sound'"),
        ({"n_val": 0}, "n_val=0"),
        ({"held_out_pairs": ("pink-up",)}, "held_out_pairs"),
        ({"held_out_pairs": ("up",)}, "held_out_pairs"),
        ({"colours": 2}, "held_out_pairs.*of the first colours"),
        ({"colours": 1, "held_out_pairs": ("red-up",)}, "a colour left"),
    ],
)
def test_a_walk_that_cannot_be_drawn_is_refused(values, names):
    with refusal("D80", names):
        WalkConfig(**values)


def test_no_pair_needs_to_be_held_out():
    config = WalkConfig(held_out_pairs=(), colours=1)
    assert isinstance(sample_walk(random.Random(0), config, new_pairs=True), Walk)
