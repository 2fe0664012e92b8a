"""Rows: what a source yields, and what is written. docs/data.md describes the columns.

A source yields ``Example``, a row before its images are read, and ``LeftOut``. ``sayo_verl.data.build`` turns examples
into rows. A row that cannot be used is left out and counted, with a reason of ``REASONS``: a ``LeftOut`` of the source,
or a ``Drop`` raised while the row is made. What shows that the whole source is invalid raises a ``SayoError``.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from sayo_verl.errors import SayoError
from sayo_verl.reward import why_not_gradable
from sayo_verl.vision.masks import check_nesting

# Files that can run code when they are loaded; none is ever read as data.
RUNS_CODE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
# Text that chat templates and processors take for something else than text.
RESERVED = re.compile(r"<image>|<video>|<audio>|<\|[a-z0-9_]{1,40}\|>|<IMG_CONTEXT>|</?img>", re.IGNORECASE)

# reason -> what it means; every row or box that is left out has one of these
REASONS: Mapping[str, str] = {
    # rows
    "no_object": "the question refers to no object of the image",
    "no_scene_graph": "there is no scene graph of its image",
    "unknown_object": "an object that the question refers to is not annotated in the image",
    "no_region": "what the question is about has no box of its own: a crowd, or a shape without extent",
    "no_box": "the row has no box, and --keep-without-boxes is not set",
    "empty_question": "there is no question",
    "empty_answer": "there is no answer",
    "ungradable_answer": "sayo_verl.reward cannot grade the answer",
    "reserved_text": "the question holds text that stands for an image or a control token",
    "image_in_other_split": "the same picture, by its bytes, is in the validation split",
    "duplicate": "the same question about the same image was there before",
    "image_missing": "there is no such image",
    "image_empty": "the image has no bytes",
    "image_unreadable": "the image cannot be decoded",
    "image_format": "the image is not JPEG, PNG or WEBP, or is animated",
    "image_too_large": "the image has too many pixels",
    "image_too_small": "a side of the image is shorter than a visual token",
    "image_too_long": "one side of the image is too many times the other",
    # boxes: one of them makes the region of the row incomplete
    "box_without_area": "a box has no width or no height",
    "box_outside": "more than half of a box is outside the image",
    "box_too_large": "a box covers most of the image, so that attention to it says little",
    "box_too_small": "a box is much smaller than a visual token",
}
# Reasons that count towards --max-drop: unusable images and text, not what a source leaves out by its rules.
LOSSES = frozenset(name for name in REASONS if name.startswith(("image_", "empty_", "ungradable", "reserved"))) - {
    "image_in_other_split"
}

BOXES = pa.list_(pa.list_(pa.list_(pa.float64())))
TEXTS = pa.list_(pa.string())
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
EXTRA_INFO = {
    "index": pa.int64(),
    **dict.fromkeys(("split", "id", "question", "answer", "kind", "box_source"), pa.string()),
    "boxes": BOXES,
    "box_names": pa.list_(TEXTS),
    "image_keys": TEXTS,
    "image_size_wh": pa.list_(pa.list_(pa.int64())),
}


def schema_of(*, link: bool) -> pa.Schema:
    """The columns of every row; a source may add columns and fields of ``extra_info``.

    Args:
        link: images are paths, ``{image}``, and not bytes, ``{bytes, path}``.
    """
    image = {"image": pa.string()} if link else {"bytes": pa.binary(), "path": pa.string()}
    return pa.schema(
        {
            "data_source": pa.string(),
            "prompt": MESSAGES,
            "images": pa.list_(pa.struct(image)),
            "ability": pa.string(),
            "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
            "extra_info": pa.struct(EXTRA_INFO),
        }
    )


class Drop(Exception):
    """Raised if a row is unusable; ``reason`` of ``REASONS``, ``detail``: what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class LeftOut:
    """A record of the source that is no example; ``reason`` of ``REASONS``, ``detail``: what was found."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ImageRef:
    """Where the encoded bytes of an image are: in a file, in a member of a zip file, or here.

    Attributes:
        key: name of the picture, equal for equal pictures: decides the split, and stands in messages.
        path: file or zip file; None when ``data`` is given.
        member: of the zip file.
        data: the bytes.
    """

    key: str
    path: Path | None = None
    member: str | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class Example:
    """A row before its images are read.

    Attributes:
        id: unique within the source.
        images: in the order of the prompt.
        question: without image tags.
        answer: the ground truth.
        boxes: per image, boxes of four numbers in ``box_format``.
        box_names: nested as ``boxes``.
        box_format: key of ``sayo_verl.data.boxes.BOX_FORMATS``.
        box_source: what the boxes are.
        data_source: name of the data in verl's metrics.
        sizes: per image, the (width, height) that the boxes were drawn on, as the source says; None: it does not say.
        kind: of question; "" when not known.
        split: "train" or "val" where the source says it; "": the picture decides.
        prompt: messages that are used as they are, with one image tag for each image; empty: made of the question.
        neutral: the row has no region by its nature ("Is there a dog?" - "no"), and is kept without one.
        extra: further fields of ``extra_info``.
        columns: further columns; ``ability`` and ``reward_model`` replace those that the builder writes.
    """

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answer: str
    boxes: tuple[tuple[tuple[float, ...], ...], ...]
    box_names: tuple[tuple[str, ...], ...]
    box_format: str
    box_source: str
    data_source: str
    sizes: tuple[tuple[int, int] | None, ...] = field(default=())
    kind: str = ""
    split: str = ""
    prompt: tuple[Mapping[str, str], ...] = ()
    neutral: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.images)
        where = f"{self.data_source} {self.id}"
        check_nesting(self.boxes, n, where=where)
        names = [len(of_image) for of_image in self.box_names]
        if names != [len(of_image) for of_image in self.boxes] or len(self.sizes) not in (0, n):
            raise SayoError(
                "D05",
                "names of boxes or sizes of images are not nested as the boxes are",
                where=where,
                got=f"{n} images, names {names}, sizes of {len(self.sizes)}",
                wanted=f"names {[len(of_image) for of_image in self.boxes]}, sizes of 0 or {n}",
                fix="write one list of names and one size per image",
            )


class Source(ABC):
    """A collection of examples.

    Attributes:
        name: stands in messages and in the manifest.
        extra_features, column_features: types (of ``datasets``) of ``Example.extra`` and ``Example.columns``.
    """

    name: str
    extra_features: Mapping[str, Any] = MappingProxyType({})
    column_features: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Options, and files by name and size, for the manifest."""

    @abstractmethod
    def examples(self) -> Iterator[Example | LeftOut]:
        """The examples in one order, every time the same. Images are not read."""


def reserved_text(text: str) -> str | None:
    """Text that chat templates and processors take for an image or a control token, or None."""
    found = RESERVED.search(text)
    return found.group() if found else None


def check_text(question: str, answer: str) -> None:
    """Refuse text that cannot be a question or an answer.

    Raises:
        Drop: ``empty_question``, ``empty_answer``, ``ungradable_answer``, ``reserved_text``.
    """
    if not question.strip():
        raise Drop("empty_question")
    if not answer.strip():
        raise Drop("empty_answer")
    reason = why_not_gradable(answer)
    if reason is not None:
        raise Drop("ungradable_answer", f"{reason}: {answer[:80]!r}")
    reserved = reserved_text(question)
    if reserved:
        raise Drop("reserved_text", reserved)
