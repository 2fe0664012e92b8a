"""A row of the data contract, or an image and a question, as the input of a model.

Shape suffixes: P prompt tokens.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.images import image_bytes, store_image
from sayo_verl.data.messages import images_of, messages_of
from sayo_verl.data.rows import Drop, ImageRef
from sayo_verl.errors import SayoError
from sayo_verl.models.families import Family
from sayo_verl.probe.plan import image_tiles, plan_row
from sayo_verl.reward.prompts import IMAGE_TAG
from sayo_verl.view.seen import SeenImage, SeenPrompt
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import check_box

Boxes = list[list[list[float]]]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt of a model.

    Attributes:
        seen: for a page.
        ids: int64 [P], all visual tokens of an image in their places.
        inputs: what the model's forward takes besides ids: ``pixel_values``, for grids also ``image_grid_thw`` and
            ``mm_token_type_ids`` [1, P].
        tiles: grids of each image.
        boxes: of each image; empty without boxes.
        pictures: as the processor got them.
        messages: as the chat template got them.
        notes: sentences that a reader needs.
    """

    seen: SeenPrompt
    ids: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    tiles: tuple[tuple[Tile, ...], ...]
    boxes: Boxes
    pictures: tuple[Image.Image, ...]
    messages: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


def row_of_images(images: Sequence[Path | str], question: str, boxes: Sequence[Sequence[float]] = ()) -> dict[str, Any]:
    """A row of the data contract from files of images.

    Args:
        images: JPEG, PNG or WEBP.
        question: of the user; the images come first.
        boxes: shares of the first image.

    Raises:
        SayoError: W02 for a file that is not such an image, W04 for an empty question, V01 to V03 for a wrong box.
    """
    if not question.strip():
        raise SayoError("W04", "the question is empty", where="--question", fix='ask something: --question "..."')
    stored = []
    for path in images:
        try:
            stored.append({"bytes": store_image(image_bytes(ImageRef(str(path), Path(path))), where=str(path)).data})
        except Drop as drop:
            raise SayoError(
                "W02",
                f"an image cannot be used ({drop.reason.replace('_', ' ')})",
                where=f"--image {path}",
                got=drop.detail,
                wanted="a JPEG, PNG or WEBP file, each side at least 28 pixels, at most 50 million pixels",
                fix="correct the path, convert or resize the picture",
            ) from drop
    for box in boxes:
        _check_flag(box, stored[0]["bytes"])
    content = IMAGE_TAG * len(stored) + question
    of_image = [[list(map(float, box)) for box in boxes], *([] for _ in stored[1:])] if boxes else None
    return {"prompt": [{"role": "user", "content": content}], "images": stored, "extra_info": {"boxes": of_image}}


def _check_flag(box: Sequence[float], picture: bytes) -> None:
    """``check_box``; pixels get the shares that they are of this picture."""
    width, height = Image.open(io.BytesIO(picture)).size
    try:
        check_box(box, where="--boxes")
    except SayoError as error:
        inside = (
            error.code == "V03" and min(box) >= 0 and max(box[0], box[2]) <= width and max(box[1], box[3]) <= height
        )
        if not inside:
            raise
        shares = ",".join(f"{n / side:.4g}" for n, side in zip(box, (width, height) * 2, strict=True))
        raise SayoError(
            "V03",
            "a box is not in shares of the picture",
            where="--boxes",
            got=",".join(f"{n:g}" for n in box),
            wanted="numbers from 0 to 1",
            fix=f"if these are pixels of the picture of {width} x {height}: --boxes {shares}",
        ) from error


