"""The matched control region of ``Intervention(kind="elsewhere")``.

Shape suffixes: V visual tokens of one image, N boxes, R and C rows and columns of a grid.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sayo_verl.vision.control import control_region, filled_tokens, has_room
from sayo_verl.vision.grids import Tile, tile_grid
from sayo_verl.vision.intervention import Intervention
from sayo_verl.vision.masks import box_masks, region_mask

PROPERTY = settings(derandomize=True, deadline=None, max_examples=80)
WHERE = {"where": "the test"}


def drawn(boxes, tiles, draw=0, key=5, seed=0, coverage=0.5):
    intervention = Intervention("elsewhere", draw=draw, seed=seed)
    found = filled_tokens(intervention, boxes, tiles, coverage, key=key, **WHERE)
    assert all(region_V.dtype == torch.bool for region_V in found)
    return [region_V.numpy() for region_V in found]


def rectangle(region_V: np.ndarray, tile: Tile) -> tuple[int, int, int, int]:
    """First row and column, rows and columns of the tokens, which must be a full rectangle."""
    rows, cols = region_V.reshape(tile.rows, tile.cols).nonzero()
    height, width = rows.max() - rows.min() + 1, cols.max() - cols.min() + 1
    assert height * width == len(rows)
    return rows.min(), cols.min(), height, width


@st.composite
def boxes_of_rows(draw: st.DrawFn):
    """Boxes and tiles of one to three images: grids, and tiles with a thumbnail."""
    edge = st.floats(0, 0.95)

    def box() -> list[float]:
        x, y = draw(edge), draw(edge)
        return [x, y, min(1.0, x + draw(st.floats(0.02, 0.6))), min(1.0, y + draw(st.floats(0.02, 0.6)))]

    boxes, tiles = [], []
    for _ in range(draw(st.integers(1, 3))):
        boxes.append([box() for _ in range(draw(st.integers(0, 3)))])
        grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
        tiled = draw(st.booleans())
        tiles.append(tile_grid(min(grid[0], 3), min(grid[1], 2), 4, **WHERE) if tiled else (Tile(*grid),))
    return boxes, tiles


@PROPERTY
@given(row=boxes_of_rows(), draw=st.integers(0, 5), key=st.integers(0, 2**60))
def test_it_has_as_many_tokens_as_the_boxes_and_touches_none_of_them(row, draw, key):
    boxes, tiles = row
    region = [region_mask(b, t, 0.5) if b else np.zeros(sum(x.tokens for x in t), bool) for b, t in zip(*row)]  # noqa: B905
    control = drawn(boxes, tiles, draw, key)
    inside, tokens = sum(int(r.sum()) for r in region), sum(len(r) for r in region)
    wanted = inside if 2 * inside <= tokens else 0
    assert has_room(inside, tokens) == (2 * inside <= tokens)
    assert sum(int(c.sum()) for c in control) == wanted
    assert not any((r & c).any() for r, c in zip(region, control, strict=True))
    again = drawn(boxes, tiles, draw, key)
    assert all(np.array_equal(a, b) for a, b in zip(control, again, strict=True))


def test_a_box_moves_to_a_place_of_its_own_shape():
    tile, box = Tile(8, 10), [0.1, 0.25, 0.4, 0.5]  # rows 2 to 3, columns 1 to 3
    assert rectangle(region_mask([box], [tile]), tile) == (2, 1, 2, 3)
    for draw in range(20):
        (control,) = drawn([[box]], [(tile,)], draw)
        row, col, *shape = rectangle(control, tile)
        assert shape == [2, 3]
        assert row >= 4 or row + 2 <= 2 or col >= 4 or col + 3 <= 1


@pytest.mark.parametrize("boxes", [[[0.1, 0.1, 0.3, 0.3]], [[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.55, 0.55]]])
def test_other_draws_are_other_regions_until_every_place_was_used(boxes):
    tile = Tile(10, 10)
    places = {drawn([boxes], [(tile,)], draw)[0].tobytes() for draw in range(40)}
    assert len(places) == 40


def test_a_place_that_is_the_only_one_is_drawn_again():
    tile = Tile(1, 4)  # a box of two tokens on the left leaves one place
    controls = [drawn([[[0.0, 0.0, 0.5, 1.0]]], [(tile,)], draw)[0].tolist() for draw in range(3)]
    assert controls == [[False, False, True, True]] * 3


def test_it_depends_on_the_seed_and_the_prompt():
    tile, box = Tile(20, 20), [0.1, 0.1, 0.2, 0.2]
    found = [drawn([[box]], [(tile,)], key=key, seed=seed)[0].tobytes() for key, seed in ((1, 0), (2, 0), (1, 1))]
    assert len(set(found)) == 3


def test_without_a_place_single_tokens_are_drawn():
    tile, box = Tile(3, 3), [0.0, 1 / 3, 1.0, 2 / 3]  # the middle row; 3 of 9
    (control,) = drawn([[box, [1 / 3, 0.0, 2 / 3, 1 / 3]]], [(tile,)])  # a T of 4 tokens, no other row is free
    assert control.sum() == 4
    corners_and_below = np.array([1, 0, 1, 0, 0, 0, 1, 1, 1], bool)
    assert not (control & ~corners_and_below).any()


def test_an_image_that_the_box_fills_borrows_tokens_of_another():
    tiles = [(Tile(2, 2),), (Tile(2, 4),)]
    control = drawn([[[0.0, 0.0, 1.0, 1.0]], []], tiles)
    assert [int(c.sum()) for c in control] == [0, 4]


def test_a_row_whose_boxes_cover_more_than_half_stays_as_it_is():
    assert not drawn([[[0.0, 0.0, 0.6, 1.0]]], [(Tile(1, 5),)])[0].any()
    assert drawn([[[0.0, 0.0, 0.5, 1.0]]], [(Tile(1, 4),)])[0].any()


def test_a_thumbnail_is_changed_as_well():
    """A control region of a tiled image has the pattern in both resolutions, as the box has."""
    tiles = tile_grid(2, 2, 4, **WHERE)
    box = [0.0, 0.0, 0.25, 0.25]
    (mask,) = box_masks([box], tiles)
    assert (mask[:64].sum(), mask[64:].sum()) == (4, 1)
    (control,) = drawn([[box]], [tiles])
    assert (control[:64].sum(), control[64:].sum()) == (4, 1)


def test_a_pattern_may_lie_across_the_tiles_of_a_resolution():
    tiles, box = tile_grid(2, 1, 2, thumbnail=False, **WHERE), [0.0, 0.0, 0.5, 0.5]  # 2 x 4 tokens, the left of the top
    found = {tuple(drawn([[box]], [tiles], draw)[0].nonzero()[0]) for draw in range(8)}
    assert found == {(4, 5), (2, 3), (3, 6), (6, 7)}  # top right; below: left, across, right


def test_other_kinds_and_rows_without_boxes_have_no_tokens_to_fill():
    tiles, box = [(Tile(2, 2),)], [[[0.0, 0.0, 0.5, 0.5]]]
    for kind in ("patches", "blur", "grey"):
        assert filled_tokens(Intervention(kind), box, tiles, 0.5, key=0, **WHERE) is None
    assert filled_tokens(Intervention("elsewhere"), [], tiles, 0.5, key=0, **WHERE) is None
    (region,) = filled_tokens(Intervention("region"), box, tiles, 0.5, key=0, **WHERE)
    assert region.tolist() == [True, False, False, False]


def test_room_of_a_batch_is_that_of_its_rows():
    region, image = torch.tensor([0.0, 2.0, 3.0, 5.0]), torch.tensor([0.0, 4.0, 5.0, 10.0])
    assert has_room(region, image).tolist() == [True, True, False, True]


@PROPERTY
@given(row=boxes_of_rows())
def test_the_boxes_are_not_changed(row):
    boxes, tiles = row
    masks = [box_masks(b, t, 0.5) for b, t in zip(boxes, tiles, strict=True)]
    assume(any(mask.any() for mask in masks))
    kept = [mask.copy() for mask in masks]
    control_region(masks, tiles, seed=0, key=1, draw=2, **WHERE)
    assert all(np.array_equal(a, b) for a, b in zip(masks, kept, strict=True))
