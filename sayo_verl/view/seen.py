"""Prompts and responses as a page shows them: images with their grids, words, numbers per token, maps.

Shape suffixes: T response tokens, W words, V visual tokens of all images of a prompt in token order, L decoder layers,
H query heads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from sayo_verl.view.maps import Packed
from sayo_verl.vision.grids import Tile

MOST_BORDER = 0.65  # share of visual tokens at the border; it is 0.64 with 5 x 5 and 0.75 with 4 x 4
UNFINISHED = "\ufffd"  # what decoders write for the bytes of a part of a character


@dataclass(frozen=True)
class TokenValue:
    """What a number per token means.

    Attributes:
        text: name for a reader.
        unit: of the value.
        low, high: range; None: unbounded.
        note: one sentence that explains it.
    """

    text: str
    unit: str
    low: float | None
    high: float | None
    note: str


# Numbers per token that a page can colour by. A method's own token factor is ``token_weight``, its
# bonus ``token_bonus``.
TOKEN_VALUES: Mapping[str, TokenValue] = {
    "image_mass": TokenValue(
        "attention to the image", "probability", 0, 1, "Share of the token's attention on all visual tokens."
    ),
    "region_mass": TokenValue(
        "attention to the boxes", "probability", 0, 1, "Share of the token's attention on the boxes' visual tokens."
    ),
    "sink_mass": TokenValue(
        "attention to the first token", "probability", 0, 1, "Models park unused attention on the first token."
    ),
    "border_mass": TokenValue(
        "attention to the image's border", "probability", 0, 1, "Visual tokens at the outer edge of an image."
    ),
    "entropy": TokenValue("entropy", "nats", 0, None, "Of the distribution that sampled the token."),
    "log_prob": TokenValue("log-probability", "nats", None, 0, "Of the token, given the real image."),
    "effect": TokenValue(
        "effect of the changed image",
        "nats",
        None,
        None,
        "Log-probability with the real image minus that with the changed image.",
    ),
    "predicting_mass": TokenValue(
        "attention to the image, where the token was predicted",
        "probability",
        0,
        1,
        "Of the position before the token, whose output the token was sampled from. It belongs to the token's effect.",
    ),
    "token_weight": TokenValue("factor of the method", "factor", 0, None, "1 is GRPO."),
    "token_bonus": TokenValue(
        "bonus of the method", "advantage", None, None, "Added to the advantage after all factors. 0 is GRPO."
    ),
    "advantage": TokenValue("advantage", "", None, None, "What the policy gradient multiplies."),
}


@dataclass(frozen=True)
class SeenImage:
    """One image of a prompt.

    Attributes:
        picture: RGB, upright, in the size of the stored image.
        tiles: its grids of visual tokens, in token order.
        boxes: ``x0, y0, x1, y1`` as shares of the picture; empty without boxes.
        names: of the boxes; may be empty.
    """

    picture: Image.Image
    tiles: tuple[Tile, ...]
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Visual tokens of all its grids."""
        return sum(tile.tokens for tile in self.tiles)


@dataclass(frozen=True)
class SeenPrompt:
    """A prompt.

    Attributes:
        where: names the row, such as ``row 3 of val.parquet``.
        question: its text.
        images: in the order of their visual tokens.
        answer: the ground truth; empty if unknown.
        region_tokens: visual tokens in the boxes, 0 without boxes.
        region: [V] bool, the visual tokens in the boxes; None: not known, and a page says nothing about the region in
            a map other than the default one.
    """

    where: str
    question: str
    images: tuple[SeenImage, ...]
    answer: str = ""
    region_tokens: int = 0
    region: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """V."""
        return sum(image.tokens for image in self.images)

    @property
    def chance(self) -> float:
        """Share of the visual tokens in the boxes: what a model that looks everywhere alike gives to the region."""
        return self.region_tokens / max(self.tokens, 1)

    @property
    def has_inside(self) -> bool:
        """Whether enough visual tokens are inside the border that its share says something: from about 5 x 5 on."""
        return bool(self.tokens) and float(self.border.mean()) <= MOST_BORDER

    @property
    def border(self) -> np.ndarray:
        """[V] bool: visual tokens at the outer edge of an image."""
        return np.concatenate([border_of(tile) for image in self.images for tile in image.tiles] or [np.zeros(0, bool)])


