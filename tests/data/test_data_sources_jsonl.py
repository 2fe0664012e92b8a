"""Lines of JSON as examples, and the rules for fields that all sources share."""

import argparse
import gzip
import json
import math
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.data.rows import Drop, Example, LeftOut
from sayo_verl.data.sources import fields, inputs, jsonl
from sayo_verl.data.sources.jsonl import JsonlSource
from sayo_verl.errors import SayoError

LINE = {"image": "a.png", "question": "What is it?", "answer": "a dog", "boxes": [[1, 2, 3, 4]]}


def written(folder: Path, *lines: dict, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(folder: Path, *lines: dict, **options) -> list[Example | LeftOut]:
    return list(JsonlSource(written(folder, *lines), **{"box_format": "xyxy", **options}).examples())


def one(folder: Path, **changed) -> Example | LeftOut:
    record = {key: value for key, value in {**LINE, **changed}.items() if value is not ...}
    (example,) = read(folder, record)
    return example


def test_a_line_becomes_an_example(tmp_path):
    full = {**LINE, "id": 7, "box_names": ["dog"], "box_format": "xyxy", "size": [10, 20], "kind": "animals"}
    example = one(tmp_path, **full)
    assert example == Example(
        "7",
        (inputs.ImageRef("a.png", tmp_path / "a.png"),),
        "What is it?",
        "a dog",
        (((1.0, 2.0, 3.0, 4.0),),),
        (("dog",),),
        "xyxy",
        "jsonl",
        "sayo/jsonl",
        ((10, 20),),
        "animals",
    )


def test_what_is_not_said_is_left_open(tmp_path):
    example = one(tmp_path, boxes=[])
    assert (example.id, example.boxes, example.box_names, example.sizes) == ("data.jsonl:1", ((),), ((),), ())


def test_several_images(tmp_path):
    example = one(
        tmp_path,
        image=...,
        images=["a.png", "sub/b.png"],
        boxes=[[[1, 2, 3, 4], [5, 6, 7, 8]], []],
        size=[[10, 10], None],
        box_names=[["x", "y"], []],
    )
    assert [image.path for image in example.images] == [tmp_path / "a.png", tmp_path / "sub" / "b.png"]
    assert [len(of_image) for of_image in example.boxes] == [2, 0]
    assert example.box_names == (("x", "y"), ())
    assert example.sizes == ((10, 10), None)


def test_the_order_is_the_file_s_and_the_same_every_time(tmp_path):
    source = JsonlSource(written(tmp_path, *({**LINE, "answer": str(i)} for i in range(9))), "xyxy")
    first = list(source.examples())
    assert first == list(source.examples())
    assert [e.answer for e in first] == list("012345678")
    assert json.loads(json.dumps(source.facts()))["box_format"] == "xyxy"


def test_packed_files_and_images_in_a_zip_file(tmp_path):
    text = written(tmp_path, LINE).read_bytes()
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data.jsonl", text)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("train/a.png", "train/b.png", "val/b.png"):
            archive.writestr(name, b"x")
    for name in ("data.jsonl.gz", "data.zip", "data.zip::data.jsonl"):
        source = JsonlSource(tmp_path / name, "xyxy", images=tmp_path / "images.zip")
        (example,) = source.examples()
        assert example.images[0].member == "train/a.png"
        assert source.facts()["files"]
    folder = inputs.ImageFolder(tmp_path / "images.zip")
    assert folder.ref("val/b.png", "here").member == "val/b.png"
    assert folder.ref("c.png", "here").member == "c.png"  # reading it tells that it is missing
    with refusal("D60", "two members"):
        folder.ref("b.png", "here")


def test_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    jsonl.add_flags(parser)
    args = parser.parse_args(["--file", str(written(tmp_path, LINE)), "--box-format", "xywh", "--name", "mine"])
    (example,) = jsonl.from_args(args).examples()
    assert (example.box_format, example.data_source, example.box_source) == ("xywh", "sayo/mine", "mine")
    with pytest.raises(SystemExit):
        parser.parse_args(["--file", "x"])  # the format of boxes is always said
    assert "xyxy_unit" in parser.format_help()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"boxs": []}, "D58", "unknown key 'boxs'.*did you mean 'boxes'"),
        ({"answer": ...}, "D58", "no answer"),
        ({"boxes": ...}, "D58", "no boxes"),
        ({"image": ...}, "D58", "either image or images"),
        ({"images": ["b.png"]}, "D58", "either image or images"),
        ({"image": ..., "images": []}, "D58", "not a list of file names"),
        ({"id": 1.5}, "D58", "wrong type"),
        ({"id": " "}, "D58", "empty"),
        ({"size": [10]}, "D58", "size"),
        ({"size": [10, 0]}, "D58", "size"),
        ({"size": [10, "px"]}, "D58", "size"),
        ({"kind": 3}, "D58", "wrong type"),
        ({"box_format": "xywh"}, "D61", "different box formats"),
        ({"box_names": ["a", "b"]}, "D59", "names"),
        ({"box_names": [1]}, "D58", "names"),
        ({"boxes": [1, 2, 3, 4]}, "D42", "four finite"),
        ({"boxes": [[1, 2, 3]]}, "D42", "four finite"),
        ({"boxes": {"x": 1}}, "D59", "not a list"),
        ({"boxes": [[[1, 2, 3, 4]], []]}, "D05", "nested"),
    ],
)
def test_a_wrong_line_stops_the_work_and_is_named(tmp_path, changed, code, says):
    with refusal(code, says) as caught:
        read(tmp_path, LINE, {key: value for key, value in {**LINE, **changed}.items() if value is not ...})
    assert f"{tmp_path / 'data.jsonl'} line 2" in caught.value.where


