"""One example to one row: images read and stored upright, boxes placed. Runs in the worker processes of a build."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sayo_verl.data.boxes import place_boxes
from sayo_verl.data.folder import SPLITS
from sayo_verl.data.images import Stored, image_bytes, store_image
from sayo_verl.data.rows import BOXES, MESSAGES, TEXTS, Drop, Example, ImageRef, Source, schema_of
from sayo_verl.reward.prompts import messages_of

if TYPE_CHECKING:
    from datasets import Features

    from sayo_verl.data.build import BuildOptions

NO_BOX = "no_box"
IMAGE_REF = pa.struct({"key": pa.string(), "path": pa.string(), "member": pa.string(), "data": pa.binary()})
# An example in a table; a source adds its types of ``extra`` and ``columns``.
EXAMPLE = pa.struct(
    {
        **dict.fromkeys(("id", "question", "answer", "box_format", "box_source", "data_source", "kind"), pa.string()),
        "images": pa.list_(IMAGE_REF),
        "boxes": BOXES,
        "box_names": pa.list_(TEXTS),
        "sizes": pa.list_(pa.list_(pa.int64())),
        "split": pa.string(),
        "prompt": MESSAGES,
        "neutral": pa.bool_(),
    }
)
# What the build decides by, beside the columns of a row; left out of the files.
FACTS = {
    **dict.fromkeys(("sayo:id", "sayo:split", "sayo:reason", "sayo:detail", "sayo:format"), pa.string()),
    "sayo:drawn": pa.list_(pa.list_(pa.float64())),  # boxes before any rule
    "sayo:boxes": pa.int64(),
    "sayo:changed": TEXTS,  # what was done to images
    "sayo:pictures": pa.list_(pa.int64()),  # hashes of the stored images
    "sayo:asked": pa.int64(),  # hash of the question and its pictures
}


def features_of(source: Source, *, link: bool) -> "Features":
    """Types of what ``make_row`` returns."""
    from datasets import Features

    features = Features.from_arrow_schema(pa.schema([*schema_of(link=link), *pa.schema(FACTS)]))
    features |= dict(source.column_features)
    features["extra_info"] = dict(source.extra_features) | features["extra_info"]
    return Features(features)


def to_table(example: Example) -> dict[str, Any]:
    """An example as plain containers; ``from_table`` is the inverse."""
    values = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    values["images"] = [vars(ref) | {"path": None if ref.path is None else str(ref.path)} for ref in example.images]
    return {name: value for name, value in values.items() if name not in ("extra", "columns") or value}


def from_table(values: dict[str, Any]) -> Example:
    """The example of ``to_table``."""
    images = tuple(ImageRef(**ref | {"path": ref["path"] and Path(ref["path"])}) for ref in values["images"])
    sizes = tuple(size and (size[0], size[1]) for size in values["sizes"])
    own = {name: values.get(name) or {} for name in ("extra", "columns")}
    return Example(**values | own | {"images": images, "sizes": sizes})


def make_row(
    row: dict[str, Any],
    number: int,
    columns: Sequence[str],
    *,
    held_out: np.ndarray,
    options: "BuildOptions",
    files: tuple[Path, Path],
) -> dict[str, Any]:
    """A row and ``FACTS``; null in the columns of a row that is left out.

    Args:
        row: of the table of examples.
        number: of the row.
        columns: of the result.
        held_out: bool [rows]: whether each is held out.
        options: how.
        files: with ``options.link``, the folder to write pictures into, and its name when the build is finished.

    Raises:
        SayoError: of ``image_bytes``, ``store_image`` and ``place_boxes``.
    """
    example, split = from_table(row["example"]), SPLITS[int(held_out[number])]
    facts: dict[str, Any] = dict.fromkeys(columns)
    facts |= {
        "sayo:id": example.id,
        "sayo:split": split,
        "sayo:reason": "",
        "sayo:detail": "",
        "sayo:format": example.box_format,
    }
    facts |= {"sayo:drawn": [], "sayo:boxes": 0, "sayo:changed": [], "sayo:pictures": []}
    names = [f"{example.data_source} {example.id}, image {ref.key!r}" for ref in example.images]
    try:
        stored = [store_image(image_bytes(ref), where=w) for ref, w in zip(example.images, names, strict=True)]
    except Drop as drop:
        return facts | {"sayo:reason": drop.reason, "sayo:detail": drop.detail}
    sizes = example.sizes or [None] * len(stored)
    placed = [
        place_boxes(
            boxes,
            texts,
            box_format=example.box_format,
            frame=options.box_frame,
            stored=image,
            annotated=size,
            rescale=options.rescale,
            where=where,
        )
        for boxes, texts, image, size, where in zip(example.boxes, example.box_names, stored, sizes, names, strict=True)
    ]
    facts["sayo:drawn"] = [box for of_image in placed for box in of_image.drawn]
    reason, detail = next(((p.reason, p.detail) for p in placed if p.reason), ("", ""))
    if not reason and not any(p.boxes for p in placed) and not example.neutral:
        reason = NO_BOX
    if reason and not options.keep_without_boxes:
        return facts | {"sayo:reason": reason, "sayo:detail": detail}
    prompt = [*map(dict, example.prompt)]
    asked = prompt or example.question
    digests = [hashlib.blake2b(image.data, digest_size=16).digest() for image in stored]
    facts |= {
        "sayo:boxes": 0 if reason else sum(len(p.boxes) for p in placed),
        "sayo:changed": [", ".join(image.changed) for image in stored if image.changed],
        "sayo:pictures": [_int64(digest) for digest in digests],
        "sayo:asked": _int64(hashlib.blake2b(b"".join([*digests, repr(asked).encode()])).digest()),
    }
    stores: list[dict[str, Any]] = [{"bytes": image.data, "path": None} for image in stored]
    if options.link:
        stores = [_linked(*of_image, *files) for of_image in zip(example.images, stored, digests, strict=True)]
    return facts | {
        "data_source": example.data_source,
        "prompt": prompt or messages_of(example.question, len(stored), options.prompt),
        "images": stores,
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": example.answer},
        **example.columns,
        "extra_info": {
            **example.extra,
            **{name: getattr(example, name) for name in ("id", "question", "answer", "kind", "box_source")},
            "index": number if example.extra.get("index") is None else example.extra["index"],
            "split": split,
            # a region with a hole would train the wrong thing: such a row keeps no box
            "boxes": [() if reason else of_image.boxes for of_image in placed],
            "box_names": [() if reason else of_image.names for of_image in placed],
            "image_keys": [ref.key for ref in example.images],
            "image_size_wh": [(image.width, image.height) for image in stored],
        },
    }


def _int64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def _linked(ref: ImageRef, image: Stored, digest: bytes, folder: Path, name: Path) -> dict[str, Any]:
    """The path of a picture: of its own file, or of a new one if it was changed or is not a file."""
    replaced = ref.path is not None and name.parent in ref.path.resolve().parents  # by this build
    if ref.path is not None and ref.member is None and not image.changed and not replaced:
        return {"image": str(ref.path.absolute())}
    folder.mkdir(exist_ok=True)
    file = digest.hex() + (".jpg" if image.data.startswith(b"\xff\xd8") else ".png")
    (folder / file).write_bytes(image.data)
    return {"image": str(name / file)}
