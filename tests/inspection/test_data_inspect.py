"""Inspection of finished data: every row without a model, a sample through the processors of the families, the page.

Inputs that the table of bad inputs calls M01 to M14 and that are not met here by name:
M01, M03 tests/vision/test_masks.py (a box never vanishes; a box that ends on a border does not take the next cell),
M04, M06 also tests/vision/test_grids.py (the golden table), M05, M07, M14 also tests/probe/test_plan.py, M11 also
tests/hooks/test_engine.py, M13 also tests/methods/test_region.py and tests/hooks/test_trainer.py.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.family_models import TINY

from sayo_verl.data.check import check_leakage, check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.rows import ROW_SCHEMA
from sayo_verl.errors import SayoError
from sayo_verl.inspection import command as inspection
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.inspection.findings import Finding, Findings
from sayo_verl.inspection.model_view import Model
from sayo_verl.inspection.page import MAX_HEIGHT, MAX_WIDTH, Picture, Sample, make_page
from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.plan import image_tiles, plan_row
from sayo_verl.vision.grids import merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks, region_mask

NAN = float("nan")
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
BOX = [0.1, 0.2, 0.6, 0.7]


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def encoded(kind: str = "PNG", size: tuple[int, int] = (96, 64), seed: int = 0, **options: Any) -> bytes:
    """A small picture; another one for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size).save(out, kind, **options)
    return out.getvalue()


def row(
    number: int = 0,
    *,
    data: list[bytes] | None = None,
    boxes: Any = ...,
    text: str | None = None,
    question: str | None = None,
    answer: Any = "red",
    source: Any = "my/photos",
    sizes: Any = ...,
    **info: Any,
) -> dict[str, Any]:
    """A row of the contract, with one picture of its own."""
    data = [encoded(seed=number)] if data is None else data
    question = f"What colour is number {number}?" if question is None else question
    boxes = [[BOX] for _ in data] if boxes is ... else boxes
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "<image>" * len(data) + question if text is None else text}],
        "images": [{"bytes": d, "path": None} for d in data],
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "index": number,
            "split": "train",
            "id": f"row-{number}",
            "question": question,
            "answer": str(answer),
            "kind": "colour",
            "boxes": boxes,
            "box_names": [["thing"] * len(b) for b in boxes or []],
            "box_source": "drawn",
            "image_keys": [f"picture-{number}-{i}" for i in range(len(data))],
            "image_size_wh": [[96, 64] for _ in data] if sizes is ... else sizes,
            **info,
        },
    }


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = ROW_SCHEMA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=4)
    return path


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


def only(findings: list[Finding], code: str, level: str = "FAIL", says: str = "") -> Finding:
    """The one finding there is, complete."""
    assert [(f.code, f.level) for f in findings] == [(code, level)], findings
    (finding,) = findings
    assert says in finding.what + " ".join(finding.rows), finding
    assert finding.count >= len(finding.rows) >= 1
    assert finding.fix
    return finding


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
def test_D11_an_image_without_bytes(audit, image):
    bad = row(1)
    bad["images"] = [image]
    assert "row 1, images[0]" in only(audit(row(0), bad)[0], "D06").rows[0]


@pytest.mark.parametrize("data", [b"not an image", encoded()[:30]], ids=["text", "cut"])
def test_D04_bytes_that_are_no_image(audit, data):
    finding = only(audit(row(0, data=[data]), row(1), row(2, data=[data + b"."]))[0], "D07")
    assert finding.count == 2  # one finding, although the library names an address in memory