def test_two_images_and_one_list_of_boxes_stop_the_work(tmp_path):
    with refusal("D05", "nested by image"):
        one(tmp_path, image=..., images=["a.png", "b.png"])


@pytest.mark.parametrize("value", [{"bytes": None, "path": "a.png"}, {"bytes": "x"}, None, 3, ""])
def test_an_image_that_is_no_file_name_stops_the_work(tmp_path, value):
    with refusal("D60") as caught:
        one(tmp_path, image=value)
    assert "got " in str(caught.value)
    assert "wanted " in str(caught.value)


@pytest.mark.parametrize(("tags", "n"), [("<image><image> Look.", 1), ("<image> Look.", 2), ("a <image> b", 2)])
def test_tags_and_images_that_differ_in_number_stop_the_work(tmp_path, tags, n):
    with refusal("D09", "each image once") as caught:
        one(tmp_path, image=..., images=["a.png", "b.png"][:n], boxes=[[], []][:n], question=tags)
    assert "line 1" in caught.value.where


def test_tags_around_the_text_are_removed_and_one_within_it_drops_the_row(tmp_path):
    assert one(tmp_path, question="<image>\nWhat is it?").question == "What is it?"
    assert one(tmp_path, question="What is it? <image>").question == "What is it?"
    two = one(tmp_path, image=..., images=["a.png", "b.png"], boxes=[], question="<image> <image> Same?")
    assert two.question == "Same?"
    assert one(tmp_path, question="Is <image> old?").reason == "reserved_text"
    assert one(tmp_path, question="Is <|image_pad|> old?").reason == "reserved_text"


def test_coordinates_that_are_no_finite_numbers_stop_the_work(tmp_path):
    for value in ("12px", None, True, [1]):
        with refusal("D42") as caught:
            one(tmp_path, boxes=[[1, 2, 3, value]])
        assert "line 1" in caught.value.where
        assert "got " in str(caught.value)
    path = tmp_path / "nan.jsonl"
    for literal in ("NaN", "Infinity", "1e999"):
        path.write_text(json.dumps(LINE).replace("[1,", f"[{literal},").replace("[[1", f"[[{literal}") + "\n")
        with refusal("D47", "finite"):
            list(JsonlSource(path, "xyxy").examples())


def test_an_id_that_comes_twice_stops_the_work(tmp_path):
    with refusal("D62", "two records") as caught:
        read(tmp_path, {**LINE, "id": 1}, {**LINE, "id": "1"})
    assert "line 2" in caught.value.where


