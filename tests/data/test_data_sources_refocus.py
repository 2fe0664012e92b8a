"""ReFocus-Chart in its two published forms, written here as they are published."""

import argparse
import io
import json
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.refusals import refusal

from sayo_verl.data.boxes import place_boxes
from sayo_verl.data.images import store_image
from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import refocus
from sayo_verl.data.sources.refocus import RefocusSource, named_labels

CORNERS = ("x1", "y1", "x2", "y2")
BARS = [[10, 20, 60, 30], [10, 40, 90, 50]]  # of "Alpha" and "Beta"
FIGURE = [5, 10, 95, 90]


def columns(boxes: list[list]) -> dict[str, list]:
    return {corner: [box[i] for box in boxes] for i, corner in enumerate(CORNERS)}


def row(**changed) -> dict:
    return {
        "id": "train-1",
        "question": "How long is the bar of Beta?",
        "answer": "80",
        "image": {"bytes": b"png", "path": "1.png"},
        "thoughts": ["THOUGHT"],
        "edited_image": {"bytes": b"edited", "path": "e.png"},
        "focus_areas_bbox": columns([BARS[1]]),
        "source": "h_bar",
        "split": "train",
        "x_values": [],
        "y_values": ["Alpha", "Beta"],
        "x_values_bbox": columns([]),
        "y_values_bbox": columns(BARS),
        "figure_bbox": dict(zip(CORNERS, FIGURE, strict=True)),
        **changed,
    }


def schema(leaf: pa.DataType, by_column: bool = True, **changed: pa.DataType) -> pa.Schema:
    box = pa.struct(dict.fromkeys(CORNERS, leaf))
    boxes = pa.struct({corner: pa.list_(leaf) for corner in CORNERS}) if by_column else pa.list_(box)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    text, texts = pa.string(), pa.list_(pa.string())
    types = {
        "id": text,
        "question": text,
        "answer": text,
        "image": image,
        "thoughts": texts,
        "edited_image": image,
        "focus_areas_bbox": boxes,
        "source": text,
        "split": text,
        "x_values": texts,
        "y_values": texts,
        "x_values_bbox": boxes,
        "y_values_bbox": boxes,
        "figure_bbox": box,
        **changed,
    }
    return pa.schema(types)


def parquet(folder: Path, *rows: dict, types: pa.Schema | None = None, name="train-00000-of-00001.parquet") -> Path:
    path = folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), types or schema(pa.int32())), path)
    return path


def one(folder: Path, types: pa.Schema | None = None, options: dict | None = None, **changed) -> Example | LeftOut:
    (example,) = RefocusSource(parquet(folder, row(**changed), types=types), **(options or {})).examples()
    return example


def test_a_row_of_the_parquet_form(tmp_path):
    example = one(tmp_path)
    assert (example.id, example.question, example.answer) == ("train-1", "How long is the bar of Beta?", "80")
    assert example.images[0].data == b"png"
    assert example.images[0].path is None
    assert example.boxes == (((10.0, 40.0, 90.0, 50.0),),)
    assert example.box_names == (("Beta",),)
    assert (example.box_format, example.box_source, example.data_source) == ("xyxy", "refocus_focus", "sayo/refocus")
    assert example.kind == "h_bar"
    assert example.sizes == ()


def test_boxes_stored_as_a_list_of_structs_are_the_same(tmp_path):
    structs = {
        key: [dict(zip(CORNERS, box, strict=True)) for box in boxes]
        for key, boxes in (("focus_areas_bbox", [BARS[1]]), ("x_values_bbox", []), ("y_values_bbox", BARS))
    }
    assert one(tmp_path, schema(pa.int32(), by_column=False), **structs) == one(tmp_path)


def test_boxes_as_datasets_itself_stores_a_sequence_of_structs(tmp_path):
    corners = {corner: datasets.Value("int32") for corner in CORNERS}
    boxes, text = datasets.Sequence(corners), datasets.Value("string")
    features = datasets.Features(
        {
            "id": text,
            "question": text,
            "answer": text,
            "image": datasets.Image(),
            "source": text,
            "x_values": datasets.Sequence(text),
            "y_values": datasets.Sequence(text),
            "focus_areas_bbox": boxes,
            "x_values_bbox": boxes,
            "y_values_bbox": boxes,
            "figure_bbox": corners,
        }
    )
    told = {key: value for key, value in row().items() if key in features}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list([told], features=features).to_parquet(path)
    assert list(RefocusSource(path).examples()) == [one(tmp_path)]


def test_pixels_and_fractions_are_placed_alike(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (100, 100)).save(out, "PNG")
    stored = store_image(out.getvalue(), where="here")
    empty = {"focus_areas_bbox": columns([])}
    (fractions,) = of_json(tmp_path, {"q": wbb()})
    placed = [
        place_boxes(
            e.boxes[0],
            e.box_names[0],
            box_format=e.box_format,
            frame="auto",
            stored=stored,
            annotated=None,
            rescale=False,
            where="here",
        ).boxes
        for e in (one(tmp_path, **empty), fractions)
    ]
    assert placed == [((0.1, 0.4, 0.9, 0.5),)] * 2


