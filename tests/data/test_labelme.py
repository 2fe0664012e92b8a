"""labelme's files, and what becomes of their shapes."""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.refusals import refusal

from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import labelme


def shape(label: str, *points: tuple[Any, Any], kind: str | None = "rectangle", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def marked(*shapes: dict[str, Any], path: str = "p0.png", **more: Any) -> dict[str, Any]:
    size = {"imageHeight": 64, "imageWidth": 96}
    return {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": path, "imageData": None, **size, **more}


SQUARE = shape("square", (40, 12.5), (10, 30))


def rows(folder: Path, files: dict[str, Any], *flags: str) -> list[Example | LeftOut]:
    """What ``sayo prepare labelme`` yields for these JSON files."""
    for name, record in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record))
    parser = argparse.ArgumentParser()
    labelme.add_flags(parser)
    source = labelme.from_args(parser.parse_args(["--folder", str(folder), *(flags or ("--ask", "count"))]))
    assert json.loads(json.dumps(source.facts(), default=str))["folder"]
    return list(source.examples())


def one(folder: Path, record: dict[str, Any]) -> Example:
    (example,) = rows(folder, {"p0.json": record})
    assert isinstance(example, Example)
    return example


@pytest.mark.parametrize(
    ("given", "box"),
    [
        (SQUARE, (10, 12.5, 40, 30)),
        (shape("square", (1, 2), (9, 2), (9, 8), (1, 8)), (1, 2, 9, 8)),
        (shape("square", (5, 1), (9, 7), (2, 4), kind="polygon"), (2, 1, 9, 7)),
        (shape("square", (5, 1), (9, 7), (2, 4), kind=None), (2, 1, 9, 7)),
        (shape("square", (1, 2), (9, 8), kind="mask"), (1, 2, 9, 8)),
    ],
)
def test_shapes_become_boxes(tmp_path, given, box):
    example = one(tmp_path, marked(given))
    assert (example.boxes, example.box_format, example.box_source) == (((box,),), "xyxy", "labelme")
    assert (example.sizes, example.id, example.answer) == (((96, 64),), "p0.json:count:square", "1")


def test_a_label_with_a_shape_that_has_no_box_is_left_out(tmp_path):
    circle, ignored = shape("square", (1, 1), (2, 2), kind="circle"), shape("__ignore__", (0, 0), (1, 1))
    parts = [shape("car", (1, 1), (2, 2), group_id=3), shape("car", (5, 5), (9, 9), group_id=3)]
    bus = shape("bus", (5, 5), (9, 9), group_id=3)
    found = rows(tmp_path, {"p0.json": marked(SQUARE, circle, *parts, bus, ignored)})
    assert found[:2] == [
        LeftOut("p0.json:count:square", "no_region", "1 of 2 objects have no box"),
        LeftOut("p0.json:count:car", "no_region", "1 of 1 objects have no box"),
    ]
    assert [e.answer for e in found[2:] if isinstance(e, Example)] == ["1"]


@pytest.mark.parametrize(
    ("path", "file", "found"),
    [
        ("p0.png", "p0.json", "p0.png"),
        ("D:\\pictures\\p0.png", "p0.json", "p0.png"),
        ("/home/other/p0.png", "sub/p0.json", "sub/p0.png"),
        ("..\\images\\p0.png", "sub/p0.json", "images/p0.png"),
    ],
)
def test_the_picture_is_found_from_any_system(tmp_path, path, file, found):
    (example,) = rows(tmp_path, {file: marked(SQUARE, path=path)})
    assert isinstance(example, Example)
    assert example.images == (ImageRef(found, tmp_path / found),)
    (tmp_path / "pictures").mkdir()
    (example,) = rows(tmp_path, {}, "--ask", "count", "--images", str(tmp_path / "pictures"))
    assert isinstance(example, Example)
    assert example.images[0].path == tmp_path / "pictures" / "p0.png"


def test_the_copy_in_the_file_is_used_where_the_picture_is_missing(tmp_path):
    copy = marked(SQUARE, imageData=base64.b64encode(b"png").decode())
    assert one(tmp_path, copy).images == (ImageRef("p0.png", data=b"png"),)
    (tmp_path / "p0.png").write_bytes(b"file")
    assert one(tmp_path, copy).images == (ImageRef("p0.png", tmp_path / "p0.png"),)


def test_own_questions_join_on_labels(tmp_path):
    line = {"file": "p0.json", "question": "Where?", "answer": "left", "labels": ["square"]}
    other = {**line, "file": "p9.json"}
    (tmp_path / "q.jsonl").write_text(
        f"{json.dumps(line)}\n{json.dumps(other)}\n{json.dumps(line | {'labels': ['x']})}"
    )
    found = rows(tmp_path, {"p0.json": marked(SQUARE)}, "--questions", str(tmp_path / "q.jsonl"))
    assert isinstance(found[0], Example)
    assert (found[0].answer, found[0].boxes) == ("left", (((10, 12.5, 40, 30),),))
    assert [r.reason for r in found[1:] if isinstance(r, LeftOut)] == ["image_missing", "unknown_object"]


@pytest.mark.parametrize(
    ("record", "code", "says"),
    [
        (marked(shape("a")), "D58", "shapes.0.points"),
        (marked(shape("a", ("x", 1), (2, 2))), "D58", "shapes.0.points"),
        (marked(shape("a", (1e300, 1), (2, 2))), "D42", "finite"),
        (marked(SQUARE, imageWidth=0), "D58", "imageWidth"),
        ({"annotations": []}, "D58", "no 'imagePath'"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path, record, code, says):
    with refusal(code, says) as caught:
        rows(tmp_path, {"p0.json": record})
    assert str(tmp_path / "p0.json") in caught.value.where


def test_a_folder_without_files_is_refused(tmp_path):
    with refusal("D63", "no JSON file"):
        rows(tmp_path, {})
