"""A bad row gets the same verdict from the launcher, `sayo inspect`, the <Focus> stage and the engine's plan."""

import io
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sayo_verl.data.check import check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.errors import SayoError
from sayo_verl.focus.rows import AnchorRows
from sayo_verl.hooks.capture import plan_micro_batch
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

IMAGE, VIDEO, TEXT = 5, 6, 9
GRID = [[1, 4, 4]]  # four visual tokens


def png(width: int = 40, height: int = 30, **how: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG", **how)
    return out.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    """A good row with other columns, or with other fields of ``extra_info``."""
    info = {"index": 0, "id": "a", "question": "What?", "boxes": [[[0.1, 0.1, 0.9, 0.9]]]}
    columns = {
        "data_source": "my/toy",
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "images": [{"bytes": png(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "red"},
    }
    fields = {name: value for name, value in changes.items() if name not in (*columns, "videos")}
    return columns | {k: v for k, v in changes.items() if k not in fields} | {"extra_info": info | fields}


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


TURNED = Image.Exif()
TURNED[0x0112] = 6
WHOLE = [0.0, 0.0, 1.0, 1.0]

# What the plan sees: the boxes, and how many images and videos there are. Text and pixels are tokens there.
SEEN_BY_ALL: list[tuple[str, dict[str, Any]]] = [
    ("D05", row(boxes=[WHOLE])),
    ("D05", row(boxes=[[WHOLE], [WHOLE]])),
    ("D05", row(boxes=[[], []])),
    ("D05", row(boxes="0 0 1 1")),
    ("V01", row(boxes=[[[0.0, 0.0, 1.0]]])),
    ("V01", row(boxes=[[[0.0, 0.0, 1.0, float("nan")]]])),
    ("V01", row(boxes=[[["0", "0", "1", "1"]]])),
    ("V02", row(boxes=[[[0.5, 0.5, 0.2, 0.9]]])),
    ("V03", row(boxes=[[[0.0, 0.0, 30.0, 20.0]]])),
    ("D66", row(videos=["a.mp4"], prompt=said("<video><image>What?"))),
]
SEEN_IN_FILES: list[tuple[str, dict[str, Any]]] = [
    ("D72", row(prompt="<image>What?")),
    ("D72", row(images="a.png")),
    ("D72", row(reward_model="red")),
    ("D09", row(prompt=said("What?"))),
    ("D09", row(images=[])),
    ("D06", row(images=[{"bytes": None, "path": "there.png"}])),
    ("D73", row(images=["absent.png"])),
    ("D06", row(images=[{"path": "there.png"}])),
    ("D07", row(images=[{"bytes": b"no image", "path": None}])),
    ("D67", row(images=[{"bytes": png(exif=TURNED), "path": None}])),
    ("D67", row(image_size_wh=[[1, 1]])),
    ("D77", row(images=[{"bytes": png(2, 900), "path": None}])),
    ("D74", row(reward_model={"style": "rule", "ground_truth": None})),
    ("D74", row(reward_model={"style": "rule", "ground_truth": "<answer>red</answer>"})),
    ("D66", row(data_source="numina_math")),
    ("D66", row(prompt=said("<image>"), question="")),
    ("D66", row(prompt=said("<image>What <|image_pad|>?"))),
    ("D05", row(box_names=[["a", "b"]])),
]


def by_launcher(path, bad):
    check_parquet(path, Demands())


def by_inspection(path, bad):
    failed = [finding for finding in Audit(find_data([path])).run()[0].sorted() if finding.level == "FAIL"]
    if failed:
        raise SayoError(failed[0].code, failed[0].what, where=failed[0].rows[0], fix=failed[0].fix)


def by_focus_stage(path, bad):
    AnchorRows([path])[0]


def by_plan(path, bad):
    images, videos = len(bad["images"]), len(bad.get("videos") or [])
    ids = torch.tensor([[TEXT, *[VIDEO] * 4 * videos, *[IMAGE] * 4 * images, TEXT, TEXT]])
    inputs = {"image_grid_thw": torch.tensor(GRID * images)} if images else {}
    inputs |= {"video_grid_thw": torch.tensor(GRID * videos)} if videos else {}
    vision = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, vision_config=vision)
    batch = {
        "input_ids": ids,
        "response_mask": torch.ones(1, 1),
        "multi_modal_inputs": [inputs],
        "extra_info": [bad["extra_info"]],
    }
    request = StatisticsRequest((Statistic("region_mass"),))
    plan_micro_batch(batch, SimpleNamespace(hf_config=config, tokenizer=None), FAMILIES["qwen3_vl"], request)


FILES = (by_launcher, by_inspection, by_focus_stage)


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(png())

    def _verdict(judge, bad) -> str:
        pq.write_table(pa.Table.from_pylist([bad]), tmp_path / "rows.parquet")
        try:
            judge(tmp_path / "rows.parquet", bad)
        except SayoError as error:
            return error.code
        return "-"

    return _verdict


@pytest.mark.parametrize("good", [row(), row(boxes=None), row(boxes=[[]]), row(images=["there.png"])])
def test_a_good_row_passes_everywhere(verdict, good):
    assert [verdict(judge, good) for judge in (*FILES, by_plan)] == ["-"] * 4


@pytest.mark.parametrize(("code", "bad"), SEEN_BY_ALL)
def test_wrong_boxes_get_one_verdict(verdict, code, bad):
    assert [verdict(judge, bad) for judge in (*FILES, by_plan)] == [code] * 4


@pytest.mark.parametrize(("code", "bad"), SEEN_IN_FILES)
def test_what_only_the_file_shows_gets_one_verdict(verdict, code, bad):
    assert [verdict(judge, bad) for judge in FILES] == [code] * 3
