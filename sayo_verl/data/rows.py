"""Rows as they are written: their schema, and what becomes one. docs/data.md describes the columns.

An ``Example`` is a row before its images are read: what a ``Source`` yields. ``sayo_verl.data.building`` turns examples
into rows. What cannot become a row is left out with a reason of ``REASONS`` and counted (``LeftOut``, or ``Drop``
raised on the way); what shows that the whole source is not what it was said to be stops the work (``SayoError``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from sayo_verl.errors import SayoError
from sayo_verl.reward import why_not_gradable
from sayo_verl.vision.masks import check_nesting

IMAGE_TAG = "<image>"
# Files that can run code when they are loaded; none is ever read as data.
RUNS_CODE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
# Asks for what ``sayo_verl.reward`` rewards; without it a model that was not trained to answer so begins at format 0.
INSTRUCTION = "Think first, then answer with a word or a short phrase: <think> ... </think> <answer> ... </answer>"
# The system turn of SAYO's released training code, word for word: train/main.py of github.com/Cratileo/Sayo at 63be688.
RELEASED_SYSTEM = (
    "A conversation between a user and an assistant. The user asks a question, and the assistant must answer it."
    "The assistant first conducts internal reasoning, followed immediately by the final answer enclosed within "
    "<answer>...</answer> tags."
    "Requirements:"
    "1. The reasoning outside <answer></answer> should be concise, minimal, and essential.\n"
    "2. The final answer must be correct, complete, and directly address the user\u2019s question.\n"
    "3. When reasoning, focus on the areas of aim object in the image.\n"
    "4. You MUST HAVE thinking process before the final answer.\n"
)
# What stands in a prompt beside the question: an instruction below it, or the released system turn above it.
PROMPTS = ("instruction", "released")
# Text that chat templates and processors take for something else than text.
RESERVED = re.compile(r"<image>|<video>|<audio>|<\|[a-z0-9_]{1,40}\|>|<IMG_CONTEXT>|</?img>", re.IGNORECASE)

# reason -> what it means; every row or box that is left out has one of these
REASONS: Mapping[str, str] = {
    # rows
    "no_object": "the question refers to no object of the image",
    "no_scene_graph": "there is no scene graph of its image",
    "unknown_object": "an object that the question refers to is not in the scene graph",
    "no_region": "what the question is about has no box of its own: a crowd, or a shape without extent",
    "no_box": "no box is left, and rows without boxes are not kept",
    "empty_question": "there is no question",
    "empty_answer": "there is no answer",
    "ungradable_answer": "sayo_verl.reward cannot grade the answer",
    "reserved_text": "the question holds text that stands for an image or a control token",
    "image_in_other_split": "the same picture, by its bytes, is in the other split",
    "duplicate": "the same question about the same image was there before",
    "image_missing": "there is no such image",
    "image_empty": "the image has no bytes",
    "image_unreadable": "the image cannot be decoded",
    "image_format": "the image is not JPEG, PNG or WEBP, or is animated",
    "image_too_large": "the image has too many pixels",
    "image_too_small": "a side of the image is shorter than a visual token",
    "image_too_long": "one side of the image is too many times the other",
    # boxes
    "box_without_area": "the box has no width or no height",
    "box_outside": "more than half of the box lies outside the image",
    "box_twice": "nearly the same box was there before",
    "box_too_large": "the box covers so much of the image that attending to it says little",
    "box_too_small": "the box is much smaller than a visual token",
}

BOXES = pa.list_(pa.list_(pa.list_(pa.float64())))


def schema_of(extra_info: Mapping[str, pa.DataType]) -> pa.Schema:
    """What verl reads, and ``extra_info`` with these fields."""
    return pa.schema(
        {
            "data_source": pa.string(),
            "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "ability": pa.string(),
            "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
            "extra_info": pa.struct(dict(extra_info)),
        }
    )


ROW_SCHEMA = schema_of(
    {
        "index": pa.int64(),
        "split": pa.string(),
        "id": pa.string(),
        "question": pa.string(),
        "answer": pa.string(),
        "kind": pa.string(),
        "boxes": BOXES,
        "box_names": pa.list_(pa.list_(pa.string())),
        "box_source": pa.string(),
        "image_keys": pa.list_(pa.string()),
        "image_size_wh": pa.list_(pa.list_(pa.int64())),
    }
)


class Drop(Exception):
    """Raised where a row turns out to be unusable; the one who builds rows counts it.

    Attributes:
        reason: key of ``REASONS``.
        detail: what was found, for the list of what was left out.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise AssertionError(f"no such reason: {reason}")
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class LeftOut:
    """A record of the source that is no example.

    Attributes:
        id: its name in the source.
        reason: key of ``REASONS``.
        detail: what was found.
    """

    id: str
    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise AssertionError(f"no such reason: {self.reason}")


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
        data_source: see the module.
        sizes: per image, the (width, height) that the boxes were drawn on, as the source says; None: it does not say.
        kind: of question; "" when not known.
        split: "train" or "val" where the source says it; "": the picture decides.
        prompt: messages that are used as they are, with one image tag for each image; empty: made of the question.
        extra: further fields of ``extra_info``; boxes in it are shares of the picture. ``Source.extra_features`` has
            their types.
        columns: further columns; ``Source.column_features`` has their types.
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


