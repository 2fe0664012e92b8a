"""Tiny models and rows for the stage of the <Focus> token."""

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.data.folder import split_files
from sayo_verl.focus.rows import FOCUS_KEY, FocusCollator
from sayo_verl.focus.token import add_focus_token
from sayo_verl.focus.trainer import FocusConfig
from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.prepared import prepare_scenes

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5")


@cache
def _drawn(seed: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        made = prepare_scenes(folder, SceneConfig(n_train=64, n_val=1, seed=seed)).path
        return [row for file in split_files(made)["train"] for row in pq.read_table(file).to_pylist()]


def scene_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rows = copy.deepcopy(_drawn(seed)[:n])
    assert len(rows) == n
    return [{**row, "_where": f"row {i}"} for i, row in enumerate(rows)]


def mixed_rows() -> list[dict[str, Any]]:
    """One box; none; two boxes; two images of which the second has a box; long response; text only."""
    a, b, c, d, e, f = scene_rows(6)
    b["extra_info"]["boxes"] = [[]]
    c["extra_info"]["boxes"] = [[*c["extra_info"]["target_boxes"][0], [0.05, 0.1, 0.93, 0.4]]]
    d["prompt"][0]["content"] = "<image><image>" + d["extra_info"]["question"]
    d["images"] = [a["images"][0], d["images"][0]]
    d["extra_info"]["boxes"] = [[], d["extra_info"]["boxes"][0]]
    e["response"] = "<think> red circle . blue star . green ring .</think><answer> red</answer>"
    f["prompt"][0]["content"], f["images"], f["extra_info"]["boxes"] = "What colour?", [], []
    return [a, b, c, d, e, f]


def load(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> tuple[Any, Any]:
    eager = {"experts_implementation": "eager"} if "moe" in folder.name else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **eager)
    processor = AutoProcessor.from_pretrained(folder)
    add_focus_token(model, processor)
    return model.eval(), processor


def batch_of(model: Any, processor: Any, rows: list[dict[str, Any]], side: str = "right", alpha: float = 0.1):
    batch = FocusCollator(processor, model.config, alpha=alpha, padding_side=side)(rows)
    return batch, batch.pop(FOCUS_KEY)


side = st.floats(1e-6, 1.0, allow_nan=False)


SHORT = FocusConfig(
    steps=24,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=1,
    layers=(-1,),
    trainer_args={"logging_steps": 3, "disable_tqdm": True, "use_cpu": True},
)
