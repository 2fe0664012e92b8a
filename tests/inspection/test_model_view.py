"""A sample of rows through the processors of the families."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.family_models import TINY
from support.inspected import BOX, NAMES, encoded, only, row, write
from support.refusals import refusal

from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.model_view import Model
from sayo_verl.vision.grids import merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks


def audited(
    tmp_path: Path, model: Model | None, *rows: dict[str, Any], limit: int = 2048, n: int = 100, shown: int = 0
):
    """The findings, and the audit with what it measured."""
    made = Audit({"train": [write(tmp_path / "rows.parquet", list(rows))], "val": []}, model=model, n_sample=n)
    made.limit, made.n_shown = limit, shown
    return made.run(), made


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_a_row_are_those_of_the_processor(models, name):
    model, boxes = models[name], [[BOX, [0.55, 0.6, 0.58, 0.64]], [], [[0.3, 0.0, 0.9, 0.4]]]
    data = [encoded(size=size, seed=i) for i, size in enumerate([(192, 96), (64, 64), (100, 260)])]
    seen = model.see(row(0, data=data, boxes=boxes), "row 0")
    for picture, tiles, of_image, mask_NV in zip(data, seen.tiles, boxes, seen.masks, strict=True):
        alone = model.see(row(0, data=[picture], boxes=[of_image]), "alone")
        assert alone.tiles == [tiles]
        np.testing.assert_array_equal(mask_NV, box_masks(of_image, tiles))
        if TINY[name].tiles:
            across = sum(t.y0 == 0 for t in tiles[:-1]) or 1
            assert tiles == tile_grid(across, max(1, len(tiles) - 1) // across, 2, where="")
    assert all(mask_NV.sum(axis=1).all() for mask_NV in seen.masks)  # a token for every box
    assert seen.prompt_tokens > sum(t.tokens for tiles in seen.tiles for t in tiles)


def test_grids_by_hand(models):
    wide = row(0, data=[encoded(size=(192, 96))])
    assert models["qwen3_vl"].see(wide, "").tiles == [merged_grid(1, 6, 12, 2, where="")]  # 32 px a token
    # 28 px a token; verl rounds 192 x 96 to 196 x 84 before the processor sees it
    assert models["qwen2_5_vl"].see(wide, "").tiles == [merged_grid(1, 6, 14, 2, where="")]
    assert models["internvl"].see(wide, "").tiles == [tile_grid(2, 1, 2, where="")]  # and a thumbnail


def test_small_boxes_are_counted_and_have_a_token(models, tmp_path):
    findings, made = audited(tmp_path, models["qwen3_vl"], row(0, boxes=[[[0.5, 0.5, 0.501, 0.501]]]), row(1))
    assert min(made.measured["visual tokens of a box"]) == 1
    assert only(findings, "D69", "INFO", "a small part of a visual token").count == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_that_the_processor_enlarges(models, name, tmp_path):
    """8 x 6 pixels become a grid of at least one token, and a box is still its share of that grid."""
    small = encoded(size=(8, 6))
    findings, made = audited(tmp_path, models[name], row(0, data=[small], sizes=[[8, 6]], boxes=[[[0, 0, 0.98, 1]]]))
    assert only(findings, "D67", "WARN", "shorter than a visual token").count == 1
    assert made.measured["visual tokens of a box"] == made.measured["visual tokens of an image"]
    assert made.measured["visual tokens in boxes, in %"] == [100.0]


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_that_are_not_the_grids(models, name, monkeypatch, tmp_path):
    model = models[name]
    V, real = sum(t.tokens for t in model.see(row(0), "").tiles[0]), Model._features

    def one_less(self: Model, values: Any, where: str) -> Any:
        made = real(self, values, where)
        at = (made["input_ids"][0] == self.config.image_token_id).nonzero()[0].item()
        made["input_ids"] = torch.cat([made["input_ids"][:, :at], made["input_ids"][:, at + 1 :]], dim=1)
        return made

    monkeypatch.setattr(Model, "_features", one_less)
    findings, _ = audited(tmp_path, model, row(0), row(1))
    assert f"got {V - 1} placeholders, wanted {V} " in only(findings, "P05").rows[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_families_have_no_token_inside_an_image(models, name):
    model, two = models[name], row(0, data=[encoded(size=(192, 128)), encoded(seed=1)])
    ids = model._features(two, "row 0")["input_ids"][0]
    at = (ids == model.config.image_token_id).nonzero().flatten()
    assert int((at.diff() != 1).sum()) == 1  # between the two images and nowhere else


def changed(folder: Path, out: Path, **values: Any) -> Path:
    """A copy of a model folder, without its weights, whose image processor has other values."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    file = out / "processor_config.json"
    config = json.loads(file.read_text())
    target = config["image_processor"] if "patch_size" in values or "merge_size" in values else config
    target.update(values)
    file.write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("name", "values"),
    [("qwen3_vl", {"patch_size": 14}), ("qwen3_vl", {"merge_size": 1}), ("internvl", {"image_seq_length": 256})],
    ids=str,
)
def test_a_processor_of_other_patches(folders, tmp_path, name, values):
    with refusal("D68", "visual tokens of these weights") as caught:
        Model(str(changed(folders[name], tmp_path / "model", **values)))
    assert str(next(iter(values.values()))) in str(caught.value.got)
    assert caught.value.wanted