def test_equal_pictures_have_equal_keys_and_splits_are_told_apart(tmp_path):
    parquet(tmp_path, row(), row(id="train-2"), row(id="train-3", image={"bytes": b"other", "path": "1.png"}))
    parquet(tmp_path, row(id="train-4"), name="train-00001-of-00002.parquet")
    parquet(tmp_path, row(id="test-1"), name="test-00000-of-00001.parquet")
    found = list(RefocusSource(tmp_path).examples())
    assert [e.id for e in found] == ["train-1", "train-2", "train-3", "train-4"]
    keys = [e.images[0].key for e in found]
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert [e.id for e in RefocusSource(tmp_path, split="test").examples()] == ["test-1"]
    facts = RefocusSource(tmp_path).facts()
    assert len(facts["files"]) == 2
    assert json.loads(json.dumps(facts)) == facts
    with refusal("D63", "no parquet file of the split 'val'"):
        RefocusSource(tmp_path, split="val")


# ----------------------------------------------------------------------------------------------------- which boxes


def test_first_box_takes_the_first_focus_area_alone(tmp_path):
    assert len(one(tmp_path, focus_areas_bbox=columns(BARS)).boxes[0]) == 2
    first = one(tmp_path, options={"first_box": True}, focus_areas_bbox=columns(BARS))
    assert first.boxes == (((10.0, 20.0, 60.0, 30.0),),)
    assert first.box_names == (("Alpha",),)


def test_without_focus_areas_the_fall_back_is_told(tmp_path):
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
    with refusal("D58", "fall-back"):
        one(tmp_path, options={"fall_back": "label"})


@pytest.mark.parametrize(
    ("question", "labels", "named"),
    [
        ("Is BETA longer than alpha?", ["Alpha", "Beta", "Gamma"], ["Alpha", "Beta"]),
        ("Is Alphabet long?", ["Alpha"], []),
        ("What of New York?", ["York", "New York"], ["New York"]),
        ("York or New  York?", ["York", "New York"], ["York", "New York"]),
        ("What of 18-29?", ["18", "18-29", "29"], ["18-29"]),
        ("What of 18.5 or 3,000?", ["18", "5", "3", "000"], []),
        ("What was it in 2005?", ["2005", "200"], ["2005"]),
        ("What of U.S. (all)?", ["U.S.", "(all)", ""], ["U.S.", "(all)"]),
        ("", ["a"], []),
    ],
)
def test_labels_that_a_question_names(question, labels, named):
    assert [labels[i] for i in named_labels(question, labels)] == named


# ------------------------------------------------------------------------------------------------------- the JSON form


def wbb(**changed) -> dict:
    def fractions(box: list[int]) -> dict[str, float]:
        return {corner: value / 100 for corner, value in zip(CORNERS, box, strict=True)}

    return {
        "query": "How long is the bar of Beta?",
        "answer": "80",
        "figure_path": "png/1.png",
        "type": "h_bar",
        "annotation_path": "1.json",
        "x_intervals": [],
        "y_intervals": [],
        "x_values": [],
        "y_values": ["Alpha", "Beta"],
        "x_bboxes": [],
        "y_bboxes": [fractions(box) for box in BARS],
        "figure_bbox": fractions(FIGURE),
        **changed,
    }


def of_json(folder: Path, records: dict) -> list[Example | LeftOut]:
    path = folder / "chartQA_h_bar_wbb.json"
    path.write_text(json.dumps(records))
    return list(RefocusSource(path, images=folder).examples())


def test_a_record_of_the_json_form(tmp_path):
    example, left = of_json(tmp_path, {"q1": wbb(), "q2": wbb(answer="")})
    assert (example.id, example.box_format, example.box_source) == ("q1", "xyxy_unit", "refocus_labels")
    assert example.boxes == (((0.1, 0.4, 0.9, 0.5),),)
    assert example.box_names == (("Beta",),)
    assert example.images[0].path == tmp_path / "png/1.png"
    assert example.kind == "h_bar"
    assert left == LeftOut("q2", "empty_answer")


def test_the_json_form_packed_and_by_the_command_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("x/chartQA_h_bar_wbb.json", json.dumps({"q1": wbb()}))
        archive.writestr("x/chartQA_v_bar_wbb.json", json.dumps({"q2": wbb()}))
    parser = argparse.ArgumentParser()
    refocus.add_flags(parser)
    member = f"{tmp_path / 'd.zip'}::chartQA_v_bar_wbb.json"
    args = parser.parse_args(["--data", member, "--images", str(tmp_path), "--fall-back", "none"])
    (example,) = refocus.from_args(args).examples()
    assert (example.id, example.box_source) == ("q2", "none")
    with refusal("D58", "images as files"):
        RefocusSource(Path(member))


