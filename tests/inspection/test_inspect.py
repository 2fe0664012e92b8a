"""Inspection of finished data: every row without a model, a sample through the processors of the families, the page."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.inspected import BOX, encoded, only, row, write
from support.refusals import refusal

from sayo_verl.data.check import check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.rows import ROW_SCHEMA
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.launch.split_check import check_leakage
from sayo_verl.probe.plan import plan_row
from sayo_verl.vision.grids import merged_grid

NAN = float("nan")


@pytest.fixture
def audit(tmp_path: Path):
    """``audit(row, ..., val=[row, ...])``: the findings of the first pass, and its figures."""

    def run(*rows: dict[str, Any], val: list[dict[str, Any]] | None = None, schema: pa.Schema | None = ROW_SCHEMA):
        folder = tmp_path / "data"
        write(folder / "train.parquet", list(rows), schema)
        if val is not None:
            write(folder / "val.parquet", val, schema)
        found, figures = Audit(find_data([folder])).run()
        return found.sorted(), figures

    return run


# ------------------------------------------------------------------------------------------------- the first pass


def test_good_rows_have_no_finding_and_are_counted(audit):
    two = row(2, data=[encoded(seed=8), encoded("JPEG", seed=9)], boxes=[[BOX, [0.0, 0.0, 0.5, 0.5]], []], kind="shape")
    findings, figures = audit(row(0), row(1), two, val=[row(3)])
    assert findings == []
    assert dict(figures.rows) == {"train": 3, "val": 1}
    assert (figures.images, figures.distinct_images) == (5, 5)
    assert dict(figures.boxes_per_row) == {1: 3, 2: 1}
    assert dict(figures.kinds) == {"colour": 3, "shape": 1}
    assert dict(figures.formats) == {"PNG": 4, "JPEG": 1}


@pytest.mark.parametrize("image", [{"bytes": None, "path": "a.png"}, {"bytes": b"", "path": None}, None], ids=str)
def test_an_image_without_bytes(audit, image):
    bad = row(1)
    bad["images"] = [image]
    assert "row 1, images[0]" in only(audit(row(0), bad)[0], "D06").rows[0]


@pytest.mark.parametrize("data", [b"not an image", encoded()[:30]], ids=["text", "cut"])
def test_bytes_that_are_no_image(audit, data):
    finding = only(audit(row(0, data=[data]), row(1), row(2, data=[data + b"."]))[0], "D07")
    assert finding.count == 2  # one finding, although the library names an address in memory


def test_an_animation_or_another_format(audit):
    frames = [Image.new("RGB", (96, 64), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    findings, _ = audit(
        row(0, data=[encoded("GIF")]), row(1, data=[encoded("BMP", seed=1)]), row(2, data=[out.getvalue()])
    )
    assert only(findings, "D67", "WARN").count == 3


def test_an_image_that_is_not_upright(audit):
    exif = Image.Exif()
    exif[0x0112] = 6
    finding = only(audit(row(0), row(1, data=[encoded("JPEG", exif=exif)]))[0], "D67", says="orientation 6")
    assert "row 1" in finding.rows[0]


@pytest.mark.parametrize("text", ["<image><image>What?", "What?"])
def test_placeholders_that_do_not_fit_the_images(audit, text):
    assert "wanted as many" in only(audit(row(0, text=text), row(1))[0], "D09").rows[0]


def test_a_question_with_the_tag_of_a_video(audit):
    assert {f.code for f in audit(row(0, question="Is <video> red?"), row(1))[0]} == {"D09", "D66"}


@pytest.mark.parametrize("tag", ["<|image_pad|>", "<IMG_CONTEXT>", "<|im_end|>"])
def test_a_question_with_reserved_text(audit, tag):
    assert tag in only(audit(row(0, question=f"Is {tag} red?"), row(1))[0], "D66").rows[0]


def test_a_question_with_the_tag_of_an_image(audit):
    codes = {f.code for f in audit(row(0, question="Is <image> red?"), row(1))[0]}
    assert codes == {"D09", "D66"}


@pytest.mark.parametrize(
    ("code", "box"),
    [
        ("V03", [10.0, 20.0, 300.0, 400.0]),
        ("V02", [0.5, 0.5, 0.2, 0.2]),
        ("V01", [NAN, 0.0, 1.0, 1.0]),
        ("V01", [0.0, 1.0, 1.0]),
    ],
    ids=["pixels", "corners in the wrong order", "NaN", "three numbers"],
)
def test_malformed_boxes_are_findings(audit, code, box):
    assert "row 1, extra_info.boxes[0][1]: got" in only(audit(row(0), row(1, boxes=[[BOX, box]]))[0], code).rows[0]


def test_an_image_of_another_size_than_the_row_says(audit):
    assert "got 96 x 64, wanted 64 x 96" in only(audit(row(0, sizes=[[64, 96]]), row(1))[0], "D67").rows[0]


def test_two_rows_of_one_id(audit):
    findings, _ = audit(row(0), row(1), row(2, id="row-0"), val=[row(3, id="row-0")])
    assert only(findings, "D65", says="row 0").count == 1  # the splits may use the same ids
    assert audit(row(0, id="7"), row(1, id="7", source=None) | {"data_source": "my/charts"})[0] == []


@pytest.mark.parametrize("by", ["name", "bytes"])
def test_an_image_of_validation_in_training(audit, by):
    other = row(9, data=[encoded(seed=0)]) if by == "bytes" else row(9, image_keys=["picture-0-0"])
    finding = only(audit(row(0), row(1), val=[other])[0], "D65", says=f"by {by}")
    assert "train.parquet row 0 and " in finding.rows[0]
    assert "val.parquet row 0" in finding.rows[0]


def test_equal_keys_of_two_data_sources_are_two_pictures(audit, tmp_path):
    theirs = row(9, image_keys=["picture-0-0"]) | {"data_source": "my/charts"}
    assert audit(row(0), row(1), val=[theirs])[0] == []
    train, val = write(tmp_path / "a.parquet", [row(0)]), write(tmp_path / "b.parquet", [theirs])
    assert "are not among" in check_leakage([train], [val], image_key="images", max_images=9)


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_a_row_without_an_answer(audit, answer):
    assert "ground_truth" in only(audit(row(0, answer=answer), row(1))[0], "D74").rows[0]


def test_an_answer_that_is_a_list(audit):
    assert "['red']" in only(audit(row(0, answer=["red"]), schema=None)[0], "D74").rows[0]


def test_an_empty_question(audit):
    findings, _ = audit(row(0, question=" "), row(1))
    only([finding for finding in findings if finding.level == "FAIL"], "D66", says="no question")


def test_a_prompt_that_does_not_ask_for_the_answer_tag_is_a_warning_under_our_reward(audit, tmp_path):
    bare = row(0) | {"prompt": [{"role": "user", "content": "<image>What colour?"}]}
    assert "row 0" in only(audit(bare, row(1))[0], "D90", "WARN", "does not ask for <answer>").rows[0]
    path = write(tmp_path / "bare.parquet", [bare])
    assert Audit(find_data([path]), Demands(judge=None)).run()[0].sorted() == []


def test_a_cut_parquet_is_refused(tmp_path):
    path = write(tmp_path / "train.parquet", [row(i) for i in range(9)])
    path.write_bytes(path.read_bytes()[:-1024])
    with refusal("D02") as caught:
        Audit(find_data([path])).run()
    assert str(path) in caught.value.where


def test_shards_of_different_types(tmp_path):
    write(tmp_path / "train-00000.parquet", [row(0)])
    write(tmp_path / "train-00001.parquet", [row(1, boxes=[[[0, 0, 1, 1]]])], schema=None)
    found, _ = Audit(find_data([tmp_path])).run()
    told = only([f for f in found.sorted() if f.level == "FAIL"], "D64").rows[0]
    assert "extra_info.boxes: list<element: list<element: list<element: int64>>>, there list<" in told
    assert "extra_info.box_names" not in told  # the same type, although the lists name their items otherwise


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.npy"])
def test_files_that_can_run_code_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with refusal("D64", "run code") as caught:
        find_data([tmp_path / name])
    assert caught.value.wanted == "parquet"


@pytest.mark.parametrize("name", ["absent.parquet", "absent", "rows.jsonl", "."])
def test_data_that_is_not_there_is_refused(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text("{}")
    with refusal("D64"):
        find_data([tmp_path / name])


@pytest.mark.parametrize("name", ["numina_olympiads", "numina_x", "codecontests", None, " "])
def test_a_data_source_that_verl_evaluates(audit, name):
    assert "data_source" in only(audit(row(0), row(1, source=name))[0], "D66").rows[0]


def test_a_box_that_is_the_whole_image_is_counted(audit):
    whole = [[[0.0, 0.0, 1.0, 0.999]]]
    many, _ = audit(row(0, boxes=whole), row(1))
    assert "50.0%" in only(many, "D69", "WARN", "same for every answer").rows[0]
    few, figures = audit(row(0, boxes=whole), *(row(i) for i in range(1, 25)))
    assert only(few, "D69", "INFO").count == figures.whole_image_rows == 1


def test_two_images_and_one_list_of_boxes(audit):
    two = [encoded(seed=1), encoded(seed=2)]
    assert "1 entries for 2 images" in only(audit(row(0, data=two, boxes=[[BOX]]))[0], "D05").rows[0]
    with refusal("D05", "nested by image"):
        plan_row(
            torch.tensor([9, 5, 5, 9]),
            0,
            image_token_id=5,
            images=[merged_grid(1, 2, 2, 2, where="")] * 2,
            boxes=[[BOX]],
            coverage=0.5,
            where="row 0",
        )


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"box_names": [["a", "b"]]}, "box_names: got [2], wanted [1]"),
        ({"box_names": []}, "got [], wanted [1]"),
        ({"image_keys": ["a", "b"]}, "image_keys: got 2"),
        ({"image_size_wh": []}, "image_size_wh: got 0"),
    ],
    ids=str,
)
def test_lists_that_are_not_nested_by_image(audit, info, says):
    only(audit(row(0, **info), row(1))[0], "D05", says=says)


def test_a_row_with_a_video(audit):
    schema = ROW_SCHEMA.append(pa.field("videos", pa.list_(pa.string())))
    shown = row(0, text="<video><image>What?") | {"videos": ["a.mp4"]}
    only(audit(shown, row(1) | {"videos": None}, schema=schema)[0], "D66", says="row 0, videos")
    assert {f.code for f in audit(row(0) | {"videos": ["a.mp4"]}, schema=schema)[0]} == {"D09", "D66"}
    with refusal("D66", "a video"):
        plan_row(
            torch.tensor([9, 5, 6, 6, 9]),
            0,
            image_token_id=5,
            images=[merged_grid(1, 2, 2, 2, where="")],
            boxes=[[BOX]],
            coverage=0.5,
            where="row 0",
            video_token_id=6,
            videos=2,
        )


def test_the_same_question_about_the_same_image(audit):
    twice = row(1, data=[encoded(seed=0)], question=row(0)["extra_info"]["question"], image_keys=["picture-0-0"])
    only(audit(row(0), twice)[0], "D65", "WARN", "the same question")
    assert audit(row(0), row(1, data=[encoded(seed=0)], image_keys=["picture-0-0"]))[0] == []


def test_equal_names_of_two_data_sources_are_two_questions(audit):
    other = row(1, question=row(0)["extra_info"]["question"], image_keys=["picture-0-0"])
    assert audit(row(0), other | {"data_source": "my/charts"})[0] == []
    only(audit(row(0), other)[0], "D65", "WARN", "the same question")


def test_rows_without_boxes(audit):
    assert only(audit(row(0), row(1, boxes=[[]]))[0], "D69", "INFO").count == 1
    only(audit(row(0, boxes=[[]]), row(1, boxes=[[]]))[0], "D04", "WARN")
    got, _ = audit(row(0, boxes=[[]]), row(1), val=[row(2, boxes=[[]])])
    assert [finding.code for finding in got] == ["D69"]
    only(audit(row(0, boxes=[[]]), val=[row(1)])[0], "D04", "WARN", "no training row")


def test_a_file_without_a_column_is_a_finding_and_the_others_are_read(tmp_path):
    write(tmp_path / "train-0.parquet", [row(0)])
    lacking = ROW_SCHEMA.remove(ROW_SCHEMA.get_field_index("reward_model"))
    write(tmp_path / "val-0.parquet", [{k: v for k, v in row(1).items() if k != "reward_model"}], lacking)
    found, figures = Audit(find_data([tmp_path])).run()
    assert "no column 'reward_model'" in only(found.sorted(), "D03").what
    assert dict(figures.rows) == {"train": 1}


def test_nothing_stops_at_the_first_mistake_and_the_first_rows_are_named(audit):
    bad = [row(i, boxes=[[[0.0, 0.0, 2.0, 1.0]]], answer="") for i in range(7)]
    findings, _ = audit(*bad)
    assert [(f.code, f.count, len(f.rows)) for f in findings] == [("D74", 7, 5), ("V03", 7, 5)]
    assert "train.parquet row 4" in findings[0].rows[-1]


def prepared(folder: Path, **manifest: Any) -> Path:
    file = write(folder / "train-00000.parquet", [row(0), row(1)])
    facts = {"rows": 2, "size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": {file.name: facts | manifest}}))
    return folder


def test_a_folder_is_what_its_manifest_says(tmp_path):
    assert Audit(find_data([prepared(tmp_path)])).run()[0].sorted() == []


@pytest.mark.parametrize(("manifest", "says"), [({"size": 5}, "wanted 5 bytes"), ({"sha256": "0" * 64}, "sha256")])
def test_a_folder_that_is_not_what_its_manifest_says(tmp_path, manifest, says):
    only(Audit(find_data([prepared(tmp_path, **manifest)])).run()[0].sorted(), "D64", says=says)


def test_manifests_that_are_damaged_absent_or_silent_about_a_file(tmp_path):
    folder = prepared(tmp_path / "more")
    write(folder / "val-00000.parquet", [row(2)])
    only(Audit(find_data([folder])).run()[0].sorted(), "D64", "WARN", "val-00000")
    for damaged in ("{", "[]", "{}", '{"files": {"a": {}}}'):
        (folder / "manifest.json").write_text(damaged)
        only(Audit(find_data([folder])).run()[0].sorted(), "D64", says="cannot be read")
    (folder / "manifest.json").unlink()
    assert Audit(find_data([folder])).run()[0].sorted() == []
    (folder / "progress.json").write_text("{}")
    only(Audit(find_data([folder])).run()[0].sorted(), "D64", says="not finished")


# --------------------------------------------------------------------------------------------- the launcher's fast form


def check(path: Path, *, max_images: int = 512) -> str:
    return str(check_parquet(path, Demands(headers=max_images > 0), max_images=max_images))


def test_the_fast_form_passes_the_row_contract(tmp_path):
    assert check(write(tmp_path / "a.parquet", [row(i) for i in range(9)])) == "9 rows, 9 with boxes, 9 images decoded"


def test_the_fast_form_refuses_what_inspection_finds(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    cases = [
        ("D65", row(1, id="row-0"), "row 0"),
        ("D66", row(1, source="numina_x"), "numina_x"),
        ("D67", row(1, sizes=[[64, 96]]), "wanted 64 x 96"),
        ("D67", row(1, data=[encoded("JPEG", exif=exif)]), "EXIF orientation 3"),
        ("D05", row(1, data=[encoded(seed=1)] * 2, boxes=[[BOX]]), "2 images"),
    ]
    for code, bad, says in cases:
        with refusal(code) as caught:
            check(write(tmp_path / "a.parquet", [row(0), bad]))
        assert "row 1" in caught.value.where
        assert says in str(caught.value)


def test_the_fast_form_reads_no_image_where_none_is_wanted(tmp_path):
    path = write(tmp_path / "a.parquet", [row(0), row(1, data=[b"no image"])])
    assert check(path, max_images=-1) == "2 rows, 2 with boxes, 0 images decoded"
    with refusal("D07") as caught:
        check(path, max_images=1)
    assert "row 1" in caught.value.where


@pytest.mark.parametrize("by", ["name", "bytes"])
def test_the_fast_form_tells_training_and_validation_apart(tmp_path, by):
    train = write(tmp_path / "train.parquet", [row(i) for i in range(6)])
    apart = write(tmp_path / "val.parquet", [row(i) for i in range(6, 9)])
    told = check_leakage([train], [apart], image_key="images", max_images=4)
    assert told == "3 names and 3 images of validation are not among 6 and 3 of training"
    shared = row(8, data=[encoded(seed=2)]) if by == "bytes" else row(8, image_keys=["picture-2-0"])
    val = write(tmp_path / "val.parquet", [row(7), shared])
    with refusal("D65", f"by {by}") as caught:
        check_leakage([train], [val], image_key="images", max_images=100)
    assert "train.parquet row 2" in caught.value.where
    assert "val.parquet row 1" in caught.value.where
