"""Drawn scenes: what is in the picture, what the row says about it, and what ends up on disk."""

import hashlib
import io
import json
import random
import re
from collections import Counter
from dataclasses import asdict, fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sayo_verl.cli import main
from sayo_verl.data.check import check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.scenes import QUESTIONS, SceneConfig, image_digest, prepare, sample_scene, scene_row
from sayo_verl.data.scenes import rows as scenes_module
from sayo_verl.data.scenes.config import BAR_KINDS, KINDS, OBJECT_KINDS
from sayo_verl.data.scenes.drawing import BACKGROUND, COLOURS, GRID_LINE, INK, SHAPES, STROKES, add_noise, draw, stencil
from sayo_verl.errors import SayoError
from sayo_verl.reward import compute_score
from sayo_verl.tiny.policy import TinyPolicyConfig
from sayo_verl.tiny.warmup import WarmupConfig, policy_hash
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import region_mask

SMALL = SceneConfig(n_train=70, n_val=20)


def _digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pixels_of(image: np.ndarray, colour: str) -> np.ndarray:
    return (image == np.array(COLOURS[colour], np.uint8)).all(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3, 10, 14])
def test_a_box_is_the_tight_box_of_the_drawn_pixels(shape, radius):
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    x0, y0, x1, y1 = draw(image, shape, "red", 30, 33, radius)
    ys, xs = np.nonzero(_pixels_of(image, "red"))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


def test_every_scene_has_one_right_answer_and_no_overlap():
    rng = random.Random(3)
    counts = set()
    for _ in range(200):
        scene = sample_scene(rng, SceneConfig())
        counts.add(len(scene.objects))
        key = scene.key_word(scene.target)
        assert key in scene.question
        assert [scene.key_word(i) for i in range(len(scene.objects))].count(key) == 1
        assert scene.answer == scene.attribute(scene.target)
        assert scene.distractor not in (None, scene.target)
        drawn = sum(_pixels_of(scene.image, o.colour).sum() for o in scene.objects)
        assert drawn == (scene.image != BACKGROUND).any(-1).sum()
        for thing in scene.objects:  # painted over by nobody: its own box is still tight
            ys, xs = np.nonzero(_pixels_of(scene.image, thing.colour))
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == thing.box
    assert counts == {5, 6}


def test_an_object_is_one_visual_token_of_the_default_grid():
    rng = random.Random(4)
    for i in range(100):
        row = scene_row(sample_scene(rng, SceneConfig()), SceneConfig(), split="train", index=i)
        boxes = (row["extra_info"][k][0] for k in ("target_boxes", "distractor_boxes"))
        target, distractor = (region_mask(b, [Tile(3, 3)]) for b in boxes)
        assert target.sum() == distractor.sum() == 1
        assert not (target & distractor).any()