@pytest.mark.parametrize("answer", ["", "  ", None, [], ["a"], {"a": 1}])
def test_an_answer_that_is_no_text_drops_the_row(tmp_path, answer):
    left = one(tmp_path, answer=answer)
    assert isinstance(left, LeftOut)
    assert left.reason == "empty_answer"
    assert left.id == "data.jsonl:1"


@pytest.mark.parametrize("name", ["a\0.png", "a\nb.png", "x" * 300 + ".png", "\udcff.png", "\x7f.png"])
def test_names_that_no_file_can_have_stop_the_work(tmp_path, name):
    with refusal("D40"):
        inputs.ImageFolder(tmp_path).ref(name, "line 1")
    if "\udcff" not in name:  # such a line is no JSON in UTF-8, which the reader refuses before
        with refusal("D40") as caught:
            one(tmp_path, image=name)
        assert "line 1" in caught.value.where


@pytest.mark.parametrize("name", ["http://x.org/a.png", "file:///etc/passwd", "s3://b/a.png", "HTTPS://x/a.png"])
def test_addresses_stop_the_work(tmp_path, name):
    with refusal("D40"):
        one(tmp_path, image=name)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", ".."])
def test_names_outside_the_folder_stop_the_work_unless_allowed(tmp_path, name):
    with refusal("D60", "outside"):
        one(tmp_path, image=name)
    (example,) = read(tmp_path, {**LINE, "image": name}, allow_outside=True)
    assert example.images[0].path == tmp_path / name


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".npy", ".PTH"])
def test_formats_that_can_run_code_stop_the_work(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"\x80")
    with refusal("D63", "run code"):
        JsonlSource(path, "xyxy")


def test_options_are_checked_before_anything_is_read(tmp_path):
    path = written(tmp_path, LINE)
    with refusal("D46", "did you mean 'xyxy_unit'"):
        JsonlSource(path, "xyxy_units")
    with refusal("D63", "no such file"):
        JsonlSource(tmp_path / "no.jsonl", "xyxy")
    with refusal("D58", "not plain"):
        JsonlSource(path, "xyxy", name="numina/x")
    with refusal("D63", "no such folder"):
        list(JsonlSource(path, "xyxy", images=tmp_path / "no").examples())
    with refusal("D58", "not an object"):
        list(JsonlSource(written(tmp_path, ["a"]), "xyxy").examples())


# ---------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (" a ", "a"),
        (3, "3"),
        (3.0, "3"),
        (0.5, "0.5"),
        (-2, "-2"),
        (True, "true"),
        (False, "false"),
        (None, ""),
        ([1], ""),
        ({}, ""),
        (math.nan, ""),
        (math.inf, ""),
        (b"a", ""),
    ],
)
def test_text(value, said):
    assert fields.text(value) == said


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_text_of_a_number_is_that_number(value):
    assert float(fields.text(value)) == float(value)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.lists(st.integers(-9, 999), min_size=4, max_size=4), max_size=3), min_size=1, max_size=4),
)
def test_nested_boxes_come_back_as_they_are(boxes):
    found = fields.boxes_of_images(boxes, len(boxes), "here")
    assert [[list(box) for box in of_image] for of_image in found] == boxes
    assert fields.names_of_boxes(None, found, "here") == tuple(("",) * len(of_image) for of_image in boxes)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(json_values, st.integers(1, 3))
def test_boxes_of_any_kind_are_read_or_refused(value, n):
    try:
        found = fields.boxes_of_images(value, n, "here")
    except SayoError:
        with refusal("(D05|D42|D59)"):
            fields.boxes_of_images(value, n, "here")
        return
    assert len(found) == n
    assert all(len(box) == 4 and all(math.isfinite(v) for v in box) for of in found for box in of)


def test_an_image_of_a_table():
    first = fields.untagged("q", 1, "here")
    assert first == "q"
    ref = inputs.stored_image({"bytes": b"png", "path": "a.png"}, "here")
    assert ref.data == b"png"
    assert ref.key == inputs.stored_image(b"png", "here").key
    assert ref.key != inputs.stored_image(b"pnh", "here").key
    with pytest.raises(Drop) as caught:
        inputs.stored_image(None, "here")
    assert caught.value.reason == "image_missing"
