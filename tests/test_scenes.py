"""Drawn scenes: what is in the picture, what the row says about it, and what ends up on disk."""

import hashlib
import io
import json
import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sayo_verl.data import scenes as scenes_module
from sayo_verl.data.check import check_parquet
from sayo_verl.data.drawing import BACKGROUND, COLOURS, SHAPES, draw
from sayo_verl.data.scenes import SceneConfig, prepare, sample_scene, scene_row
from sayo_verl.errors import SayoError
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
        check_parquet(path, image_key="images", prompt_key="prompt", need_boxes=True, max_images=10)
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
        {"question_kinds": ("size",)},
        {"question_kinds": ()},
        {"n_val": 0},
        {"region": "both"},
    ],
)
def test_an_impossible_configuration_is_refused(change):
    with pytest.raises(SayoError, match="SAYO-D20"):
        SceneConfig(**change)


def test_rows_need_a_second_object(tmp_path):
    with pytest.raises(SayoError, match="SAYO-D21"):
        prepare(tmp_path, SceneConfig(min_objects=1, max_objects=1, n_train=1, n_val=1))