def test_the_processor_of_another_family(folders, tmp_path):
    folder = changed(folders["qwen3_vl"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    with refusal("L23", "processor of another family"):
        Model(str(folder))


def test_prompts_over_the_limit(models, tmp_path):
    rows = [row(0), row(1, question="What colour is it? " * 40), row(2), row(3, question="What? " * 50)]
    findings, made = audited(tmp_path, models["qwen3_vl"], *rows, limit=100)
    assert only(findings, "D68", says="100").count == 2
    assert "2 of 4 rows" in findings[0].rows[0]
    assert f"max {findings[0].what.split()[-3]};" in made.figures()["tokens of a prompt"]


def test_a_family_without_a_map_of_boxes(tmp_path):
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


def test_a_row_with_a_fault_is_not_sent_to_the_processor(models, tmp_path):
    narrow = row(0, data=[encoded(size=(5700, 28))], sizes=[[5700, 28]])
    bad = [narrow, row(1, text="What?"), row(2, boxes=[[[0.0, 0.0, 2.0, 1.0]]]), row(3, data=[b"x"]), row(4)]
    findings, made = audited(tmp_path, models["qwen3_vl"], *bad)
    assert sorted(f.code for f in findings) == ["D07", "D09", "D77", "V03"]
    assert made.counted["sample"].total() == 1
    with refusal("D68", "ValueError.* in another size"):
        models["qwen3_vl"].see(narrow, "row 0")


def test_a_refusal_of_a_cut_image_says_to_store_it_again(models):
    whole = encoded(size=(96, 96))
    with refusal("D68", r"OSError: image file is truncated.* images again"):
        models["qwen3_vl"].see(row(0, data=[whole[: len(whole) // 2]]), "row 0")


def test_an_orientation_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(exif=exif)
    at = png.index(b"eXIf") - 4
    length = 12 + int.from_bytes(png[at : at + 4], "big")
    end = png.index(b"IEND") - 4
    moved = png[:at] + png[at + length : end] + png[at : at + length] + png[end:]
    assert audited(tmp_path, None, row(0, data=[moved]), n=0)[0] == []  # the header does not tell
    only(audited(tmp_path, None, row(0, data=[moved]))[0], "D67", says="orientation 6")


def test_pixels_that_are_cut(tmp_path):
    cut = row(0, data=[encoded("JPEG", size=(200, 200))[:900]], sizes=[[200, 200]])
    assert audited(tmp_path, None, cut, row(1), n=0)[0] == []
    only(audited(tmp_path, None, cut, row(1))[0], "D07", says="row 0")


def test_a_row_without_an_image(models, tmp_path):
    findings, made = audited(tmp_path, models["qwen3_vl"], row(0, data=[], boxes=[], sizes=[]))
    assert [f.code for f in findings] == ["D04"]
    assert made.counted["sample"].total() == 1
    assert "limit 2048" in made.figures()["tokens of a prompt"]


def test_a_row_is_left_as_it_is(models):
    before = row(0)
    models["qwen3_vl"].see(before, "row 0")
    assert before == row(0)


def test_the_page_gets_the_smallest_and_the_largest_box_one_row_of_each_kind_and_others(tmp_path):
    rows = [row(i, kind="ab"[i % 2], boxes=[[[0, 0, 0.1 + i / 50, 0.5]]]) for i in range(40)]
    rows[11] = row(11, kind="c", boxes=[[]])
    _, made = audited(tmp_path, None, *rows, shown=8)
    shown = [int(seen.where.split()[-1]) for seen in made.shown]
    assert shown[:2] == [0, 39]
    assert {rows[i]["extra_info"]["kind"] for i in shown} == {"a", "b", "c"}
    assert len(set(shown)) == 8
    assert shown == [int(seen.where.split()[-1]) for seen in audited(tmp_path, None, *rows, shown=8)[1].shown]
    assert audited(tmp_path, None, *rows)[1].shown == []
