"""All rows without a model: what is counted, what is a mistake, and where boxes are.

Faults of a single row are tested with the row contract (tests/data/test_contract.py).
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.inspected import BOX, ROW_SCHEMA, encoded, only, row, write
from support.refusals import refusal

from sayo_verl.data.contract import Demands
from sayo_verl.data.folder import write_manifest
from sayo_verl.inspection.audit import Audit, find_data
from sayo_verl.inspection.positions import covered, doubt, figures
from sayo_verl.vision.masks import cell_coverage

NAN = float("nan")


@pytest.fixture
def audit(tmp_path: Path):
    """``audit(row, ..., val=[row, ...])``: the findings, and the audit with its figures."""

    def run(*rows: dict[str, Any], val: list[dict[str, Any]] | None = None, schema: pa.Schema | None = ROW_SCHEMA):
        folder = tmp_path / "data"
        write(folder / "train.parquet", list(rows), schema)
        if val is not None:
            write(folder / "val.parquet", val, schema)
        made = Audit(find_data([folder]))
        return made.run(), made

    return run


def test_good_rows_have_no_finding_and_are_counted(audit):
    two = row(2, data=[encoded(seed=8), encoded("JPEG", seed=9)], boxes=[[BOX, [0.0, 0.0, 0.5, 0.5]], []], kind="shape")
    findings, made = audit(row(0), row(1), two, val=[row(3)])
    assert findings == []
    shown = made.figures()
    assert shown["rows"] == "train 3, val 1"
    assert shown["images"] == "PNG 4, JPEG 1; 5 different"
    assert shown["kinds"] == "colour 3, shape 1"
    assert shown["boxes of a row"].endswith("max 2")
    assert len(made.boxes_N4) == 5


def test_linked_images_are_read(tmp_path, audit):
    linked = []
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encoded(seed=i))
        linked.append(row(i) | {"images": [{"image": str(tmp_path / f"{i}.png")}]})
    findings, made = audit(*linked, schema=None)
    assert findings == []
    assert made.figures()["images"] == "PNG 2; 2 different"
    (tmp_path / "1.png").unlink()
    assert "row 1" in only(audit(*linked, schema=None)[0], "D73").rows[0]


def test_every_fault_of_every_row_is_counted_and_the_first_rows_are_named(audit):
    bad = [row(i, boxes=[[[0.0, 0.0, 2.0, 1.0]]], answer="") for i in range(7)]
    findings, _ = audit(*bad)
    assert [(f.code, f.count, len(f.rows)) for f in findings] == [("D74", 7, 3), ("V03", 7, 3)]
    assert "train.parquet row 2" in findings[0].rows[-1]


@pytest.mark.parametrize("data", [b"not an image", encoded()[:30]], ids=["text", "cut"])
def test_the_message_of_a_library_does_not_make_two_findings(audit, data):
    assert only(audit(row(0, data=[data]), row(1), row(2, data=[data + b"."]))[0], "D07").count == 2


@pytest.mark.parametrize(("column", "value"), [("data_source", ["a"]), ("extra_info", "text"), ("prompt", "text")])
def test_values_of_any_type_are_findings(audit, column, value):
    findings, _ = audit(row(0) | {column: value}, schema=None)
    assert {f.code for f in findings if f.level == "FAIL"} <= {"D66", "D72"}
    assert findings


@pytest.mark.parametrize(("code", "box"), [("V02", [0.5, 0.5, 0.2, 0.2]), ("V01", [NAN, 0.0, 1.0, 1.0])])
def test_rows_of_malformed_boxes_are_not_rows_without_boxes(audit, code, box):
    findings, made = audit(row(0, boxes=[[BOX, box]]))
    assert "extra_info.boxes[0][1]: got" in only(findings, code).rows[0]
    assert len(made.boxes_N4) == 0


def test_an_animation_another_format_and_a_short_side(audit):
    frames = [Image.new("RGB", (96, 64), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    findings, _ = audit(row(0, data=[encoded("GIF")]), row(1, data=[out.getvalue()]))
    assert only(findings, "D67", "WARN", "JPEG, PNG or WEBP").count == 2
    findings, _ = audit(row(0, data=[encoded(size=(96, 20))], sizes=[[96, 20]]), row(1))
    assert "96 x 20" in only(findings, "D67", "WARN", "shorter than a visual token").rows[0]


@pytest.mark.parametrize("by", ["name", "bytes"])
def test_an_image_of_validation_in_training(audit, by):
    other = row(9, data=[encoded(seed=0)]) if by == "bytes" else row(9, image_keys=["picture-0-0"])
    findings, _ = audit(row(0), row(1), val=[other])
    finding = only([f for f in findings if f.level == "FAIL"], "D65", says=f"by {by}")
    assert "train.parquet row 0 and " in finding.rows[0]
    assert "val.parquet row 0" in finding.rows[0]


def test_equal_names_of_two_data_sources_are_two_pictures_and_two_questions(audit):
    theirs = row(9, question=row(0)["extra_info"]["question"], image_keys=["picture-0-0"])
    only(audit(row(0), theirs)[0], "D65", "WARN", "the same question")
    assert audit(row(0), theirs | {"data_source": "my/charts"})[0] == []
    assert audit(row(0), row(1), val=[theirs | {"data_source": "my/charts"}])[0] == []


def test_a_picture_of_several_names(audit):
    """A split by name can then put one picture into training and into validation."""
    findings, _ = audit(row(0), row(1, data=[encoded(seed=0)]), row(2, data=[encoded(seed=0)], image_keys=None))
    finding = only(findings, "D97", "WARN", "several image_keys")
    assert finding.count == 1
    assert "'picture-1-0', before 'picture-0-0'" in finding.rows[0]
    assert audit(row(0), row(1, data=[encoded(seed=0)], image_keys=["picture-0-0"]))[0] == []


def test_a_prompt_that_does_not_ask_for_the_answer_tag_is_a_warning_under_our_reward(audit, tmp_path):
    bare = row(0) | {"prompt": [{"role": "user", "content": "<image>What colour?"}]}
    assert "row 0" in only(audit(bare, row(1))[0], "D90", "WARN", "does not ask for <answer>").rows[0]
    path = write(tmp_path / "bare.parquet", [bare])
    assert Audit(find_data([path]), Demands(judge=None)).run() == []


def test_a_box_that_is_the_whole_image_is_counted(audit):
    whole = [[[0.0, 0.0, 1.0, 0.999]]]
    assert "50.0%" in only(audit(row(0, boxes=whole), row(1))[0], "D69", "WARN", "the whole image").rows[0]
    few, _ = audit(row(0, boxes=whole), *(row(i, boxes=[[[0, i / 30, 0.9, 1]]]) for i in range(1, 25)))
    assert only(few, "D69", "INFO").count == 1


def test_rows_without_boxes(audit):
    assert only(audit(row(0), row(1, boxes=[[]]))[0], "D69", "INFO").count == 1
    assert only(audit(row(0, boxes=[[]]), row(1, boxes=[[]]))[0], "D04", "WARN").count == 2
    got, _ = audit(row(0, boxes=[[]]), row(1), val=[row(2, boxes=[[]])])
    assert [finding.code for finding in got] == ["D69"]
    only(audit(row(0, boxes=[[]]), val=[row(1)])[0], "D04", "WARN", "no training row")


def test_data_without_boxes_on_purpose_are_no_warning(audit, tmp_path):
    folder = tmp_path / "data"
    write(folder / "train-00000.parquet", [row(0, boxes=[[]])])
    for val_boxes, level in (([[]], "INFO"), (..., "WARN")):  # boxes of one split only are a mistake
        write(folder / "val-00000.parquet", [row(1, boxes=val_boxes)])
        (folder / "manifest.json").unlink(missing_ok=True)
        write_manifest(folder, options={"keep_without_boxes": True})
        assert [(f.code, f.level) for f in Audit(find_data([folder])).run()] == [("D04", level)]


# ----------------------------------------------------------------------------------------------------- where boxes are


def spread_boxes(n: int, seed: int = 0) -> np.ndarray:
    """Boxes of objects anywhere in the picture: [n, 4]."""
    rng = np.random.default_rng(seed)
    size, place = rng.uniform(0.05, 0.4, (n, 2)), rng.uniform(0, 1, (n, 2))
    return np.concatenate([place * (1 - size), place * (1 - size) + size], axis=1)


@given(st.integers(1, 30), st.sampled_from([1, 3, 24]), st.integers(0, 9))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_the_map_is_the_mean_of_what_each_box_covers(n, cells, seed):
    boxes_N4 = spread_boxes(n, seed)
    expected = np.mean([cell_coverage(box, cells, cells) for box in boxes_N4], axis=0)
    np.testing.assert_allclose(covered(boxes_N4, cells), expected, atol=1e-9)


def test_figures_by_hand():
    shown = figures(np.array([[0.0, 0.0, 1 / 3, 1 / 3], [0.0, 0.0, 2 / 3, 0.6]]))
    assert shown["area of boxes, by place"].splitlines() == [" 43%  22%   0%", " 17%  17%   0%", "  0%   0%   0%"]
    assert shown["centre of a box, from left"] == "min 0.17, median 0.25, 90 % 0.32, max 0.33"
    assert shown["area of a box, in %"] == "min 11, median 26, 90 % 37, max 40"
    assert figures(np.zeros((0, 4))) == {}


@pytest.mark.parametrize(
    ("boxes_N4", "says"),
    [
        (np.tile([[0.1, 0.2, 0.6, 0.7]], (40, 1)), "40 of 40 boxes are the same, [0.1, 0.2, 0.6, 0.7]"),
        (spread_boxes(300) * 0.5, "end within 50% of the width"),
    ],
    ids=["one box", "the upper left corner"],
)
def test_boxes_that_together_look_like_a_mistake(audit, boxes_N4, says):
    rows = [row(i, data=[encoded(seed=i % 3)], boxes=[[box]]) for i, box in enumerate(boxes_N4.tolist())]
    for made in rows:
        made["extra_info"]["image_keys"] = None
    finding = only(audit(*rows)[0], "D97", "WARN", "do the boxes show")
    assert says in finding.rows[0]


@pytest.mark.parametrize(
    "boxes_N4",
    [
        spread_boxes(300),
        spread_boxes(300) * [1, 0.5, 1, 0.5],  # documents whose boxes are all in the upper half
        np.clip(np.random.default_rng(0).normal([0.3, 0.3, 0.7, 0.7], 0.05, (300, 4)), 0, 1),  # centred objects
        np.tile([[0.1, 0.2, 0.6, 0.7]], (19, 1)),  # too few to say
    ],
    ids=["anywhere", "upper half", "centred", "few"],
)
def test_boxes_that_are_plausible(boxes_N4):
    assert doubt(boxes_N4) is None


# --------------------------------------------------------------------------------------------------------------- files


def test_which_files_are_training_and_which_validation(tmp_path):
    folder = tmp_path / "made"
    files = {name: write(folder / f"{name}.parquet", [row(0)]) for name in ("train-0", "train-1", "val-0", "other")}
    alone = write(tmp_path / "alone.parquet", [row(0)])
    found = {"train": [files["train-0"], files["train-1"]], "val": [files["val-0"]]}
    assert find_data([folder]) == find_data([folder, folder]) == found  # others of the folder are not read
    assert find_data([alone, files["val-0"]])["val"] == [files["val-0"]]  # by its name
    assert find_data([files["train-0"]], [alone])["val"] == [alone]


@pytest.mark.parametrize("name", ["absent.parquet", "absent", "rows.jsonl", "rows.pkl", "."])
def test_a_path_without_rows_is_refused(tmp_path, name):
    for other in ("rows.jsonl", "rows.pkl"):
        (tmp_path / other).write_text("{}")
    with refusal("D64", "no rows to inspect"):
        find_data([tmp_path / name])


def test_the_parent_of_a_prepared_folder_names_it(tmp_path):
    write(tmp_path / "scenes-1" / "train-00000.parquet", [row(0)])
    write_manifest(tmp_path / "scenes-1")
    with refusal("D64", "no rows to inspect") as caught:
        find_data([tmp_path])
    assert caught.value.fix == f"did you mean {tmp_path / 'scenes-1'}?"


def test_a_cut_parquet_is_refused(tmp_path):
    path = write(tmp_path / "train.parquet", [row(i) for i in range(9)])
    path.write_bytes(path.read_bytes()[:-1024])
    with refusal("D02") as caught:
        Audit(find_data([path]))
    assert str(path) in caught.value.where


def test_files_that_verl_cannot_join_or_read_are_findings_and_the_others_are_read(tmp_path):
    write(tmp_path / "a" / "train-0.parquet", [row(0)])
    write(tmp_path / "a" / "train-1.parquet", [row(1, boxes=[[[0, 0, 1, 1]]])], schema=None)
    findings = Audit(find_data([tmp_path / "a"])).run()
    assert "extra_info.boxes" in only([f for f in findings if f.level == "FAIL"], "D64").rows[0]
    write(tmp_path / "b" / "train-0.parquet", [row(0)])
    lacking = ROW_SCHEMA.remove(ROW_SCHEMA.get_field_index("reward_model"))
    write(tmp_path / "b" / "val-0.parquet", [{k: v for k, v in row(1).items() if k != "reward_model"}], lacking)
    made = Audit(find_data([tmp_path / "b"]))
    assert "no column 'reward_model'" in only(made.run(), "D03").what
    assert dict(made.counted["rows"]) == {"train": 1}


def test_a_folder_that_is_not_as_its_manifest_says(tmp_path):
    file = write(tmp_path / "train-00000.parquet", [row(0), row(1)])
    assert Audit(find_data([tmp_path])).run() == []  # a folder of one's own has no manifest
    write_manifest(tmp_path)
    assert Audit(find_data([tmp_path])).run() == []
    write(file, [row(0)])
    only(Audit(find_data([tmp_path])).run(), "D56", says="train-00000.parquet")
