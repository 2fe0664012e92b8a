"""A source of invented examples, and what a build makes of it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from PIL import Image
from support.pictures import encoded
from support.refusals import refusal

from sayo_verl.data.building.build import BuildOptions, build
from sayo_verl.data.building.shards import read_rows
from sayo_verl.data.rows import Example, ImageRef, LeftOut

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


SMALL = BuildOptions(workers=1, shard_rows=10, row_group_rows=4, val_share=0.2)


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
class Made:
    """A source of what it is given."""

    things: list[Example | LeftOut]
    told: Any = None
    name: str = "made"

    def facts(self) -> dict[str, Any]:
        return {"told": self.told}

    def examples(self) -> Iterator[Example | LeftOut]:
        yield from self.things


def mixed() -> Made:
    """Rows, and some of most things that are left out."""
    things: list[Example | LeftOut] = [example(n) for n in range(60)]
    things[7] = LeftOut("e7", "no_object", "-")
    things[11] = example(11, question="what <image> is it?")
    things[13] = example(13, answer=" ")
    things[20] = dataclasses.replace(example(20), question="what is 21?")  # as e21, whose picture it has
    things[23] = example(23, picture(99)[:-40])
    things[31] = example(31, boxes=(((3, 3, 3, 9),),))
    for n in (5, 26, 36):
        things[n] = example(n, boxes=(((3, 3, 20, 30), (5, 5, 50, 30), (5, 5, 50, 5)),), box_names=(("a", "b", "c"),))
    things[41] = dataclasses.replace(example(41), images=(ImageRef("other name", data=picture(0)),))
    return Made(things)


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def rows(folder: Path, split: str = "*") -> list[dict[str, Any]]:
    return list(read_rows(folder, [p.name for p in sorted(folder.glob(f"{split}-*.parquet"))]))


def left_out(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["reason"] for line in lines}


LENIENT = dataclasses.replace(SMALL, max_drop=0.1)


class Killed(BaseException):
    """Not caught by anything."""


def killing(function: Callable, at: int) -> Callable:
    """The function, which ends the process, as far as it can tell, at its ``at``-th call."""
    calls = iter(range(at + 1))

    def called(*args: Any) -> Any:
        if next(calls, None) == at - 1:
            raise Killed
        return function(*args)

    return called


def interrupted(out: Path, options: BuildOptions = LENIENT) -> None:
    """A folder that was begun, with some shards."""
    source = mixed()
    stop = dataclasses.replace(example(45), images=(ImageRef("x", path=out / "not there"),))
    source.things[45] = stop
    with refusal("D54"):
        build(source, out, options)
    assert json.loads((out / "progress.json").read_text())["state"]["shards"]
