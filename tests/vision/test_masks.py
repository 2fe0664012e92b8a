"""Boxes to visual tokens of one grid: properties of the coverage rule, hand cases, refusals.

Images of several tiles are in ``test_grids``. Shape suffixes: R grid rows, C grid columns.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import cell_coverage, check_box, region_mask

PROPERTY = settings(derandomize=True, deadline=None, max_examples=120)
TOUCHING = 1e-6  # a threshold that any real overlap reaches
NAN = float("nan")

grids = st.integers(1, 24)
thresholds = st.floats(min_value=0.05, max_value=1.0)


@st.composite
def boxes(draw: st.DrawFn, smallest: float = 1e-3) -> list[float]:
    """[x0, y0, x1, y1] anywhere in the image, from slivers to the whole."""
    x0, y0 = (draw(st.floats(min_value=0, max_value=1 - smallest)) for _ in "xy")
    x1, y1 = (draw(st.floats(min_value=low + smallest, max_value=1)) for low in (x0, y0))
    return [x0, y0, x1, y1]


def grid_mask(box: list[float], rows: int, cols: int, coverage: float = 0.5) -> np.ndarray:
    return region_mask([box], [Tile(rows, cols)], coverage).reshape(rows, cols)


# ------------------------------------------------------------------------------------------------------ shares of cells


@PROPERTY
@given(box=boxes(), rows=grids, cols=grids)
def test_the_shares_add_up_to_the_area_of_the_box(box, rows, cols):
    share_RC = cell_coverage(box, rows, cols)
    assert share_RC.shape == (rows, cols)
    assert share_RC.min() >= 0
    assert share_RC.max() <= 1
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert share_RC.sum() / (rows * cols) == pytest.approx(area, rel=1e-9, abs=1e-12)


@PROPERTY
@given(box=boxes(), rows=st.integers(1, 6), cols=st.integers(1, 6))
def test_the_shares_against_exact_arithmetic(box, rows, cols):
    x0, y0, x1, y1 = (Fraction(v) for v in box)
    share_RC = cell_coverage(box, rows, cols)
    for r in range(rows):
        for c in range(cols):
            width = max(Fraction(0), min(x1 * cols, Fraction(c + 1)) - max(x0 * cols, Fraction(c)))
            height = max(Fraction(0), min(y1 * rows, Fraction(r + 1)) - max(y0 * rows, Fraction(r)))
            assert share_RC[r, c] == pytest.approx(float(width * height), abs=1e-12)


def test_shares_by_hand():
    assert cell_coverage([0.25, 0.0, 0.75, 1.0], 1, 2).tolist() == [[0.5, 0.5]]
    assert cell_coverage([0.0, 0.5, 1.0, 1.0], 2, 1).tolist() == [[0.0], [1.0]]
    assert cell_coverage([0.125, 0.25, 0.5, 1.0], 2, 2).tolist() == [[0.375, 0.0], [0.75, 0.0]]


# -------------------------------------------------------------------------------------------------------- coverage rule


def test_masks_by_hand():
    # 2 x 3 cells; the box covers 40 %, 100 % and 60 % of columns 0 to 2 and the upper row only
    box = [0.2, 0.0, 0.8667, 0.5]
    assert grid_mask(box, 2, 3).astype(int).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert grid_mask(box, 2, 3, 0.4 - 1e-6).astype(int).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert grid_mask(box, 2, 3, 1.0).astype(int).tolist() == [[0, 1, 0], [0, 0, 0]]


def test_tokens_are_row_major():
    assert region_mask([[0.5, 0.0, 1.0, 0.5]], [Tile(2, 2)]).tolist() == [False, True, False, False]
    assert region_mask([[0.0, 0.5, 0.5, 1.0]], [Tile(2, 2)]).tolist() == [False, False, True, False]


def test_no_box_gives_an_empty_mask():
    mask = region_mask([], [Tile(3, 4)])
    assert mask.shape == (12,)
    assert mask.dtype == bool
    assert not mask.any()


@PROPERTY
@given(box=boxes(), rows=grids, cols=grids, coverage=thresholds)
def test_a_box_never_vanishes_and_marks_only_what_it_touches(box, rows, cols, coverage):
    mask = region_mask([box], [Tile(rows, cols)], coverage)
    assert mask.shape == (rows * cols,)
    assert mask.dtype == bool
    assert mask.any()
    share = cell_coverage(box, rows, cols).reshape(-1)
    assert (share[mask] > 0).all()
    if share.max() >= coverage:
        assert (mask == (share >= coverage - 1e-9)).all()
    elif share.max() < coverage - 1e-9:
        assert (mask == (share >= share.max() * (1 - 1e-6))).all(), "the most covered cells, all of them"


@pytest.mark.parametrize("coverage", [1e-12, 1e-9, TOUCHING])
def test_a_tiny_threshold_means_touched_cells_not_all_cells(coverage):
    assert grid_mask([0.3, 0.3, 0.6, 0.45], 4, 4, coverage).astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


@PROPERTY
@given(outer=boxes(), inner=st.tuples(*[st.floats(min_value=0, max_value=0.45)] * 4), rows=grids, cols=grids)
def test_a_larger_box_marks_at_least_as_much(outer, inner, rows, cols):
    x0, y0, x1, y1 = outer
    left, top, right, bottom = inner
    width, height = x1 - x0, y1 - y0
    small = [x0 + left * width, y0 + top * height, x1 - right * width, y1 - bottom * height]
    threshold = 1e-9
    assume(cell_coverage(small, rows, cols).max() > 2 * threshold)
    assert not (grid_mask(small, rows, cols, threshold) & ~grid_mask(outer, rows, cols, threshold)).any()


@PROPERTY
@given(box=boxes(), rows=grids, cols=grids, low=thresholds, high=thresholds)
def test_a_higher_threshold_marks_at_most_as_much(box, rows, cols, low, high):
    low, high = sorted((low, high))
    assert not (grid_mask(box, rows, cols, high) & ~grid_mask(box, rows, cols, low)).any()


@PROPERTY
@given(some=st.lists(boxes(), max_size=4), others=st.lists(boxes(), max_size=4), rows=grids, cols=grids, c=thresholds)
def test_boxes_join_by_union(some, others, rows, cols, c):
    tiles = [Tile(rows, cols)]
    joined = region_mask(some + others, tiles, c)
    assert (joined == (region_mask(some, tiles, c) | region_mask(others, tiles, c))).all()
    assert (joined == region_mask((others + some)[::-1] + some, tiles, c)).all()


@pytest.mark.parametrize("coverage", [TOUCHING, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (10, 10), (13, 6), (24, 11)])
def test_boxes_that_are_cells_tile_the_image(rows, cols, coverage):
    seen = np.zeros(rows * cols, dtype=int)
    for r in range(rows):
        for c in range(cols):
            mask = grid_mask([c / cols, r / rows, (c + 1) / cols, (r + 1) / rows], rows, cols, coverage)
            assert mask.sum() == 1  # its own cell and, at any threshold, not a neighbour
            assert mask[r, c]
            seen += mask.reshape(-1)
    assert (seen == 1).all()


@PROPERTY
@given(rows=grids, cols=grids, coverage=st.one_of(thresholds, st.just(TOUCHING)))
def test_the_whole_image_is_every_token(rows, cols, coverage):
    assert region_mask([[0.0, 0.0, 1.0, 1.0]], [Tile(rows, cols)], coverage).all()


@st.composite
def cell_spans(draw: st.DrawFn) -> tuple[int, int, int]:
    """(number of cells along a side, first cell, one past the last cell)."""
    n = draw(st.integers(1, 40))
    low = draw(st.integers(0, n - 1))
    return n, low, draw(st.integers(low + 1, n))


@PROPERTY
@given(x=cell_spans(), y=cell_spans(), coverage=st.one_of(thresholds, st.just(TOUCHING)))
def test_a_box_that_ends_on_a_border_does_not_take_the_next_cell(x, y, coverage):
    (cols, c0, c1), (rows, r0, r1) = x, y
    expected = np.zeros((rows, cols), dtype=bool)
    expected[r0:r1, c0:c1] = True
    assert (grid_mask([c0 / cols, r0 / rows, c1 / cols, r1 / rows], rows, cols, coverage) == expected).all()


@pytest.mark.parametrize(("k", "n"), [(15, 22), (23, 43), (1, 49), (28, 55)])
def test_cells_that_only_rounding_leaves_uncovered_count(k, n):
    assert k / n * n < k
    whole = [True] * k + [False] * (n - k)
    assert region_mask([[0.0, 0.0, k / n, 1.0]], [Tile(1, n)], coverage=1.0).tolist() == whole
    assert region_mask([[0.0, 0.0, 1.0, k / n]], [Tile(n, 1)], coverage=1.0).tolist() == whole


@PROPERTY
@given(box=boxes(), rows=grids, cols=grids, coverage=thresholds)
def test_swapping_the_axes_transposes_and_mirroring_mirrors(box, rows, cols, coverage):
    share = cell_coverage(box, rows, cols)
    # where rounding or the choice among equal cells decides, the two sides may differ
    assume(share.max() >= coverage + 1e-6)
    assume(np.abs(share - coverage).min() > 1e-6)
    x0, y0, x1, y1 = box
    mask = grid_mask(box, rows, cols, coverage)
    assert (grid_mask([y0, x0, y1, x1], cols, rows, coverage) == mask.T).all()
    assert (grid_mask([1 - x1, y0, 1 - x0, y1], rows, cols, coverage) == mask[:, ::-1]).all()


@PROPERTY
@given(box=boxes(), rows=grids, cols=grids, coverage=thresholds)
def test_the_marked_cells_surround_the_centre_of_the_box(box, rows, cols, coverage):
    # True whenever some cell reaches the threshold: each side loses less than half of the box.
    assume(cell_coverage(box, rows, cols).max() >= coverage)
    marked_r, marked_c = np.nonzero(grid_mask(box, rows, cols, coverage))
    centre_x, centre_y = (box[0] + box[2]) / 2 * cols, (box[1] + box[3]) / 2 * rows
    assert marked_c.min() - 1e-6 <= centre_x <= marked_c.max() + 1 + 1e-6
    assert marked_r.min() - 1e-6 <= centre_y <= marked_r.max() + 1 + 1e-6


@PROPERTY
@given(box=boxes(), rows=grids, cols=grids)
def test_the_marked_area_is_that_of_the_box_to_within_its_border(box, rows, cols):
    mask, share = grid_mask(box, rows, cols), cell_coverage(box, rows, cols)
    assume(share.max() >= 0.5)
    cut = (share > 0) & (share < 1)  # cells that the border runs through
    assert abs(mask.sum() - share.sum()) <= 0.5 * cut.sum() + 1e-6


def test_inputs_stay_as_they_are():
    box = [[0.1, 0.2, 0.3, 0.4]]
    region_mask(box, [Tile(5, 5)])
    assert box == [[0.1, 0.2, 0.3, 0.4]]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "box",
    [
        [0.1, 0.2, 0.3],
        [0.1, 0.2, 0.3, 0.4, 0.5],
        [],
        [NAN, 0, 1, 1],
        [0, 0, float("inf"), 1],
        [0, None, 1, 1],
        ["0", "0", "1", "1"],
    ],
    ids=str,
)
def test_a_box_that_is_not_four_numbers_is_refused(box):
    with refusal("V01", "four finite numbers"):
        check_box(box, where="row 3")


@pytest.mark.parametrize(
    "box", [[0.5, 0.1, 0.5, 0.9], [0.1, 0.5, 0.9, 0.5], [0.6, 0.1, 0.4, 0.9], [0.1, 0.6, 0.9, 0.4]], ids=str
)
def test_a_box_without_area_is_refused(box):
    with refusal("V02", "no area") as caught:
        check_box(box, where="row 3")
    assert "width" in caught.value.fix  # the usual cause: [x, y, width, height]


@pytest.mark.parametrize(
    "box", [[-0.1, 0, 0.5, 0.5], [0, -0.001, 0.5, 0.5], [0.5, 0, 1.0001, 1], [10, 20, 30, 40], [0, 0, 1, 2]], ids=str
)
def test_a_box_outside_the_image_is_refused(box):
    with refusal("V03", "outside"):
        check_box(box, where="row 3")


def test_the_borders_of_the_image_are_inside_and_any_kind_of_number_will_do():
    check_box([0, 0, 1, 1], where="row 3")
    check_box(np.array([0.0, 0.25, 0.5, 1.0], dtype=np.float32), where="row 3")


@pytest.mark.parametrize("coverage", [0.0, 1.1, -1.0, NAN])
def test_a_threshold_out_of_range_is_refused(coverage):
    with refusal("V04") as caught:
        region_mask([[0, 0, 1, 1]], [Tile(4, 4)], coverage)
    assert "algorithm.attn.region.coverage" in caught.value.fix


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (-1, 4), (2.5, 4)])
def test_a_grid_without_tokens_is_refused(rows, cols):
    with refusal("V05"):
        region_mask([[0, 0, 1, 1]], [Tile(rows, cols)])


def test_a_refusal_names_the_box():
    with refusal("V02") as caught:
        region_mask([[0, 0, 1, 1], [0.5, 0.5, 0.2, 0.9]], [Tile(4, 4)])
    assert caught.value.where.endswith("box 1")
    with refusal("V03") as caught:
        check_box([0, 0, 3, 4], where="train.parquet row 7")
    assert "train.parquet row 7" in str(caught.value)
    assert "[0, 0, 3, 4]" in str(caught.value)


def test_a_line_of_text_keeps_the_whole_row_of_cells_it_covers_alike():
    mask = region_mask([[0.05, 0.42, 0.95, 0.46]], [Tile(10, 10)])
    assert mask.nonzero()[0].tolist() == [41, 42, 43, 44, 45, 46, 47, 48]


def test_a_box_thinner_than_rounding_keeps_the_cell_of_its_centre():
    x = 0.3
    assert region_mask([[x, 0.9, np.nextafter(x, 1), 0.95]], [Tile(4, 4)]).nonzero()[0].tolist() == [13]
