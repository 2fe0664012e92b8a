"""Drawn scenes: boxes, clutter and noise, the rows of the source, the folders."""

import hashlib
import io
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.refusals import refusal
from support.scenes import A_COLOUR, A_SHAPE, pixels_of

from sayo_verl.cli import main
from sayo_verl.data.contract import Demands
from sayo_verl.data.folder import split_files
from sayo_verl.data.sources.scenes import SceneSource
from sayo_verl.errors import SayoError
from sayo_verl.launch.row_check import check_parquet
from sayo_verl.scenes import SceneConfig, sample_scene
from sayo_verl.scenes.config import KINDS
from sayo_verl.scenes.drawing import BACKGROUND, SHAPES, STROKES, add_noise, draw
from sayo_verl.tiny.prepared import prepare_scenes
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import region_mask

SMALL = SceneConfig(n_train=70, n_val=20)


def rows_of(folder, split: str) -> list[dict]:
    return [row for file in split_files(folder)[split] for row in pq.read_table(file).to_pylist()]


# --------------------------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3, 10, 14])
def test_a_box_is_the_tight_box_of_the_drawn_pixels(shape, radius):
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    x0, y0, x1, y1 = draw(image, shape, "red", (30, 33), radius)
    ys, xs = np.nonzero(pixels_of(image, "red"))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


# Recorded: figures in docs/ were measured on these scenes.
DIGESTS = {
    "colour": "a3d37f10735001",
    "place": "7ab34d2bc3308d",
    "size": "70c06ce65db714",
    "count": "f2fa3f0f53ec65",
    "relation": "0833734a132342",
    "highest": "b890c47de2292a",
    "height": "91d18a995cace8",
    "higher": "a5c70ddba5a9ba",
}


@pytest.mark.parametrize("kind", DIGESTS)
def test_a_seed_keeps_its_pixels(kind):
    later = {"question_kinds": (kind,), "clutter": 5, "noise": 9}
    config, seed = (SceneConfig(), "0/train/0/0") if kind == "colour" else (SceneConfig(**later), f"0/train/{kind}")
    image = sample_scene(random.Random(seed), config).image
    assert hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:14] == DIGESTS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_clutter_and_noise_leave_the_scene_and_its_boxes_as_they_are(kind):
    for seed in range(3):
        plain, cluttered, noisy = (
            sample_scene(random.Random(seed), SceneConfig(question_kinds=(kind,), **more))
            for more in ({}, {"clutter": 30}, {"clutter": 30, "noise": 10})
        )
        for other in (cluttered, noisy):
            assert other.objects == plain.objects
            assert (other.question, other.answer, other.needed) == (plain.question, plain.answer, plain.needed)
            assert np.array_equal(other.drawing, plain.image)
        added = (cluttered.image != plain.image).any(-1)
        assert 30 * 3 * 0.5 < added.sum() <= 30 * 5
        assert set(np.unique(cluttered.image[added])) <= set(STROKES)
        y, x = np.nonzero(added)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):  # strokes are on the background and touch nothing
                assert (plain.image[np.clip(y + dy, 0, 95), np.clip(x + dx, 0, 95)] == BACKGROUND).all()
        difference = noisy.image.astype(float) - cluttered.image
        assert difference[cluttered.image == BACKGROUND].std() == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("deviation", [1, 8, 32])
def test_noise_has_its_deviation_and_is_independent(deviation):
    grey = np.full((64, 64, 3), BACKGROUND, np.uint8)
    noise = add_noise(grey, random.Random(0), deviation).astype(float) - BACKGROUND
    assert noise.std() == pytest.approx((deviation**2 + 1 / 12) ** 0.5, rel=0.03)  # 1/12: rounding
    assert abs(noise.mean()) < 0.05 * deviation
    flat = noise.reshape(-1, 3)
    assert np.abs(np.corrcoef(flat.T) - np.eye(3)).max() < 0.06
    assert abs(np.corrcoef(flat[1:, 0], flat[:-1, 0])[0, 1]) < 0.06
    wide = add_noise(np.full((64, 64, 3), 250, np.uint8), random.Random(0), 32)
    assert (wide.max(), wide.min() > 100) == (255, True)  # cut, not wrapped


