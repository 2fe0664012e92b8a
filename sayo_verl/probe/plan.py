"""Which keys of a row are what: visual tokens, those in its boxes, the text of its turns.

All of it is host work on CPU tensors, and nearly all of it depends on the prompt alone. The responses of a group share
a prompt, so what is found in a prompt is kept for the rows that follow.

Shape suffixes: S tokens of one row, P prompt tokens, T response tokens, V visual tokens.
"""

import functools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sayo_verl.errors import SayoError
from sayo_verl.models.families import Family
from sayo_verl.vision.grids import Tile, merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks, check_boxes, not_an_image


@dataclass(frozen=True)
class ChatTokens:
    """Token ids that mark the roles of turns.

    Attributes:
        start, end: open and close a turn; the token after ``start`` is the role.
        roles: ids of ``system`` and ``user``.
        newline: follows the role.
        delimiters: borders of an image.
    """

    start: int
    end: int
    roles: Mapping[str, int]
    newline: int
    delimiters: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, family: Family) -> "ChatTokens":
        """Look them up in the model's tokenizer.

        Raises:
            SayoError: P20 when the tokenizer has no such tokens, or a role is not a single one.
        """
        ids = {
            text: tokenizer.encode(text, add_special_tokens=False)
            for text in ("<|im_start|>", "<|im_end|>", "system", "user", "\n", *family.delimiters)
        }
        split = {text: found for text, found in ids.items() if len(found) != 1}
        if split:
            raise SayoError(
                "P20",
                "the tokenizer does not write turns as <|im_start|>role ... <|im_end|>",
                where=type(tokenizer).__name__,
                got=split,
                wanted="one token each",
                fix="do not ask for system_mass or question_mass with this model",
            )
        one = {text: found[0] for text, found in ids.items()}
        return cls(
            one["<|im_start|>"],
            one["<|im_end|>"],
            {"system": one["system"], "user": one["user"]},
            one["\n"],
            tuple(one[d] for d in family.delimiters),
        )


@dataclass(frozen=True)
class RowPlan:
    """One sequence.

    Attributes:
        length: S.
        response_length: T.
        keys: name of a set -> bool [S]; always ``image`` and ``region``.
        image_columns: int64 [V] positions of the visual tokens.
        region_tokens: how many of them lie in the row's boxes.
    """

    length: int
    response_length: int
    keys: Mapping[str, torch.Tensor]
    image_columns: torch.Tensor
    region_tokens: int


def image_tiles(image: Mapping[str, Any], family: Family, config: Any, *, where: str) -> list[tuple[Tile, ...]]:
    """For each image of a row, the grids it became, from what its processor returned.

    Args:
        image: the row's ``multi_modal_inputs``; empty for a row without an image. Videos in it are not looked at.
        family: the model's.
        config: its HF config.
        where: names the row in errors.

    Raises:
        SayoError: P07 for a grid that is not a still image's, P19 when pixels come without their grid.
    """
    name = {"grid": "image_grid_thw", "tiles": "image_tile_grid"}[family.geometry]
    if name not in image:
        if "pixel_values" in image:
            raise SayoError(
                "P19",
                "an image came without the grid of its visual tokens",
                where=where,
                got=sorted(image),
                wanted=f"{name}, as the processor of a {family.model_type} model gives",
                fix="use the model's own processor; its family is not that of the weights, or another plug-in replaced "
                "it",
            )
        return []
    if family.geometry == "grid":
        merge = int(config.vision_config.spatial_merge_size)
        return [merged_grid(int(t), int(h), int(w), merge, where=where) for t, h, w in image[name].tolist()]
    side = round(int(config.image_seq_length) ** 0.5)
    return [tile_grid(int(columns), int(rows), side, where=where) for columns, rows in image[name].tolist()]