def test_the_files_follow_the_row_contract(tmp_path):
    folder, reused = prepare(tmp_path, SMALL)
    assert not reused
    for split, n_rows in (("train", 70), ("val", 20)):
        path = folder / f"{split}.parquet"
        assert check_parquet(path, Demands(), max_images=10).with_boxes
        rows = pq.read_table(path).to_pylist()
        assert [row["extra_info"]["index"] for row in rows] == list(range(n_rows))
        for row in rows:
            info = row["extra_info"]
            assert row["prompt"] == [{"role": "user", "content": "<image>" + info["question"]}]
            assert info["boxes"] == info["target_boxes"] != info["distractor_boxes"]
            image = np.array(Image.open(io.BytesIO(row["images"][0]["bytes"])))
            assert image.shape == (96, 96, 3)
            assert info["image_size_wh"] == [[96, 96]]
            x0, y0, x1, y1 = (round(value * 96) for value in info["boxes"][0][0])
            colour, shape = info["box_names"][0][0].split()
            ys, xs = np.nonzero(_pixels_of(image, colour))
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)
            assert {info["key_word"], row["reward_model"]["ground_truth"]} == {colour, shape}
    groups = pq.ParquetFile(folder / "train.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [64, 6]


def test_same_configuration_same_bytes_other_seed_other_images(tmp_path):
    first = prepare(tmp_path / "a", SMALL).path
    second = prepare(tmp_path / "b", SMALL).path
    other = prepare(tmp_path / "a", replace(SMALL, seed=1)).path
    for name in ("train.parquet", "val.parquet"):
        assert _digest(first / name) == _digest(second / name) != _digest(other / name)
    assert first.name == second.name != other.name


def test_train_and_held_out_images_are_disjoint(tmp_path):
    folder = prepare(tmp_path, SMALL).path
    seen = {
        split: {row["images"][0]["bytes"] for row in pq.read_table(folder / f"{split}.parquet").to_pylist()}
        for split in ("train", "val")
    }
    assert seen["train"].isdisjoint(seen["val"])
    assert json.loads((folder / "manifest.json").read_text())["distinct_images"] == {"train": 70, "val": 20}


def test_a_held_out_image_is_never_drawn_for_training(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_module, "image_digest", lambda image: "always the same")
    with pytest.raises(SayoError, match="SAYO-D22"):
        prepare(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_wrong_box_control_differs_in_the_rewarded_box_alone(tmp_path):
    right = pq.read_table(prepare(tmp_path, SMALL).path / "train.parquet").to_pylist()
    wrong = pq.read_table(prepare(tmp_path, replace(SMALL, region="distractor")).path / "train.parquet").to_pylist()
    for a, b in zip(right, wrong, strict=True):
        assert b["extra_info"]["boxes"] == b["extra_info"]["distractor_boxes"] == a["extra_info"]["distractor_boxes"]
        assert b["extra_info"]["box_names"] != a["extra_info"]["box_names"]
        for row in (a, b):
            del row["extra_info"]["boxes"], row["extra_info"]["box_names"]
        assert a == b


def test_a_complete_folder_is_reused_and_a_damaged_one_is_rebuilt(tmp_path):
    folder, _ = prepare(tmp_path, SMALL)
    before = _digest(folder / "val.parquet")
    assert prepare(tmp_path, SMALL) == (folder, True)
    (folder / "val.parquet").write_bytes(b"cut short")
    assert prepare(tmp_path, SMALL) == (folder, False)
    assert _digest(folder / "val.parquet") == before
    (folder / "manifest.json").write_text('{"files": {"train')
    assert prepare(tmp_path, SMALL) == (folder, False)
    (folder / "manifest.json").unlink()
    assert prepare(tmp_path, SMALL) == (folder, False)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "change",
    [
        {"min_objects": 0},
        {"min_objects": 6, "max_objects": 5},
        {"max_objects": 7},
        {"max_radius": 16},
        {"min_radius": 0},
        {"question_kinds": ("taste",)},
        {"question_kinds": ()},
        {"n_val": 0},
        {"region": "both"},
        {"grid": 0},
        {"clutter": 65},
        {"noise": -1},
        {"question_kinds": ("height",), "noise": 33},
        {"repeat": 0},  # no kind reads it
        {"max_bars": 4},
        {"question_kinds": ("place",), "max_count": 3},
        {"question_kinds": ("colour", "count"), "max_objects": 7},
        {"question_kinds": ("count",), "max_objects": 10},
        {"question_kinds": ("count",), "min_objects": 1},
        {"question_kinds": ("count",), "max_count": 0},
        {"question_kinds": ("count",), "max_count": 6},
        {"question_kinds": ("place",), "grid": 1, "min_objects": 1, "max_objects": 1, "repeat": 0},
        {"question_kinds": ("place",), "min_objects": 1},
        {"question_kinds": ("place",), "min_objects": 6, "repeat": 6},
        {"question_kinds": ("place",), "min_radius": 2},
        {"question_kinds": ("size",), "min_radius": 13},
        {"question_kinds": ("relation",), "repeat": 4},
        {"question_kinds": ("relation",), "max_objects": 9},
        {"question_kinds": ("highest",), "bar_levels": 0},
        {"question_kinds": ("highest",), "bar_levels": 4},
        {"question_kinds": ("highest",), "bar_levels": 15},
        {"question_kinds": ("highest",), "image_size": 40},
        {"question_kinds": ("highest",), "min_bars": 1},
        {"question_kinds": ("highest",), "max_bars": 7, "bar_levels": 8},
    ],
)
def test_an_impossible_configuration_is_refused(change):
    with pytest.raises(SayoError, match=r"^SAYO-D20: .+ \| at .+ \| got .+=.+, wanted .+ \| fix: change .+\Z"):
        SceneConfig(**change)


def test_rows_need_a_second_object(tmp_path):
    with pytest.raises(SayoError, match="SAYO-D21"):
        prepare(tmp_path, SceneConfig(min_objects=1, max_objects=1, n_train=1, n_val=1))


# ----------------------------------------------------------------- version 1 stays: names, hashes, bytes of the default

VERSION_1 = {
    "image_size": 96,
    "grid": 3,
    "min_objects": 5,
    "max_objects": 6,
    "min_radius": 10,
    "max_radius": 14,
    "question_kinds": ("colour", "shape"),
    "n_train": 4096,
    "n_val": 256,
    "seed": 0,
    "region": "target",
}


def test_folders_of_version_1_keep_their_names_and_their_manifest():
    assert SceneConfig().config_hash() == "07b11aee7b"
    assert SceneConfig(region="distractor").config_hash() == "93903d4958"
    assert SceneConfig().content() == VERSION_1


def test_the_tiny_policy_keeps_its_name():
    assert policy_hash(TinyPolicyConfig(), WarmupConfig(), SceneConfig()) == "fc45dc1780"
    assert policy_hash(TinyPolicyConfig(), WarmupConfig(), SceneConfig(noise=1)) != "fc45dc1780"


def test_scenes_of_version_1_keep_their_pixels_and_their_rows():
    """Recorded from version 1: pixels of three scenes of two configurations, and pixels and rows of 200 scenes."""
    small = SceneConfig(grid=2, image_size=64, min_objects=2, max_objects=4)
    recorded = {
        "0/train/0/0": ("a3d37f10735001", "ada21c035b2980"),
        "0/val/7/0": ("2dbe80ebaf9874", "16056226cdc817"),
        "1/train/3/0": ("03433e7f53709b", "227ed0a7d56d61"),
    }
    for seed, starts in recorded.items():
        for config, start in zip((SceneConfig(), small), starts, strict=True):
            assert image_digest(sample_scene(random.Random(seed), config).image).startswith(start)
    everything = hashlib.sha256()
    for i in range(200):
        scene = sample_scene(random.Random(f"0/train/{i}/0"), SceneConfig())
        row = scene_row(scene, SceneConfig(), split="train", index=i)
        everything.update(scene.image.tobytes())
        everything.update(repr({name: value for name, value in row.items() if name != "images"}).encode())
    assert everything.hexdigest() == "9a461408d09e56ee9d1287b773b7d9d72169eeb05da3a04b63dacba2c5b259b3"


def test_every_later_field_renames_the_folder_when_it_changes():
    every = SceneConfig(question_kinds=KINDS)
    changes = [
        {"repeat": 0},
        {"max_count": 3},
        {"min_bars": 4},
        {"max_bars": 4},
        {"bar_levels": 7},
        {"clutter": 1},
        {"noise": 1},
    ]
    assert {name for change in changes for name in change} == {f.name for f in fields(SceneConfig)} - set(VERSION_1)
    names = {every.config_hash(), *(replace(every, **change).config_hash() for change in changes)}
    assert len(names) == len(changes) + 1
    assert asdict(every)["max_count"] == 4
    assert "max_count" not in every.content()
    assert "later_version" in every.content()


# ---------------------------------------------------------------- an oracle that sees the pixels and the question alone


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
            colours = [colour for colour in COLOURS if _pixels_of(cell, colour).any()]
            assert len(colours) <= 1
            for colour in colours:
                mask = _pixels_of(cell, colour)
                x0, y0, x1, y1 = _tight(mask)
                shapes = [s for s in SHAPES if np.array_equal(stencil(s, (x1 - x0) // 2), mask[y0:y1, x0:x1])]
                assert len(shapes) == 1
                dx, dy = column * side, row * side
                found.append({"shape": shapes[0], "colour": colour, "box": (x0 + dx, y0 + dy, x1 + dx, y1 + dy)})
    assert sum(_pixels_of(image, c).sum() for c in COLOURS) == (image != BACKGROUND).any(-1).sum()
    return found


def _seen_bars(image: np.ndarray) -> list[dict]:
    """Every bar: its colour, its box, and its height read off the lines at the right edge."""
    edge = image[:, -2, 0].astype(int)  # right of every bar: lines alone
    (base,) = np.nonzero(edge == INK)[0]
    lines = [base, *sorted(np.nonzero(edge == GRID_LINE)[0], reverse=True)]
    assert len(set(np.diff(lines))) == 1
    found = []
    for colour in COLOURS:
        mask = _pixels_of(image, colour)
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


def _height_answer(seen, size, colour):
    bar = _named(seen, colour, "bar")
    return str(bar["height"]), [bar]


def _higher_answer(seen, size, first, second):
    a, b = (_named(seen, colour, "bar") for colour in (first, second))
    assert a["height"] != b["height"]
    return max((a, b), key=lambda bar: bar["height"])["colour"], sorted((a, b), key=lambda bar: -bar["height"])


def _colour_answer(seen, size, shape):
    thing = _one([o for o in seen if o["shape"] == shape])
    return thing["colour"], [thing]


def _shape_answer(seen, size, colour):
    thing = _one([o for o in seen if o["colour"] == colour])
    return thing["shape"], [thing]


_C, _S = "|".join(COLOURS), "|".join(SHAPES)
ORACLE = {
    "colour": (rf"What colour is the ({_S})\?", _colour_answer),
    "shape": (rf"What shape is the ({_C}) object\?", _shape_answer),
    "place": (rf"What colour is the ({_S}) in the (top|bottom) (left|right)\?", _place_answer),
    "size": (rf"Is the ({_C}) ({_S}) large or small\?", _size_answer),
    "count": (rf"How many (?:({_C}) objects|({_S})(?:s|(?<=cross)es)) are there\?", _count_answer),
    "relation": (
        rf"What (colour|shape) is the object directly (left of|right of|above|below) the ({_C}) ({_S})\?",
        _relation_answer,
    ),
    "highest": (r"Which bar is the (highest|lowest)\?", _extreme_answer),
    "height": (rf"How high is the ({_C}) bar\?", _height_answer),
    "higher": (rf"Which bar is higher, the ({_C}) or the ({_C})\?", _higher_answer),
}
CONFIGS = {
    "default": {},
    "small": {"image_size": 64, "grid": 2, "min_objects": 3, "max_objects": 4},
    "crowded": {"image_size": 167, "grid": 5, "min_objects": 8, "max_objects": 20, "min_radius": 4, "max_radius": 13},
    "loose": {"image_size": 160, "grid": 4, "min_radius": 3, "max_radius": 5},
}
LATER = {
    ("crowded", "place"): {"repeat": 5},
    ("crowded", "size"): {"repeat": 7},
    ("crowded", "relation"): {"repeat": 6},
    ("crowded", "count"): {"max_count": 9},
    ("small", "count"): {"max_count": 3},
    ("loose", "relation"): {"repeat": 0},
    ("loose", "place"): {"repeat": 4},
}
BAR_CONFIGS = {
    "small": {"bar_levels": 5, "min_bars": 2},
    "crowded": {"bar_levels": 12, "min_bars": 6, "max_bars": 6},
    "loose": {"bar_levels": 9},
}


def _config(name: str, kind: str, **more) -> SceneConfig:
    chosen = dict(CONFIGS[name])
    if kind in QUESTIONS:
        chosen["max_objects"] = min(6, chosen.get("max_objects", 6))
        chosen["min_objects"] = min(5, chosen.get("min_objects", 5))
    chosen |= BAR_CONFIGS.get(name, {}) if kind in BAR_KINDS else LATER.get((name, kind), {})
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
        inside = _pixels_of(scene.drawing[y0:y1, x0:x1], thing.colour)
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
    wanted = {
        "colour": set(COLOURS),
        "shape": set(SHAPES),
        "place": set(COLOURS),
        "size": {"large", "small"},
        "count": set("1234"),
        "relation": {*COLOURS, *SHAPES},
        "highest": set(COLOURS),
        "height": set("123456"),
        "higher": set(COLOURS),
    }[kind]
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


# --------------------------------------------------------------------------------------- later scenes, difficulty, rows

# A change of what is drawn after version 1 must raise scene_config.LATER_VERSION, and then these are recorded anew.
LATER_DIGESTS = {
    "place": "7ab34d2bc3308d",
    "size": "70c06ce65db714",
    "count": "f2fa3f0f53ec65",
    "relation": "0833734a132342",
    "highest": "b890c47de2292a",
    "height": "91d18a995cace8",
    "higher": "a5c70ddba5a9ba",
}


@pytest.mark.parametrize("kind", [*OBJECT_KINDS, *BAR_KINDS])
def test_later_scenes_keep_their_pixels(kind):
    config = SceneConfig(question_kinds=(kind,), clutter=5, noise=9)
    a, b = (sample_scene(random.Random(f"0/train/{kind}"), config) for _ in range(2))
    assert image_digest(a.image) == image_digest(b.image)
    assert (a.objects, a.question, a.needed, a.distractors) == (b.objects, b.question, b.needed, b.distractors)
    assert image_digest(a.image)[:14] == LATER_DIGESTS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_clutter_and_noise_leave_the_scene_and_its_boxes_as_they_are(kind):
    for seed in range(5):
        plain, cluttered, noisy = (
            sample_scene(random.Random(seed), SceneConfig(question_kinds=(kind,), **more))
            for more in ({}, {"clutter": 30}, {"clutter": 30, "noise": 10})
        )
        for other in (cluttered, noisy):
            assert other.objects == plain.objects
            assert (other.question, other.answer, other.needed) == (plain.question, plain.answer, plain.needed)
            assert np.array_equal(other.drawing, plain.image)
        assert plain.image is plain.drawing
        added = (cluttered.image != plain.image).any(-1)
        assert 30 * 3 * 0.5 < added.sum() <= 30 * 5
        assert set(np.unique(cluttered.image[added])) <= set(STROKES)
        assert (plain.image[added] == BACKGROUND).all()  # strokes are on the background and touch nothing
        y, x = np.nonzero(added)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near = np.clip(y + dy, 0, 95), np.clip(x + dx, 0, 95)
                assert (plain.image[near] == BACKGROUND).all()
        difference = noisy.image.astype(float) - cluttered.image
        assert difference[cluttered.image == BACKGROUND].std() == pytest.approx(10, rel=0.05)
        assert abs(difference[cluttered.image == BACKGROUND].mean()) < 0.5


@pytest.mark.parametrize("deviation", [1, 8, 32])
def test_noise_has_the_deviation_asked_for_and_is_not_the_same_everywhere(deviation):
    grey = np.full((64, 64, 3), BACKGROUND, np.uint8)
    noise = add_noise(grey, random.Random(0), deviation).astype(float) - BACKGROUND
    assert noise.std() == pytest.approx((deviation**2 + 1 / 12) ** 0.5, rel=0.03)  # 1/12: rounding
    assert abs(noise.mean()) < 0.05 * deviation
    flat = noise.reshape(-1, 3)
    assert np.abs(np.corrcoef(flat.T) - np.eye(3)).max() < 0.06
    assert abs(np.corrcoef(flat[1:, 0], flat[:-1, 0])[0, 1]) < 0.06
    wide = add_noise(np.full((64, 64, 3), 250, np.uint8), random.Random(0), 32)
    assert wide.max() == 255  # cut, not wrapped
    assert wide.min() > 100


def test_noise_does_not_let_a_held_out_drawing_into_training():
    noisy = SceneConfig(noise=20, clutter=9)
    for split in ("train", "val"):
        clean = [digest for _, digest in scenes_module._draw_split(SceneConfig(), split, 5, set())]
        assert clean == [digest for _, digest in scenes_module._draw_split(noisy, split, 5, set())]
    taken = {clean[0]}
    redrawn = [digest for _, digest in scenes_module._draw_split(noisy, "val", 5, taken)]
    assert redrawn[0] not in taken
    assert redrawn[1:] == clean[1:]


def test_the_files_of_all_kinds_follow_the_row_contract(tmp_path):
    config = SceneConfig(question_kinds=KINDS, n_train=90, n_val=30, clutter=6, noise=6)
    right = prepare(tmp_path, config).path
    wrong = prepare(tmp_path, replace(config, region="distractor")).path
    seen: Counter = Counter()
    for split in ("train", "val"):
        for folder in (right, wrong):
            assert check_parquet(folder / f"{split}.parquet", Demands(), max_images=9).with_boxes
        pair = [pq.read_table(folder / f"{split}.parquet").to_pylist() for folder in (right, wrong)]
        for row, control in zip(*pair, strict=True):
            info, other = row["extra_info"], control["extra_info"]
            kind = info["kind"]
            seen[kind] += 1
            assert info["boxes"] == info["target_boxes"] == other["target_boxes"]
            assert other["boxes"] == info["distractor_boxes"] == other["distractor_boxes"]
            (boxes,), (names,), (wrong_boxes,), (wrong_names,) = (
                info["boxes"],
                info["box_names"],
                other["boxes"],
                other["box_names"],
            )
            assert len(boxes) == len(names)
            assert 1 <= len(wrong_boxes) == len(wrong_names) <= len(boxes)
            assert not {tuple(box) for box in boxes} & {tuple(box) for box in wrong_boxes}
            if kind == "count":
                assert len(boxes) == int(info["answer"])
            else:
                assert len(boxes) == (2 if kind in ("relation", "higher") else 1)
            if kind == "relation":
                assert [name.split(":")[0] for name in names] == ["answer", "reference"]
                assert info["answer"] in names[0]
                assert names[1].removeprefix("reference: ") in info["question"]
            elif kind == "higher":
                assert names[0] == f"answer: {info['answer']} bar"
                assert names[1].startswith("other: ")
            assert all(re.fullmatch(rf"({_C}) ({_S}|bar)", name) for name in wrong_names)
            assert row["prompt"][0]["content"] == control["prompt"][0]["content"] == "<image>" + info["question"]
            assert row["images"] == control["images"]
    assert set(seen) == set(KINDS)
    manifest = json.loads((right / "manifest.json").read_text())
    assert manifest["config"]["noise"] == 6
    assert manifest["config"]["question_kinds"] == list(KINDS)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SceneConfig(question_kinds=("relation",), min_objects=2, max_objects=2, repeat=0), "min_objects to 3"),
        (SceneConfig(question_kinds=("place",), min_objects=1, max_objects=1, repeat=0), "min_objects to 2"),
        (SceneConfig(question_kinds=("higher",), min_bars=2, max_bars=2), "min_bars to 3"),
    ],
)
def test_rows_of_later_kinds_need_a_further_object(tmp_path, config, field):
    with pytest.raises(SayoError, match=rf"^SAYO-D21: .+ \| at .+ \| .+fix: set {field} or more\Z"):
        prepare(tmp_path, replace(config, n_train=1, n_val=1))


def test_the_command_line_has_the_new_settings(tmp_path, capsys):
    rows = ["--n-train", "6", "--n-val", "2"]
    hard = ["--question-kinds", "count", "highest", "--noise", "4", "--max-count", "2", "--bar-levels", "9"]
    assert main(["prepare", "synthetic", "--out", str(tmp_path), *hard, *rows]) == 0
    config = SceneConfig(question_kinds=("count", "highest"), noise=4, max_count=2, bar_levels=9, n_train=6, n_val=2)
    assert capsys.readouterr().out.strip() == str(tmp_path / f"scenes-{config.config_hash()}")
    assert main(["prepare", "synthetic", "--out", str(tmp_path), "--noise", "65"]) == 2
    assert "SAYO-D20" in capsys.readouterr().err
