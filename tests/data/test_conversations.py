"""Conversations in LLaVA's form, and in the form that Visual-CoT's own converter writes."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from support.refusals import refusal

from sayo_verl.data.rows import Example
from sayo_verl.data.sources import conversations

ASKS_BOX = " Please provide the bounding box coordinate of the region that can help you answer the question better."


def talk(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]


LLAVA = {"id": "000000033471", "image": "coco/a.jpg", "conversations": talk("<image>\nWhat is it?", "A bus.")}
COT = {
    "dataset": "v7w",
    "split": "train",
    "question_id": 0,
    "image": ["cot/v7w/a.jpg", "cot/v7w/a.jpg###[446, 246, 502, 345]"],
    "conversations": talk(f"<image>\nWhere?{ASKS_BOX}", "[0.446, 0.371, 0.502, 0.470]", "<image>", "At home"),
}


def rows(folder: Path, records: Any, *flags: str, box_format: str | None = None) -> list[Example]:
    """What ``sayo prepare conversations`` yields with these flags."""
    (folder / "talk.json").write_text(json.dumps(records) if isinstance(records, list) else records)
    parser = argparse.ArgumentParser()
    conversations.add_flags(parser)
    args = parser.parse_args(["--file", str(folder / "talk.json"), "--images", str(folder), *flags])
    args.box_format = box_format
    source = conversations.from_args(args)
    assert json.loads(json.dumps(source.facts(), default=str))["files"]
    return list(source.examples())


def one(folder: Path, record: dict[str, Any], *flags: str, **how: Any) -> Example:
    (example,) = rows(folder, [record], *flags, **how)
    return example


def test_llava_s_form_as_an_array_and_as_lines(tmp_path):
    example = one(tmp_path, LLAVA)
    assert (example.id, example.question, example.answer) == ("talk.json:1 000000033471", "What is it?", "A bus.")
    assert (example.images[0].path, example.boxes) == (tmp_path / "coco" / "a.jpg", ((),))
    lines = rows(tmp_path, f"{json.dumps(LLAVA)}\n{json.dumps(LLAVA)}\n")
    assert [e.id for e in lines] == ["talk.json:1 000000033471", "talk.json:2 000000033471"]  # LLaVA's own ids repeat
    text = one(tmp_path, {"conversations": talk("What is a bus?", "A vehicle.")})
    assert (text.images, text.boxes, text.question) == ((), (), "What is a bus?")


@pytest.mark.parametrize("key", ["boxes", "bbox"])
def test_boxes_of_a_record_need_a_format(tmp_path, key):
    record = {**LLAVA, key: [0.1, 0.2, 0.3, 0.4]}
    example = one(tmp_path, record, box_format="xyxy_unit")
    assert (example.boxes, example.box_format) == ((((0.1, 0.2, 0.3, 0.4),),), "xyxy_unit")
    assert one(tmp_path, record).box_format == ""  # refused by the builder


def test_one_of_several_questions_is_asked_where_the_command_names_it(tmp_path):
    record = {**LLAVA, "conversations": talk("<image>\nWhat?", "A bus.", "Which colour?", "Red.")}
    assert one(tmp_path, record, "--turn", "first").answer == "A bus."
    last = one(tmp_path, record, "--turn", "last")
    assert (last.question, last.answer) == ("Which colour?", "Red.")
    with refusal("D92", "several questions.*--turn first"):
        rows(tmp_path, [LLAVA, record])


def test_a_record_of_visual_cot(tmp_path):
    example = one(tmp_path, COT)
    assert (example.id, example.question, example.answer) == ("talk.json:1", "Where?", "At home")
    assert [image.path for image in example.images] == [tmp_path / "cot/v7w/a.jpg"]
    assert (example.boxes, example.box_format) == ((((446, 246, 502, 345),),), "xyxy")


def test_a_validation_file_names_the_split_of_its_rows(tmp_path):
    (tmp_path / "val.json").write_text(json.dumps([LLAVA]))
    found = rows(tmp_path, [LLAVA], "--val-file", str(tmp_path / "val.json"))
    assert [(e.id, e.split) for e in found] == [
        ("talk.json:1 000000033471", "train"),
        ("val/val.json:1 000000033471", "val"),
    ]


@pytest.mark.parametrize(
    ("record", "code", "says"),
    [
        ({**LLAVA, "bboxs": [[1, 2, 3, 4]]}, "D92", "unknown key.*bboxs.*rename"),
        ({**LLAVA, "conversations": talk("a", "b", "c")}, "D92", "human and gpt"),
        ({**LLAVA, "conversations": []}, "D92", "human and gpt"),
        ({**LLAVA, "conversations": [{"value": "a"}]}, "D58", "conversations.0.from"),
        ({"image": "a.jpg"}, "D58", "conversations"),
        ({**LLAVA, "image": ["a.jpg", "b.jpg"]}, "D09", "each image once"),
        ({**COT, "image": COT["image"][1:]}, "D92", "form is not that of Visual-CoT.*wanted four turns"),
        ({**COT, "image": ["b.jpg", COT["image"][1]]}, "D92", "form is not"),
        ({**COT, "image": ["a.jpg", "a.jpg###[0.1, 0.2, 0.3, 0.4]"]}, "D92", "form is not"),
        ({**COT, "conversations": talk("<image>Where?", "[0, 0, 1, 1]", "<image>", "x")}, "D92", "form is not"),
    ],
)
def test_a_record_of_another_form_is_refused_by_its_place(tmp_path, record, code, says):
    with refusal(code, says) as caught:
        rows(tmp_path, [LLAVA, record])
    assert caught.value.where == f"{tmp_path / 'talk.json'} record 2"


def test_the_format_of_visual_cot_is_its_own(tmp_path):
    assert one(tmp_path, COT, box_format="xyxy").box_format == "xyxy"
    with refusal("D61", "boxes of Visual-CoT are xyxy"):
        rows(tmp_path, [COT], box_format="xyxy_unit")
