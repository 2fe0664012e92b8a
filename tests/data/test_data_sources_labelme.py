"""Pictures annotated with labelme, written here as it writes them."""

import argparse
import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from support.refusals import refusal

from sayo_verl.data.boxes import place_boxes
from sayo_verl.data.image_files import read_image
from sayo_verl.data.images import store_image
from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import labelme
from sayo_verl.data.sources.labelme import LabelmeSource


def shape(label: str, points: list, kind: str | None = "rectangle", group: int | None = None) -> dict:
    return {"label": label, "points": points, "group_id": group, "shape_type": kind, "flags": {}}


def save(folder: Path, *shapes: dict, name: str = "a.json", picture: bytes | None = b"jpeg", **changed) -> Path:
    record = {
        "version": "5.4.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": "a.jpg",
        "imageData": None,
        "imageHeight": 40,
        "imageWidth": 50,
        **changed,
    }
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    if picture is not None:
        (path.parent / "a.jpg").write_bytes(picture)
    return path


def read(folder: Path, *, questions: list[dict] | None = None, **options) -> list[Example | LeftOut]:
    if questions is None:
        options.setdefault("ask", ("count",))
    else:
        options["questions"] = folder / "q.jsonl"
        options["questions"].write_text("".join(json.dumps(q) + "\n" for q in questions))
    return list(LabelmeSource(folder, **options).examples())


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_points_lie_on_the_upright_picture(tmp_path, orientation):
    """A photo that its EXIF orientation turns to 50 x 40, which is what labelme shows and writes."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (50, 40) if orientation < 5 else (40, 50)).save(out, "JPEG", exif=exif)
    save(tmp_path, shape("dog", [[5, 10], [15, 30]]), picture=out.getvalue())
    (example,) = read(tmp_path)
    stored = store_image(read_image(example.images[0]), where="here")
    told = {"box_format": example.box_format, "stored": stored, "annotated": example.sizes[0], "rescale": False}
    if orientation == 3:  # the sizes are equal: someone has to say it
        with refusal("D45"):
            place_boxes(example.boxes[0], ("dog",), frame="auto", where="here", **told)
    frame = "upright" if orientation == 3 else "auto"
    placed = place_boxes(example.boxes[0], ("dog",), frame=frame, where="here", **told)
    assert placed.boxes == ((0.1, 0.25, 0.3, 0.75),)


def test_rectangles_whichever_corners_come_first(tmp_path):
    save(
        tmp_path,
        shape("dog", [[30.5, 20], [10, 35.25]]),
        shape("dog", [[1, 2], [3, 4]]),
        shape("cat", [[5, 6], [7, 8]]),
    )
    dogs, cat = read(tmp_path)
    assert dogs.boxes == (((10.0, 20.0, 30.5, 35.25), (1.0, 2.0, 3.0, 4.0)),)
    assert (dogs.id, dogs.question, dogs.answer) == ("a.json:count:dog", "How many dogs are in the image?", "2")
    assert (dogs.box_format, dogs.box_source, dogs.data_source) == ("xyxy", "labelme_rectangle", "sayo/labelme")
    assert dogs.sizes == ((50, 40),)
    assert dogs.images[0].path == tmp_path / "a.jpg"
    assert dogs.images[0].data is None
    assert cat.answer == "1"


def test_polygons_by_their_bounding_box_and_told(tmp_path):
    save(
        tmp_path,
        shape("dog", [[10, 5], [30, 9], [20, 38]], "polygon"),
        shape("cat", [[5, 6], [7, 8]]),
        shape("cat", [[1, 1], [2, 1], [2, 3]], None),
    )
    dog, cats = read(tmp_path)
    assert (dog.boxes, dog.box_source) == ((((10.0, 5.0, 30.0, 38.0),),), "labelme_polygon")
    assert cats.box_source == "labelme_mixed"
    assert cats.boxes[0][1] == (1.0, 1.0, 2.0, 3.0)


def test_labels_with_a_shape_that_has_no_box_are_left_out(tmp_path):
    save(
        tmp_path,
        shape("dog", [[1, 2], [3, 4]]),
        shape("dog", [[9, 9], [12, 9]], "circle"),
        shape("cat", [[5, 6], [7, 8]]),
    )
    left, cat = read(tmp_path, ask=("presence",))
    assert left == LeftOut("a.json:presence:dog", "no_region", "1 of 2 'dog' have no box (a circle has no box)")
    assert cat.question == "Is there a cat in the image?"


def test_shapes_of_one_group_are_one_object_and_ignored_ones_none(tmp_path):
    save(
        tmp_path,
        shape("dog", [[1, 2], [3, 4]], group=0),
        shape("dog", [[20, 20], [30, 22]], group=0),
        shape("dog", [[40, 20], [44, 22]]),
        shape("cat", [[5, 6], [7, 8]], group=0),
        shape("__ignore__", [[0, 0], [1, 1]]),
    )
    dogs, cat = read(tmp_path)
    assert dogs.answer == "2"
    assert dogs.boxes == (((1.0, 2.0, 30.0, 22.0), (40.0, 20.0, 44.0, 22.0)),)
    assert cat.answer == "1"


def test_the_picture_beside_the_file_then_the_copy_within_it(tmp_path):
    data = base64.b64encode(b"copy").decode()
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), imageData=data)
    assert read(tmp_path)[0].images[0].data is None
    (tmp_path / "a.jpg").unlink()
    (example,) = read(tmp_path)
    assert example.images[0].data == b"copy"
    assert example.images[0].key == "a.jpg"
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), imageData="*", picture=None)
    assert read(tmp_path) == [
        LeftOut("a.json", "image_unreadable", "imageData is no base64 (Only base64 data is allowed)")
    ]
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), picture=None)
    assert read(tmp_path)[0].images[0].path == tmp_path / "a.jpg"  # reading it tells that it is missing


def test_folders_of_any_depth_windows_paths_and_a_folder_of_pictures(tmp_path):
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), name="x/b.json", imagePath="sub\\a.jpg")
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), name="a.json", imagePath="a.jpg")
    found = read(tmp_path)
    assert [e.images[0].key for e in found] == ["a.jpg", "x/sub/a.jpg"]
    assert found[1].images[0].path == tmp_path / "x" / "sub" / "a.jpg"
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), name="x/b.json", imagePath="..\\..\\a.jpg")
    with refusal("D60", "outside"):
        read(tmp_path)
    assert read(tmp_path, allow_outside=True)[1].images[0].path == tmp_path / "x" / "../../a.jpg"
    assert read(tmp_path, images=tmp_path)[1].images[0].path == tmp_path / "a.jpg"


def test_questions_joined_by_label(tmp_path):
    save(
        tmp_path, shape("dog", [[1, 2], [3, 4]]), shape("cat", [[5, 6], [7, 8]]), shape("cow", [[1, 1], [2, 2]], "line")
    )
    asked = [
        {"file": "a.json", "question": "Who barks?", "answer": "the dog", "labels": ["dog"], "id": 4, "kind": "who"},
        {"file": "a.json", "question": "Is it day?", "answer": True, "labels": []},
        {"file": "b.json", "question": "Who?", "answer": "x", "labels": ["dog"]},
        {"file": "a.json", "question": "Who?", "answer": "x", "labels": ["dog", "fox"]},
        {"file": "a.json", "question": "Who?", "answer": "x", "labels": ["cow"]},
        {"file": "a.json", "question": "Who?", "answer": [], "labels": ["dog"]},
    ]
    barks, day, missing, unknown, line, empty = read(tmp_path, questions=asked)
    assert (barks.id, barks.boxes, barks.kind) == ("4", (((1.0, 2.0, 3.0, 4.0),),), "who")
    assert (day.answer, day.boxes, day.box_source) == ("true", ((),), "labelme_none")
    assert [e.reason for e in (missing, unknown, line, empty)] == [
        "image_missing",
        "unknown_object",
        "no_region",
        "empty_answer",
    ]
    with refusal("D58", "unknown key 'label'"):
        read(tmp_path, questions=[{**asked[0], "label": "dog"}])
    with refusal("D62", "two records"):
        read(tmp_path, questions=[asked[0], asked[0]])


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        (shape("dog", [[1, 2]]), "D59", "points"),
        (shape("dog", [[1, 2], [3, 4], [5, 6]]), "D59", "points"),
        (shape("dog", [[1, 2], [3, 4]], "polygon"), "D59", "points"),
        (shape("dog", [1, 2, 3, 4]), "D59", "points"),
        (shape("dog", [[1, 2], [3, "4px"]]), "D42", "finite"),
        (shape("dog", {"x": 1}), "D58", "wrong type"),
        ({"points": []}, "D58", "no 'label'"),
        (shape(3, [[1, 2], [3, 4]]), "D58", "wrong type"),
    ],
)
def test_a_wrong_shape_stops_the_work(tmp_path, wrong, code, says):
    save(tmp_path, shape("cat", [[5, 6], [7, 8]]), wrong)
    with refusal(code, says) as caught:
        read(tmp_path)
    assert "a.json shapes[1]" in caught.value.where


def test_other_files_and_options_are_refused(tmp_path):
    with refusal("D63", "no JSON file"):
        read(tmp_path)
    with refusal("D63", "no such folder"):
        LabelmeSource(tmp_path / "no", ask=("count",))
    with refusal("D58", "either questions to make or a file"):
        LabelmeSource(tmp_path)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with refusal("D58", "no 'shapes'"):
        read(tmp_path)
    (tmp_path / "other.json").unlink()
    save(tmp_path, imagePath="http://x.org/a.jpg")
    with refusal("D40"):
        read(tmp_path)
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), imageWidth=0)
    with refusal("D58", "size"):
        read(tmp_path)
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]), imageWidth=None)
    assert read(tmp_path)[0].sizes == (None,)


def test_command_line_and_facts(tmp_path):
    save(tmp_path, shape("dog", [[1, 2], [3, 4]]))
    parser = argparse.ArgumentParser()
    labelme.add_flags(parser)
    made = labelme.from_args(parser.parse_args(["--folder", str(tmp_path), "--ask", "count"]))
    assert made == LabelmeSource(tmp_path, ask=("count",))
    assert len(list(made.examples())) == 1
    assert list(made.facts()["files"]) == [str(tmp_path / "a.json")]
    assert json.loads(json.dumps(made.facts())) == made.facts()
