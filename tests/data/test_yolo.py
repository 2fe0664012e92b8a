"""YOLO folders in the layouts that Ultralytics documents, and as Roboflow and other machines write them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.refusals import refusal

from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import yolo

FILES = {
    "images/train/a.jpg": "x",
    "images/train/b.PNG": "x",
    "images/val/c.jpg": "x",
    "labels/train/a.txt": "0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.3 0.1 0.2 0.5\n\n",
    "labels/val/c.txt": "1 0.25 0.25 0.1 0.1\n",
}
DATA = {"path": "../datasets/coco8", "train": "images/train", "val": "images/val", "names": {0: "dog", 1: "cat"}}


def rows(folder: Path, files: dict[str, str], data: Any, *flags: str) -> list[Example | LeftOut]:
    """What ``sayo prepare yolo`` yields for these files, with ``data`` as data.yaml if there is any."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if data is not None:
        (folder / "data.yaml").write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    parser = argparse.ArgumentParser()
    yolo.add_flags(parser)
    source = yolo.from_args(parser.parse_args(["--folder", str(folder), *(flags or ("--ask", "count"))]))
    assert json.loads(json.dumps(source.facts(), default=str))["folder"]
    return list(source.examples())


def answers(found: list[Example | LeftOut]) -> dict[str, tuple[str, str]]:
    return {e.id: (e.split, e.answer) for e in found if isinstance(e, Example)}


ALL = {
    "images/train/a.jpg:count:dog": ("train", "1"),
    "images/train/a.jpg:count:cat": ("train", "1"),
    "images/val/c.jpg:count:cat": ("val", "1"),
}


def test_boxes_are_by_their_centre_and_polygons_by_their_bounding_box(tmp_path):
    found = {e.id: e for e in rows(tmp_path, FILES, DATA) if isinstance(e, Example)}
    dog, cat = (found[f"images/train/a.jpg:count:{name}"] for name in ("dog", "cat"))
    assert (dog.boxes, dog.box_format) == ((((0.5, 0.5, 0.2, 0.4),),), "cxcywh_unit")
    assert cat.boxes[0][0] == pytest.approx((0.2, 0.3, 0.2, 0.4))
    assert dog.images[0].path == tmp_path / "images/train/a.jpg"
    assert answers(list(found.values())) == ALL  # b.PNG has no labels, so no object


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        {**DATA, "names": ["dog", "cat"]},
        {**DATA, "train": "..\\images\\train", "val": "../images/val", "path": None} | {"path": ""},
        {**DATA, "train": "/content/set/images/train", "val": "D:\\set\\images\\val"},
    ],
)
def test_data_yaml_names_the_folders(tmp_path, data):
    assert answers(rows(tmp_path, FILES, data)) == ALL


def test_without_train_all_of_images_is_read_and_split_later(tmp_path):
    found = answers(rows(tmp_path, FILES, {"names": ["dog", "cat"]}))
    assert found == {id: ("", answer) for id, (_, answer) in ALL.items()}


def test_a_set_without_validation_is_split_by_picture_later(tmp_path):
    found = rows(tmp_path, FILES, {**DATA, "val": "images/train"})  # as in coco8.yaml
    assert {split for split, _ in answers(found).values()} == {""}


def test_own_questions_and_absent_objects(tmp_path):
    line = {"file": "images/val/c.jpg", "question": "Which?", "answer": "a cat", "categories": ["cat"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    (joined,) = rows(tmp_path, FILES, DATA, "--questions", str(tmp_path / "q.jsonl"))
    assert isinstance(joined, Example)
    assert (joined.answer, joined.boxes) == ("a cat", (((0.25, 0.25, 0.1, 0.1),),))
    absent = answers(rows(tmp_path, FILES, DATA, "--ask", "presence", "--absent"))
    assert absent["images/val/c.jpg:absence:dog"] == ("val", "no")


@pytest.mark.parametrize(
    ("files", "data", "code", "says"),
    [
        ({"labels/val/c.txt": "2 0.5 0.5 0.1 0.1"}, DATA, "D93", "c.txt line 1 .*wanted a class of data.yaml"),
        ({"labels/val/c.txt": "0 0.5 0.5 0.1"}, DATA, "D93", "3 numbers"),
        ({"labels/val/c.txt": "\ndog 0.5 0.5 0.1 0.1"}, DATA, "D93", "c.txt line 2"),
        ({}, {**DATA, "kpt_shape": [17, 3]}, "D58", "kpt_shape"),
        ({}, {"train": "images/train"}, "D58", "no 'names'"),
        ({}, None, "D63", "data.yaml"),
        ({}, {**DATA, "train": "pictures"}, "D93", "is missing.*pictures"),
        ({}, {**DATA, "names": 3}, "D58", "names"),
        ({}, "names: [a\n  b: {", "D93", "no YAML"),
        ({}, "names: !!python/object/apply:os.getcwd []", "D93", "wanted a class"),  # tags are not read
        (
            {"images/other/a.jpg": "x"},
            {"names": ["dog"], "train": "images/other"},
            "D93",
            "folder of labels is missing",
        ),
    ],
)
def test_other_folders_are_refused(tmp_path, files, data, code, says):
    with refusal(code, says):
        rows(tmp_path, {**FILES, **files}, data)


def test_no_is_the_name_of_a_class_and_a_split_may_be_a_list_or_empty(tmp_path):
    data = "train: [images/train, images/val]\nval:\nnames: {0: no, 1: yes}\n"
    ids = [f"images/{name}" for name in ("train/a.jpg:count:no", "train/a.jpg:count:yes", "val/c.jpg:count:yes")]
    assert answers(rows(tmp_path, FILES, data)) == dict.fromkeys(ids, ("", "1"))


def test_a_wrong_key_of_a_question_lists_both_names(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"image": "a.jpg", "question": "Q?", "answer": "x", "label": []}')
    with refusal("D58", "did you mean 'labels'.*categories or labels"):
        rows(tmp_path, FILES, DATA, "--questions", str(tmp_path / "q.jsonl"))