# ---------------------------------------------------------------------------------------------------------- the source


def test_a_row_depends_on_seed_split_and_index_alone():
    few, more = (SceneSource(replace(SMALL, n_train=n)).examples() for n in (3, 9))
    made, longer = list(few), list(more)
    assert made == longer[: len(made)]
    assert [e.id for e in longer[-2:]] == ["train-7", "train-8"]
    assert [e.split for e in made] == ["val"] * 20 + ["train"] * 3
    others = SceneSource(replace(SMALL, n_train=3, seed=1)).examples()
    assert not {e.images[0].key for e in made} & {e.images[0].key for e in others}


def test_a_drawing_of_a_validation_row_is_not_used_for_training(monkeypatch):
    first, other = (sample_scene(random.Random(seed), SceneConfig(noise=9)) for seed in (0, 1))
    noisier = replace(first, image=other.image)  # the same drawing under other noise
    drawn = iter([first, noisier, noisier, other])
    monkeypatch.setattr("sayo_verl.data.sources.scenes.sample_scene", lambda *_: next(drawn))
    made = list(SceneSource(SceneConfig(n_train=1, n_val=1)).examples())
    assert [e.question for e in made] == [first.question, other.question]
    monkeypatch.setattr("sayo_verl.data.sources.scenes.sample_scene", lambda *_: first)
    with refusal("D22", "too few different images"):
        list(SceneSource(SceneConfig(n_train=1, n_val=1)).examples())


def test_the_wrong_box_control_differs_in_the_rewarded_boxes_alone():
    sources = (SceneSource(replace(SMALL, region=region)) for region in ("target", "distractor"))
    for right, wrong in zip(*(source.examples() for source in sources), strict=True):
        assert right.extra == wrong.extra
        assert [[list(np.divide(b, 96)) for b in of] for of in right.boxes] == right.extra["target_boxes"]
        assert [[list(np.divide(b, 96)) for b in of] for of in wrong.boxes] == right.extra["distractor_boxes"]
        boxes = {"boxes": right.boxes, "box_names": right.box_names, "box_source": right.box_source}
        assert replace(wrong, **boxes) == right != wrong


def test_the_region_of_each_kind():
    seen: Counter = Counter()
    config = SceneConfig(question_kinds=KINDS, n_train=120, n_val=1, clutter=6, noise=6)
    for e in SceneSource(config).examples():
        (boxes,), (names,), wrong = e.boxes, e.box_names, e.extra["distractor_boxes"][0]
        seen[e.kind] += 1
        wanted = int(e.answer) if e.kind == "count" else 2 if e.kind in ("relation", "higher") else 1
        assert len(boxes) == len(names) == wanted >= len(wrong) >= 1
        if e.kind == "relation":
            assert e.answer in names[0]
            assert names[1] in e.question
        elif e.kind == "higher":
            assert names[0] == f"{e.answer} bar"
        assert all(re.fullmatch(rf"({A_COLOUR}) ({A_SHAPE}|bar)", name) for name in names)
    assert set(seen) == set(KINDS)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SceneConfig(min_objects=1, max_objects=1), "min_objects to 2"),
        (SceneConfig(question_kinds=("relation",), min_objects=2, max_objects=2, repeat=0), "min_objects to 3"),
        (SceneConfig(question_kinds=("higher",), min_bars=2, max_bars=2), "min_bars to 3"),
    ],
)
def test_a_row_needs_an_object_for_the_wrong_box_control(config, field):
    with refusal("D21", f"fix: set {field} or more"):
        next(SceneSource(config).examples())


