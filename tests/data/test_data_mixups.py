"""Boxes published in another format than the one named are found."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boxes import PROPERTY, unit_boxes, written
from support.refusals import refusal

from sayo_verl.data.boxes import BOX_FORMATS
from sayo_verl.data.mixups import FormatWatch

PHOTOS = [(640, 480), (480, 640), (500, 375), (333, 500), (640, 427), (1024, 683)]


LARGE = [(4000, 3000), (3024, 4032), (1920, 1080), (2048, 1536)]


def random_boxes(n: int, seed: int, *, large: float = 0.0) -> np.ndarray:
    """float64 [n, 4] in [0, 1]: extents from small to nearly all, at any place; some touch the border."""
    rng = np.random.default_rng(seed)
    extent = rng.beta(1, 4, (n, 2)) * (1 - large) + large
    extent = np.clip(extent, 0.01, 1)
    corner = rng.random((n, 2)) * (1 - extent)
    corner[rng.random((n, 2)) < 0.1] = 0.0
    return np.concatenate([corner, corner + extent], 1)


def watch_over(box_format: str, boxes, of_sizes, told=True) -> None:
    watch = FormatWatch(box_format)
    for i, (box, size) in enumerate(zip(boxes, of_sizes, strict=True)):
        watch.add([[box]], [size] if told else None, f"row {i}")
    watch.finish()


def publish(true_format: str, n: int, of_sizes, seed: int = 0, large: float = 0.0, digits: int | None = None):
    sizes = list(itertools.islice(itertools.cycle(of_sizes), n))
    boxes = [written(u, true_format, *s) for u, s in zip(random_boxes(n, seed, large=large), sizes, strict=True)]
    digits = digits if digits is not None else (3 if "unit" in true_format else 0)
    return [[round(v, digits) for v in box] for box in boxes], sizes


@pytest.mark.parametrize("true_format", BOX_FORMATS)
@pytest.mark.parametrize(
    "of_sizes",
    [PHOTOS, LARGE, PHOTOS + LARGE, [(800, 557)], [(4800, 3000)], [(1000, 1000)], [(300, 2000)], [(448, 448)]],
    ids=str,
)
@settings(PROPERTY, max_examples=12)
@given(seed=st.integers(0, 10**6), n=st.sampled_from([1, 2, 5, 20, 200, 400]), large=st.sampled_from([0.0, 0.3, 0.6]))
def test_honest_boxes_raise_no_alarm(true_format, of_sizes, seed, n, large):
    boxes, sizes = publish(true_format, n, of_sizes, seed, large)
    watch_over(true_format, boxes, sizes)
    watch_over(true_format, boxes, sizes, told=False)


@PROPERTY
@given(
    data=st.lists(
        st.tuples(unit_boxes(at_least=0.02), st.tuples(st.integers(56, 3000), st.integers(56, 3000))), max_size=40
    ),
    true_format=st.sampled_from(list(BOX_FORMATS)),
)
def test_any_few_honest_boxes_raise_no_alarm(data, true_format):
    watch_over(true_format, [written(unit, true_format, *size) for unit, size in data], [size for _, size in data])


@pytest.mark.parametrize("true_format", BOX_FORMATS)
def test_one_box_of_many_rows_is_one_box(true_format):
    for unit in random_boxes(30, 1):
        box = written(unit, true_format, 4000, 3000)
        watch_over(true_format, [box] * 500, [(4000, 3000)] * 500)


def test_a_box_that_runs_out_and_is_asked_about_often_is_one_box():
    boxes, sizes = publish("xyxy", 20, PHOTOS)
    watch_over("xyxy", [*boxes, *[[500, 100, 900, 300]] * 100], [*sizes, *[(640, 480)] * 100])


def test_boxes_of_few_rows_are_no_evidence_of_where_boxes_can_be():
    boxes, _ = publish("xyxy_1000", 100, [(4000, 3000)])
    rows = [boxes[i::4] for i in range(4)]
    watch = FormatWatch("xyxy")
    for row in rows:
        watch.add([row], [(4000, 3000)], "here")
    watch.finish()
    for i in range(5):
        watch.add([[[0, 0, 990 + i, 990 + i]]], [(4000, 3000)], "here")
    with refusal("D43", "xyxy_1000"):
        watch.finish()


def test_boxes_that_only_end_in_the_first_pixel_are_not_taken_for_shares():
    watch_over("xyxy", [(-50, -50, 1, 1), (-90, -50, 1, 1), (-50, -60, 0.5, 1)], [(640, 480)] * 3)


def test_honest_boxes_that_run_out_a_little_or_rarely():
    boxes, sizes = publish("xywh", 300, PHOTOS)
    for i in range(0, 300, 10):  # one in ten far out, as in scene graphs
        boxes[i][2] = sizes[i][0]
    for i in range(1, 300, 2):  # every other one by a pixel or two
        boxes[i][2] = sizes[i][0] - boxes[i][0] + 2
    watch_over("xywh", boxes, sizes)


@pytest.mark.parametrize(
    ("named", "true_format", "of_sizes", "looks"),
    [
        ("xyxy", "xyxy_unit", PHOTOS, "xyxy_unit"),
        ("xyxy", "xyxy_unit", LARGE, "xyxy_unit"),
        ("xywh", "xywh_unit", PHOTOS, "xywh_unit"),
        ("xyxy_1000", "xyxy_unit", PHOTOS, "xyxy_unit"),
        ("xyxy_1000_square", "xyxy_unit_square", PHOTOS, "xyxy_unit_square"),
        ("xyxy", "xyxy_1000", PHOTOS, "xyxy_1000"),
        ("xyxy", "xyxy_1000", LARGE, "xyxy_1000"),
        ("xyxy", "xyxy_1000", PHOTOS + LARGE, "xyxy_1000"),
        ("xywh", "xyxy_1000", LARGE, "xyxy_1000"),
        ("xywh", "xyxy", PHOTOS, "xyxy"),
        ("xywh", "xyxy", LARGE, "xyxy"),
        ("xywh_unit", "xyxy_unit", PHOTOS, "xyxy_unit"),
        ("xyxy_1000", "xyxy", PHOTOS[:-1], "xyxy"),
        ("xyxy_unit", "xyxy_unit_square", PHOTOS, "xyxy_unit_square"),
        ("xyxy_1000", "xyxy_1000_square", PHOTOS, "xyxy_1000_square"),
        ("xyxy_unit_square", "xyxy_unit", PHOTOS, "xyxy_unit"),
        ("xyxy_1000_square", "xyxy_1000", PHOTOS, "xyxy_1000"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_mix_ups_are_found_within_the_first_400_boxes(named, true_format, of_sizes, looks, seed):
    boxes, sizes = publish(true_format, 400, of_sizes, seed)
    with refusal("D43", rf"probably not {named}; they look like .*\b{looks} ") as caught:
        watch_over(named, boxes, sizes)
    assert "--box-format=" in caught.value.fix
    assert "row" in caught.value.where


@pytest.mark.parametrize("true_format", ["xywh", "xywh_unit"])
@pytest.mark.parametrize("of_sizes", [PHOTOS, LARGE])
def test_xywh_named_xyxy_stops_at_the_first_box_that_shows_it(true_format, of_sizes):
    boxes, sizes = publish(true_format, 50, of_sizes)
    with refusal("D43", "looks like xywh"):
        watch_over(true_format.replace("xywh", "xyxy"), boxes, sizes)


def test_thousandths_as_xywh_are_found_though_there_is_no_such_format():
    boxes, sizes = publish("xyxy_1000", 300, PHOTOS)
    boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
    with refusal("D43", "look like .*thousandths") as caught:
        watch_over("xywh", boxes, sizes)
    assert "--box-format=xywh_1000" not in str(caught.value)


def test_boxes_that_fit_nothing_are_refused_without_a_guess():
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 3000, (300, 2))
    boxes = np.concatenate([corner, corner + 200], 1).tolist()
    with refusal("D43", "probably not xyxy") as caught:
        watch_over("xyxy", boxes, [(640, 480)] * 300)
    assert "look like" not in str(caught.value)
    assert "image sizes" in caught.value.fix


def test_a_mix_up_stops_after_200_boxes_and_a_small_one_at_the_end():
    boxes, sizes = publish("xyxy_unit", 300, PHOTOS)
    watch = FormatWatch("xyxy")
    with refusal("D43"):
        for i, (box, size) in enumerate(zip(boxes, sizes, strict=True)):
            watch.add([[box]], [size], f"row {i}")
    assert i < 250  # some boxes are equal, and count once
    watch = FormatWatch("xyxy")
    watch.add([boxes[:3], []], None, "row 0")
    with refusal("D43", "xyxy_unit"):
        watch.finish()


def test_rows_without_boxes_or_with_placeholders_raise_no_alarm():
    watch = FormatWatch("xyxy")
    watch.add([], None, "row 0")
    watch.add([[], []], [None, (640, 480)], "row 1")
    watch.add([[(0, 0, 0, 0)]], [(640, 480)], "row 2")
    watch.finish()


def test_watching_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr("sayo_verl.data.mixups.AT_MOST", 50)
    boxes, sizes = publish("xyxy", 300, PHOTOS)
    watch = FormatWatch("xyxy")
    for box, size in zip(boxes, sizes, strict=True):
        watch.add([[box]], [size], "here")
    assert len(watch._seen) == 50
    with refusal("D43"):  # the format of each box is still looked at
        watch.add([[(9, 9, 3, 3)]], None, "here")


def test_the_summary_says_how_many_boxes_the_format_was_checked_on():
    for rows, enough in ((3, False), (40, True)):
        boxes, sizes = publish("xyxy", rows, PHOTOS)
        watch = FormatWatch("xyxy")
        for box, size in zip([*boxes, boxes[0]], [*sizes, sizes[0]], strict=True):
            watch.add([[box]], [size], "row")
        assert watch.summary().startswith(f"box format xyxy: {rows} different boxes in {rows} rows fit it")
        assert ("too few" in watch.summary()) != enough