def test_D06_an_animation_or_another_format(audit):
    frames = [Image.new("RGB", (96, 64), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    findings, _ = audit(
        row(0, data=[encoded("GIF")]), row(1, data=[encoded("BMP", seed=1)]), row(2, data=[out.getvalue()])
    )
    assert only(findings, "D67", "WARN").count == 3


def test_D08_an_image_that_is_not_upright(audit):
    exif = Image.Exif()
    exif[0x0112] = 6
    finding = only(audit(row(0), row(1, data=[encoded("JPEG", exif=exif)]))[0], "D67", says="orientation 6")
    assert "row 1" in finding.rows[0]


@pytest.mark.parametrize("text", ["<image><image>What?", "What?"])
def test_D12_placeholders_and_images(audit, text):
    assert "wanted as many" in only(audit(row(0, text=text), row(1))[0], "D09").rows[0]


def test_D13_a_question_with_the_tag_of_a_video(audit):
    assert {f.code for f in audit(row(0, question="Is <video> red?"), row(1))[0]} == {"D09", "D66"}


@pytest.mark.parametrize("tag", ["<|image_pad|>", "<IMG_CONTEXT>", "<|im_end|>"])
def test_D13_reserved_text(audit, tag):
    assert tag in only(audit(row(0, question=f"Is {tag} red?"), row(1))[0], "D66").rows[0]


def test_D13_a_question_with_the_tag_of_an_image(audit):
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
    ids=["D18 pixels", "D17 sizes", "D20 NaN", "three numbers"],
)
def test_D17_D18_D20_boxes_that_are_none(audit, code, box):
    assert "row 1, extra_info.boxes[0][1]: got" in only(audit(row(0), row(1, boxes=[[BOX, box]]))[0], code).rows[0]


def test_D19_an_image_of_another_size_than_the_row_says(audit):
    assert "got 96 x 64, wanted 64 x 96" in only(audit(row(0, sizes=[[64, 96]]), row(1))[0], "D67").rows[0]


def test_D21_two_rows_of_one_id(audit):
    findings, _ = audit(row(0), row(1), row(2, id="row-0"), val=[row(3, id="row-0")])
    assert only(findings, "D65", says="row 0").count == 1  # the splits may use the same ids
    assert audit(row(0, id="7"), row(1, id="7", source=None) | {"data_source": "my/charts"})[0] == []


@pytest.mark.parametrize("by", ["name", "bytes"])
def test_D21_an_image_of_validation_in_training(audit, by):
    other = row(9, data=[encoded(seed=0)]) if by == "bytes" else row(9, image_keys=["picture-0-0"])
    finding = only(audit(row(0), row(1), val=[other])[0], "D65", says=f"by {by}")
    assert "train.parquet row 0 and " in finding.rows[0]
    assert "val.parquet row 0" in finding.rows[0]


def test_D21_equal_keys_of_two_data_sources_are_two_pictures(audit, tmp_path):
    theirs = row(9, image_keys=["picture-0-0"]) | {"data_source": "my/charts"}
    assert audit(row(0), row(1), val=[theirs])[0] == []
    train, val = write(tmp_path / "a.parquet", [row(0)]), write(tmp_path / "b.parquet", [theirs])
    assert "are not among" in check_leakage([train], [val], image_key="images", max_images=9)


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_D22_no_answer(audit, answer):
    assert "ground_truth" in only(audit(row(0, answer=answer), row(1))[0], "D74").rows[0]


def test_D22_an_answer_that_is_a_list(audit):
    assert "['red']" in only(audit(row(0, answer=["red"]), schema=None)[0], "D74").rows[0]


def test_an_empty_question(audit):
    only(audit(row(0, question=" "), row(1))[0], "D66", says="no question")


def test_D23_a_cut_parquet_is_refused(tmp_path):
    path = write(tmp_path / "train.parquet", [row(i) for i in range(9)])
    path.write_bytes(path.read_bytes()[:-1024])
    with refusal("D02") as caught:
        Audit(find_data([path])).run()
    assert str(path) in caught.value.where


def test_D25_shards_of_different_types(tmp_path):
    write(tmp_path / "train-00000.parquet", [row(0)])
    write(tmp_path / "train-00001.parquet", [row(1, boxes=[[[0, 0, 1, 1]]])], schema=None)
    found, _ = Audit(find_data([tmp_path])).run()
    told = only([f for f in found.sorted() if f.level == "FAIL"], "D64").rows[0]
    assert "extra_info.boxes: list<element: list<element: list<element: int64>>>, there list<" in told
    assert "extra_info.box_names" not in told  # the same type, although the lists name their items otherwise


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.npy"])
def test_D31_files_that_can_run_code_are_not_read(tmp_path, name):
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
def test_D32_a_data_source_that_verl_evaluates(audit, name):
    assert "data_source" in only(audit(row(0), row(1, source=name))[0], "D66").rows[0]


def test_M02_a_box_that_is_the_whole_image_is_counted(audit):
    whole = [[[0.0, 0.0, 1.0, 0.999]]]
    many, _ = audit(row(0, boxes=whole), row(1))
    assert "50.0%" in only(many, "D69", "WARN", "same for every answer").rows[0]
    few, figures = audit(row(0, boxes=whole), *(row(i) for i in range(1, 25)))
    assert only(few, "D69", "INFO").count == figures.whole_image_rows == 1


def test_M07_two_images_and_one_list_of_boxes(audit):
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


def test_M11_a_row_with_a_video(audit):
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
    only(audit(row(0), twice)[0], "D65", "WARN", "twice")
    assert audit(row(0), row(1, data=[encoded(seed=0)], image_keys=["picture-0-0"]))[0] == []


def test_equal_names_of_two_data_sources_are_two_questions(audit):
    other = row(1, question=row(0)["extra_info"]["question"], image_keys=["picture-0-0"])
    assert audit(row(0), other | {"data_source": "my/charts"})[0] == []
    only(audit(row(0), other)[0], "D65", "WARN", "twice")


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
def test_D21_the_fast_form_tells_training_and_validation_apart(tmp_path, by):
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


# -------------------------------------------------------------------------------------------- through the processors

NAMES = ("qwen3_vl", "qwen2_5_vl", "internvl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in made.items():
        TINY[name].build(folder)
    return made


@pytest.fixture(scope="module")
def models(folders) -> dict[str, Model]:
    return {name: Model(str(folder)) for name, folder in folders.items()}


def measure(tmp_path: Path, model: Model, *rows: dict[str, Any], limit: int = 2048, n: int = 100):
    findings = Findings()
    data = find_data([write(tmp_path / "rows.parquet", list(rows))])
    got = inspection.measure(data, model, findings, rows=n, limit=limit, seed=0)
    return got, findings.sorted()


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_a_row_are_those_of_the_processor(models, name):
    model, boxes = models[name], [[BOX, [0.55, 0.6, 0.58, 0.64]], [], [[0.3, 0.0, 0.9, 0.4]]]
    data = [encoded(size=size, seed=i) for i, size in enumerate([(192, 96), (64, 64), (100, 260)])]
    seen = model.see(row(0, data=data, boxes=boxes), "row 0")
    # the grids of each image alone, asked of the image processor without verl
    for picture, tiles, of_image, mask_NV in zip(data, seen.tiles, boxes, seen.masks, strict=True):
        alone = model.see(row(0, data=[picture], boxes=[of_image]), "alone")
        assert alone.tiles == [tiles]
        np.testing.assert_array_equal(mask_NV, box_masks(of_image, tiles))
        if TINY[name].tiles:
            assert tiles == tile_grid(
                sum(t.y0 == 0 for t in tiles if t != tiles[-1]) or 1,
                sum(t.x0 == 0 for t in tiles if t != tiles[-1]) or 1,
                2,
                where="",
            )
    assert seen.tokens_per_box == [int(n) for m in seen.masks for n in m.sum(axis=1)]
    assert min(seen.tokens_per_box) >= 1
    assert seen.prompt_tokens > sum(t.tokens for tiles in seen.tiles for t in tiles)


def test_grids_by_hand(models):
    wide = row(0, data=[encoded(size=(192, 96))])
    assert models["qwen3_vl"].see(wide, "").tiles == [merged_grid(1, 6, 12, 2, where="")]  # 32 px a token
    # 28 px a token; verl rounds 192 x 96 to 196 x 84 before the processor sees it
    assert models["qwen2_5_vl"].see(wide, "").tiles == [merged_grid(1, 6, 14, 2, where="")]
    assert models["internvl"].see(wide, "").tiles == [tile_grid(2, 1, 2, where="")]  # and a thumbnail


def test_M01_small_boxes_are_counted_and_have_a_token(models, tmp_path):
    tiny = [[0.5, 0.5, 0.501, 0.501]]
    got, findings = measure(tmp_path, models["qwen3_vl"], row(0, boxes=[tiny]), row(1))
    assert min(got.per_box) == 1
    assert only(findings, "D69", "INFO", "smaller than 0.5 of a visual token").count == got.small == 1


@pytest.mark.parametrize("name", NAMES)
def test_M04_a_picture_that_the_processor_enlarges(models, name, tmp_path):
    """8 x 6 pixels become a grid of at least one token, and a box is still its share of that grid."""
    small = encoded(size=(8, 6))
    got, findings = measure(tmp_path, models[name], row(0, data=[small], sizes=[[8, 6]], boxes=[[[0, 0, 1, 1]]]))
    assert only(findings, "D67", "WARN", "shorter than a visual token").count == 1
    assert got.per_box == got.visual
    assert got.shares == [1.0]


def fewer_tokens(model: Model, monkeypatch, change) -> None:
    """The model with other prompt ids than its processor gives."""
    real = Model._features

    def features(self: Model, values: Any, where: str) -> Any:
        made = real(self, values, where)
        made["input_ids"] = change(made["input_ids"], self.config.image_token_id)
        return made

    monkeypatch.setattr(Model, "_features", features)


@pytest.mark.parametrize("name", NAMES)
def test_M05_placeholders_that_are_not_the_grids(models, name, monkeypatch, tmp_path):
    model = models[name]
    V = sum(t.tokens for t in model.see(row(0), "").tiles[0])

    def drop(ids, image):
        at = (ids[0] == image).nonzero()[0].item()
        return torch.cat([ids[:, :at], ids[:, at + 1 :]], dim=1)

    fewer_tokens(model, monkeypatch, drop)
    _, findings = measure(tmp_path, model, row(0), row(1))
    told = only(findings, "P05").rows[0]
    assert f"got {V - 1} placeholders, wanted {V} " in told


def test_M12_a_token_inside_the_run_of_an_image(models, monkeypatch, tmp_path):
    def split(ids, image):
        at = (ids[0] == image).nonzero()[1].item()
        return torch.cat([ids[:, :at], ids[:, :1] * 0, ids[:, at:]], dim=1)

    fewer_tokens(models["qwen3_vl"], monkeypatch, split)
    _, findings = measure(tmp_path, models["qwen3_vl"], row(0))
    assert "runs of [1, 5] placeholders" in only(findings, "P05").rows[0]


@pytest.mark.parametrize("name", NAMES)
def test_M12_the_families_have_no_token_inside_an_image(models, name):
    model, two = models[name], row(0, data=[encoded(size=(192, 128)), encoded(seed=1)])
    ids = model._features(two, "row 0")["input_ids"][0]
    at = (ids == model.config.image_token_id).nonzero().flatten()
    assert int((at.diff() != 1).sum()) == 1  # between the two images and nowhere else


def changed(folder: Path, out: Path, **values: Any) -> Path:
    """A copy of a model folder, without its weights, whose image processor has other values."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    file = out / "processor_config.json"
    told = json.loads(file.read_text())
    target = told["image_processor"] if "patch_size" in values or "merge_size" in values else told
    target.update(values)
    file.write_text(json.dumps(told))
    return out


@pytest.mark.parametrize(
    ("name", "values"),
    [("qwen3_vl", {"patch_size": 14}), ("qwen3_vl", {"merge_size": 1}), ("internvl", {"image_seq_length": 256})],
    ids=str,
)
def test_M06_a_processor_of_other_patches(folders, tmp_path, name, values):
    with refusal("D68", "visual tokens of these weights") as caught:
        Model(str(changed(folders[name], tmp_path / "model", **values)))
    assert str(next(iter(values.values()))) in str(caught.value.got)
    assert caught.value.wanted


def test_M06_the_processor_of_another_family(folders, tmp_path):
    folder = changed(folders["qwen3_vl"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    with refusal("L23", "processor of another family"):
        Model(str(folder))


def test_M08_an_image_that_is_added_in_the_response_is_not_the_prompts(models):
    """Multi-turn rollouts are refused at launch (L13). Should one get through: added tokens are not marked, and an
    added image's grid is refused."""
    grid = merged_grid(1, 2, 4, 2, where="")
    ids = torch.tensor([1, 5, 5, 2, 7, 5, 5, 8])  # two visual tokens in the prompt, two in the response
    plan = plan_row(ids, 4, image_token_id=5, images=[grid], boxes=[[[0.0, 0.0, 0.5, 1.0]]], coverage=0.5, where="row")
    assert plan.image_columns.tolist() == [1, 2]
    assert plan.keys["region"].nonzero().flatten().tolist() == [1]
    with refusal("P05"):
        plan_row(ids, 4, image_token_id=5, images=[grid, grid], boxes=[[], []], coverage=0.5, where="row")


def test_M14_a_placeholder_in_the_response_is_text(models):
    ids = torch.tensor([1, 5, 5, 2, 5, 8])
    plan = plan_row(
        ids, 2, image_token_id=5, images=[merged_grid(1, 2, 4, 2, where="")], boxes=[[BOX]], coverage=0.5, where="row"
    )
    assert plan.image_columns.tolist() == [1, 2]
    assert plan.keys["response"].nonzero().flatten().tolist() == [4, 5]


def test_M13_a_padding_row_of_verl_has_boxes_and_no_image(models):
    plan = plan_row(
        torch.tensor([1, 2, 3]),
        1,
        image_token_id=5,
        boxes=[[BOX]],
        coverage=0.5,
        where="row",
        images=image_tiles({}, FAMILIES["qwen3_vl"], None, where="row"),
    )
    assert (plan.region_tokens, len(plan.image_columns)) == (0, 0)
    assert not plan.keys["region"].any()


def test_M09_prompts_over_the_limit(models, tmp_path):
    rows = [row(0), row(1, question="What colour is it? " * 40), row(2), row(3, question="What? " * 50)]
    got, findings = measure(tmp_path, models["qwen3_vl"], *rows, limit=100)
    longest = max(got.prompts)
    finding = only(findings, "D68", says=f"max prompt {longest} > 100")
    assert finding.count == sum(n > 100 for n in got.prompts) == 2
    assert "2 of 4 rows" in finding.rows[0]
    assert str(longest) in finding.fix


def test_M10_a_family_without_a_map_of_boxes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    with refusal("L18") as caught:
        Model(str(tmp_path))
    assert caught.value.got == "llava_next"
    assert "internvl" in caught.value.wanted


@pytest.mark.parametrize("name", ["absent", "."])
def test_no_model_at_the_path(tmp_path, name):
    with refusal("L17"):
        Model(str(tmp_path / name))


def test_a_model_without_its_processor(folders, tmp_path):
    shutil.copy(folders["internvl"] / "config.json", tmp_path)
    with refusal("D68", "cannot be loaded"):
        Model(str(tmp_path))


def test_D10_a_picture_that_the_processor_refuses(models, tmp_path):
    long = row(0, data=[encoded(size=(455, 2))], sizes=[[455, 2]])
    found, _ = Audit(find_data([write(tmp_path / "train.parquet", [long, row(1)])])).run()
    assert "455 x 2" in only(found.sorted(), "D77", says="row 0").rows[0]
    got, findings = measure(tmp_path, models["qwen3_vl"], long, row(1))
    assert findings == []  # counted by the first pass
    assert len(got.prompts) == 1
    with refusal("D68", "ValueError"):
        models["qwen3_vl"].see(long, "row 0")


def test_D08_an_orientation_behind_the_pixels_of_a_png(models, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(exif=exif)
    at = png.index(b"eXIf") - 4
    length = 12 + int.from_bytes(png[at : at + 4], "big")
    end = png.index(b"IEND") - 4
    moved = png[:at] + png[at + length : end] + png[at : at + length] + png[end:]
    found, _ = Audit(find_data([write(tmp_path / "train.parquet", [row(0, data=[moved])])])).run()
    assert found.sorted() == []
    _, findings = measure(tmp_path, models["qwen3_vl"], row(0, data=[moved]))
    only(findings, "D67", says="orientation 6")


def test_D03_pixels_that_are_cut(models, tmp_path):
    _, findings = measure(
        tmp_path, models["qwen3_vl"], row(0, data=[encoded("JPEG", size=(200, 200))[:900]], sizes=[[200, 200]]), row(1)
    )
    only(findings, "D07", says="row 0")


def test_what_the_first_pass_refused_is_not_refused_again(models, tmp_path):
    bad = [row(0, text="What?"), row(1, boxes=[[[0.0, 0.0, 2.0, 1.0]]]), row(2, data=[b"x"]), row(3)]
    got, findings = measure(tmp_path, models["qwen3_vl"], *bad)
    assert findings == []
    assert len(got.prompts) == 1


def test_a_row_without_an_image(models, tmp_path):
    got, findings = measure(tmp_path, models["qwen3_vl"], row(0, data=[], boxes=[], sizes=[]))
    assert findings == []
    assert (len(got.prompts), got.visual, got.per_box) == (1, [], [])


def test_a_row_is_left_as_it_is(models):
    before = row(0)
    models["qwen3_vl"].see(before, "row 0")
    assert before == row(0)


@given(st.integers(0, 300), st.integers(0, 60), st.integers(0, 5))
@PROPERTY
def test_the_sample_is_spread_evenly(n, k, seed):
    chosen = inspection.spread(n, k, seed)
    assert chosen == sorted(set(chosen)) == inspection.spread(n, k, seed)
    assert len(chosen) == min(n, k)
    if k < n:
        assert all(i * n // k <= c < (i + 1) * n // k for i, c in enumerate(chosen))


# ---------------------------------------------------------------------------------------------------------- the page


class Drawings(HTMLParser):
    """What a page draws: token -> its rectangle, by picture and level; boxes; texts; addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: dict[str, dict[int, dict[int, tuple[float, ...]]]] = {}
        self.boxes: dict[str, dict[int, list[tuple[float, ...]]]] = {}
        self.sizes: dict[str, tuple[float, float]] = {}
        self.pictures: dict[str, Image.Image] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        told = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag == "svg":
            self.at, self.level = told["data-image"], int(told["data-level"])
            self.sizes[self.at] = tuple(float(v) for v in told["viewbox"].split()[2:])
            self.tokens.setdefault(self.at, {})[self.level] = {}
            self.boxes.setdefault(self.at, {})[self.level] = []
        elif tag == "image":
            kind, data = told["href"].split(",", 1)
            assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
            self.pictures[self.at] = Image.open(io.BytesIO(base64.b64decode(data)))
        elif tag == "rect":
            width, height = self.sizes[self.at]
            x, y, w, h = (float(told[k]) for k in ("x", "y", "width", "height"))
            share = (x / width, y / height, (x + w) / width, (y + h) / height)
            if told["class"] == "token":
                self.tokens[self.at][self.level][int(told["data-token"])] = share
            elif told["class"] == "box":
                self.boxes[self.at][self.level].append(share)

    def handle_data(self, data: str) -> None:
        self.text += data


def sample(picture: Picture, **texts: str) -> Sample:
    told = {
        "where": "rows row 3",
        "why": "at random",
        "question": "What?",
        "answer": "red",
        "source": "my/photos",
        "kind": "colour",
        "box_source": "drawn",
    }
    return Sample(**(told | texts), prompt_tokens=40, pictures=(picture,))


TILINGS = {
    "grid": merged_grid(1, 10, 14, 2, where=""),
    "tiles and thumbnail": tile_grid(3, 2, 4, where=""),
    "one tile": tile_grid(1, 1, 4, where=""),
}


@pytest.mark.parametrize("tiles", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("size", [(96, 64), (1400, 900), (30, 1500)], ids=str)
def test_the_page_draws_the_tokens_of_the_region_where_they_are(tiles, size):
    boxes = [[0.1, 0.2, 0.6, 0.7], [0.9, 0.9, 0.91, 0.92]]
    picture = Picture(Image.new("RGB", size, "grey"), tiles, boxes, ["a", "b"], box_masks(boxes, tiles))
    page = Drawings(make_page("rows", [], [], [sample(picture)]))
    levels = page.tokens["s0i0"]
    drawn = {token: share for level in levels.values() for token, share in level.items()}
    assert sorted(drawn) == np.flatnonzero(region_mask(boxes, tiles)).tolist()
    assert sum(len(level) for level in levels.values()) == len(drawn)
    assert len(levels) == (2 if len(tiles) > 1 else 1)
    first = 0
    for tile in tiles:
        for token in range(tile.tokens):
            r, c = divmod(token, tile.cols)
            w, h = (tile.x1 - tile.x0) / tile.cols, (tile.y1 - tile.y0) / tile.rows
            cell = (tile.x0 + c * w, tile.y0 + r * h, tile.x0 + (c + 1) * w, tile.y0 + (r + 1) * h)
            if first + token in drawn:
                assert drawn[first + token] == pytest.approx(cell, abs=1e-3)
                on_thumbnail = len(tiles) > 1 and tile == tiles[-1]
                assert (first + token in levels[1]) if on_thumbnail else (first + token in levels[0])
        first += tile.tokens
    for level in page.boxes["s0i0"].values():
        assert np.allclose(level, boxes, atol=1e-3)
    shown = page.pictures["s0i0"]
    assert shown.width <= MAX_WIDTH
    assert shown.height <= MAX_HEIGHT
    assert shown.size == page.sizes["s0i0"]
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_the_lines_of_the_grid_are_where_the_cells_end():
    tiles = merged_grid(1, 6, 8, 2, where="")
    page = make_page("", [], [], [sample(Picture(Image.new("RGB", (80, 60)), tiles, [], [], box_masks([], tiles)))])
    path = re.search(r'class="grid"[^>]* d="([^"]+)"', page).group(1)
    assert re.findall(r"M(\S+) 0.000V60.000", path) == ["20.000", "40.000", "60.000"]
    assert re.findall(r"M0.000 (\S+)H80.000", path) == ["20.000", "40.000"]


def test_the_page_escapes_every_text():
    evil = "<script>alert(\"1\")</script><img src=x onerror=alert(1)> & 'quoted' </title></style>"
    tiles = TILINGS["grid"]
    picture = Picture(Image.new("RGB", (64, 64)), tiles, [BOX], [evil], box_masks([BOX], tiles))
    names = ("where", "why", "question", "answer", "source", "kind", "box_source")
    finding = Finding("D66", "FAIL", evil, 3, (evil, evil), evil)
    page = make_page(evil, [(evil, evil)], [finding], [sample(picture, **dict.fromkeys(names, evil))])
    drawn = Drawings(page)
    assert not {"script", "img"} & set(drawn.tags)
    assert drawn.tags.count("style") == drawn.tags.count("title") == 1
    assert drawn.text.count(evil) == 1 + 1 + 2 + 4 + len(names) + 1  # title, heading, figure, finding, sample, box


def test_the_page_needs_nothing_from_elsewhere():
    tiles = TILINGS["tiles and thumbnail"]
    picture = Picture(Image.new("RGB", (64, 64)), tiles, [BOX], ["a"], box_masks([BOX], tiles))
    page = make_page("rows", [], [], [sample(picture)] * 2)
    drawn = Drawings(page)
    assert all(a.startswith("data:image/") for a in drawn.addresses)
    assert len(drawn.addresses) == 4  # two pictures at two resolutions
    assert "http" not in page
    assert "@import" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


def test_samples_are_the_worst_and_then_of_every_kind():
    path = Path("rows.parquet")
    rows = [(path, i, "my/photos", "ab"[i % 2], 5, 9) for i in range(40)]
    rows[7], rows[30] = (path, 7, "my/photos", "a", 1, 2), (path, 30, "my/photos", "a", 5, 60)
    rows[11] = (path, 11, "my/charts", "c", 0, 0)  # no box
    chosen = inspection.choose_samples(rows, 8, 0)
    assert chosen == inspection.choose_samples(rows, 8, 0)
    assert chosen[0] == (7, "visual tokens of its smallest box: 1")
    assert (30, "visual tokens of its largest box: 60") in chosen
    assert len(chosen) == len(dict(chosen)) == 8
    at_random = [i for i, why in chosen if why == "at random"]
    assert 11 in at_random
    assert {rows[i][3] for i in at_random} == {"a", "b", "c"}
    assert len(inspection.choose_samples(rows, 100, 0)) == 40
    assert inspection.choose_samples([], 8, 0) == []
    assert inspection.choose_samples(rows, 8, 1) != chosen


# ------------------------------------------------------------------------------------------------------- the command


def command(*argv: str | Path | int) -> int:
    parser = argparse.ArgumentParser()
    inspection.add_flags(parser)
    return inspection.run(parser.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_prints_figures_and_writes_a_page(folders, models, tmp_path, capsys, name):
    rows = [row(i, question=f"Is {i} <b>red</b>?", boxes=[[BOX]] if i % 2 else [[]]) for i in range(10)]
    write(tmp_path / "data" / "train-00000.parquet", rows)
    write(tmp_path / "data" / "val-00000.parquet", [row(20)])
    page = tmp_path / "made" / "page.html"
    assert command(tmp_path / "data", "--model", folders[name], "--page", page, "--samples", 5, "--rows", 8) == 0
    out = capsys.readouterr().out
    for told in ("10 train, 1 val", "rows through the processor", "visual tokens per box", "prompt length", "D69"):
        assert told in out
    assert re.search(r"rows through the processor +8\b", out)
    drawn = Drawings(page.read_text(encoding="utf-8"))
    assert len(drawn.pictures) == 5
    assert "b" not in drawn.tags
    for at, levels in drawn.tokens.items():
        got = sorted(token for level in levels.values() for token in level)
        boxes = list(drawn.boxes[at][0])
        tiles = models[name].see(row(0), "").tiles[0]  # all pictures are 96 x 64
        assert got == (np.flatnonzero(region_mask([BOX], tiles)).tolist() if boxes else [])


def test_which_files_are_training_and_which_validation(tmp_path):
    folder = tmp_path / "made"
    files = {name: write(folder / f"{name}.parquet", [row(0)]) for name in ("train-0", "train-1", "val-0", "other")}
    alone = write(tmp_path / "alone.parquet", [row(0)])
    assert find_data([folder]).train == (files["train-0"], files["train-1"])  # others of the folder are not read
    assert find_data([folder]).val == (files["val-0"],)
    assert find_data([alone, files["val-0"]]).val == (files["val-0"],)  # by its name
    assert find_data([files["train-0"]], [alone]).val == (alone,)
    assert find_data([folder, folder]) == find_data([folder])


def test_the_modules_import_neither_torch_nor_verl():
    code = (
        "import sys, sayo_verl.inspection.command, sayo_verl.data.check, sayo_verl.inspection.page; "
        "print([m for m in ('torch', 'transformers', 'verl', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_strict_and_refusals(folders, tmp_path):
    model = ("--model", folders["qwen3_vl"])
    good = write(tmp_path / "good.parquet", [row(0), row(1, boxes=[[]])])
    bad = write(tmp_path / "bad.parquet", [row(0), row(1, answer="")])
    assert command(good, *model, "--strict") == 0  # an INFO is no reason
    assert command(bad, *model) == 0
    assert command(bad, *model, "--strict") == 1
    assert command(good, *model, "--strict", "--max-prompt-length", 3) == 1
    val = write(tmp_path / "val.parquet", [row(0)])
    assert command(good, *model, "--strict", "--val", val) == 1  # the same image
    warned = write(tmp_path / "warned.parquet", [row(0, boxes=[[]])])
    assert command(warned, *model, "--strict") == 1  # D04 is a WARN
    assert command(good, *model, "--strict", "--rows", 0, "--page", tmp_path / "p.html") == 0
    with refusal("D64", "no such file"):
        command(tmp_path / "absent.parquet", *model)
    with refusal("D64", "cannot be written"):
        command(good, *model, "--page", tmp_path)
    with refusal("L17"):
        command(good, "--model", tmp_path / "absent")