def prompt_of(
    row: Mapping[str, Any],
    where: str,
    *,
    family: Family,
    config: Any,
    processor: Any,
    coverage: float,
    chat_template: str | None = None,
) -> Prompt:
    """Bring a row through the model's chat template and processor.

    Args:
        row: as pyarrow gives it.
        where: names the row.
        family, config, processor: of ``models.processors.load``.
        coverage: share of a visual token's cell that a box must cover.
        chat_template: None: the model's own.

    Raises:
        SayoError: the first fault of the row by the row contract, W03 for a row without an image, W05 for a prompt that
            fills the model's context, and what ``image_tiles`` and ``plan_row`` raise.
    """
    looked = RowContract(Demands(rewarded=False, qwen_resize=family.geometry == "grid")).look(row, where)
    if looked.faults:
        raise looked.faults[0]
    row = {"images": None, "extra_info": None, **row, "_where": where}
    messages, pictures, info = messages_of(row), images_of(row), row["extra_info"] or {}
    if not pictures:
        raise SayoError(
            "W03",
            "the row has no image, so there is nothing to look at",
            where=where,
            fix="choose rows with an image",
        )
    ids_P, inputs, tiles = _processed(messages, pictures, where, family, config, processor, chat_template)
    names = info.get("box_names") or [[] for _ in pictures]
    boxes: Boxes = looked.boxes
    images = tuple(
        SeenImage(picture, of_image, tuple((b[0], b[1], b[2], b[3]) for b in of_boxes), tuple(map(str, of_names)))
        for picture, of_image, of_boxes, of_names in zip(
            pictures, tiles, boxes or [[] for _ in pictures], names, strict=True
        )
    )
    plan = plan_row(
        ids_P, 0, image_token_id=config.image_token_id, images=tiles, boxes=boxes, coverage=coverage, where=where
    )
    asked, truth = info.get("question"), (row.get("reward_model") or {}).get("ground_truth")
    seen = SeenPrompt(
        where=where,
        question=asked if isinstance(asked, str) else looked.question.strip(),
        images=images,
        answer="" if truth is None else str(truth),
        region_tokens=plan.region_tokens,
        region=plan.keys["region"][plan.image_columns].numpy(),
    )
    check_context(config, seen, len(ids_P), 1)
    notes = tuple(
        _resized(picture, of_image, i, processor)
        for i, (picture, of_image) in enumerate(zip(pictures, tiles, strict=True))
    )
    return Prompt(
        seen,
        ids_P,
        inputs,
        tuple(tiles),
        boxes,
        tuple(pictures),
        tuple(messages),
        tuple(note for note in notes if note),
    )


SHORTER = "give smaller or fewer images or a shorter question, or lower --max-new-tokens"


def check_context(
    config: Any, seen: SeenPrompt, prompt_tokens: int, response_tokens: int, *, fix: str = SHORTER
) -> None:
    """Refuse a prompt that leaves no room for so many response tokens.

    Raises:
        SayoError: W05.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + response_tokens > limit:
        sizes = ", ".join(f"{image.picture.width} x {image.picture.height} pixels" for image in seen.images)
        raise SayoError(
            "W05",
            "prompt and response are longer than the model's context",
            where=seen.where,
            got=f"{prompt_tokens} + {response_tokens} tokens, {seen.tokens} of them visual ({sizes})",
            wanted=f"at most {limit}, max_position_embeddings of config.json",
            fix=fix,
        )


def _processed(
    messages: Sequence[dict[str, Any]],
    pictures: Sequence[Image.Image],
    where: str,
    family: Family,
    config: Any,
    processor: Any,
    chat_template: str | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[tuple[Tile, ...]]]:
    """Ids [P], model inputs and grids of a conversation."""
    own = {} if chat_template is None else {"chat_template": chat_template}
    text = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **own)
    made = dict(processor(text=[text], images=list(pictures), return_tensors="pt"))
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids") if family.geometry == "grid" else ("pixel_values",)
    return (
        made["input_ids"][0],
        {n: made[n] for n in names if n in made},
        image_tiles(made, family, config, where=where),
    )


def with_question(
    prompt: Prompt, question: str, *, family: Family, config: Any, processor: Any, chat_template: str | None = None
) -> Prompt:
    """The same images with another text of the user: the last turn's text is replaced, other user turns lose theirs."""
    messages = []
    last = max((i for i, message in enumerate(prompt.messages) if message["role"] == "user"), default=None)
    for i, message in enumerate(prompt.messages):
        if message["role"] == "user":
            parts = [part for part in message["content"] if part["type"] != "text"]
            parts += [{"type": "text", "text": question}] if i == last else []
            message = {**message, "content": parts}
        messages.append(message)
    ids_P, inputs, _ = _processed(
        messages, prompt.pictures, prompt.seen.where, family, config, processor, chat_template
    )
    return dataclasses.replace(prompt, ids=ids_P, inputs=inputs, messages=tuple(messages))


def _resized(picture: Image.Image, tiles: Sequence[Tile], number: int, processor: Any) -> str:
    """A sentence if the processor made the picture smaller, as it does with one that is larger than it takes."""
    patch = getattr(processor.image_processor, "patch_size", None)
    merge = getattr(processor.image_processor, "merge_size", None)
    if patch is None or merge is None or len(tiles) != 1:
        return ""
    cell = int(patch) * int(merge)
    width, height = tiles[0].cols * cell, tiles[0].rows * cell
    if width * height >= 0.9 * picture.width * picture.height:
        return ""
    return (
        f"Image {number + 1} has {picture.width} x {picture.height} pixels; the model's processor made it "
        f"{width} x {height}, so the model saw {tiles[0].tokens} visual tokens of it."
    )
