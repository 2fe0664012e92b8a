"""Prompts and responses of a page, drawn and made up, with maps that a test can predict."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sayo_verl.view.maps import Packed
from sayo_verl.view.seen import HeadTable, MapSet, SeenImage, SeenPrompt, SeenResponse, words_of
from sayo_verl.vision.grids import Tile, tile_grid

EVIL = "</script><img src=x onerror=alert(1)><!--"
QWEN, INTERNVL = (Tile(6, 8),), tile_grid(3, 2, 4, where="a test")


def looked_at(
    tiles: Sequence[Tile] = QWEN, *, images: int = 1, text: str = "Which colour?", box: bool = True
) -> SeenPrompt:
    """A prompt with images of 160 x 120 pixels; with a box the first five visual tokens are in it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8))
    boxes: Any = ((0.1, 0.2, 0.5, 0.6),) if box else ()
    one = SeenImage(picture, tuple(tiles), boxes, (text,) * len(boxes))
    in_box = np.arange(images * one.tokens) < 5
    return SeenPrompt(text, text, (one,) * images, text, 5 if box else 0, in_box if box else None)


def said(
    prompt: SeenPrompt,
    pieces: Sequence[str] = ("The", " re", "d", " box", ".\n"),
    *,
    seed: int = 0,
    maps: Sequence[str] = ("mean",),
    stored: Sequence[str] = ("mean",),
    facts: dict[str, Any] | None = None,
    heads: bool = False,
    notes: Sequence[str] = (),
) -> SeenResponse:
    """A response with heavy-tailed maps; those in ``stored`` have maps of words."""
    random = np.random.default_rng(seed)
    words, tokens = words_of(pieces), len(pieces)
    made = []
    for name in maps:
        maps_WV = random.pareto(1.2, (len(words), prompt.tokens)).astype(np.float32)
        maps_WV *= random.uniform(0.02, 0.3, (len(words), 1)) / maps_WV.sum(1, keepdims=True)
        total = Packed.of(maps_WV.mean(0, keepdims=True))
        steady = np.arange(prompt.tokens) % 7 == 3
        made.append(MapSet(name, f"map {name}", total, Packed.of(maps_WV) if name in stored else None, steady))
    table = {"image_mass": random.random((3, 4), np.float32), "region_mass": random.random((3, 4), np.float32)}
    return SeenResponse(
        tuple(pieces),
        words,
        {
            "entropy": random.exponential(1, tokens).astype(np.float32),
            "effect": np.where(np.arange(tokens) % 2, np.nan, random.normal(0, 1, tokens)).astype(np.float32),
        },
        tuple(made),
        {"R_a": 0.7} if facts is None else facts,
        tuple(notes),
        HeadTable((0, 1, 2), table) if heads else None,
    )
