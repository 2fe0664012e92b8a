"""Rows of walks: the splits, the boxes, the image-free variant, the command."""

import io
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.refusals import refusal

from sayo_verl.cli import main
from sayo_verl.data.contract import Demands
from sayo_verl.data.folder import check_folder, split_files
from sayo_verl.data.sources.walks import WalkSource
from sayo_verl.inspection.audit import Audit
from sayo_verl.launch.row_check import check_parquet
from sayo_verl.reward import compute_score
from sayo_verl.scenes.drawing import COLOURS
from sayo_verl.scenes.walk import COLOUR_NAMES, Walk, WalkConfig, demonstration
from sayo_verl.scenes.walk_truth import DIRECTIONS, cell_names, walk_path
from sayo_verl.tiny.prepared import prepare_walks
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import region_mask

SMALL = WalkConfig(n_train=30, n_val=10, noise=0, jitter=0)


def rows_of(folder, split: str) -> list[dict]:
    return [row for file in split_files(folder)[split] for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_walks(tmp_path_factory.mktemp("walks"), SMALL).path


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return prepare_walks(tmp_path_factory.mktemp("walks"), WalkConfig(moves="text", n_train=30, n_val=10)).path


def colour_of(image: np.ndarray, cell: int, side: int = 32) -> str:
    """The colour of the arrow in a cell without noise."""
    y, x = (at * side + side // 2 for at in divmod(cell, 4))
    return next(name for name, rgb in COLOURS.items() if tuple(image[y, x]) == rgb)


def test_each_kind_of_validation_row_has_its_data_source(folder):
    sources = {split: Counter(row["data_source"] for row in rows_of(folder, split)) for split in ("train", "val")}
    assert sources["train"] == {"sayo/walk": 30}
    assert sources["val"] == {"sayo/walk": 10, "sayo/walk_more_steps": 10, "sayo/walk_new_pairs": 10}
    steps = {(row["data_source"], row["extra_info"]["walk"]["steps"]) for row in rows_of(folder, "val")}
    assert steps == {("sayo/walk", 8), ("sayo/walk_more_steps", 12), ("sayo/walk_new_pairs", 8)}


def test_held_out_pairs_are_in_no_row_but_those_that_ask_for_them(folder):
    pairs = set(SMALL.held_out_pairs)
    for split in ("train", "val"):
        for row in rows_of(folder, split):
            walk = row["extra_info"]["walk"]
            image = np.array(Image.open(io.BytesIO(row["images"][0]["bytes"])))
            drawn = [f"{colour_of(image, cell)}-{DIRECTIONS[way]}" for cell, way in enumerate(walk["directions"])]
            path = walk_path(4, walk["start"], walk["directions"], walk["steps"])[:-1]
            if row["data_source"] == "sayo/walk_new_pairs":
                assert {drawn[cell] for cell in path} <= pairs
            else:
                assert pairs.isdisjoint(drawn)


def test_the_boxes_are_the_cells_of_the_path_in_order(folder):
    for row in rows_of(folder, "val"):
        info, walk = row["extra_info"], row["extra_info"]["walk"]
        path = walk_path(4, walk["start"], walk["directions"], walk["steps"])
        for cell, box, name in zip(path[:-1], info["boxes"][0], info["box_names"][0], strict=True):
            mask = region_mask([box], [Tile(4, 4)])  # one visual token for each cell
            assert np.flatnonzero(mask).tolist() == [cell]
            assert name == f"{cell_names(4)[cell]} {DIRECTIONS[walk['directions'][cell]]}"
        assert row["reward_model"]["ground_truth"] == cell_names(4)[path[-1]]


@pytest.mark.parametrize("moves", ["image", "text"])
def test_a_clean_response_to_every_row_is_rewarded(folder, text_folder, moves):
    for row in rows_of(folder if moves == "image" else text_folder, "val"):
        info = row["extra_info"]["walk"]
        path = walk_path(*(info[name] for name in ("grid", "start", "directions", "steps", "moves")))
        ways, moves_ = tuple(info["directions"]), tuple(info["moves"])
        walk = Walk(None, "", row["reward_model"]["ground_truth"], 4, info["start"], ways, (), path, (), moves_)
        said = " ".join(demonstration(walk, random.Random(0)))
        found = compute_score(row["data_source"], said, row["reward_model"]["ground_truth"], row["extra_info"])
        assert found["score"] == 1.0
        assert set(found["walk_marks"]) == ({".", "P"} if moves == "image" else {"."})


def test_no_walk_occurs_twice(folder, text_folder):
    rows = [*rows_of(folder, "train"), *rows_of(folder, "val")]
    assert len({row["images"][0]["bytes"] for row in rows}) == len(rows)
    config = WalkConfig(grid=3, steps=2, more_steps=0, moves="text", n_train=40, n_val=20)
    examples = list(WalkSource(config).examples())
    assert len({example.question for example in examples}) == len(examples) == 60


def test_too_few_different_walks_are_refused():
    config = WalkConfig(grid=3, steps=1, more_steps=0, moves="text", n_train=40, n_val=1)
    with refusal("D82", "too few different walks.*train-"):
        list(WalkSource(config).examples())


def test_rows_without_an_image_have_no_region(text_folder):
    manifest = check_folder(text_folder)
    assert manifest["rows"] == {"train": 30, "val": 20}  # no new pairs without a picture
    assert manifest["boxes"] == 0
    for row in rows_of(text_folder, "train"):
        assert (row["images"], row["extra_info"]["boxes"]) == ([], [])
        assert "<image>" not in row["prompt"][0]["content"]
        assert check_parquet(split_files(text_folder)["train"][0], Demands()).rows == 30


def test_inspection_finds_nothing_wrong(folder, text_folder):
    assert Audit(split_files(folder), n_sample=5).run() == []
    assert [finding.code for finding in Audit(split_files(text_folder), n_sample=5).run()] == ["D04"]  # no box to train


def test_inspection_finds_a_walk_with_another_end(folder, tmp_path):
    table = pq.read_table(split_files(folder)["val"][0])
    rows = table.to_pylist()
    rows[0]["reward_model"]["ground_truth"] = rows[1]["reward_model"]["ground_truth"] = "z9"
    file = tmp_path / "val-00000.parquet"
    pq.write_table(table.from_pylist(rows, schema=table.schema), file)
    findings = {finding.code: finding.count for finding in Audit({"train": [], "val": [file]}, n_sample=1).run()}
    assert findings == {"D81": 2}


def test_the_command_makes_walks_and_names_what_the_task_does_not_read(tmp_path, capsys):
    command = ["prepare", "synthetic", "--out", str(tmp_path)]
    sizes = ["--n-train", "3", "--n-val", "2", "--grid", "5", "--steps", "4"]
    assert main([*command, "--task", "walk", *sizes, "--held-out-pairs", "red-up"]) == 0
    made = capsys.readouterr().out.strip()
    config = WalkConfig(grid=5, steps=4, n_train=3, n_val=2, held_out_pairs=("red-up",))
    assert prepare_walks(tmp_path, config) == (tmp_path / made.rpartition("/")[2], True)
    for wrong in (["--task", "walk", "--bar-levels", "4"], ["--task", "walk", "--prompt", "instruction"], sizes):
        assert main([*command, *wrong]) == 2
        assert "SAYO-D83" in capsys.readouterr().err
    assert main([*command, "--task", "walk", "--grid", "2"]) == 2
    assert "SAYO-D80" in capsys.readouterr().err
    assert COLOUR_NAMES[0] == "red"
