"""Images to visual tokens: what the installed processors and vision towers do, and boxes over several tiles.

``python tests/vision/test_grids.py`` writes the golden table anew from the installed processors.

Shape suffixes: V visual tokens of one image, N boxes, R x C cells of a level of resolution.
"""

import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.refusals import refusal
from transformers import InternVLConfig, InternVLModel, InternVLProcessor, Qwen2Config
from transformers.models.got_ocr2 import image_processing_got_ocr2, image_processing_pil_got_ocr2
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.internvl import InternVLVisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl, image_processing_qwen2_vl
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from sayo_verl.vision.grids import Tile, merged_grid, tile_grid, token_levels
from sayo_verl.vision.masks import box_masks, cell_coverage, region_mask, token_coverage

GOLDEN = Path(__file__).parent / "golden" / "visual_tokens.json"
SIZES = [  # (width, height)
    (640, 480),
    (224, 224),
    (150, 224),
    (500, 375),
    (800, 557),
    (1024, 1024),
    (100, 1000),
    (1500, 200),
    (28, 28),
    (33, 65),
    (3, 3),
    (2, 1),
    (1, 1),
    (1, 200),
    (200, 1),
]
PATCH = {"qwen3_vl": 16, "qwen2_5_vl": 14}
LIMITS = {"qwen3_vl": (65_536, 16_777_216), "qwen2_5_vl": (3_136, 12_845_056)}  # fewest and most pixels, as published
FAMILIES = [*PATCH, "internvl"]
MERGE = 2
TILE_PIXELS, TILE_SIDE = 448, 16
TILE_TOKENS = inspect.signature(InternVLProcessor.__init__).parameters["image_seq_length"].default
BACKENDS = ["torchvision", "pil"]
PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)
PLAIN = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}  # pixel values in [0, 1]


# ------------------------------------------------------------------------------------------- the installed processors


def image_processor(family: str, backend: str = "torchvision") -> Any:
    """The image processor that ``AutoProcessor`` gives the family, made from its published numbers."""
    if family == "internvl":
        kind = {
            "torchvision": image_processing_got_ocr2.GotOcr2ImageProcessor,
            "pil": image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil,
        }[backend]
        side = {"height": TILE_PIXELS, "width": TILE_PIXELS}
        return kind(size=side, crop_to_patches=True, min_patches=1, max_patches=12, **PLAIN)
    kind = {
        "torchvision": image_processing_qwen2_vl.Qwen2VLImageProcessor,
        "pil": image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil,
    }[backend]
    fewest, most = LIMITS[family]
    size = {"shortest_edge": fewest, "longest_edge": most}
    return kind(size=size, patch_size=PATCH[family], merge_size=MERGE, **PLAIN)


