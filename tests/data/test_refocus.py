"""ReFocus-Chart in its two published forms, written here as they are published."""

import argparse
import io
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.refocus_files import BARS, CORNERS, FIGURE, columns, of_json, one, parquet, row, wbb
from support.refusals import refusal

from sayo_verl.data.boxes import place_boxes
from sayo_verl.data.images import store_image
from sayo_verl.data.rows import LeftOut
from sayo_verl.data.sources import refocus
from sayo_verl.data.sources.refocus import RefocusSource, named_labels

# ------------------------------------------------------------------------------------------------------- the two forms


def test_a_row_of_the_parquet_form(tmp_path):
    example = one(tmp_path)
    assert (example.id, example.question, example.answer) == ("train-1", "How long is the bar of Beta?", "80")
    assert (example.images[0].data, example.images[0].path) == (b"png", None)
    assert (example.boxes, example.box_names) == ((((10.0, 40.0, 90.0, 50.0),),), (("Beta",),))
    assert (example.box_format, example.box_source, example.data_source) == ("xyxy", "refocus_focus", "sayo/refocus")
    assert (example.kind, example.sizes) == ("h_bar", ())


def test_boxes_as_datasets_itself_stores_a_sequence_of_structs(tmp_path):
    corners = {corner: datasets.Value("int32") for corner in CORNERS}
    boxes, text = datasets.Sequence(corners), datasets.Value("string")
    features = dict.fromkeys(("id", "question", "answer", "source"), text) | {"image": datasets.Image()}
    features |= dict.fromkeys(("x_values", "y_values"), datasets.Sequence(text)) | {"figure_bbox": corners}
    features |= dict.fromkeys(("focus_areas_bbox", "x_values_bbox", "y_values_bbox"), boxes)
    path = tmp_path / "train.parquet"
    record = {key: row()[key] for key in features}
    datasets.Dataset.from_list([record], features=datasets.Features(features)).to_parquet(path)
    assert list(RefocusSource(path).examples()) == [one(tmp_path)]


def test_a_record_of_the_json_form(tmp_path):
    (example,) = of_json(tmp_path, {"q1": wbb()})
    assert (example.id, example.box_format, example.box_source) == ("q1", "xyxy_unit", "refocus_labels")
    assert (example.boxes, example.box_names) == ((((0.1, 0.4, 0.9, 0.5),),), (("Beta",),))
    assert (example.images[0].path, example.kind) == (tmp_path / "png/1.png", "h_bar")


def test_pixels_and_fractions_are_placed_alike_and_a_plot_over_the_border_is_clipped(tmp_path):
    Image.new("RGB", (100, 100)).save(out := io.BytesIO(), "PNG")
    how = {"frame": "auto", "stored": store_image(out.getvalue(), where=""), "annotated": None, "rescale": False}
    wide = {"x1": -0.02, "y1": 0.5, "x2": 1.05, "y2": 0.9}
    fractions, figure = of_json(tmp_path, {"q": wbb(), "r": wbb(query="How many?", figure_bbox=wide)})
    pixels = one(tmp_path, focus_areas_bbox=columns([]))
    placed = [
        place_boxes(e.boxes[0], e.box_names[0], box_format=e.box_format, where="", **how).boxes
        for e in (pixels, fractions, figure)
    ]
    assert placed == [((0.1, 0.4, 0.9, 0.5),), ((0.1, 0.4, 0.9, 0.5),), ((0.0, 0.5, 1.0, 0.9),)]


def test_several_questions_of_a_picture_and_files_by_their_split(tmp_path):
    parquet(tmp_path, row(), row(id="train-2"), row(id="train-3", image={"bytes": b"other", "path": "1.png"}))
    parquet(tmp_path, row(id="train-4"), name="train-00001-of-00002.parquet")
    parquet(tmp_path, row(id="test-1"), name="test-00000-of-00001.parquet")
    found = list(RefocusSource(tmp_path).examples())
    assert [e.id for e in found] == ["train-1", "train-2", "train-3", "train-4"]
    keys = [e.images[0].key for e in found]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert [e.id for e in RefocusSource(tmp_path, split="test").examples()] == ["test-1"]
    assert len(RefocusSource(tmp_path).facts()["files"]) == 2
    with refusal("D63", "no val-"):
        RefocusSource(tmp_path, split="val")


