"""COCO annotations in their published form, and the questions about annotated objects."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.refusals import refusal

from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import coco

MANY = "How many objects of the class"
CATEGORIES = {1: "person", 2: "wine glass", 3: "umbrella", 4: "skis"}


def mark(image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    unread = {"id": 100 * image + category, "area": 1.0, "segmentation": [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]}
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **unread, **more}


def detection(**changed: Any) -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480, "license": 1} for i in (9, 5, 7)],
        "annotations": [
            mark(5, 1, [0, 0, 10, 20]),
            mark(9, 2, [1.5, 2.5, 3, 4]),
            mark(5, 1, [30, 40, 50, 60]),
            mark(9, 1, [7, 7, 7, 7]),
            mark(9, 1, [0, 0, 99, 99], iscrowd=1),
        ],
        "categories": [{"id": i, "name": name, "supercategory": "x"} for i, name in CATEGORIES.items()],
        **changed,
    }


def rows(folder: Path, file: dict[str, Any] | None = None, *flags: str) -> list[Example | LeftOut]:
    """What ``sayo prepare coco`` yields with these flags."""
    (folder / "ann.json").write_text(json.dumps(file or detection()))
    parser = argparse.ArgumentParser()
    coco.add_flags(parser)
    source = coco.from_args(
        parser.parse_args(["--annotations", str(folder / "ann.json"), "--images", str(folder), *flags])
    )
    assert json.loads(json.dumps(source.facts(), default=str))["files"]
    return list(source.examples())


def asked(found: list[Example | LeftOut]) -> list[tuple[Any, ...]]:
    return [
        (e.id, e.question, e.answer, e.boxes[0]) if isinstance(e, Example) else (e.id, e.reason, e.detail)
        for e in found
    ]


def joined(folder: Path, *questions: dict[str, Any]) -> list[Example | LeftOut]:
    """Rows of a file of questions."""
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return rows(folder, None, "--questions", str(folder / "q.jsonl"))


def test_counts_have_the_boxes_of_all_objects_and_a_crowd_has_no_box(tmp_path):
    found = rows(tmp_path, None, "--ask", "count")
    assert asked(found) == [
        ("9:count:wine glass", f"{MANY} 'wine glass' are in the image?", "1", ((1.5, 2.5, 3, 4),)),
        ("9:count:person", "no_region", "1 of 2 objects have no box"),
        ("5:count:person", f"{MANY} 'person' are in the image?", "2", ((0, 0, 10, 20), (30, 40, 50, 60))),
    ]
    example = found[2]
    assert isinstance(example, Example)
    assert (example.box_format, example.sizes, example.box_names) == ("xywh", ((640, 480),), (("person", "person"),))
    assert (example.images[0].path, example.data_source) == (tmp_path / "5.jpg", "sayo/coco")


def test_presence_and_as_many_absent_objects_that_are_neutral(tmp_path):
    found = rows(tmp_path, None, "--ask", "presence", "--absent")
    no = [e for e in found if isinstance(e, Example) and e.answer == "no"]
    assert [e.id.rpartition(":")[0] for e in no] == ["9:absence", "9:absence", "5:absence"]
    assert all(e.neutral and e.boxes == ((),) and e.kind == "absence" for e in no)
    assert not any(name in e.question for e in no if e.id.startswith("9") for name in ("person", "glass"))
    assert no[2].question.startswith("Is there an object of the class '")
    yes = [e for e in found if isinstance(e, Example) and e.answer == "yes"]
    assert [e.id for e in yes] == ["9:presence:wine glass", "5:presence:person"]
    assert not any(e.neutral for e in yes)
    assert found == rows(tmp_path, None, "--ask", "presence", "--absent")  # drawn, and the same every time


def test_an_object_that_is_written_twice_counts_once_and_windows_names_are_read(tmp_path):
    image = {"id": 5, "file_name": "images\\p0.png", "width": 4, "height": 4}
    twice = detection(images=[image], annotations=[mark(5, 1, [0, 0, 1, 2])] * 2)
    (example,) = rows(tmp_path, twice, "--ask", "count")
    assert isinstance(example, Example)
    assert (example.answer, example.boxes) == ("1", (((0, 0, 1, 2),),))
    assert example.images[0].path == tmp_path / "images" / "p0.png"


def test_own_questions_join_on_names(tmp_path):
    about = {"question": "<image> Who?", "answer": "two people"}
    found = joined(
        tmp_path,
        {**about, "image_id": 5, "categories": ["person"], "kind": "who"},
        {**about, "file_name": "5.jpg", "categories": [], "id": "none"},
        {**about, "file_name": "7.jpg", "labels": ["person"]},
        {**about, "image_id": 9, "categories": ["person", "wine glass"]},
        {**about, "image_id": 6, "categories": []},
    )
    assert asked(found) == [
        ("question:1", "Who?", "two people", ((0, 0, 10, 20), (30, 40, 50, 60))),
        ("none", "Who?", "two people", ()),
        ("question:3", "unknown_object", "7 has no 'person'"),
        ("question:4", "no_region", "1 of 3 objects have no box"),
        ("question:5", "image_missing", "6 is not annotated"),
    ]
    assert [e.neutral for e in found if isinstance(e, Example)] == [False, True]


@pytest.mark.parametrize(
    ("question", "code", "says"),
    [
        ({"catgories": []}, "D58", "unknown key 'catgories'"),
        ({}, "D58", "no 'categories'"),
    ],
)
def test_a_wrong_question_is_refused_by_its_line(tmp_path, question, code, says):
    first = {"image_id": 5, "question": "Who?", "answer": "x", "categories": []}
    with refusal(code, says) as caught:
        joined(tmp_path, first, {"image_id": 5, "question": "Who?", "answer": "x", **question})
    assert caught.value.where.endswith("q.jsonl line 2")


@pytest.mark.parametrize(
    ("changed", "code", "where"),
    [
        ({"images": [{"id": 5, "file_name": "a.jpg", "width": 0, "height": 4}]}, "D58", "images[0]"),
        ({"images": detection()["images"] + detection()["images"][:1]}, "D62", "images[3]"),
        ({"images": []}, "D58", "ann.json"),
        ({"annotations": [mark(8, 1, [0, 0, 1, 1])]}, "D58", "annotations[0]"),
        ({"annotations": [mark(5, 9, [0, 0, 1, 1])]}, "D58", "annotations[0]"),
        ({"annotations": [mark(5, 1, [0, 0, 1])]}, "D42", "annotations[0]"),
        ({"annotations": [{"image_id": 5, "segments_info": []}]}, "D58", "annotations[0]"),  # panoptic
    ],
)
def test_a_wrong_annotation_is_refused_by_its_place(tmp_path, changed, code, where):
    with refusal(code) as caught:
        rows(tmp_path, detection(**changed), "--ask", "count")
    assert where in caught.value.where


@pytest.mark.parametrize("flags", [(), ("--ask", "count", "--questions", "q.jsonl")])
def test_either_ask_or_questions_is_named(tmp_path, flags):
    with pytest.raises(SystemExit):
        rows(tmp_path, None, *flags)


def test_absent_objects_stay_in_the_folder_that_is_built(tmp_path):
    from sayo_verl.data.build import BuildOptions, build

    Image.new("RGB", (640, 480), "red").save(tmp_path / "5.jpg")
    one = detection(images=detection()["images"][1:2], annotations=[mark(5, 1, [10, 20, 100, 100])])
    (tmp_path / "ann.json").write_text(json.dumps(one))
    asked = {"name": "coco", "ask": ["presence"], "absent": True}
    source = coco.CocoSource(annotations=tmp_path / "ann.json", images=tmp_path, **asked)
    built = build(source, tmp_path / "out", BuildOptions(val_share=0))
    assert (built.rows["train"], dict(built.left_out)) == (2, {})
