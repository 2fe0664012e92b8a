"""Small files as ReFocus-Chart is published."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources.refocus import RefocusSource

CORNERS = ("x1", "y1", "x2", "y2")
BARS = [[10, 20, 60, 30], [10, 40, 90, 50]]  # of "Alpha" and "Beta"
FIGURE = [5, 10, 95, 90]
TEXT, TEXTS = pa.string(), pa.list_(pa.string())
IMAGE = pa.struct({"bytes": pa.binary(), "path": TEXT})


def columns(boxes: list[list]) -> dict[str, list]:
    return {corner: [box[i] for box in boxes] for i, corner in enumerate(CORNERS)}


def row(**changed) -> dict:
    return {
        "id": "train-1",
        "question": "How long is the bar of Beta?",
        "answer": "80",
        "image": {"bytes": b"png", "path": "1.png"},
        "thoughts": ["THOUGHT"],
        "edited_image": {"bytes": b"edited", "path": "e.png"},
        "source": "h_bar",
        "x_values": [],
        "y_values": ["Alpha", "Beta"],
        "focus_areas_bbox": columns([BARS[1]]),
        "x_values_bbox": columns([]),
        "y_values_bbox": columns(BARS),
        "figure_bbox": dict(zip(CORNERS, FIGURE, strict=True)),
        **changed,
    }


def parquet(folder: Path, *rows: dict, name="train-00000-of-00001.parquet") -> Path:
    box = pa.struct(dict.fromkeys(CORNERS, pa.int32()))
    boxes = pa.struct({corner: pa.list_(pa.int32()) for corner in CORNERS})
    types = dict.fromkeys(("id", "question", "answer", "source"), TEXT) | {"figure_bbox": box}
    types |= dict.fromkeys(("thoughts", "x_values", "y_values"), TEXTS) | dict.fromkeys(
        ("image", "edited_image"), IMAGE
    )
    types |= dict.fromkeys(("focus_areas_bbox", "x_values_bbox", "y_values_bbox"), boxes)
    path = folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(types)), path)
    return path


def one(folder: Path, options: dict | None = None, **changed) -> Example | LeftOut:
    (example,) = RefocusSource(parquet(folder, row(**changed)), **(options or {})).examples()
    return example


def wbb(**changed) -> dict:
    def fractions(box: list[int]) -> dict[str, float]:
        return {corner: value / 100 for corner, value in zip(CORNERS, box, strict=True)}

    return {
        "query": "How long is the bar of Beta?",
        "answer": "80",
        "figure_path": "png/1.png",
        "type": "h_bar",
        "x_values": [],
        "y_values": ["Alpha", "Beta"],
        "x_bboxes": [],
        "y_bboxes": [fractions(box) for box in BARS],
        "figure_bbox": fractions(FIGURE),
        **changed,
    }


def of_json(folder: Path, records: dict) -> list[Example | LeftOut]:
    path = folder / "chartQA_h_bar_wbb.json"
    path.write_text(json.dumps(records))
    return list(RefocusSource(path, images=folder).examples())