@pytest.mark.parametrize(
    "change",
    [
        {"min_objects": 0},
        {"min_objects": 6, "max_objects": 5},
        {"max_objects": 7},
        {"max_radius": 16},
        {"min_radius": 0},
        {"question_kinds": ("taste",)},
        {"n_val": 0},
        {"region": "both"},
        {"grid": 0},
        {"clutter": 65},
        {"noise": -1},
        {"question_kinds": ("height",), "noise": 33},
        {"repeat": 0},  # no kind reads it
        {"max_bars": 4},
        {"question_kinds": ("count",), "max_objects": 10},
        {"question_kinds": ("count",), "max_count": 6},
        {"question_kinds": ("place",), "grid": 1, "min_objects": 1, "max_objects": 1, "repeat": 0},
        {"question_kinds": ("place",), "min_objects": 6, "repeat": 6},
        {"question_kinds": ("place",), "min_radius": 2},
        {"question_kinds": ("size",), "min_radius": 13},
        {"question_kinds": ("relation",), "max_objects": 9},
        {"question_kinds": ("highest",), "bar_levels": 15},
        {"question_kinds": ("highest",), "image_size": 40},
        {"question_kinds": ("highest",), "max_bars": 7, "bar_levels": 8},
    ],
)
def test_an_impossible_configuration_is_refused(change):
    with pytest.raises(SayoError, match=r"^SAYO-D20: .+ \| at .+ \| got .+=.+, wanted .+ \| fix: change .+\Z"):
        SceneConfig(**change)


# ---------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return root, prepare_scenes(root, SMALL)


def test_the_rows_follow_the_contract(made):
    folder, reused = made[1]
    assert not reused
    pictures = {}
    for split, n_rows in (("train", 70), ("val", 20)):
        for file in split_files(folder)[split]:
            assert check_parquet(file, Demands(), max_images=10).with_boxes
        rows = rows_of(folder, split)
        assert [row["extra_info"]["id"] for row in rows] == [f"{split}-{i}" for i in range(n_rows)]
        pictures[split] = {row["images"][0]["bytes"] for row in rows}
        for row in rows:
            info = row["extra_info"]
            assert row["prompt"] == [{"role": "user", "content": "<image>" + info["question"]}]
            assert info["boxes"] == info["target_boxes"] != info["distractor_boxes"]
            image = np.array(Image.open(io.BytesIO(row["images"][0]["bytes"])))
            x0, y0, x1, y1 = (round(value * 96) for value in info["boxes"][0][0])
            colour, shape = info["box_names"][0][0].split()
            ys, xs = np.nonzero(pixels_of(image, colour))
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)
            assert {info["key_word"], row["reward_model"]["ground_truth"]} == {colour, shape}
            # an object is one visual token of the tiny policy's grid
            target, distractor = (region_mask(info[k][0], [Tile(3, 3)]) for k in ("target_boxes", "distractor_boxes"))
            assert target.sum() == distractor.sum() == 1
            assert not (target & distractor).any()
    assert pictures["train"].isdisjoint(pictures["val"])


def test_a_complete_folder_is_reused_and_a_damaged_one_is_built_again_with_the_same_bytes(made):
    root, (folder, _) = made
    file = folder / "val-00000.parquet"
    before = file.read_bytes()
    assert prepare_scenes(root, SMALL) == (folder, True)
    file.write_bytes(b"cut short")
    assert prepare_scenes(root, SMALL) == (folder, False)
    assert file.read_bytes() == before
    assert [path.name for path in root.iterdir()] == [folder.name]


def test_the_command_line_names_folders_by_settings_and_prompt(tmp_path, capsys):
    hard = ["--question-kinds", "count", "highest", "--noise", "4", "--max-count", "2", "--bar-levels", "9"]
    command = ["prepare", "synthetic", "--out", str(tmp_path), "--n-train", "6", "--n-val", "2", *hard]
    assert main(command) == 0
    bare = capsys.readouterr().out.strip()
    config = SceneConfig(question_kinds=("count", "highest"), noise=4, max_count=2, bar_levels=9, n_train=6, n_val=2)
    assert prepare_scenes(tmp_path, config) == (tmp_path / bare.rpartition("/")[2], True)
    assert main([*command, "--prompt", "instruction"]) == 0
    asked = capsys.readouterr().out.strip()
    assert asked != bare
    assert "<answer>" in rows_of(tmp_path / asked.rpartition("/")[2], "val")[0]["prompt"][0]["content"]
    assert main([*command, "--noise", "65"]) == 2
    assert "SAYO-D20" in capsys.readouterr().err