def test_a_plot_that_reaches_over_the_border_is_clipped(tmp_path):
    figure = {"x1": -0.02, "y1": 0.1, "x2": 1.05, "y2": 0.9}
    (example,) = of_json(tmp_path, {"q": wbb(query="How many?", figure_bbox=figure)})
    assert example.boxes == (((0.0, 0.1, 1.0, 0.9),),)


def test_files_of_another_kind_are_refused(tmp_path):
    with refusal("D58", "no 'x_values'"):
        of_json(tmp_path, {"q": {key: value for key, value in wbb().items() if key != "x_values"}})  # a table's
    with refusal("D58", "no 'query'"):
        of_json(tmp_path, {"q": ["a"]})
    path = parquet(tmp_path, row())
    pq.write_table(pq.read_table(path).drop_columns(["figure_bbox"]), path)
    with refusal("D58", "no column 'figure_bbox'"):
        list(RefocusSource(path).examples())


# ---------------------------------------------------------------------------------------------------------- bad inputs


def test_an_image_without_bytes_stops_the_work(tmp_path):
    with refusal("D60", "no bytes") as caught:
        one(tmp_path, image={"bytes": None, "path": "1.png"})
    assert "row 0" in caught.value.where
    assert one(tmp_path, image=None).reason == "image_missing"


def test_pixels_among_fractions_stop_the_work(tmp_path):
    box = pa.struct({corner: pa.float64() for corner in CORNERS})
    with refusal("D61", "mixed"):  # column by column
        list(RefocusSource(parquet(tmp_path, row(), types=schema(pa.int32(), figure_bbox=box))).examples())
    with refusal("D61", "mixed") as caught:  # and box by box
        one(tmp_path, schema(pa.float64()))
    assert "row 0, focus_areas_bbox" in caught.value.where
    with refusal("D61", "mixed") as caught:
        of_json(tmp_path, {"q": wbb(y_bboxes=[wbb()["y_bboxes"][0], dict(zip(CORNERS, BARS[1], strict=True))])})
    assert "record 'q', y_bboxes" in caught.value.where
    with refusal("D61", "mixed") as caught:
        one(tmp_path, focus_areas_bbox=columns([[0, 0, 1, 1]]))
    assert "cut to whole numbers" in str(caught.value)
    assert one(tmp_path, focus_areas_bbox=columns([[0, 0, 0, 0]])).boxes == (((0.0,) * 4,),)  # dropped when placed


def test_fractions_in_parquet_are_read_as_such(tmp_path):
    shares = [[v / 100 for v in box] for box in BARS]
    figure = dict(zip(CORNERS, (v / 100 for v in FIGURE), strict=True))
    example = one(
        tmp_path,
        schema(pa.float64()),
        focus_areas_bbox=columns(shares[:1]),
        y_values_bbox=columns(shares),
        figure_bbox=figure,
    )
    assert (example.box_format, example.boxes) == ("xyxy_unit", (((0.1, 0.2, 0.6, 0.3),),))


def test_boxes_that_do_not_fit_together_stop_the_work(tmp_path):
    with refusal("D59", "as many y labels"):
        one(tmp_path, y_values=["Alpha"])
    with refusal("D59", "equally many") as caught:
        one(tmp_path, focus_areas_bbox={**columns(BARS), "x2": [60]})
    assert "row 0, focus_areas_bbox" in caught.value.where
    with refusal("D59", "x1, y1, x2, y2"):
        of_json(tmp_path, {"q": wbb(figure_bbox=[0, 0, 1, 1])})


def test_a_coordinate_that_is_no_number_stops_the_work(tmp_path):
    with refusal("D42"):
        one(tmp_path, focus_areas_bbox={**columns(BARS), "x2": [60, None]})
    with refusal("D42"):
        of_json(tmp_path, {"q": wbb(figure_bbox={**wbb()["figure_bbox"], "x2": "90%"})})


def test_an_id_that_comes_twice_stops_the_work(tmp_path):
    with refusal("D62"):
        list(RefocusSource(parquet(tmp_path, row(), row())).examples())
    with refusal("D58", "no id"):
        one(tmp_path, id=None)


def test_rows_without_question_or_answer_are_left_out(tmp_path):
    assert one(tmp_path, answer=None) == LeftOut("train-1", "empty_answer")
    assert one(tmp_path, question=" ") == LeftOut("train-1", "empty_question")
    assert one(tmp_path, question="What of <image> this?").reason == "reserved_text"
    assert one(tmp_path, question="<image>\nWhat?").question == "What?"


def test_a_parquet_file_cut_short_stops_the_work(tmp_path):
    path = parquet(tmp_path, row())
    path.write_bytes(path.read_bytes()[:-1024])
    with refusal("D63", "cannot be read") as caught:
        list(RefocusSource(path).examples())
    assert f"{path.stat().st_size} bytes" in str(caught.value)


def test_formats_that_can_run_code_stop_the_work(tmp_path):
    for name in ("train.pkl", "train.npy"):
        (tmp_path / name).write_bytes(b"\x80")
        with refusal("D63", "run code"):
            RefocusSource(tmp_path / name)
    with refusal("D63", "run code"):  # a folder of nothing else
        RefocusSource(tmp_path)
