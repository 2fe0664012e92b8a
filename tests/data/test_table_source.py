"""Tables: parquet, csv and JSON files, and data sets of the hub, whose client is replaced."""

import argparse
import decimal
import io
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.refusals import refusal

from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import table
from sayo_verl.data.sources.table import TableSource, parse_map

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BOX = (1.0, 2.0, 30.0, 24.0)


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    return out.getvalue()


def row(**changed) -> dict:
    return {"image": {"bytes": png("red"), "path": None}, "question": "What?", "answer": "x", **changed}


def parquet(folder: Path, *rows: dict, name: str = "train-0.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(path: Path, **options) -> list[Example | LeftOut]:
    return list(TableSource(str(path), **{"box_format": "xyxy", **options}).examples())


def one(folder: Path, options: dict | None = None, **changed) -> Example | LeftOut:
    (example,) = read(parquet(folder, row(**changed)), **(options or {}))
    return example


def test_every_field_of_a_row(tmp_path):
    example = one(
        tmp_path, {"columns": {"id": "id"}}, id=5, boxes=[list(BOX)], box_names=["dog"], kind="k", width=80, height=60
    )
    assert (example.id, example.question, example.answer, example.kind) == ("5", "What?", "x", "k")
    assert example.images[0].data == png("red")
    assert (example.sizes, example.boxes, example.box_names) == (((80, 60),), ((BOX,),), (("dog",),))
    assert (example.box_format, example.box_source, example.data_source) == ("xyxy", "table", "sayo/table")
    plain = one(tmp_path)
    assert (plain.id, plain.sizes, plain.boxes, plain.split) == ("train:0", (), ((),), "")


def test_a_table_without_boxes_makes_rows_without_boxes(tmp_path):
    path = parquet(tmp_path, row(), row(question="Who?"))
    with refusal("D55", "no_box.*--keep-without-boxes"):
        build(TableSource(str(path)), tmp_path / "out", BuildOptions())
    made = build(TableSource(str(path)), tmp_path / "kept", BuildOptions(keep_without_boxes=True))
    assert [info["boxes"] for info in pq.read_table(made.files["train"])["extra_info"].to_pylist()] == [[[]]] * 2


def test_columns_of_other_names_within_structs_and_lists_of_structs(tmp_path):
    values = {"img": png("red"), "q": "What?", "labels": {"text": "x"}, "qid": "7"}
    columns = parse_map("image=img, question=q,answer=labels.text,boxes=objects.bbox,box_names=objects.name,id=qid")
    for objects in ({"bbox": [list(BOX)], "name": ["d"]}, [{"bbox": list(BOX), "name": "d"}]):
        (example,) = read(parquet(tmp_path, values | {"objects": objects}), columns=columns)
        assert (example.id, example.answer, example.boxes, example.box_names) == ("7", "x", ((BOX,),), (("d",),))
    with refusal("D58", "no field .boxes.*bbox.*name"):
        read(tmp_path / "train-0.parquet", columns={**columns, "boxes": "objects.boxes"})


def test_missing_columns_are_answered_by_a_map_to_copy(tmp_path):
    geometry = parquet(
        tmp_path, {"images": [{"bytes": png("red"), "path": None}], "problem": "<image>x?", "solution": 2}
    )
    with refusal("D58", "no column 'image'.*--map image=images,question=problem,answer=solution") as caught:
        read(geometry)
    (example,) = read(geometry, columns=parse_map(caught.value.fix.split("--map ")[1]))
    assert (example.question, example.answer, len(example.images)) == ("x?", "2", 1)
    with refusal("D58", r"no column 'query' \(did you mean 'question'\?\)|no column 'quest'"):
        read(parquet(tmp_path, row()), columns={"question": "quest"})


@pytest.mark.parametrize(
    ("given", "stored"),
    [(2.0, "2"), (decimal.Decimal("1.5"), "1.5"), (True, "true"), ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}")],
)
def test_answers_become_text(tmp_path, given, stored):
    assert one(tmp_path, answer=given).answer == stored
    with refusal("D58", "choose one entry"):
        one(tmp_path, answer=[given, given])


def test_one_box_several_images_and_tags_in_the_question(tmp_path):
    assert one(tmp_path, boxes=list(BOX)).boxes == ((BOX,),)
    images = [{"bytes": png(colour), "path": None} for colour in ("red", "blue")]
    two = one(tmp_path, image=images, boxes=[[list(BOX)], []], question="<image><image>\nWhat?")
    assert ([len(of) for of in two.boxes], two.question) == ([1, 0], "What?")
    with refusal("D05", "nested by image"):
        one(tmp_path, image=images, boxes=[list(BOX)])
    with refusal("D09"):
        one(tmp_path, image=images, question="<image>What?")
    assert one(tmp_path, image=[]).reason == "image_missing"


def test_a_box_is_four_finite_numbers(tmp_path):
    with refusal("D42", "row 0, boxes"):
        one(tmp_path, boxes=[[1.0, 2.0, float("nan"), 4.0]])


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_csv_and_json_are_read_as_parquet_is(tmp_path, kind):
    """Image names as Windows writes them, a byte order mark, text that looks like a number or like nothing."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p0.png").write_bytes(png("red"))
    values = {"image": "images\\p0.png", "question": "Größe?", "answer": "1.50", "boxes": [list(BOX)], "id": "007"}
    both = [values, values | {"image": "D:\\data\\images\\p0.png", "answer": "NA", "boxes": [], "id": 8}]
    text = json.dumps(both) if kind == "json" else "\n".join(map(json.dumps, both))
    if kind == "csv":
        text = (
            'image,question,answer,boxes,id\nimages\\p0.png,Größe?,1.50,"[[1, 2, 30, 24]]",007\nD:\\p0.png,Q?,NA,,8\n'
        )
    path = tmp_path / f"data.{kind}"
    path.write_text(text, encoding="utf-8-sig")
    first, second = read(path, columns={"id": "id"})
    assert (first.id, first.question, first.answer, first.boxes) == ("007", "Größe?", "1.50", ((BOX,),))
    assert (first.images[0].path, second.answer, second.boxes) == (tmp_path / "images/p0.png", "NA", ((),))
    path.write_bytes("image,question\n答,答\n".encode("gb18030"))
    with refusal("D63" if kind == "csv" else "D47", "UTF-8"):
        read(path)


def test_a_folder_has_the_files_of_its_splits(tmp_path):
    for name in ("data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "test/0.parquet", "training-set.parquet"):
        parquet(tmp_path, row(question=name), name=name)
    rows = [(example.id, example.question, example.split) for example in read(tmp_path, val_split="test")]
    assert rows == [
        ("train:0", "data/train-0-of-2.parquet", "train"),
        ("train:1", "data/train-1-of-2.parquet", "train"),
        ("test:0", "test/0.parquet", "val"),
    ]
    with refusal("D63", "no table of the split 'dev'"):
        read(tmp_path, split="dev")
    with refusal("D63", "--val-split"):
        read(tmp_path / "training-set.parquet", val_split="val")
    facts = TableSource(str(tmp_path), val_split="test").facts()
    assert (len(facts["files"]), facts["val_split"]) == (3, "test")


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "train.pkl").write_bytes(b"\x80")
    for path, says in ((tmp_path / "train.pkl", "cannot be read.*parquet"), (tmp_path, "no table of the split")):
        with refusal("D63", says):
            read(path)


def test_a_parquet_file_that_was_cut_short_is_refused(tmp_path):
    path = parquet(tmp_path, row())
    path.write_bytes(path.read_bytes()[:-200])
    with refusal("D63", "cannot be read"):
        read(path)
    with refusal("D63", "no such file"):
        read(tmp_path / "absent.parquet")


def test_the_flags_of_the_command(tmp_path):
    parser = argparse.ArgumentParser()
    table.add_flags(parser)
    parser.add_argument("--box-format")
    args = ["--dataset", str(parquet(tmp_path, row(q="Why?"))), "--map", "question=q", "--name", "mine"]
    (example,) = table.from_args(parser.parse_args(args)).examples()
    assert (example.question, example.data_source) == ("Why?", "sayo/mine")
    for text in ("question", "question=", "=q", "id=b,id=c", "box=objects.bbox"):
        with refusal("D58", "map"):
            parse_map(text)
    assert parse_map("") == {}


# ------------------------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, whose image column is of ``datasets.Image`` as there; returns the calls."""
    calls = []
    whole = datasets.Dataset.from_list([row(), row(question="Who?")]).cast_column("image", datasets.Image())

    def load_dataset(*args, **options):
        calls.append((args, options))
        return whole.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    return calls


def test_the_hub_is_streamed_at_one_commit_with_images_as_they_are(hub):
    source = TableSource("owner/name", split="val", config="all")
    first, second = source.examples()
    assert first.images[0].data == png("red")
    assert (first.id, second.id, second.question) == ("val:0", "val:1", "Who?")
    assert hub == [(("owner/name", "all"), {"split": "val", "streaming": True, "revision": COMMIT})]
    assert source.facts()["commit"] == COMMIT


def test_errors_of_the_hub_have_one_line(hub, monkeypatch):
    def away(*args, **options):
        raise ConnectionError("no route to host\nat all")

    for missing in ((datasets, "load_dataset"), (huggingface_hub.HfApi, "dataset_info")):
        monkeypatch.setattr(*missing, away)
        with refusal("D63", "ConnectionError: no route to host at all.*HF_HUB_OFFLINE"):
            read(Path("owner/name"))


def test_an_id_needs_a_map_and_boxes_of_a_csv_are_json(tmp_path):
    assert [e.id for e in read(parquet(tmp_path, row(id=1), row(id=1)))] == ["train:0", "train:1"]
    path = tmp_path / "a.csv"
    path.write_text("image,question,answer,boxes\n[a].jpg,What?,x,\n[a].jpg,What?,x,10 20 100 120\n")
    rows = TableSource(str(path), "xyxy").examples()
    assert next(rows).images[0].key == "[a].jpg"
    with refusal("D58", "write lists as JSON"):
        next(rows)