def measure(family: str, image: Image.Image, backend: str = "torchvision") -> tuple[dict[str, Any], torch.Tensor]:
    """What the golden table says of one image, and its pixel values."""
    processor = image_processor(family, backend)
    made = processor(images=[image], return_tensors="pt")
    if family != "internvl":
        grid = made["image_grid_thw"][0].tolist()
        return {"grid_thw": grid, "tokens": len(made["pixel_values"]) // MERGE**2}, made["pixel_values"]
    n_tiles = int(made["num_patches"][0])
    # The question an adapter asks: (height, width) in, (columns, rows) out.
    columns, rows = get_optimal_tiled_canvas(
        (image.height, image.width), (TILE_PIXELS, TILE_PIXELS), processor.min_patches, processor.max_patches
    )
    assert n_tiles == len(made["pixel_values"]) == processor.get_number_of_image_patches(image.height, image.width)
    thumbnail = n_tiles > columns * rows
    return (
        {"columns": columns, "rows": rows, "thumbnail": thumbnail, "tokens": n_tiles * TILE_TOKENS},
        made["pixel_values"],
    )


def tiles_of(family: str, entry: dict[str, Any]) -> tuple[Tile, ...]:
    """Our tiles for an entry of the golden table."""
    if family == "internvl":
        return tile_grid(entry["columns"], entry["rows"], TILE_SIDE, where=family)
    return merged_grid(*entry["grid_thw"], MERGE, where=family)


def table(backend: str = "torchvision") -> list[dict[str, Any]]:
    """The golden table, measured now."""
    entries = []
    for width, height in SIZES:
        image = Image.new("RGB", (width, height), (10, 200, 30))
        measured = {family: measure(family, image, backend)[0] for family in FAMILIES}
        entries.append({"width": width, "height": height, **measured})
    return entries


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_golden_table_is_what_the_installed_processors_do(backend):
    golden = json.loads(GOLDEN.read_text())
    assert [(e["width"], e["height"]) for e in golden["images"]] == SIZES
    for wanted, got in zip(golden["images"], table(backend), strict=True):
        assert got == wanted, f"transformers {transformers.__version__}; the table is of {golden['transformers']}"


def test_our_tiles_have_the_tokens_of_the_golden_table():
    for entry in json.loads(GOLDEN.read_text())["images"]:
        for family in FAMILIES:
            assert sum(tile.tokens for tile in tiles_of(family, entry[family])) == entry[family]["tokens"]
        tiled = entry["internvl"]
        assert len(tiles_of("internvl", tiled)) == tiled["columns"] * tiled["rows"] + tiled["thumbnail"]


def test_the_table_holds_sizes_that_tell_the_families_and_the_axes_apart():
    by_size = {(e["width"], e["height"]): e for e in json.loads(GOLDEN.read_text())["images"]}
    assert by_size[640, 480]["qwen3_vl"] == {"grid_thw": [1, 30, 40], "tokens": 300}
    assert by_size[640, 480]["qwen2_5_vl"] == {"grid_thw": [1, 34, 46], "tokens": 391}
    assert by_size[150, 224]["internvl"] == {"columns": 2, "rows": 3, "thumbnail": True, "tokens": 1792}


# ------------------------------------------------------------- from a place in the image to a token: pixels, then tower


def position_picture(width: int, height: int) -> Image.Image:
    """Red grows from 0 to 255 from left to right, green from top to bottom."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    green = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    return Image.fromarray(np.rint(255 * np.stack([red, green, np.zeros_like(red)], -1)).astype(np.uint8))


def cell_centres(tiles: tuple[Tile, ...]) -> np.ndarray:
    """float [V, 2]: where in the image the middle of each token's cell is, (x, y), in token order."""
    return np.array(
        [
            (t.x0 + (c + 0.5) / t.cols * (t.x1 - t.x0), t.y0 + (r + 0.5) / t.rows * (t.y1 - t.y0))
            for t in tiles
            for r in range(t.rows)
            for c in range(t.cols)
        ]
    )


def token_colours(family: str, pixel_values: torch.Tensor) -> np.ndarray:
    """float [V, 2]: mean red and green of the pixels that go into each token."""
    if family == "internvl":  # [tiles, 3, 448, 448]
        cell = TILE_PIXELS // TILE_SIDE
        cells = pixel_values.unflatten(3, (TILE_SIDE, cell)).unflatten(2, (TILE_SIDE, cell))
        return cells.mean(dim=(3, 5)).permute(0, 2, 3, 1).reshape(-1, 3)[:, :2].numpy()
    side = PATCH[family]  # [patches, 3 * 2 frames * side * side]
    return pixel_values.reshape(-1, MERGE**2, 3, 2, side, side).mean(dim=(1, 3, 4, 5))[:, :2].numpy()


@pytest.mark.parametrize("size", [(640, 480), (150, 224), (800, 557), (100, 1000), (1500, 200), (224, 224)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pixels_of_each_token_are_those_of_its_cell(family, size):
    entry, pixel_values = measure(family, position_picture(*size))
    tiles = tiles_of(family, entry)
    centres_V2, colours_V2 = cell_centres(tiles), token_colours(family, pixel_values)
    assert centres_V2.shape == colours_V2.shape
    cell_V2 = np.repeat(
        [((t.x1 - t.x0) / t.cols, (t.y1 - t.y0) / t.rows) for t in tiles], [t.tokens for t in tiles], axis=0
    )
    off = np.abs(centres_V2 - colours_V2) / cell_V2
    print(f"{family} {size}: {len(off)} tokens, at most {off.max():.3f} of a cell from their place")
    assert off.max() < 0.4  # the next cell is 1 away


@pytest.mark.parametrize("size", [(640, 480), (150, 224), (1500, 200)], ids=str)
def test_each_tile_of_internvl_is_its_rectangle_and_the_thumbnail_is_last(size):
    entry, pixel_values = measure("internvl", position_picture(*size))
    colours = pixel_values[:, :2].mean(dim=(2, 3)).numpy()
    middles = np.array([((t.x0 + t.x1) / 2, (t.y0 + t.y1) / 2) for t in tiles_of("internvl", entry)])
    assert np.abs(colours - middles).max() < 0.005
    for mirrored in (middles[::-1], middles[:, ::-1]):  # the check can fail
        assert np.abs(colours - mirrored).max() > 0.05
    left_edge = pixel_values[-1, 0, :, 0].mean()
    assert left_edge < 0.05
    assert pixel_values[-1, 0, :, -1].mean() > 0.95


def tower_without_layers(family: str) -> Any:
    """Patch embedding, the family's reordering, merger: tokens do not mix, so each depends on its own pixels alone."""
    torch.manual_seed(0)
    if family == "internvl":
        size = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 0}
        text = Qwen2Config(**size, num_key_value_heads=1, vocab_size=8, layer_types=[])
        vision = InternVLVisionConfig(**size)
        return InternVLModel(InternVLConfig(vision_config=vision, text_config=text, image_token_id=1))
    size = {"hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "depth": 0, "out_hidden_size": 8}
    if family == "qwen3_vl":
        return Qwen3VLVisionModel(Qwen3VLVisionConfig(**size, deepstack_visual_indexes=[], num_position_embeddings=16))
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**size, fullatt_block_indexes=[]))


def visual_embeddings(family: str, tower: Any, image: Image.Image) -> np.ndarray:
    """float [V, 8]: what the language model gets for each visual token."""
    made = image_processor(family)(images=[image], return_tensors="pt")
    with torch.no_grad():
        if family == "internvl":
            output = tower.get_image_features(
                made["pixel_values"], vision_feature_layer=-1, vision_feature_select_strategy="default"
            )
        else:
            output = tower(made["pixel_values"], grid_thw=made["image_grid_thw"])
    return output.pooler_output.flatten(0, -2).numpy()


@pytest.mark.parametrize(
    ("family", "size"),
    [("qwen3_vl", (320, 384)), ("qwen2_5_vl", (28 * 11, 28 * 9)), ("internvl", (2 * TILE_PIXELS, TILE_PIXELS))],
)
def test_a_cell_of_the_image_reaches_the_language_model_as_its_token(family, size):
    """The image is of a size that needs no resize, so what is painted into one cell changes one token and no other."""
    blank, tower = Image.new("RGB", size, (90, 90, 90)), tower_without_layers(family)
    tiles = tiles_of(family, measure(family, blank)[0])
    before_V8 = visual_embeddings(family, tower, blank)
    levels_V, centres_V2 = token_levels(tiles, where="test"), cell_centres(tiles)
    assert len(before_V8) == len(levels_V)
    full_V = levels_V == 0
    cell = TILE_PIXELS // TILE_SIDE if family == "internvl" else PATCH[family] * MERGE
    rng = np.random.default_rng(0)
    for v in rng.permutation(full_V.sum())[:12]:
        x, y = (round(float(place) * n - cell / 2) for place, n in zip(centres_V2[v], size, strict=True))
        pixels = np.array(blank)
        pixels[y : y + cell, x : x + cell] = rng.integers(0, 256, (cell, cell, 3))
        changed_V = np.abs(visual_embeddings(family, tower, Image.fromarray(pixels)) - before_V8).max(-1)
        assert np.nonzero(changed_V * full_V)[0].tolist() == [v]
        if family == "internvl":  # in the thumbnail the paint spreads a little over the cell's border
            box = [x / size[0], y / size[1], (x + cell) / size[0], (y + cell) / size[1]]
            assert (changed_V * ~full_V).argmax() == np.nonzero(region_mask([box], tiles) & ~full_V)[0].item()


# ------------------------------------------------------------------------------------------------------ shapes of tiles


counts = st.integers(1, 6)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[int, int, int, tuple[Tile, ...]]:
    """(columns, rows, side, tiles): tiles of InternVL, small."""
    columns, rows, side = draw(counts), draw(counts), draw(st.integers(1, 8))
    return columns, rows, side, tile_grid(columns, rows, side, where="test")


@st.composite
def boxes(draw: st.DrawFn, smallest: float = 1e-3) -> list[float]:
    x0, y0 = (draw(st.floats(min_value=0, max_value=1 - smallest)) for _ in "xy")
    x1, y1 = (draw(st.floats(min_value=low + smallest, max_value=1)) for low in (x0, y0))
    return [x0, y0, x1, y1]


thresholds = st.floats(min_value=0.05, max_value=1.0)


def as_one_grid(mask_V: np.ndarray, columns: int, rows: int, side: int) -> np.ndarray:
    """The tokens of the tiles, laid out as they lie in the image: [rows * side, columns * side]."""
    tiles = mask_V[: columns * rows * side * side].reshape(rows, columns, side, side)
    return tiles.swapaxes(1, 2).reshape(rows * side, columns * side)


@PROPERTY
@given(tiling=tilings())
def test_tiles_and_thumbnail_are_counted(tiling):
    columns, rows, side, tiles = tiling
    n = columns * rows
    assert len(tiles) == n + (n > 1)
    assert sum(tile.tokens for tile in tiles) == (n + (n > 1)) * side * side
    assert tile_grid(columns, rows, side, thumbnail=False, where="test") == tiles[:n]
    levels_V = token_levels(tiles, where="test")
    assert levels_V.tolist() == [0] * n * side * side + [1] * (n > 1) * side * side


def test_tiles_are_row_major_by_hand():
    assert tile_grid(2, 1, 4, where="test") == (Tile(4, 4, 0, 0, 0.5, 1), Tile(4, 4, 0.5, 0, 1, 1), Tile(4, 4))
    assert tile_grid(1, 2, 4, where="test") == (Tile(4, 4, 0, 0, 1, 0.5), Tile(4, 4, 0, 0.5, 1, 1), Tile(4, 4))
    assert tile_grid(1, 1, 4, where="test") == (Tile(4, 4),)
    assert merged_grid(1, 30, 40, 2, where="test") == (Tile(15, 20),)


# ------------------------------------------------------------------------------------------------- boxes over the tiles


@PROPERTY
@given(box=boxes(), tiling=tilings())
def test_the_shares_of_each_level_add_up_to_the_area_of_the_box(box, tiling):
    columns, rows, side, tiles = tiling
    share_V, levels_V = token_coverage(box, tiles), token_levels(tiles, where="test")
    area = (box[2] - box[0]) * (box[3] - box[1])
    for level, cells in enumerate([columns * rows * side**2, side**2][: levels_V.max() + 1]):
        assert share_V[levels_V == level].sum() / cells == pytest.approx(area, rel=1e-9, abs=1e-12)


@PROPERTY
@given(box=boxes(), tiling=tilings(), coverage=thresholds)
def test_the_tiles_are_one_grid_and_the_thumbnail_another(box, tiling, coverage):
    """Borders of tiles leave no trace: the mask is that of one large grid, and that of the thumbnail alone."""
    columns, rows, side, tiles = tiling
    mask_V = region_mask([box], tiles, coverage)
    grid = Tile(rows * side, columns * side)
    share = cell_coverage(box, grid.rows, grid.cols)
    assume(np.abs(share - coverage).min() > 1e-7)  # where rounding decides, the two may differ
    assume(np.abs(share / share.max() - (1 - 1e-6)).min() > 1e-7)
    alone = region_mask([box], [grid], coverage).reshape(grid.rows, grid.cols)
    assert (as_one_grid(mask_V, columns, rows, side) == alone).all()
    if len(tiles) > 1:
        assert (mask_V[-side * side :] == region_mask([box], [Tile(side, side)], coverage)).all()


def test_a_sliver_over_a_tiles_border_is_not_kept_for_being_the_largest_of_its_tile():
    tiles = tile_grid(2, 1, 4, where="test")  # full resolution: 4 x 8 cells, the border of the tiles at x = 0.5
    box = [0.45, 0.3, 0.505, 0.35]  # 0.05 of its width right of the border; 0.08 of a cell's area at most
    marked = region_mask([box], tiles).nonzero()[0].tolist()
    assert marked == [1 * 4 + 3, 2 * 16 + 1 * 4 + 1]  # its cell of the left tile, its cell of the thumbnail


@PROPERTY
@given(box=boxes(smallest=1e-12), tiling=tilings(), coverage=thresholds)
def test_a_box_is_seen_at_every_resolution(box, tiling, coverage):
    tiles = tiling[3]
    mask_V, levels_V = region_mask([box], tiles, coverage), token_levels(tiles, where="test")
    for level in range(levels_V.max() + 1):
        assert mask_V[levels_V == level].any()


@pytest.mark.parametrize("x", [0.3, 0.5, 1 / 3, np.nextafter(1, 0)])
@pytest.mark.parametrize("y", [0.0, 0.5, 2 / 3])
def test_a_box_thinner_than_rounding_is_seen_at_every_resolution(x, y):
    tiles = tile_grid(3, 2, 16, where="test")
    mask_V = region_mask([[x, y, np.nextafter(x, 2), np.nextafter(y, 2)]], tiles)
    centres_V2 = cell_centres(tiles)
    for part in (slice(0, 6 * 256), slice(6 * 256, None)):
        marked = centres_V2[part][mask_V[part]]
        assert 1 <= len(marked) <= 4  # on a corner it touches four
        cell = (1 / 48, 1 / 32) if part.start == 0 else (1 / 16, 1 / 16)
        assert (np.abs(marked - [x, y]) <= np.array(cell) / 2 + 1e-8).all()


@PROPERTY
@given(tiling=tilings(), coverage=st.one_of(thresholds, st.just(1e-6)))
def test_the_whole_image_is_every_token_of_every_tile(tiling, coverage):
    assert region_mask([[0.0, 0.0, 1.0, 1.0]], tiling[3], coverage).all()


@st.composite
def cuts(draw: st.DrawFn, n: int) -> list[int]:
    """0, some whole numbers in between, n."""
    return sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))})


