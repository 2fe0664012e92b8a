"""verl's own parquet: rows pass through, boxes are their own or come from a side file."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.refusals import refusal

from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.sources import verl_rows
from sayo_verl.data.sources.verl_rows import VerlSource

ALL = BuildOptions(keep_without_boxes=True, val_share=0)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


def row(number: int, info: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    question = {"role": "user", "content": f"<image>How long is side {number}?"}
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "system", "content": "Answer in <answer>."}, question],
        "images": [{"bytes": png(number), "path": None}],
        "ability": "math",
        "reward_model": {"style": "model", "ground_truth": str(number), "tolerance": 0.5},
        "extra_info": {"index": number, "split": "train", "level": "hard", **(info or {})},
        "agent_name": "single_turn_agent",
        **changed,
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def side(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def built(source: VerlSource, out: Path, options: BuildOptions = ALL, split: str = "train") -> list[dict[str, Any]]:
    rows = [r for file in build(source, out, options).files[split] for r in pq.read_table(file).to_pylist()]
    assert not [fault for r in rows for fault in RowContract(Demands()).look(r, "row").faults]
    return sorted(rows, key=lambda r: r["extra_info"]["id"])


def test_rows_pass_through_and_boxes_are_joined_by_id(tmp_path):
    file = write(tmp_path / "train.parquet", *[row(n) for n in range(3)])
    region = {"boxes": [[4, 3, 20, 15]], "box_names": ["side"]}
    boxes = side(tmp_path / "boxes.jsonl", {"id": 0, **region}, {"id": "2", **region})
    source = VerlSource(file, boxes=boxes, box_format="xyxy")
    first, second, third = built(source, tmp_path / "out")
    given = row(0)
    for column in ("data_source", "prompt", "images", "ability", "reward_model", "agent_name"):
        assert first[column] == given[column]
    info = first["extra_info"]
    assert (info["level"], info["question"], info["answer"]) == ("hard", "How long is side 0?", "0")
    assert (info["boxes"], info["box_names"]) == ([[[0.1, 0.1, 0.5, 0.5]]], [["side"]])
    assert second["extra_info"]["boxes"] == [[]]
    assert third["extra_info"]["boxes"] == [[[0.1, 0.1, 0.5, 0.5]]]
    boxed = built(source, tmp_path / "boxed", BuildOptions(val_share=0))
    assert [r["extra_info"]["id"] for r in boxed] == ["train:0", "train:2"]


@pytest.mark.parametrize("truth", ["\\boxed{3}", 3, None])
def test_an_answer_of_another_reward_function_passes_through(tmp_path, truth):
    file = write(tmp_path / "a.parquet", row(1, reward_model={"style": "math", "ground_truth": truth}))
    made = build(VerlSource(file), tmp_path / "out", ALL)
    assert pq.read_table(made.files["train"])["reward_model"].to_pylist() == [{"style": "math", "ground_truth": truth}]


def test_boxes_of_the_rows_stay(tmp_path):
    own = {"id": "a", "boxes": [[[0.1, 0.2, 0.5, 0.6]]], "question": "How long?"}
    (only,) = built(VerlSource(write(tmp_path / "a.parquet", row(1, own))), tmp_path / "out")
    assert (only["extra_info"]["id"], only["extra_info"]["boxes"]) == ("a", own["boxes"])
    boxes = side(tmp_path / "boxes.jsonl", {"id": "a", "boxes": [[1, 2, 3, 4]]})
    with refusal("D96", "boxes already"):
        list(VerlSource(tmp_path / "a.parquet", boxes=boxes, box_format="xyxy").examples())


def test_a_validation_file_and_a_column_of_ids(tmp_path):
    train = write(tmp_path / "train.parquet", row(1, uid="a"))
    val = write(tmp_path / "val.parquet", row(2, uid="b", reward_model={"style": "model", "ground_truth": "2"}))
    boxes = side(tmp_path / "boxes.jsonl", {"id": "b", "boxes": [[0, 0, 20, 15]]})
    source = VerlSource(train, "xyxy", val_file=val, boxes=boxes, id="uid")
    (held,) = built(source, tmp_path / "out", split="val")
    assert (held["uid"], held["extra_info"]["split"], held["extra_info"]["boxes"]) == ("b", "val", [[[0, 0, 0.5, 0.5]]])
    assert sorted(source.facts()["files"]) == sorted(map(str, (train, val, boxes)))


@pytest.mark.parametrize(
    ("code", "says", "lines", "options"),
    [
        ("D95", "1 of 1, such as 7", [{"id": 7, "boxes": [[1, 2, 3, 4]]}], {}),
        ("D96", "boxes already", [{"id": "hard", "boxes": [[1, 2, 3, 4]]}], {"id": "extra_info.level"}),
        ("D58", "--id", [{"id": 0, "boxes": [[1, 2, 3, 4]]}], {"id": "extra_info.absent"}),
        ("D58", "did you mean 'boxes'", [{"id": 0, "boxs": [[1, 2, 3, 4]]}], {}),
        ("D62", "line 2", [{"id": 0, "boxes": []}, {"id": "0", "boxes": []}], {}),
        ("D42", "row 0", [{"id": 0, "boxes": [[1, 2, 3]]}], {}),
    ],
)
def test_a_side_file_that_does_not_fit_is_refused(tmp_path, code, says, lines, options):
    file = write(tmp_path / "train.parquet", row(0), row(1))
    boxes = side(tmp_path / "boxes.jsonl", *lines)
    with refusal(code, says):
        list(VerlSource(file, boxes=boxes, **{"box_format": "xyxy", **options}).examples())


@pytest.mark.parametrize(
    "form",
    [
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"image": str(path)},
        lambda path: path.name,
        lambda path: f"file://{path}",
    ],
)
def test_images_in_every_form_make_the_same_row(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    file = write(tmp_path / "train.parquet", row(1, images=[form(tmp_path / "a.png")]))
    (only,) = built(VerlSource(file), tmp_path / "out")
    assert only["images"] == [{"bytes": png(1), "path": None}]


def test_rows_that_verl_cannot_read_are_refused(tmp_path):
    for changed in ({"prompt": "What?"}, {"extra_info": "{}"}, {"reward_model": {"style": "rule"}}):
        with refusal("D72", "row 0"):
            list(VerlSource(write(tmp_path / "a.parquet", row(1, **changed))).examples())
    with refusal("D09", "has no image"):
        list(VerlSource(write(tmp_path / "a.parquet", row(1, images=[]))).examples())
    with refusal("D03", "no column 'prompt'"):
        VerlSource(write(tmp_path / "a.parquet", {"images": []}))
    with refusal("D64"):
        other = write(tmp_path / "b.parquet", row(1, agent_name=3))
        VerlSource(write(tmp_path / "a.parquet", row(1)), val_file=other)
    for code, image in (
        ("D06", {"bytes": None, "path": "a.png"}),
        ("D73", "absent.png"),
    ):
        with refusal(code, "row 0, images"):
            list(VerlSource(write(tmp_path / "a.parquet", row(1, images=[image]))).examples())


def test_the_flags_of_the_command(tmp_path):
    parser = argparse.ArgumentParser()
    verl_rows.add_flags(parser)
    parser.add_argument("--box-format")
    args = ["--file", str(write(tmp_path / "train.parquet", row(1))), "--id", "uid"]
    assert verl_rows.from_args(parser.parse_args(args)) == VerlSource(tmp_path / "train.parquet", id="uid")


def test_a_side_file_may_match_one_row_of_each_split_and_answers_stay(tmp_path):
    files = [
        write(tmp_path / n / "a.parquet", row(0, {"answer": "zero"})) for n in ("t", "v") if not (tmp_path / n).mkdir()
    ]
    boxes = side(tmp_path / "boxes.jsonl", {"id": 0, "boxes": [[4, 3, 20, 15]]})
    found = list(VerlSource(files[0], "xyxy", val_file=files[1], boxes=boxes).examples())
    assert [(e.id, e.answer, e.extra["index"]) for e in found] == [("train:0", "zero", 0), ("val:0", "zero", 0)]


def test_large_types_of_pandas_become_plain_and_a_map_is_refused(tmp_path):
    table = pa.Table.from_pylist([row(1)])
    large = table.set_column(6, "agent_name", table["agent_name"].cast(pa.large_string()))
    pq.write_table(large, tmp_path / "a.parquet")
    assert VerlSource(tmp_path / "a.parquet").column_features["agent_name"].dtype == "string"
    pq.write_table(
        table.append_column("m", pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))), tmp_path / "b.parquet"
    )
    with refusal("D64"):
        VerlSource(tmp_path / "b.parquet")
