"""Boxes of published data to boxes of rows: formats, frames, rules, and mix-ups that are found or rightly not found."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.boxes import KEEP_ALL, PIXELS, PROPERTY, image, place, sizes, unit_boxes, written
from support.refusals import refusal

from sayo_verl.data.boxes import BOX_FORMATS, BoxRules, Placed, place_boxes, upright_boxes
from sayo_verl.data.mixups import FormatWatch

SHARES = [name for name in BOX_FORMATS if name not in PIXELS]


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    ("box_format", "whole"),
    [
        ("xyxy", (0, 0, 640, 480)),
        ("xywh", (0, 0, 640, 480)),
        ("xyxy_unit", (0, 0, 1, 1)),
        ("xywh_unit", (0, 0, 1, 1)),
        ("xyxy_1000", (0, 0, 1000, 1000)),
        ("xyxy_unit_square", (0, 0.125, 1, 0.875)),
        ("xyxy_1000_square", (0, 125, 1000, 875)),
    ],
)
def test_the_whole_image_in_each_format(box_format, whole):
    assert place([whole], box_format).boxes == ((0.0, 0.0, 1.0, 1.0),)


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy", (64, 120, 320, 360)),
        ("xywh", (64, 120, 256, 240)),
        ("xyxy_unit", (0.1, 0.25, 0.5, 0.75)),
        ("xywh_unit", (0.1, 0.25, 0.4, 0.5)),
        ("xyxy_1000", (100, 250, 500, 750)),
        ("xyxy_unit_square", (0.1, 0.3125, 0.5, 0.6875)),
        ("xyxy_1000_square", (100, 312.5, 500, 687.5)),
    ],
)
def test_one_box_by_hand_in_each_format(box_format, box):
    (placed,) = place([box], box_format).boxes
    assert placed == pytest.approx((0.1, 0.25, 0.5, 0.75), abs=1e-12)


def test_every_format_is_tested_by_hand():
    assert set(BOX_FORMATS) == {*PIXELS, *SHARES}
    assert len(SHARES) == 5


def test_padding_to_a_square_is_by_whole_pixels():
    # 375 pixels high in a square of 500: 62 rows above and 63 below
    (box,) = place([(0, 62 / 500, 1, 437 / 500)], "xyxy_unit_square", image(500, 375)).boxes
    assert box == pytest.approx((0, 0, 1, 1), abs=1e-12)
    (box,) = place([(0.11, 0.594, 0.212, 0.664)], "xyxy_unit_square", image(500, 375)).boxes
    assert np.multiply(box, [500, 375, 500, 375]) == pytest.approx([55, 235, 106, 270], abs=1e-9)


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@PROPERTY
@given(unit=unit_boxes(), size=sizes)
def test_round_trip(box_format, unit, size):
    box = written(unit, box_format, *size)
    (placed,) = place([box], box_format, image(*size)).boxes
    assert placed == pytest.approx(unit, abs=1e-6)


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@PROPERTY
@given(unit=unit_boxes(at_least=0.1), size=st.tuples(st.integers(28, 1000), st.integers(28, 1000)))
def test_round_trip_of_rounded_values(box_format, unit, size):
    digits = 3 if "unit" in box_format else 0
    box = [round(v, digits) for v in written(unit, box_format, *size)]
    (placed,) = place([box], box_format, image(*size)).boxes
    # half a unit of the last digit, and half a one more where an extent is added to a rounded corner
    unit_px = np.array([max(size) / 1000 if "square" in box_format else s / 1000 for s in (*size, *size)])
    bound = np.ones(4) if box_format in PIXELS else unit_px
    error = np.abs(np.subtract(placed, unit)) * np.array([*size, *size])
    assert (error <= bound * (0.5 if box_format.startswith("xyxy") else 1.0) + 1e-9).all()


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@PROPERTY
@given(unit=st.lists(unit_boxes(), max_size=4), orientation=st.integers(1, 8))
def test_inputs_are_left_alone(box_format, unit, orientation):
    boxes = [list(written(box, box_format, 640, 480)) for box in unit]
    names = ["thing"] * len(boxes)
    before = copy.deepcopy((boxes, names))
    place_boxes(
        boxes,
        names,
        box_format=box_format,
        frame="upright",
        stored=image(orientation=orientation),
        annotated=None,
        rescale=False,
        where="here",
    )
    watch = FormatWatch(box_format)
    watch.add([boxes], [(640, 480)], "here")
    upright_boxes(unit, orientation)
    assert (boxes, names) == before


def test_numpy_numbers_are_numbers():
    assert place(np.array([[64, 120, 320, 360]], np.int32)).boxes == place([(64.0, 120.0, 320.0, 360.0)]).boxes


# ---------------------------------------------------------------------------------------------------- malformed boxes


BAD_VALUES = [float("nan"), float("inf"), -float("inf"), "12px", "12", None, True, [1], 10**400, 1e12, 1j]


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
@pytest.mark.parametrize("at", range(4))
def test_values_that_are_no_coordinates(box_format, value, at):
    box: list = [0.1, 0.1, 0.5, 0.5]
    box[at] = value
    with refusal("D42", "four finite numbers") as caught:
        place([(0.1, 0.1, 0.2, 0.2), box], box_format)
    assert "row 7, box 1" in str(caught.value)
    with refusal("D42"):
        FormatWatch(box_format).add([[], [box]], None, "here")


@pytest.mark.parametrize("box", [(), (1, 2, 3), (1, 2, 3, 4, 5), "1234", b"1234", None, 5, {"x": 1}], ids=str)
def test_boxes_that_are_not_four_values(box):
    with refusal("D42", "four finite numbers"):
        place([box])
    with refusal("D42"):
        FormatWatch("xyxy").add([[box]], None, "here")


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy", (300, 200, 40, 400)),
        ("xyxy", (100, 200, 300, 40)),
        ("xyxy_unit", (0.6, 0.2, 0.3, 0.4)),
        ("xyxy_1000", (600, 200, 300, 400)),
        ("xyxy_unit_square", (0.2, 0.6, 0.4, 0.3)),
    ],
)
def test_xywh_given_as_xyxy(box_format, box):
    with refusal("D43", "looks like xywh"):
        place([box], box_format)
    with refusal("D43", "looks like xywh"):
        FormatWatch(box_format).add([[box]], None, "here")


@pytest.mark.parametrize("box_format", ["xywh", "xywh_unit"])
@pytest.mark.parametrize("box", [(0.5, 0.5, -0.1, 0.2), (0.5, 0.5, 0.1, -0.2)])
def test_boxes_of_negative_extent(box_format, box):
    with refusal("D43", "negative width or height"):
        place([box], box_format)


@pytest.mark.parametrize(
    ("box_format", "box", "says"),
    [
        ("xyxy_unit", (0.1, 0.1, 0.5, 1.002), "pixels or thousandths"),
        ("xyxy_unit", (100, 100, 300, 300), "pixels or thousandths"),
        ("xywh_unit", (100, 100, 300, 1300), "looks like pixels"),
        ("xyxy_unit", (-0.002, 0.1, 0.5, 0.5), "outside of 0 .. 1"),
        ("xyxy_unit_square", (0.1, 0.1, 0.5, 640), "pixels or thousandths"),
        ("xyxy_1000", (100, 100, 500, 1002), "looks like pixels"),
        ("xyxy_1000_square", (100, 100, 1500, 500), "looks like pixels"),
        ("xyxy_1000", (-2, 100, 500, 500), "outside of 0 .. 1000"),
    ],
)
def test_values_beyond_the_format(box_format, box, says):
    with refusal("D43", says):
        place([box], box_format)
    with refusal("D43", says):
        FormatWatch(box_format).add([[box]], None, "here")


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy_unit", (-0.0009, 0, 1.0009, 1)),
        ("xywh_unit", (0.5, 0.5, 0.5009, 0.5)),
        ("xyxy_1000", (-0.9, 0, 1000.9, 1000)),
        ("xyxy_unit_square", (0, 0.1, 1.0009, 0.9)),
    ],
)
def test_rounding_at_the_border_is_clipped(box_format, box):
    assert len(place([box], box_format).boxes) == 1


@pytest.mark.parametrize("options", [{"box_format": "xyxz"}, {"frame": "Raw"}])
def test_unknown_format_or_frame(options):
    with refusal("D46", "did you mean"):
        place([(0, 0, 1, 1)], **options)


def test_names_that_do_not_fit_and_rules_out_of_range():
    with refusal("D46", "differ in number"):
        place_boxes(
            [(0, 0, 9, 9)],
            [],
            box_format="xyxy",
            frame="auto",
            stored=image(),
            annotated=None,
            rescale=False,
            where="row 7",
        )
    for rules in ({"max_area": 1.1}, {"min_area": -0.1}, {"merge_iou": math.nan}, {"min_area": 0.6}):
        with refusal("D46"):
            BoxRules(**rules)
    with refusal("D46", "did you mean"):
        FormatWatch("xyhw")


# ---------------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (10, 10, 20, 10), (10, 10, 10, 10), (0, 0, 0, 0)])
def test_boxes_without_area(box):
    assert place([box]) == Placed((), (), {"box_without_area": 1})
    x0, y0, x1, y1 = box
    assert place([(x0, y0, x1 - x0, y1 - y0)], "xywh") == Placed((), (), {"box_without_area": 1})
    assert place([(0, 0, 1e-300, 1e-300)], "xywh").left_out  # so thin that its area vanishes


@pytest.mark.parametrize(
    ("box", "placed"),
    [
        ((-100, 0, 100, 480), (0, 0, 100 / 640, 1)),  # half of it is left: kept and clipped
        ((-101, 0, 100, 480), None),
        ((600, 440, 680, 480), (600 / 640, 440 / 480, 1, 1)),
        ((600, 440, 680, 520), None),  # a quarter is left
        ((640, 0, 700, 480), None),
        ((-50, -50, -10, -10), None),
        ((-10, -10, 650, 490), (0, 0, 1, 1)),
    ],
)
def test_boxes_that_run_outside(box, placed):
    out = place([box], rules=BoxRules(max_area=1.0))
    if placed is None:
        assert out == Placed((), (), {"box_outside": 1})
    else:
        assert out.boxes[0] == pytest.approx(placed, abs=1e-12)


def test_a_box_wholly_outside_goes_whatever_the_rule():
    assert place([(640, 0, 700, 480)]).left_out == {"box_outside": 1}
    assert place([(639, 0, 1000, 480)]).boxes


@PROPERTY
@given(
    x0=st.integers(-600, 700),
    y0=st.integers(-600, 700),
    w=st.integers(1, 900),
    h=st.integers(1, 900),
    share=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
)
def test_the_area_left_exactly(x0, y0, w, h, share):
    across = max(0, min(x0 + w, 640) - max(x0, 0))
    down = max(0, min(y0 + h, 480) - max(y0, 0))
    left = Fraction(across * down, w * h)
    rules = BoxRules(min_area_left=share, max_area=1.0, min_area=0.0)
    out = place([(x0, y0, w, h)], "xywh", rules=rules)
    assert bool(out.boxes) == (left > 0 and left >= Fraction(share))


def test_area_rules_are_shares_of_the_image():
    rules = BoxRules(max_area=0.6, min_area=0.0005)
    boxes = [(0, 0, 640, 288), (0, 0, 640, 289), (0, 0, 16, 9.6), (0, 0, 16, 9.5), (100, 100, 200, 200)]
    out = place(boxes, rules=rules)
    assert out.names == ("thing 0", "thing 2", "thing 4")
    assert out.left_out == {"box_too_large": 1, "box_too_small": 1}


def test_near_duplicates_keep_the_first():
    boxes = [(0, 0, 100, 100), (0, 0, 100, 91), (0, 0, 100, 90), (300, 300, 400, 400), (0, 0, 100, 100)]
    out = place(boxes, rules=BoxRules())
    assert out.names == ("thing 0", "thing 2", "thing 3")  # 0.91, exactly 0.9, another place
    assert out.left_out == {"box_twice": 2}
    assert len(place(boxes, rules=KEEP_ALL).boxes) == 5


def test_each_box_has_one_reason_and_the_rest_keep_their_order():
    boxes = [
        (5, 5, 5, 9),
        (0, 0, 640, 480),
        (700, 0, 800, 9),
        (50, 50, 150, 150),
        (0, 0, 2, 2),
        (50, 50, 150, 151),
        (0, 0, 640, 480),
        (10, 200, 60, 400),
    ]
    out = place(boxes, rules=BoxRules())
    assert out.names == ("thing 3", "thing 7")
    assert out.left_out == {
        "box_without_area": 1,
        "box_too_large": 2,
        "box_outside": 1,
        "box_too_small": 1,
        "box_twice": 1,
    }