@PROPERTY
@given(data=st.data(), tiling=tilings(), coverage=st.one_of(thresholds, st.just(1e-6)))
def test_boxes_that_divide_the_image_along_cells_divide_the_tokens(data, tiling, coverage):
    """On borders of the thumbnail's cells, which are borders of the tiles' cells too: each token in one box exactly."""
    _, _, side, tiles = tiling
    xs, ys = (data.draw(cuts(side)) for _ in "xy")
    parts = [[a / side, c / side, b / side, d / side] for a, b in pairwise(xs) for c, d in pairwise(ys)]
    assert (box_masks(parts, tiles, coverage).sum(0) == 1).all()


@PROPERTY
@given(data=st.data(), tiling=tilings(), coverage=st.one_of(thresholds, st.just(1e-6)))
def test_a_box_on_borders_of_cells_takes_these_cells_and_no_neighbour(data, tiling, coverage):
    columns, rows, side, tiles = tiling
    wanted = np.zeros((rows * side, columns * side), dtype=bool)
    (c0, c1), (r0, r1) = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in wanted.shape[::-1]
    )
    wanted[r0:r1, c0:c1] = True
    width, height = columns * side, rows * side
    mask_V = region_mask([[c0 / width, r0 / height, c1 / width, r1 / height]], tiles, coverage)
    assert (as_one_grid(mask_V, columns, rows, side) == wanted).all()