class Source(Protocol):
    """A collection of examples.

    ``examples`` yields them in one order, every time the same, without reading images and without holding them all.
    ``facts`` names everything that decides what it yields (options; files by name and size); it stands in the manifest,
    and a build that was interrupted goes on only where the facts are equal.
    """

    name: str

    def facts(self) -> dict[str, Any]: ...

    def examples(self) -> Iterator[Example | LeftOut]: ...


def reserved_text(text: str) -> str | None:
    """Text that chat templates and processors take for something else, or None."""
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


def messages_of(question: str, n_images: int, *, prompt: str, instruction: str = INSTRUCTION) -> list[dict[str, str]]:
    """The prompt of a row.

    Args:
        question: without image tags.
        n_images: image tags above the question.
        prompt: "instruction": the instruction stands below the question; "released": a system turn stands above it;
            "question": neither.
        instruction: "" for none.
    """
    below = f"\n{instruction}" if prompt == "instruction" and instruction else ""
    system = [{"role": "system", "content": RELEASED_SYSTEM}] if prompt == "released" else []
    return [*system, {"role": "user", "content": IMAGE_TAG * n_images + question + below}]


def record(
    example: Example,
    *,
    stored: Sequence[tuple[bytes, int, int]],
    boxes: Sequence[Sequence[Sequence[float]]],
    box_names: Sequence[Sequence[str]],
    split: str,
    index: int,
    instruction: str = INSTRUCTION,
    prompt: str = PROMPTS[0],
) -> dict[str, Any]:
    """One row of ``ROW_SCHEMA``.

    Args:
        example: what it is made of.
        stored: per image, its encoded bytes, width and height.
        boxes: per image, in [0, 1] of the stored image.
        box_names: nested as ``boxes``.
        split: "train" or "val".
        index: place in the split.
        instruction: stands below the question in the prompt; "" for none.
        prompt: of ``PROMPTS``; with "released" a system turn stands above the question, and no instruction below it.
    """
    return {
        "data_source": example.data_source,
        "prompt": messages_of(example.question, len(example.images), prompt=prompt, instruction=instruction),
        "images": [{"bytes": data, "path": None} for data, _, _ in stored],
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": example.answer},
        "extra_info": {
            "index": index,
            "split": split,
            "id": example.id,
            "question": example.question,
            "answer": example.answer,
            "kind": example.kind,
            "boxes": [[list(box) for box in of_image] for of_image in boxes],
            "box_names": [list(of_image) for of_image in box_names],
            "box_source": example.box_source,
            "image_keys": [image.key for image in example.images],
            "image_size_wh": [[width, height] for _, width, height in stored],
        },
    }
