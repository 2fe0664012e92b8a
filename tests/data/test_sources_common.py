"""What all sources share: texts, records, boxes, names of images."""

import math
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from support.refusals import refusal

from sayo_verl.data.rows import Drop, ImageRef
from sayo_verl.data.sources import common
from sayo_verl.data.sources.common import ImageFolder, boxes_of_images, names_of_boxes


class Inner(BaseModel):
    value: int


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid")
    question: common.Text
    size: tuple[common.Side, common.Side] | None = None
    turns: list[Inner] = []


# --------------------------------------------------------------------------------------------------- records and texts


def test_text_is_written_as_json_writes_it():
    texts = {" a ": "a", 3: "3", 4.0: "4", 0.25: "0.25", Decimal("2.5"): "2.5", True: "true", None: "", math.nan: ""}
    assert [common.parse(common.Text, value, "here") for value in texts] == list(texts.values())


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "a", "sise": [1, 2]}, "unknown key 'sise' .did you mean 'size'"),
        ({"sise": [1, 2]}, "unknown key 'sise'"),  # before what is missing: it is likely the cause
        ({}, "has no 'question'.*wanted question, size, turns"),
        ({"question": "a", "size": [640, 0]}, "size.1 is invalid.*got 0"),
        ({"question": "a", "size": [1.5, 2]}, "size.0"),
        ({"question": ["yes", "no"]}, "question is invalid.*choose one"),
        ({"question": "a", "turns": [{"value": 1}, {}]}, "no 'turns.1.value'"),
        ([1], "the record is invalid"),
    ],
)
def test_a_wrong_record_is_refused_in_one_line_with_the_field(record, says):
    with refusal("D58", says) as caught:
        common.parse(Sample, record, "file line 2")
    assert caught.value.where == "file line 2"


def test_input_files_exist_and_cannot_run_code(tmp_path):
    for suffix in (".pkl", ".pt", ".NPY"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
        with refusal("D63", "run code"):
            common.check_input(tmp_path / f"a{suffix}")
    with refusal("D63", "no such file"):
        common.check_input(tmp_path / "none.jsonl")


def test_image_tags_around_a_question_are_removed_and_must_be_as_many_as_images():
    assert common.untagged("<image>\n<image> Same?", 2, "here") == "Same?"
    assert common.untagged("What is it? <image>", 1, "here") == "What is it?"
    assert common.untagged("Is <image> older than <image>?", 2, "here") == "Is <image> older than <image>?"
    assert common.untagged("What?", 3, "here") == "What?"
    with refusal("D09", "each image once"):
        common.untagged("<image> What?", 2, "line 4")


# --------------------------------------------------------------------------------------------------------------- boxes


def test_boxes_are_nested_by_image():
    box = (1, 2, 3, 4)
    for one in (box, [box], [[box]]):
        assert boxes_of_images(one, 1, "here") == ((box,),)
    for none in (None, [], [[]]):
        assert boxes_of_images(none, 1, "here") == ((),)
    assert boxes_of_images([box, box], 1, "here") == ((box, box),)
    assert boxes_of_images([[], [box]], 2, "here") == ((), (box,))
    assert boxes_of_images(None, 2, "here") == ((), ())


def test_other_boxes_are_refused_by_place():
    wrong: list[Any] = [["a"], [[1, 2, 3]], [[1, 2, 3, "4px"]], [[1, 2, 3, None]], [[1, 2, 3, math.inf]]]
    for value, n, code in [*((w, 1, "D42") for w in wrong), ([[1, 2, 3, 4]], 2, "D05"), ({"x": 1}, 1, "D05")]:
        with refusal(code) as caught:
            boxes_of_images(value, n, "line 7")
        assert "line 7" in caught.value.where


def test_names_of_boxes():
    boxes = (((1.0, 2.0, 3.0, 4.0),), ())
    assert names_of_boxes(None, boxes, "here") == (("",), ())
    assert names_of_boxes([["dog"], []], boxes, "here") == (("dog",), ())
    assert names_of_boxes(["dog"], boxes[:1], "here") == (("dog",),)
    for value in ([3], "dog"):
        with refusal("D58"):
            names_of_boxes(value, boxes[:1], "here")


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("images/p0.png", "p1.png", "sub/p2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    return tmp_path / "set"


def test_names_of_any_system_are_looked_up_in_the_folder(pictures, tmp_path):
    names = {"./images/../p1.png": "p1.png", "images\\p0.png": "images/p0.png", "三　辆.png": "三　辆.png"}
    names |= {"D:\\data\\images\\p0.png": "images/p0.png", "C:/somewhere/p1.png": "p1.png"}
    names |= {"/home/other/set/sub/p2.png": "sub/p2.png", "../p3.png": "../p3.png"}
    names |= {"/gone/p9.png": "p9.png", "http://x.org/a.png": "http:/x.org/a.png"}  # refused when they are read
    for name, found in names.items():
        assert ImageFolder(pictures).ref(name, "here") == ImageRef(found, pictures / found)
    there = pictures / "p1.png"
    assert ImageFolder(tmp_path).ref(str(there), "here").path == there


def test_two_absolute_names_are_not_one_picture(pictures):
    folder = ImageFolder(pictures)
    assert folder.ref("/a/p1.png", "here") == folder.ref("/a/p1.png", "here")
    with refusal("D60", "two images have one name.*/a/p1.png and /b/p1.png"):
        folder.ref("/b/p1.png", "here")


def test_images_in_a_zip_file_by_their_names_or_unique_ends(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train/a.png", "train/b.png", "val/b.png"):
            archive.writestr(name, b"x")
    folder = ImageFolder(path)
    members = {"train/a.png": "train/a.png", "a.png": "train/a.png", "D:\\x\\val\\b.png": "val/b.png", "b.png": "b.png"}
    for name, member in members.items():
        assert folder.ref(name, "here") == ImageRef(member, path, member)
    (tmp_path / "no.zip").write_bytes(b"x")
    for missing in (tmp_path / "none", tmp_path / "no.zip"):
        with refusal("D63", "no folder or zip file"):
            ImageFolder(missing)


def test_an_image_of_a_table_is_bytes_or_a_name(pictures):
    by_bytes: list[Any] = [b"abc", {"bytes": b"abc", "path": "x.png"}]
    refs = [common.stored_image(value, "here") for value in by_bytes]
    assert refs[0] == refs[1]
    assert refs[0].data == b"abc"
    for value in ("p1.png", {"bytes": None, "path": "p1.png"}):
        assert common.stored_image(value, "here", ImageFolder(pictures)).path == pictures / "p1.png"
    for value in ("p1.png", {"bytes": None, "path": None}, 3, {}):
        with refusal("D60", "--images"):
            common.stored_image(value, "here")
    with pytest.raises(Drop, match="image_missing"):
        common.stored_image(None, "here")