def border_of(tile: Tile) -> np.ndarray:
    """[V] bool: tokens of a tile that touch the outer edge of the image."""
    edge_RC = np.zeros((tile.rows, tile.cols), bool)
    edge_RC[0] |= tile.y0 == 0
    edge_RC[-1] |= tile.y1 == 1
    edge_RC[:, 0] |= tile.x0 == 0
    edge_RC[:, -1] |= tile.x1 == 1
    return edge_RC.ravel()


@dataclass(frozen=True)
class MapSet:
    """Maps of one selection of layers and heads.

    Attributes:
        name: ``mean``, ``L24`` or ``L24H5``; layers and heads count from 0.
        label: for a reader, such as ``layer 24, head 5``.
        total: [1, V] attention of the whole response: the mean over its tokens.
        words: [W, V] attention of each word: the mean over its tokens; None: not stored.
        steady: [V] bool, visual tokens that draw attention whatever the question is; None: not measured.
    """

    name: str
    label: str
    total: Packed
    words: Packed | None = None
    steady: np.ndarray | None = None


@dataclass(frozen=True)
class HeadTable:
    """Numbers per layer and head, means over the response's tokens.

    Attributes:
        layers: numbers from 0 of the L rows.
        values: name -> float32 [L, H]: ``image_mass``, ``region_mass``, ``box_hit`` (share of tokens whose most
            attended visual token is in a box), ``spatial_entropy`` (nats, of the attention within the image).
    """

    layers: tuple[int, ...]
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SeenResponse:
    """One response, and where the model looked while it wrote it.

    Attributes:
        pieces: T texts; joined they are the response.
        words: W pairs of first token and token after the last, see ``words_of``.
        values: name in ``TOKEN_VALUES`` -> float32 [T]; NaN: not measured for this token.
        maps: the first is the default.
        facts: name -> text or number, such as ``reward``, ``accuracy``, ``advantage``, ``trajectory_weight``, R_a.
        notes: sentences that a reader needs, such as what was not measured.
        heads: None: not measured.
    """

    pieces: tuple[str, ...]
    words: tuple[tuple[int, int], ...]
    values: Mapping[str, np.ndarray]
    maps: tuple[MapSet, ...] = ()
    facts: Mapping[str, str | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    heads: HeadTable | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Text of each token; joined they are the decoded response, with special tokens.

    The bytes of one character may be several tokens. All but the last of them have an empty text.
    """
    pieces = []
    for n in range(1, len(ids) + 1):
        # a window keeps this linear; it starts at the same token for both texts, so a broken first character cancels
        window = list(ids[max(0, n - 8) : n])
        before = tokenizer.decode(window[:-1], skip_special_tokens=False).rstrip(UNFINISHED)
        after = tokenizer.decode(window, skip_special_tokens=False)
        pieces.append("" if after.endswith(UNFINISHED) and n < len(ids) else after[len(before) :])
    return tuple(pieces)


def words_of(pieces: Sequence[str], alone: Collection[int] = ()) -> tuple[tuple[int, int], ...]:
    """Group tokens into words: a word starts at a text with white space before it, or at one of a script without it.

    Args:
        pieces: T texts.
        alone: positions of tokens that are words of their own, such as special tokens.
    """
    starts = [
        t
        for t, piece in enumerate(pieces)
        if t == 0
        or piece[:1].isspace()
        or pieces[t - 1][-1:].isspace()
        or _no_spaces(piece)
        or t in alone
        or t - 1 in alone
    ]
    return tuple(zip(starts, [*starts, len(pieces)][1:], strict=True))


def special_tokens(tokenizer: Any, ids: Sequence[int]) -> frozenset[int]:
    """Positions of the tokenizer's special tokens."""
    special = set(tokenizer.all_special_ids)
    return frozenset(t for t, token in enumerate(ids) if token in special)


def _no_spaces(piece: str) -> bool:
    """Whether a text starts with a letter of Chinese or Japanese."""
    return "\u3040" <= piece[:1] <= "\u9fff"