@PROPERTY
@given(box=boxes(), grow=st.tuples(*[st.floats(min_value=0, max_value=1)] * 4), tiling=tilings(), coverage=thresholds)
def test_growing_a_box_never_removes_a_token_of_a_level_where_a_cell_reached_the_threshold(box, grow, tiling, coverage):
    """The exact statement: kept by the threshold means kept for good; kept as the most covered can be lost (below)."""
    tiles, (x0, y0, x1, y1), (left, up, right, down) = tiling[3], box, grow
    larger = [x0 * left, y0 * up, max(x1, 1 - right * (1 - x1)), max(y1, 1 - down * (1 - y1))]
    lost_V = region_mask([box], tiles, coverage) & ~region_mask([larger], tiles, coverage)
    levels_V, covered_V = token_levels(tiles, where="test"), token_coverage(box, tiles)
    for level in range(levels_V.max() + 1):
        if covered_V[levels_V == level].max() >= coverage:
            assert not lost_V[levels_V == level].any()


def test_growing_a_box_can_remove_a_token_that_was_only_the_most_covered():
    tiles = merged_grid(1, 4, 4, 2, where="test")
    small, large = [0.4, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 0.5]
    assert region_mask([small], tiles).tolist() == [True, False, False, False]
    assert region_mask([large], tiles).tolist() == [False, True, False, False]