def video_tokens(image: Mapping[str, Any], family: Family, config: Any, *, where: str) -> int:
    """How many visual tokens the videos of a row have; 0 without one. Arguments as of ``image_tiles``.

    Raises:
        SayoError: P07 for a family whose videos are not known, P19 when frames come without their grid.
    """
    if "video_grid_thw" not in image:
        if "pixel_values_videos" in image:
            raise SayoError(
                "P19",
                "a video came without the grid of its visual tokens",
                where=where,
                got=sorted(image),
                wanted="video_grid_thw",
                fix="use the model's processor",
            )
        return 0
    if family.geometry != "grid":
        raise SayoError(
            "P07",
            f"a row of a {family.model_type} model has a video",
            where=where,
            fix="remove videos; with this family only images are supported",
        )
    merge = int(config.vision_config.spatial_merge_size)
    return sum(int(t) * (int(h) // merge) * (int(w) // merge) for t, h, w in image["video_grid_thw"].tolist())


def plan_row(
    input_ids: torch.Tensor,
    response_length: int,
    *,
    image_token_id: int,
    images: Sequence[Sequence[Tile]],
    boxes: Sequence[Sequence[Sequence[float]]] | None,
    coverage: float,
    where: str,
    n_boxes: int = 0,
    chat: ChatTokens | None = None,
    video_token_id: int | None = None,
    videos: int = 0,
) -> RowPlan:
    """Find a row's visual tokens and which of them lie in its boxes.

    Args:
        input_ids: [S] prompt and response. Only placeholders in the prompt count: a policy can sample the token too.
        response_length: T.
        image_token_id: the placeholder.
        images: each image's grids, see ``image_tiles``.
        boxes: ``extra_info.boxes`` of the row, which ``check_boxes`` judges; empty or None for none.
        coverage: see ``sayo_verl.vision.masks``.
        where: names the row in errors.
        n_boxes: how many single boxes to keep apart, in the order of the row, as ``box0``, ``box1``, ...
        chat: when given, the sets ``system`` and ``question`` are made.
        video_token_id: the placeholder of videos; None: there are none.
        videos: how many visual tokens the row's videos have. They count like an image's, but no box lies in a video.

    Raises:
        SayoError: P05 when placeholders and grids disagree, P21 for a row without a prompt, D66 for boxes of a row with
            a video, and what ``sayo_verl.vision.masks`` raises for bad boxes and grids.
    """
    ids_S = input_ids.cpu()
    S, P = ids_S.shape[0], ids_S.shape[0] - response_length
    if P < 1 or response_length < 0:
        raise SayoError(
            "P21",
            "a row has no prompt token before its response",
            where=where,
            got=f"{S} tokens, {response_length} of the response",
            wanted="1 prompt token or more",
            fix="check the agent loop's response_mask",
        )
    prompt = _plan_prompt(
        _Prompt.of(
            ids=ids_S[:P].contiguous().numpy(),
            image_token_id=image_token_id,
            images=images,
            boxes=boxes,
            coverage=coverage,
            n_boxes=n_boxes,
            chat=chat,
            video_token_id=video_token_id,
            videos=videos,
            where=where,
        )
    )
    keys = {name: torch.nn.functional.pad(mask_P, (0, response_length)) for name, mask_P in prompt.keys.items()}
    keys["response"] = torch.arange(S) >= P
    return RowPlan(S, response_length, keys, prompt.image_columns, prompt.region_tokens)


@dataclass(frozen=True)
class _Prompt:
    """The arguments of ``plan_row`` that do not depend on the response. Prompts are equal when their bytes are: the
    place in an error differs from row to row."""

    as_bytes: bytes
    given: Mapping[str, Any] = field(compare=False)
    where: str = field(compare=False)

    @classmethod
    def of(cls, *, where: str, **given: Any) -> "_Prompt":
        return cls(pickle.dumps(given), given, where)


# more prompts than a micro-batch has; an entry holds some 10 bytes a token
@functools.lru_cache(maxsize=128)
def _plan_prompt(prompt: _Prompt) -> RowPlan:
    """The plan of a prompt without a response; errors are those of ``plan_row``."""
    return _find(where=prompt.where, **prompt.given)


def _find(
    *,
    ids: np.ndarray,
    image_token_id: int,
    images: Sequence[Sequence[Tile]],
    boxes: Sequence[Sequence[Sequence[float]]] | None,
    coverage: float,
    n_boxes: int,
    chat: ChatTokens | None,
    video_token_id: int | None,
    videos: int,
    where: str,
) -> RowPlan:
    ids_P = torch.from_numpy(ids)
    image_P = ids_P == image_token_id
    columns_V = image_P.nonzero().flatten()
    counts = [sum(tile.tokens for tile in tiles) for tiles in images]
    if sum(counts) != columns_V.numel():
        raise SayoError(
            "P05",
            "the prompt's image placeholders do not fit the image grids",
            where=where,
            got=f"{columns_V.numel()} placeholders",
            wanted=f"{sum(counts)} ({len(counts)} images of {counts} visual tokens)",
            fix="the prompt was cut or a second processor resized the image; raise data.max_prompt_length",
        )
    video_P = ids_P == video_token_id if video_token_id is not None else torch.zeros_like(image_P)
    if int(video_P.sum()) != videos:
        raise SayoError(
            "P05",
            "the prompt's video placeholders do not fit the video grids",
            where=where,
            got=f"{int(video_P.sum())} placeholders",
            wanted=videos,
            fix="the prompt was cut; raise data.max_prompt_length",
        )
    if videos and boxes and any(boxes):
        raise not_an_image(f"{where}, videos", f"{videos} visual tokens of videos")
    # a padding row of verl's has the boxes of another row and no image
    boxes = check_boxes(boxes, len(images), where=where) if images else []
    image_P = image_P | video_P
    keys = {"image": image_P, "region": torch.zeros_like(image_P)}
    keys |= {f"box{i}": torch.zeros_like(image_P) for i in range(n_boxes)}
    if boxes:
        box, columns = 0, columns_V
        for tiles, image_boxes, count in zip(images, boxes, counts, strict=True):
            for inside_V in torch.from_numpy(box_masks(image_boxes, tiles, coverage, where=where)):
                marked = columns[:count][inside_V]
                keys["region"][marked] = True
                if box < n_boxes:
                    keys[f"box{box}"][marked] = True
                box += 1
            columns = columns[count:]
    keys["sink"] = torch.arange(ids_P.shape[0]) == 0
    if chat is not None:
        keys |= _turns(ids_P, ~image_P, chat)
    return RowPlan(ids_P.shape[0], 0, keys, image_P.nonzero().flatten(), int(keys["region"].sum()))


def _turns(ids_P: torch.Tensor, text_P: torch.Tensor, chat: ChatTokens) -> dict[str, torch.Tensor]:
    """The text of system and user turns, without the tokens that frame a turn or an image."""
    ids, inside = ids_P.tolist(), text_P.tolist()
    out = {"system": torch.zeros_like(text_P), "question": torch.zeros_like(text_P)}
    names = {chat.roles["system"]: "system", chat.roles["user"]: "question"}
    current, frame = None, 0  # frame: how many tokens of a turn's head are still to come
    for i, token in enumerate(ids):
        if token == chat.start:
            current, frame = None, 2
        elif token == chat.end:
            current = None
        elif frame == 2:
            current, frame = names.get(token), 1
        elif frame == 1 and token == chat.newline:
            frame = 0
        else:
            frame = 0
            if current is not None and inside[i] and token not in chat.delimiters:
                out[current][i] = True
    return out
