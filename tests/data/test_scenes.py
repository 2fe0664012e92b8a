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
from PIL import Image
from support.scenes import A_COLOUR, A_SHAPE, pixels_of

from sayo_verl.cli import main
from sayo_verl.data.check import check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.rows import PROMPTS
from sayo_verl.data.scenes import SceneConfig, image_digest, prepare, sample_scene, scene_row
from sayo_verl.data.scenes import rows as scenes_module
from sayo_verl.data.scenes.config import BAR_KINDS, KINDS, OBJECT_KINDS
from sayo_verl.data.scenes.drawing import BACKGROUND, SHAPES, STROKES, add_noise, draw
from sayo_verl.errors import SayoError
from sayo_verl.tiny.policy import TinyPolicyConfig
from sayo_verl.tiny.warmup import WarmupConfig, policy_hash
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import region_mask

SMALL = SceneConfig(n_train=70, n_val=20)


def _digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3, 10, 14])
def test_a_box_is_the_tight_box_of_the_drawn_pixels(shape, radius):
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    x0, y0, x1, y1 = draw(image, shape, "red", 30, 33, radius)
    ys, xs = np.nonzero(pixels_of(image, "red"))
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
        drawn = sum(pixels_of(scene.image, o.colour).sum() for o in scene.objects)
        assert drawn == (scene.image != BACKGROUND).any(-1).sum()
        for thing in scene.objects:  # painted over by nobody: its own box is still tight
            ys, xs = np.nonzero(pixels_of(scene.image, thing.colour))
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
            ys, xs = np.nonzero(pixels_of(image, colour))
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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scenes_can_ask_for_the_rewarded_form_as_other_sources_do(prompt):
    scene = sample_scene(random.Random(0), SceneConfig())
    asked, bare = (scene_row(scene, SceneConfig(prompt=p), split="train", index=0) for p in (prompt, "question"))
    assert "<answer>" in str(asked.pop("prompt"))
    assert "<answer>" not in str(bare.pop("prompt"))
    assert asked == bare


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
        {"prompt": "instruction"},
    ]
    assert {name for change in changes for name in change} == {f.name for f in fields(SceneConfig)} - set(VERSION_1)
    names = {every.config_hash(), *(replace(every, **change).config_hash() for change in changes)}
    assert len(names) == len(changes) + 1
    assert asdict(every)["max_count"] == 4
    assert "max_count" not in every.content()
    assert "later_version" in every.content()


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
            assert all(re.fullmatch(rf"({A_COLOUR}) ({A_SHAPE}|bar)", name) for name in wrong_names)
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