@PROPERTY
@given(data=st.data(), some=st.lists(boxes(), max_size=5), tiling=tilings(), coverage=thresholds)
def test_the_region_is_the_union_of_its_boxes_in_any_order(data, some, tiling, coverage):
    tiles = tiling[3]
    masks_NV = box_masks(some, tiles, coverage)
    assert masks_NV.shape == (len(some), sum(tile.tokens for tile in tiles))
    assert masks_NV.dtype == bool
    order = data.draw(st.permutations(range(len(some))))
    shuffled = [some[i] for i in order]
    assert (box_masks(shuffled, tiles, coverage) == masks_NV[list(order)]).all()
    union_V = np.zeros(masks_NV.shape[1], dtype=bool)
    for box, mask_V in zip(some, masks_NV, strict=True):
        assert (region_mask([box], tiles, coverage) == mask_V).all()
        union_V |= mask_V
    assert (region_mask(shuffled, tiles, coverage) == union_V).all()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "grid", [(2, 4, 4, 2), (0, 4, 4, 2), (1, 3, 4, 2), (1, 4, 5, 2), (1, 0, 4, 2), (1, 4, -2, 2), (1, 4, 4, 0)]
)
def test_a_grid_that_is_not_a_still_images_is_refused(grid):
    with refusal("P07", "still image") as caught:
        merged_grid(*grid, where="row 3")
    assert caught.value.where == "row 3"


