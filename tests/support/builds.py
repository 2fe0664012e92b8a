"""A source of invented examples, and what a build makes of it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from hypothesis import settings
from PIL import Image
from support.pictures import encoded

from sayo_verl.data.build import BuildOptions
from sayo_verl.data.rows import Example, ImageRef, LeftOut, Source

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
FIFTH = BuildOptions(val_share=0.2, max_drop=0.1)


@cache
def picture(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize(size))


def example(n: int, image: int | bytes | None = None, **values: Any) -> Example:
    """The n-th example: of picture ``image``, two rows to a picture by default."""
    image = n // 2 if image is None else image
    data = image if isinstance(image, bytes) else picture(image)
    key = hashlib.sha256(data).hexdigest()[:8] if isinstance(image, bytes) else f"p{image}"
    return Example(
        **{
            "id": f"e{n}",
            "images": (ImageRef(key, data=data),),
            "question": f"what is {n}?",
            "answer": f"a{n}",
            "boxes": (((n % 20, 3, n % 20 + 30, 33),),),
            "box_names": (("thing",),),
            "box_format": "xyxy",
            "box_source": "made",
            "data_source": "sayo/made",
            "sizes": ((60, 40),),
            "kind": "query",
        }
        | values
    )


@dataclasses.dataclass
class Made(Source):
    """A source of the examples that it is given."""

    things: list[Example | LeftOut]
    name: str = "made"
    extra_features: dict[str, Any] = dataclasses.field(default_factory=dict)
    column_features: dict[str, Any] = dataclasses.field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        return {"n": len(self.things)}

    def examples(self) -> Iterator[Example | LeftOut]:
        yield from self.things


def bare(n: int, **values: Any) -> Example:
    """An example without a box."""
    return example(n, boxes=((),), box_names=((),), **values)


def rows(folder: Path, split: str = "*") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def left_out(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["reason"] for line in lines}