def test_options_of_the_command_line(tmp_path):
    of_json(tmp_path, {"q": wbb()})
    parser = argparse.ArgumentParser()
    refocus.add_flags(parser)
    data = str(tmp_path / "chartQA_h_bar_wbb.json")
    args = parser.parse_args(["--data", data, "--images", str(tmp_path), "--fall-back", "none", "--first-box"])
    assert refocus.from_args(args) == RefocusSource(Path(data), "train", tmp_path, True, "none")
    with refusal("D58", "images"):
        RefocusSource(Path(data))


# --------------------------------------------------------------------------------------------------------- which boxes


def test_focus_areas_first_then_the_fall_back(tmp_path):
    assert len(one(tmp_path, focus_areas_bbox=columns(BARS)).boxes[0]) == 2
    first = one(tmp_path, options={"first_box": True}, focus_areas_bbox=columns(BARS))
    assert (first.boxes, first.box_names) == ((((10.0, 20.0, 60.0, 30.0),),), (("Alpha",),))
    empty = {"focus_areas_bbox": columns([])}
    named = one(tmp_path, **empty)
    assert (named.box_source, named.box_names) == ("refocus_labels", (("Beta",),))
    unnamed = {**empty, "question": "How many bars are there?"}
    figure = one(tmp_path, **unnamed)
    assert (figure.box_source, figure.boxes) == ("refocus_figure", ((tuple(map(float, FIGURE)),),))
    none = one(tmp_path, options={"fall_back": "labels"}, **unnamed)
    assert (none.box_source, none.boxes, none.box_names) == ("none", ((),), ((),))
    assert one(tmp_path, options={"fall_back": "none"}, **empty).box_source == "none"
    assert one(tmp_path, **unnamed, figure_bbox=None).box_source == "none"


@pytest.mark.parametrize(
    ("question", "labels", "named"),
    [
        ("Is BETA longer than alpha?", ["Alpha", "Beta", "Gamma"], ["Alpha", "Beta"]),
        ("Is Alphabet long?", ["Alpha"], []),
        ("What of New York?", ["York", "New York"], ["New York"]),
        ("York or New  York?", ["York", "New York"], ["York", "New York"]),
        ("What of 18-29?", ["18", "18-29", "29"], ["18-29"]),
        ("What of 18.5 or 3,000?", ["18", "5", "3", "000"], []),
        ("What of U.S. (all)?", ["U.S.", "(all)", ""], ["U.S.", "(all)"]),
        ("", ["a"], []),
    ],
)
def test_labels_that_a_question_names(question, labels, named):
    assert [labels[i] for i in named_labels(question, labels)] == named


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("code", "says", "changed"),
    [
        ("D58", "x_bboxes|x_values_bbox", {"x_bboxes": "none"}),
        ("D58", "y_boxes|y_bboxes|y_values_bbox", {"y_bboxes": [{"x1": 0.1, "y1": 0.1, "x2": "90%", "y2": 0.2}] * 2}),
        ("D58", "figure_bbox.*x1, y1, x2, y2", {"figure_bbox": [0, 0, 1, 1]}),
        ("D58", "figure_bbox.*x1, y1, x2, y2", {"figure_bbox": {"left": 0, "right": 1}}),
        ("D59", "1 labels, 2 boxes", {"y_values": ["Alpha"]}),
    ],
)
def test_records_of_another_format_stop_the_work(tmp_path, code, says, changed):
    with refusal(code, says):
        of_json(tmp_path, {"q": wbb(**changed)})


def test_rows_of_another_format_stop_the_work(tmp_path):
    with refusal("D58", "figure_bbox"):
        path = parquet(tmp_path, row())
        pq.write_table(pq.read_table(path).drop_columns(["figure_bbox"]), path)
        list(RefocusSource(path).examples())
    with refusal("D58", "focus_areas_bbox"):
        one(tmp_path, focus_areas_bbox={**columns(BARS), "x2": [60]})
    with refusal("D58", "id"):
        one(tmp_path, id=None)
    with refusal("D60", "no bytes"):
        one(tmp_path, image={"bytes": None, "path": "1.png"})
    assert one(tmp_path, image=None) == LeftOut("train-1", "image_missing", "null")
    assert one(tmp_path, question="<image>\nWhat?").question == "What?"
    path = parquet(tmp_path, row())
    path.write_bytes(path.read_bytes()[:-1024])
    with refusal("D02", "cannot be read"):
        list(RefocusSource(path).examples())
    (tmp_path / "train.pkl").write_bytes(b"\x80")
    with refusal("D63", "run code"):
        RefocusSource(tmp_path / "train.pkl")
