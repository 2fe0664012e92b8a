"""COCO annotations, written here in their published form, and the questions made of them."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from support.refusals import refusal

from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import coco, templates
from sayo_verl.data.sources.coco import CocoSource, Marks

CATEGORIES = {1: "person", 2: "wine glass", 3: "umbrella", 4: "skis"}


def mark(id: int, image: int, category: int, box: list, **more) -> dict:
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "iscrowd": 0,
        "area": 1.0,
        "segmentation": [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]],
        **more,
    }


def detection(**changed) -> dict:
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480, "license": 1} for i in (9, 5, 7)],
        "annotations": [
            mark(11, 5, 1, [0, 0, 10, 20]),
            mark(12, 9, 2, [1.5, 2.5, 3, 4]),
            mark(13, 5, 1, [30, 40, 50, 60]),
            mark(14, 5, 2, [5, 5, 5, 5]),
            mark(15, 9, 1, [7, 7, 7, 7]),
            mark(16, 9, 1, [0, 0, 99, 99], iscrowd=1),
        ],
        "categories": [{"id": i, "name": name, "supercategory": "x"} for i, name in CATEGORIES.items()],
        **changed,
    }


def panoptic() -> dict:
    segments = [
        {"id": 900, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
        {"id": 901, "category_id": 8, "bbox": [0, 0, 640, 200], "iscrowd": 0, "area": 99},
    ]
    whole = detection(
        annotations=[{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in (5, 7)],
        categories=[{"id": 1, "name": "person", "isthing": 1}, {"id": 8, "name": "sky", "isthing": 0}],
    )
    return whole


def source(folder: Path, data: dict, questions: list[dict] | None = None, **options) -> CocoSource:
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    if questions is not None:
        options["questions"] = folder / "questions.jsonl"
        options["questions"].write_text("".join(json.dumps(q) + "\n" for q in questions))
    return CocoSource(path, folder, **options)


def read(folder: Path, data: dict, questions: list[dict] | None = None, **options) -> list[Example | LeftOut]:
    return list(source(folder, data, questions, **options).examples())


def test_counts(tmp_path):
    found = {e.id: e for e in read(tmp_path, detection(), ask=("count",))}
    assert list(found) == ["9:count:wine glass", "9:count:person", "5:count:person", "5:count:wine glass"]
    people = found["5:count:person"]
    assert (people.question, people.answer) == ("How many people are in the image?", "2")
    assert people.boxes == (((0.0, 0.0, 10.0, 20.0), (30.0, 40.0, 50.0, 60.0)),)
    assert people.box_names == (("person", "person"),)
    assert people.sizes == ((640, 480),)
    assert (people.box_format, people.box_source, people.data_source) == ("xywh", "coco_count", "sayo/coco")
    assert people.images[0].path == tmp_path / "5.jpg"
    assert people.kind == "count"
    assert found["9:count:wine glass"].question == "How many wine glasses are in the image?"


def test_a_name_with_a_crowd_is_not_asked_about(tmp_path):
    left = [e for e in read(tmp_path, detection(), ask=("count", "presence")) if isinstance(e, LeftOut)]
    assert [(e.id, e.reason) for e in left] == [("9:count:person", "no_region"), ("9:presence:person", "no_region")]
    assert "1 of 2 'person'" in left[0].detail
    assert "crowd" in left[0].detail


def test_presence_and_as_many_absences(tmp_path):
    yes = read(tmp_path, detection(), ask=("presence",))
    assert [e.question for e in yes if isinstance(e, Example)] == [
        "Is there a wine glass in the image?",
        "Is there a person in the image?",
        "Is there a wine glass in the image?",
    ]
    both = read(tmp_path, detection(), ask=("presence",), absent=True)
    no = [e for e in both if isinstance(e, Example) and e.answer == "no"]
    assert len(no) == len([e for e in both if isinstance(e, Example) and e.answer == "yes"]) == 3
    assert all(e.boxes == ((),) and e.kind == "absence" for e in no)
    here = {9: {"person", "wine glass"}, 5: {"person", "wine glass"}}
    assert all(e.id.split(":")[2] not in here[int(e.id.split(":")[0])] for e in no)
    assert both == read(tmp_path, detection(), ask=("presence",), absent=True)


def test_a_crowd_is_not_absent(tmp_path):
    alone = detection(annotations=[mark(1, 5, 1, [0, 0, 9, 9], iscrowd=1), mark(2, 5, 2, [0, 0, 9, 9])])
    found = read(tmp_path, alone, ask=("presence",), absent=True, categories=("person", "wine glass"))
    assert [e.id for e in found] == ["5:presence:person", "5:presence:wine glass"]  # nothing is absent
    assert isinstance(found[0], LeftOut)


def test_only_the_categories_that_were_named(tmp_path):
    found = read(tmp_path, detection(), ask=("count",), categories=("wine glass",))
    assert [e.id for e in found] == ["9:count:wine glass", "5:count:wine glass"]
    with refusal("D62", "did you mean 'wine glass'"):
        read(tmp_path, detection(), ask=("count",), categories=("wineglass",))


def test_panoptic_segments_and_no_stuff(tmp_path):
    found = read(tmp_path, panoptic(), ask=("count",))
    assert [e.id for e in found] == ["5:count:person", "7:count:person"]
    assert found[0].boxes == (((1.0, 2.0, 3.0, 4.0),),)
    (joined,) = read(
        tmp_path, panoptic(), [{"file_name": "7.jpg", "question": "Where?", "answer": "up", "annotation_ids": [901]}]
    )
    assert joined.box_names == (("sky",),)


def test_questions_joined_by_annotation_and_by_category(tmp_path):
    asked = [
        {
            "id": "a",
            "image_id": 5,
            "question": "Who is left?",
            "answer": "he",
            "annotation_ids": [13, 14],
            "kind": "who",
        },
        {"file_name": "9.jpg", "question": "Who?", "answer": 3, "categories": ["person", "skis"]},
        {"image_id": 7, "question": "Any?", "answer": "no", "categories": ["person"]},
        {"image_id": 9, "question": "The group?", "answer": "b", "annotation_ids": [16]},
        {"image_id": 5, "question": "Who?", "answer": None, "annotation_ids": []},
        {"image_id": 77, "question": "Who?", "answer": "x", "annotation_ids": []},
        {"image_id": 5, "question": "Who?", "answer": "x", "annotation_ids": [12]},
    ]
    by_id, by_name, none, crowd, empty, missing, unknown = read(tmp_path, detection(), asked)
    assert by_id.id == "a"
    assert by_id.box_names == (("person", "wine glass"),)
    assert by_id.kind == "who"
    assert by_id.boxes == (((30.0, 40.0, 50.0, 60.0), (5.0, 5.0, 5.0, 5.0)),)
    assert by_name.boxes == (((7.0, 7.0, 7.0, 7.0),),)
    assert by_name.answer == "3"
    assert none.boxes == ((),)
    assert crowd.boxes == (((0.0, 0.0, 99.0, 99.0),),)
    assert by_name.id == "questions.jsonl:2"
    assert by_name.box_source == "coco_questions"
    assert [e.reason for e in (empty, missing, unknown)] == ["empty_answer", "image_missing", "unknown_object"]


@pytest.mark.parametrize(
    ("question", "code", "says"),
    [
        ({"question": "Q", "answer": "a", "annotation_ids": []}, "D58", "image_id or file_name"),
        ({"image_id": 5, "question": "Q", "answer": "a"}, "D58", "annotation_ids or categories"),
        ({"image_id": 5, "question": "Q", "answer": "a", "annotation_id": []}, "D58", "unknown key 'annotation_id'"),
        ({"image_id": "5", "question": "Q", "answer": "a", "annotation_ids": []}, "D58", "wrong type"),
        ({"image_id": 5, "question": "Q", "answer": "a", "categories": ["persons"]}, "D62", "did you mean 'person'"),
        ({"image_id": 5, "question": "<image><image>Q", "answer": "a", "annotation_ids": []}, "D09", "each image once"),
    ],
)
def test_wrong_questions_stop_the_work(tmp_path, question, code, says):
    with refusal(code, says) as caught:
        read(tmp_path, detection(), [question])
    assert "questions.jsonl line 1" in caught.value.where


@pytest.mark.parametrize(
    ("changed", "code", "says", "where"),
    [
        ({"images": []}, "D58", "no images", "annotations.json"),
        ({"categories": []}, "D58", "no categories", "annotations.json"),
        ({"images": [{"id": 5, "file_name": "5.jpg"}]}, "D58", "no 'width'", "images\\[0\\]"),
        ({"images": [{"id": 5, "file_name": "../5.jpg", "width": 1, "height": 1}]}, "D60", "outside", "images\\[0\\]"),
        ({"images": [{"id": 5, "file_name": "http://x/5.jpg", "width": 1, "height": 1}]}, "D40", "", "images\\[0\\]"),
        ({"images": [{"id": 5, "file_name": "a", "width": 1, "height": 1}] * 2}, "D62", "two records", "images\\[1\\]"),
        ({"annotations": [{"id": 1, "image_id": 5, "category_id": 1, "caption": "a"}]}, "D58", "no 'bbox'", "\\[0\\]"),
        ({"annotations": [mark(1, 6, 1, [0, 0, 1, 1])]}, "D58", "not in images", "annotations\\[0\\]"),
        ({"annotations": [mark(1, 5, 99, [0, 0, 1, 1])]}, "D58", "not in categories", "annotations\\[0\\]"),
        ({"annotations": [mark(1, 5, 1, [0, 0, 1])]}, "D42", "four finite", "annotations\\[0\\]"),
        ({"annotations": [mark(1, 5, 1, [0, 0, "1px", 1])]}, "D42", "finite", "annotations\\[0\\]"),
    ],
)
def test_a_wrong_annotation_stops_the_work(tmp_path, changed, code, says, where):
    with refusal(code, says) as caught:
        read(tmp_path, detection(**changed), ask=("count",))
    assert caught.match(rf"\| at .*{where}")


def test_options_that_contradict_each_other_are_refused(tmp_path):
    for options in (
        {},
        {"ask": ("count",), "questions": []},
        {"ask": ("colour",)},
        {"ask": ("count",), "absent": True},
    ):
        with refusal("D58"):
            source(tmp_path, detection(), **options)
    with refusal("D63"):
        CocoSource(tmp_path / "no.json", tmp_path, ask=("count",))
    with refusal("D47", "another kind"):  # the list of annotations alone, without images and categories
        read(tmp_path, detection()["annotations"], ask=("count",))


def test_command_line_and_facts(tmp_path):
    made = source(tmp_path, detection(), ask=("count",))
    parser = argparse.ArgumentParser()
    coco.add_flags(parser)
    args = ["--annotations", str(made.annotations), "--images", str(tmp_path), "--ask", "count", "presence", "--absent"]
    parsed = coco.from_args(parser.parse_args(args))
    assert parsed.ask == ("count", "presence")
    assert parsed.absent
    assert json.loads(json.dumps(parsed.facts())) == parsed.facts() != made.facts()


def test_boxes_are_held_in_a_few_numbers_each():
    marks, n = Marks(), 20_000
    for i in range(n):
        marks.add(i % 100, i, 1, i % 7 == 0, (i, 1.0, 2.0, 3.0))
    held = sys.getsizeof(marks._numbers) + sys.getsizeof(marks._boxes)
    assert held < 100 * n
    marks.close()
    assert [a for a, *_ in marks.of(3)] == list(range(3, n, 100))
    assert marks.of(3)[1] == (103, 1, False, (103.0, 1.0, 2.0, 3.0))
    assert marks.of(1000) == []


@pytest.mark.parametrize(
    ("name", "many", "there"),
    [
        ("person", "How many people are in the image?", "Is there a person in the image?"),
        ("umbrella", "How many umbrellas are in the image?", "Is there an umbrella in the image?"),
        ("skis", "How many skis are in the image?", "Are there skis in the image?"),
        ("teddy bear", "How many teddy bears are in the image?", "Is there a teddy bear in the image?"),
        ("couch", "How many couches are in the image?", "Is there a couch in the image?"),
        ("berry", "How many berries are in the image?", "Is there a berry in the image?"),
        ("toy", "How many toys are in the image?", "Is there a toy in the image?"),
        ("N/A 3", "How many 'N/A 3' are in the image?", "Is there a 'N/A 3' in the image?"),
    ],
)
def test_how_names_are_asked_about(name, many, there):
    assert (templates.how_many(name), templates.is_there(name)) == (many, there)


def test_absent_names_differ_by_image_and_not_by_how_many_are_asked_for():
    names = [f"n{i}" for i in range(20)]
    chosen = [tuple(templates.absent_names(["n3"], names, 4, str(image))) for image in range(30)]
    assert len(set(chosen)) > 20
    assert all("n3" not in of_image and len(set(of_image)) == 4 for of_image in chosen)
    assert templates.absent_names(["n3"], names, 2, "0") == list(chosen[0][:2])
    assert len({name for of_image in chosen for name in of_image}) == 19


def test_a_file_without_annotations_has_no_counts(tmp_path):
    assert read(tmp_path, detection(annotations=[]), ask=("count",)) == []
