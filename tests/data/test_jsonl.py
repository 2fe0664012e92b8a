"""Lines of JSON: what becomes a row, and which lines are refused."""

import argparse
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.rows import Example
from sayo_verl.data.sources import jsonl
from sayo_verl.data.sources.jsonl import JsonlSource
from sayo_verl.errors import SayoError

LINE = {"image": "a.png", "question": "What is it?", "answer": "a bus", "boxes": [[1, 2, 3, 4]]}


def written(folder: Path, *lines: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def one(folder: Path, **changed: Any) -> Example:
    """The row of ``LINE`` with other values; ``...`` removes a key."""
    line = {key: value for key, value in {**LINE, **changed}.items() if value is not ...}
    (example,) = JsonlSource(written(folder, line), "xyxy").examples()
    return example


def test_a_line_becomes_an_example(tmp_path):
    example = one(tmp_path, id=7, kind="object", size=[640, 480], box_names=["bus"], box_format="xyxy")
    assert (example.id, example.question, example.answer, example.kind) == ("7", "What is it?", "a bus", "object")
    assert (example.boxes, example.box_names, example.box_format) == ((((1, 2, 3, 4),),), (("bus",),), "xyxy")
    assert (example.images[0].path, example.sizes, example.split) == (tmp_path / "a.png", ((640, 480),), "")
    assert (example.data_source, example.box_source) == ("sayo/jsonl", "jsonl")


def test_what_a_line_leaves_out_is_left_open(tmp_path):
    example = one(tmp_path, question="<image>\nWhat is it?", answer=3.0)
    assert (example.id, example.question, example.answer) == ("data.jsonl:1", "What is it?", "3")
    assert (example.sizes, example.kind, example.box_names) == ((), "", (("",),))


@pytest.mark.parametrize("boxes", [..., [], None, [[]]])
def test_a_line_may_have_no_boxes_and_then_needs_no_format(tmp_path, boxes):
    line = {key: value for key, value in {**LINE, "boxes": boxes}.items() if value is not ...}
    (example,) = JsonlSource(written(tmp_path, line)).examples()
    assert (example.boxes, example.box_names, example.neutral) == (((),), ((),), False)


def test_boxes_without_a_format_and_ids_that_repeat_are_refused_by_the_builder(tmp_path):
    for code, lines, box_format in (("D46", [LINE], None), ("D52", [{**LINE, "id": 1}] * 2, "xyxy")):
        with refusal(code):
            build(JsonlSource(written(tmp_path, *lines), box_format), tmp_path / "out", BuildOptions())


def test_several_images(tmp_path):
    names, boxes = ["a.png", "sub\\b.png"], [[[1, 2, 3, 4], [5, 6, 7, 8]], []]
    example = one(tmp_path, image=..., images=names, boxes=boxes, size=[[10, 10], None], box_names=[["x", "y"], []])
    assert [image.path for image in example.images] == [tmp_path / "a.png", tmp_path / "sub" / "b.png"]
    assert [len(of_image) for of_image in example.boxes] == [2, 0]
    assert (example.box_names, example.sizes) == ((("x", "y"), ()), ((10, 10), None))


def test_a_validation_file_names_the_split_of_its_rows(tmp_path):
    (tmp_path / "own").mkdir()
    source = JsonlSource(
        written(tmp_path, LINE, LINE), "xyxy", val_file=written(tmp_path / "own", {**LINE, "answer": "no"})
    )
    rows = list(source.examples())
    assert [(e.split, e.answer) for e in rows] == [("train", "a bus"), ("train", "a bus"), ("val", "no")]
    assert [e.images[0].path for e in rows[1:]] == [tmp_path / "a.png", tmp_path / "own" / "a.png"]
    assert (len({e.id for e in rows}), len(source.facts()["files"])) == (3, 2)


def test_the_flags_make_the_source(tmp_path):
    parser = argparse.ArgumentParser()
    jsonl.add_flags(parser)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(written(tmp_path, LINE).read_bytes()))
    args = parser.parse_args(["--file", str(packed), "--images", str(tmp_path), "--name", "mine"])
    args.box_format = "xywh"  # of the command
    (example,) = jsonl.from_args(args).examples()
    assert (example.box_format, example.data_source) == ("xywh", "sayo/mine")


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"boxs": []}, "D58", "unknown key 'boxs'.*did you mean 'boxes'"),
        ({"answer": ...}, "D58", "no 'answer'"),
        ({"answer": ["a", "b"]}, "D58", "answer is invalid: a list.*choose one"),
        ({"image": ...}, "D58", "either image or images"),
        ({"image": ..., "images": []}, "D58", "either image or images"),
        ({"size": [10, 0]}, "D58", "size"),
        ({"box_format": "xywh"}, "D61", "got xywh, wanted xyxy"),
        ({"box_names": "a"}, "D58", "valid tuple"),
        ({"boxes": [[1, 2, 3]]}, "D42", "four finite"),
        ({"boxes": [[[1, 2, 3, 4]], []]}, "D05", "nested"),
        ({"question": "<image><image> Look."}, "D09", "each image once"),
    ],
)
def test_a_wrong_line_is_refused_by_file_and_line(tmp_path, changed, code, says):
    wrong = {key: value for key, value in {**LINE, **changed}.items() if value is not ...}
    with refusal(code, says) as caught:
        list(JsonlSource(written(tmp_path, {**LINE, "id": "first"}, wrong), "xyxy").examples())
    assert f"{tmp_path / 'data.jsonl'} line 2" in caught.value.where


VALUES = st.none() | st.booleans() | st.integers(-9, 999) | st.text(max_size=9) | st.sampled_from([1e308, 0.5])
JSON = st.recursive(VALUES, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x, max_size=2))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*LINE, "images", "id", "size", "box_names", "kind", "other"]), JSON)
def test_any_value_of_a_key_is_a_row_or_a_refusal(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("any")
    try:
        (outcome,) = JsonlSource(written(folder, {**LINE, key: value}), "xyxy").examples()
    except SayoError as error:
        assert "data.jsonl" in error.where  # noqa: PT017 (either outcome is right)
    else:
        assert isinstance(outcome, Example)


def test_pictures_of_one_name_beside_two_files_are_two_pictures(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"image": "0.png", "question": "q?", "answer": "a"}')
    beside = JsonlSource(tmp_path / "train" / "a.jsonl", val_file=tmp_path / "val" / "a.jsonl")
    assert [row.images[0].key for row in beside.examples()] == ["0.png", "val/0.png"]
    assert [row.images[0].path for row in beside.examples()] == [tmp_path / n / "0.png" for n in ("train", "val")]
    one_folder = dataclasses.replace(beside, images=tmp_path)
    assert [row.images[0].key for row in one_folder.examples()] == ["0.png", "0.png"]
