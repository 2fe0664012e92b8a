"""A sample of rows through the processors of the families."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.family_models import TINY
from support.inspected import BOX, NAMES, encoded, only, row, write
from support.refusals import refusal

from sayo_verl.inspection import sample as inspection
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.inspection.findings import Findings
from sayo_verl.inspection.model_view import Model
from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.plan import image_tiles, plan_row
from sayo_verl.vision.grids import merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


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


def test_small_boxes_are_counted_and_have_a_token(models, tmp_path):
    tiny = [[0.5, 0.5, 0.501, 0.501]]
    got, findings = measure(tmp_path, models["qwen3_vl"], row(0, boxes=[tiny]), row(1))
    assert min(got.per_box) == 1
    assert only(findings, "D69", "INFO", "smaller than 0.5 of a visual token").count == got.small == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_that_the_processor_enlarges(models, name, tmp_path):
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
def test_placeholders_that_are_not_the_grids(models, name, monkeypatch, tmp_path):
    model = models[name]
    V = sum(t.tokens for t in model.see(row(0), "").tiles[0])

    def drop(ids, image):
        at = (ids[0] == image).nonzero()[0].item()
        return torch.cat([ids[:, :at], ids[:, at + 1 :]], dim=1)

    fewer_tokens(model, monkeypatch, drop)
    _, findings = measure(tmp_path, model, row(0), row(1))
    told = only(findings, "P05").rows[0]
    assert f"got {V - 1} placeholders, wanted {V} " in told


def test_a_token_inside_the_run_of_an_image(models, monkeypatch, tmp_path):
    def split(ids, image):
        at = (ids[0] == image).nonzero()[1].item()
        return torch.cat([ids[:, :at], ids[:, :1] * 0, ids[:, at:]], dim=1)

    fewer_tokens(models["qwen3_vl"], monkeypatch, split)
    _, findings = measure(tmp_path, models["qwen3_vl"], row(0))
    assert "runs of [1, 5] placeholders" in only(findings, "P05").rows[0]


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


def test_an_image_that_is_added_in_the_response_is_not_the_prompts(models):
    """Multi-turn rollouts are refused at launch (L13). Should one get through: added tokens are not marked, and an
    added image's grid is refused."""
    grid = merged_grid(1, 2, 4, 2, where="")
    ids = torch.tensor([1, 5, 5, 2, 7, 5, 5, 8])  # two visual tokens in the prompt, two in the response
    plan = plan_row(ids, 4, image_token_id=5, images=[grid], boxes=[[[0.0, 0.0, 0.5, 1.0]]], coverage=0.5, where="row")
    assert plan.image_columns.tolist() == [1, 2]
    assert plan.keys["region"].nonzero().flatten().tolist() == [1]
    with refusal("P05"):
        plan_row(ids, 4, image_token_id=5, images=[grid, grid], boxes=[[], []], coverage=0.5, where="row")


def test_a_placeholder_in_the_response_is_text(models):
    ids = torch.tensor([1, 5, 5, 2, 5, 8])
    plan = plan_row(
        ids, 2, image_token_id=5, images=[merged_grid(1, 2, 4, 2, where="")], boxes=[[BOX]], coverage=0.5, where="row"
    )
    assert plan.image_columns.tolist() == [1, 2]
    assert plan.keys["response"].nonzero().flatten().tolist() == [4, 5]


def test_a_padding_row_of_verl_has_boxes_and_no_image(models):
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


def test_prompts_over_the_limit(models, tmp_path):
    rows = [row(0), row(1, question="What colour is it? " * 40), row(2), row(3, question="What? " * 50)]
    got, findings = measure(tmp_path, models["qwen3_vl"], *rows, limit=100)
    longest = max(got.prompts)
    finding = only(findings, "D68", says=f"max prompt {longest} > 100")
    assert finding.count == sum(n > 100 for n in got.prompts) == 2
    assert "2 of 4 rows" in finding.rows[0]
    assert str(longest) in finding.fix


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


def test_a_picture_that_the_processor_refuses(models, tmp_path):
    long = row(0, data=[encoded(size=(455, 2))], sizes=[[455, 2]])
    found, _ = Audit(find_data([write(tmp_path / "train.parquet", [long, row(1)])])).run()
    assert "455 x 2" in only(found.sorted(), "D77", says="row 0").rows[0]
    got, findings = measure(tmp_path, models["qwen3_vl"], long, row(1))
    assert findings == []  # counted by the first pass
    assert len(got.prompts) == 1
    with refusal("D68", "ValueError"):
        models["qwen3_vl"].see(long, "row 0")


def test_an_orientation_behind_the_pixels_of_a_png(models, tmp_path):
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


def test_pixels_that_are_cut(models, tmp_path):
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
