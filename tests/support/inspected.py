"""Rows of the contract with pictures of their own, for tests of the inspection."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from support import pictures

from sayo_verl.data.rows import schema_of
from sayo_verl.inspection.audit import Finding

ROW_SCHEMA = schema_of(link=False)
FORM = "\n<think> ... </think> <answer> ... </answer>"
BOX = [0.1, 0.2, 0.6, 0.7]


def encoded(kind: str = "PNG", size: tuple[int, int] = (96, 64), seed: int = 0, **options: Any) -> bytes:
    """A small picture; another one for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return pictures.encoded(small.resize(size), kind, **options)


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
    form = FORM if question.strip() else ""
    return {
        "data_source": source,
        "prompt": [
            {"role": "user", "content": "<image>" * len(data) + question + form if text is None else text + form}
        ],
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


def only(findings: list[Finding], code: str, level: str = "FAIL", says: str = "") -> Finding:
    """The one finding there is, complete."""
    assert [(f.code, f.level) for f in findings] == [(code, level)], findings
    (finding,) = findings
    assert says in finding.what + " ".join(finding.rows), finding
    assert finding.count >= len(finding.rows) >= 1
    assert finding.fix
    return finding


NAMES = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "internvl")
