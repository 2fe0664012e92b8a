"""Boxes of published data to boxes of rows: formats, frames, rules, and mix-ups that are found or rightly not found."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.refusals import refusal

from sayo_verl.data.boxes import BOX_FORMATS, BoxRules, Placed, place_boxes, upright_boxes
from sayo_verl.data.images import Stored
from sayo_verl.data.mixups import FormatWatch
from sayo_verl.data.rows import REASONS
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import box_masks, check_box

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
KEEP_ALL = BoxRules(min_area_left=0.0, merge_iou=1.0, max_area=1.0, min_area=0.0)
PIXELS = ("xyxy", "xywh")
SHARES = [name for name in BOX_FORMATS if name not in PIXELS]


def image(width: int = 640, height: int = 480, orientation: int = 1) -> Stored:
    """A stored image of that upright size."""
    raw = (height, width) if orientation >= 5 else (width, height)
    return Stored(b"", width, height, *raw, orientation, ())


def place(boxes, box_format="xyxy", stored=None, *, frame="auto", annotated=None, rescale=False, rules=KEEP_ALL):
    stored = stored or image()
    names = [f"thing {i}" for i in range(len(boxes))]
    out = place_boxes(
        boxes,
        names,
        box_format=box_format,
        frame=frame,
        stored=stored,
        annotated=annotated,
        rescale=rescale,
        rules=rules,
        where="row 7",
    )
    assert len(out.boxes) == len(out.names)
    assert len(out.boxes) + sum(out.left_out.values()) == len(boxes)  # every box is kept or counted
    assert set(out.left_out) <= set(REASONS)
    for box in out.boxes:
        check_box(box, where="here")
    return out


def written(unit, box_format: str, width: int, height: int) -> tuple[float, ...]:
    """A box in [0, 1] as a publisher would write it: the formats, the other way round."""
    x0, y0, x1, y1 = unit
    if box_format.endswith("_square"):
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        x0, x1 = ((x * width + left) / side for x in (x0, x1))
        y0, y1 = ((y * height + top) / side for y in (y0, y1))
    elif box_format in PIXELS:
        x0, x1, y0, y1 = x0 * width, x1 * width, y0 * height, y1 * height
    values = (x0, y0, x1 - x0, y1 - y0) if box_format.startswith("xywh") else (x0, y0, x1, y1)
    return tuple(1000 * v for v in values) if "1000" in box_format else values


@st.composite
def unit_boxes(draw, at_least: float = 1e-3):
    def side():
        a, b = sorted(draw(st.tuples(*[st.floats(0, 1)] * 2)))
        assume(b - a > at_least)
        return a, b

    (x0, x1), (y0, y1) = side(), side()
    return x0, y0, x1, y1


sizes = st.tuples(st.integers(28, 5000), st.integers(28, 5000))


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


# ------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pillow_turns_the_picture(orientation):
    raw = Image.new("L", (64, 40))
    box = (7, 3, 30, 11)
    raw.paste(255, box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(raw)
    stored = image(*upright.size, orientation)
    assert (stored.raw_width, stored.raw_height) == raw.size

    wanted = np.divide(upright.getbbox(), [*upright.size, *upright.size])
    (turned,) = upright_boxes([np.divide(box, [64, 40, 64, 40])], orientation)
    assert turned == pytest.approx(tuple(wanted), abs=1e-12)
    (placed,) = place([box], stored=stored, frame="raw").boxes
    assert placed == pytest.approx(tuple(wanted), abs=1e-12)
    (placed,) = place([upright.getbbox()], stored=stored, frame="upright").boxes
    assert placed == pytest.approx(tuple(wanted), abs=1e-12)


@PROPERTY
@given(unit=unit_boxes(), orientation=st.integers(1, 8), size=sizes, box_format=st.sampled_from(list(BOX_FORMATS)))
def test_round_trip_through_the_raw_frame(unit, orientation, size, box_format):
    back = {6: 8, 8: 6}.get(orientation, orientation)
    (raw_unit,) = upright_boxes([unit], back)
    stored = image(*size, orientation)
    box = written(raw_unit, box_format, stored.raw_width, stored.raw_height)
    (placed,) = place([box], box_format, stored, frame="raw").boxes
    assert placed == pytest.approx(unit, abs=1e-6)


def test_the_auto_frame_is_that_of_the_annotated_size():
    stored = image(480, 640, 6)  # 640 x 480 on its side
    box = (64, 120, 320, 360)
    assert place([box], stored=stored, annotated=(640, 480)) == place([box], stored=stored, frame="raw")
    assert place([box], stored=stored, annotated=(480, 640)) == place([box], stored=stored, frame="upright")
    assert place([box], stored=stored, frame="raw").boxes[0] == pytest.approx((0.25, 0.1, 0.75, 0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("stored", "annotated", "rescale"),
    [
        (image(480, 640, 6), None, False),
        (image(500, 500, 6), (500, 500), False),
        (image(640, 480, 3), (640, 480), False),
        (image(640, 480, 2), None, False),
        (image(480, 640, 8), (240, 320), True),
    ],
)
def test_the_auto_frame_does_not_guess(stored, annotated, rescale):
    for box_format in ("xyxy", "xyxy_unit"):
        with refusal("D45", "nothing tells") as caught:
            place([(0, 0, 0.5, 0.5)], box_format, stored, annotated=annotated, rescale=rescale)
        assert "--box-frame" in caught.value.fix
    for frame in ("raw", "upright"):
        assert place([(0, 0, 90, 90)], stored=stored, annotated=annotated, frame=frame, rescale=rescale).boxes
    assert place([], stored=stored).boxes == ()  # without a box there is nothing to tell


@pytest.mark.parametrize(("frame", "annotated"), [("raw", (480, 640)), ("upright", (640, 480))])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_frame_that_the_annotated_size_contradicts(frame, annotated, rescale):
    with refusal("D45", "are said to be"):
        place([(0, 0, 9, 9)], stored=image(480, 640, 6), frame=frame, annotated=annotated, rescale=rescale)


@pytest.mark.parametrize("frame", ["auto", "raw", "upright"])
@pytest.mark.parametrize("stored", [image(), image(480, 640, 6), image(640, 480, 3)])
@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_an_annotated_size_that_is_not_the_images(box_format, stored, frame):
    with refusal("D44", "another size") as caught:
        place([(0.1, 0.1, 0.5, 0.5)], box_format, stored, frame=frame, annotated=(320, 200))
    assert "320 x 200" in str(caught.value)
    assert "--rescale" in caught.value.fix


@pytest.mark.parametrize("box_format", BOX_FORMATS)
@PROPERTY
@given(
    unit=unit_boxes(),
    size=sizes,
    drawn_on=sizes,
    orientation=st.integers(1, 8),
    frame=st.sampled_from(["raw", "upright"]),
)
def test_rescale_takes_the_annotated_size(box_format, unit, size, drawn_on, orientation, frame):
    stored = image(*size, orientation)
    assume(drawn_on not in (size, size[::-1]))
    (turned,) = upright_boxes([unit], orientation if frame == "raw" else 1)
    box = written(unit, box_format, *drawn_on)
    (placed,) = place([box], box_format, stored, frame=frame, annotated=drawn_on, rescale=True).boxes
    assert placed == pytest.approx(turned, abs=1e-6)


@pytest.mark.parametrize("size", [(0, 480), (640, -1), (640.0, 480), (True, 480), (640,), (640, 480, 3), ("640", 480)])
def test_annotated_sizes_that_are_none(size):
    with refusal("D44", "no size"):
        place([(0, 0, 9, 9)], annotated=size)
    with refusal("D44", "no size"):
        FormatWatch("xyxy").add([[(0, 0, 9, 9)]], [size], "here")


# ------------------------------------------------------------------------------------------------- boxes to tokens


@PROPERTY
@given(
    unit=unit_boxes(),
    size=sizes,
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    box_format=st.sampled_from(list(BOX_FORMATS)),
)
def test_the_tokens_of_a_placed_box_hold_it(unit, size, rows, cols, box_format):
    (box,) = place([written(unit, box_format, *size)], box_format, image(*size)).boxes
    mask = box_masks([box], (Tile(rows, cols),), coverage=1e-12)[0].reshape(rows, cols)
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert across[0] / cols <= box[0] + 1e-6
    assert down[0] / rows <= box[1] + 1e-6
    assert (across[-1] + 1) / cols >= box[2] - 1e-6
    assert (down[-1] + 1) / rows >= box[3] - 1e-6
    assert mask.sum() == len(down) * len(across)  # and no token of a row or column that it does not touch
    assert (across[0] + 1) / cols > box[0] - 1e-6
    assert across[-1] / cols < box[2] + 1e-6


# ------------------------------------------------------------------------------------------------------------ mix-ups


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