@pytest.mark.parametrize("counts", [(0, 1, 16), (1, 0, 16), (1, 1, 0), (-2, -2, 16), (1.5, 2, 16)])
def test_a_tiling_without_tiles_is_refused(counts):
    with refusal("V05") as caught:
        tile_grid(*counts, where="row 3")
    assert caught.value.where == "row 3"


TILES = tile_grid(3, 2, 4, where="test")


@pytest.mark.parametrize(
    "tiles",
    [
        [],
        TILES[1:],
        TILES[:5] + TILES[6:],
        (*TILES, TILES[-1]),
        (*TILES[:5], TILES[4], TILES[6]),
        [Tile(4, 4, 0.0, 0.0, 1.0, 0.9)],
        [Tile(4, 4, 0.0, 0.0, 2.0, 0.5)],
        [Tile(4, 4, 1.0, 0.0, 0.0, 1.0)],
        [Tile(4, 4, 0.0, float("nan"), 1.0, 1.0)],
    ],
    ids=[
        "none",
        "first missing",
        "last missing",
        "two thumbnails",
        "one twice",
        "a strip missing",
        "outside",
        "mirrored",
        "not a number",
    ],
)
def test_tiles_that_are_not_the_whole_image_once_per_resolution_are_refused(tiles):
    with refusal("V06", "exactly once"):
        region_mask([[0.1, 0.1, 0.2, 0.2]], tiles, where="row 3")


if __name__ == "__main__":
    lines = json.dumps(table()).replace('}, {"width"', '},\n    {"width"')
    assert re.match(r'\[{"width"', lines)
    GOLDEN.write_text(
        "{\n"
        '  "about": "visual tokens of the installed image processors; written by: python tests/vision/test_grids.py",\n'
        f'  "transformers": "{transformers.__version__}",\n'
        f'  "images": [\n    {lines[1:-1]}\n  ]\n'
        "}\n"
    )
    print(f"wrote {len(json.loads(GOLDEN.read_text())['images'])} images to {GOLDEN}")
