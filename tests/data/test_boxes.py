"""Boxes of published data to boxes of rows: formats, frames, rules, and mix-ups that are found or rightly not found."""

import copy
import decimal

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.boxes import PROPERTY, image, place, sizes, unit_boxes, written
from support.refusals import refusal

from sayo_verl.data.boxes import BOX_FORMATS, Placed, doubt, place_boxes

FORMATS = pytest.mark.parametrize("box_format", BOX_FORMATS)


BY_HAND = {
    "xyxy": (64, 120, 320, 360),
    "xywh": (64, 120, 256, 240),
    "cxcywh": (192, 240, 256, 240),
    "xyxy_unit": (0.1, 0.25, 0.5, 0.75),
    "xywh_unit": (0.1, 0.25, 0.4, 0.5),
    "cxcywh_unit": (0.3, 0.5, 0.4, 0.5),
    "xyxy_percent": (10, 25, 50, 75),
    "xywh_percent": (10, 25, 40, 50),
    "xyxy_1000": (100, 250, 500, 750),
    "yxyx_1000": (250, 100, 750, 500),
    "xyxy_unit_square": (0.1, 0.3125, 0.5, 0.6875),
    "xyxy_1000_square": (100, 312.5, 500, 687.5),
}


@FORMATS
def test_one_box_by_hand_in_each_format(box_format):
    (placed,) = place([BY_HAND[box_format]], box_format).boxes
    assert placed == pytest.approx((0.1, 0.25, 0.5, 0.75), abs=1e-12)


def test_padding_to_a_square_is_by_whole_pixels():
    # 375 pixels high in a square of 500: 62 rows above and 63 below
    (box,) = place([(0.11, 0.594, 0.212, 0.664)], "xyxy_unit_square", image(500, 375)).boxes
    assert np.multiply(box, [500, 375, 500, 375]) == pytest.approx([55, 235, 106, 270], abs=1e-9)


@FORMATS
@PROPERTY
@given(unit=unit_boxes(), drawn_on=sizes, size=sizes, orientation=st.integers(1, 8), rescale=st.booleans())
def test_round_trip_through_each_format_and_frame(box_format, unit, drawn_on, size, orientation, rescale):
    back = {6: 8, 8: 6}.get(orientation, orientation)
    (raw,) = place([unit], "xyxy_unit", image(orientation=back), frame="raw").drawn
    for frame, before in (("upright", unit), ("raw", raw)):
        stored = image(*size, orientation)
        on = drawn_on if rescale else size if frame == "upright" else (stored.raw_width, stored.raw_height)
        assume(not rescale or on not in (size, size[::-1]))
        box = written(before, box_format, *on)
        given_size = on if rescale else None
        (placed,) = place([box], box_format, stored, frame=frame, annotated=given_size, rescale=rescale).boxes
        assert placed == pytest.approx(unit, abs=1e-6)


def test_inputs_are_left_alone_and_other_kinds_of_numbers_are_read():
    boxes, names = [[64, 120, 320, 360]], ["thing"]
    before = copy.deepcopy((boxes, names))
    how = {"box_format": "xyxy", "frame": "auto", "stored": image(), "annotated": None, "rescale": False, "where": ""}
    placed = place_boxes(boxes, names, **how)
    assert (boxes, names) == before
    for values in (np.array(boxes, np.int32), [[decimal.Decimal(v) for v in boxes[0]]], np.array(boxes, np.float32)):
        assert place_boxes(values, names, **how) == placed


BAD_VALUES = [float("nan"), float("inf"), "12px", "12", None, True, [1], 10**400, 1e12, 1j, decimal.Decimal("NaN")]
BAD_BOXES = [(), (1, 2, 3), (1, 2, 3, 4, 5), "1234", None, 5, {"x": 1}]


@pytest.mark.parametrize("box", [*[(0.1, 0.1, value, 0.5) for value in BAD_VALUES], *BAD_BOXES], ids=str)
def test_boxes_that_are_not_four_numbers(box):
    with refusal("D42", "four finite numbers") as caught:
        place([(0.1, 0.1, 0.5, 0.5), box], "xyxy_unit")
    assert "row 7, box 1" in str(caught.value)


@pytest.mark.parametrize(
    ("box_format", "box", "says"),
    [
        ("xyxy", (300, 200, 40, 400), "ends before"),
        ("xyxy_unit", (0.1, 0.6, 0.3, 0.4), "ends before"),
        ("yxyx_1000", (600, 200, 300, 400), "ends before"),
        ("xywh", (50, 50, -10, 20), "ends before"),
        ("cxcywh_unit", (0.5, 0.5, 0.1, -0.2), "ends before"),
        ("xyxy_unit", (100, 100, 300, 300), "outside of 0 to 1"),
        ("cxcywh_unit", (0.5, 0.5, 0.1, 96), "outside of 0 to 1"),
        ("xywh_percent", (10, 10, 300, 50), "outside of 0 to 100"),
        ("xyxy_1000", (100, 100, 1002, 500), "outside of 0 to 1000"),
        ("xyxy_1000_square", (-2, 100, 500, 500), "outside of 0 to 1000"),
    ],
)
def test_a_box_that_is_impossible_in_its_format_names_no_other_format(box_format, box, says):
    with refusal("D43", says) as caught:
        place([box], box_format)
    assert "publisher's description" in caught.value.fix
    assert set(str(caught.value).replace(":", " ").split()) & set(BOX_FORMATS) == {box_format}


def test_boxes_that_reach_a_little_over_the_edge_are_clipped():
    over = {"xyxy_unit": (-0.02, 0, 0.5, 1), "xywh_percent": (80, 10, 30, 40), "xyxy_1000": (500, 500, 1000.9, 1000)}
    for box_format, box in over.items():
        assert place([box], box_format).boxes


@pytest.mark.parametrize(
    ("box_format", "says"), [("xywh_unti", "did you mean"), (None, "not given"), ("", "not given")]
)
def test_an_unknown_format_names_the_flag_and_the_formats(box_format, says):
    with refusal("D46", says) as caught:
        place([(0, 0, 9, 9)], box_format)
    assert "--box-format" in caught.value.fix
    assert "cxcywh_unit" in str(caught.value)
    assert place([], box_format, image(480, 640, 6)) == Placed((), (), ())  # without boxes nothing is asked


UNUSABLE = {
    "box_without_area": [(10, 10, 10, 20), (10, 10, 20, 10), (0, 0, 0, 0), (0, 0, 1e-200, 1e-200)],
    "box_outside": [(-101, 0, 100, 480), (600, 440, 680, 520), (640, 0, 700, 480)],
    "box_too_large": [(0, 0, 640, 289)],
    "box_too_small": [(0, 0, 16, 9.5), (0.1, 0.2, 0.9, 1.0)],  # the last: shares among pixels
    "": [(-100, 0, 100, 480), (600, 440, 680, 480), (0, 0, 640, 288), (0, 0, 16, 9.6)],
}


@pytest.mark.parametrize(("reason", "box"), [(reason, box) for reason, boxes in UNUSABLE.items() for box in boxes])
def test_one_unusable_box_makes_the_region_unusable(reason, box):
    good = (100, 100, 200, 200)
    out = place([good, box, (300, 300, 400, 400)])
    assert (out.reason, out.detail) == (reason, "1 of 3 boxes" if reason else "")
    assert len(out.boxes) == (0 if reason else 3)
    assert out.drawn[1] == pytest.approx(np.divide(box, (640, 480, 640, 480)))
    assert place([(0, 0, 1, 1)], stored=image(28, 28)).reason == "box_too_small"  # though not by its share


def test_exact_duplicates_are_merged_and_near_ones_stay():
    out = place([(0, 0, 0.3, 0.1), (0, 0, 0.3, 0.1 + 1e-9), (0, 0, 0.3, 0.101), (0, 0, 0.3, 0.1)], "xyxy_unit")
    assert out.names == ("thing 0", "thing 2")
    assert len(out.drawn) == 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pillow_turns_the_picture(orientation):
    raw = Image.new("L", (64, 40))
    box = (7, 3, 30, 11)
    raw.paste(255, box)
    raw.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(raw)
    stored = image(*upright.size, orientation)
    wanted = np.divide(upright.getbbox(), [*upright.size, *upright.size])
    for drawn, frame in ((box, "raw"), (upright.getbbox(), "upright")):
        (placed,) = place([drawn], stored=stored, frame=frame).boxes
        assert placed == pytest.approx(tuple(wanted), abs=1e-12)


def test_the_auto_frame_is_that_of_the_annotated_size():
    stored = image(480, 640, 6)  # 640 x 480 on its side
    box = (64, 120, 320, 360)
    assert place([box], stored=stored, annotated=(640, 480)) == place([box], stored=stored, frame="raw")
    assert place([box], stored=stored, annotated=[480, 640]) == place([box], stored=stored, frame="upright")
    assert place([box], stored=stored, frame="raw").boxes[0] == pytest.approx((0.25, 0.1, 0.75, 0.5), abs=1e-12)


AMBIGUOUS = [(image(480, 640, 6), None, False), (image(500, 500, 6), (500, 500), False)]
AMBIGUOUS += [(image(640, 480, 3), (640, 480), False), (image(480, 640, 8), (240, 320), True)]


@pytest.mark.parametrize(("stored", "annotated", "rescale"), AMBIGUOUS)
def test_the_auto_frame_does_not_guess(stored, annotated, rescale):
    with refusal("D45", "do not show whether") as caught:
        place([(0, 0, 90, 90)], stored=stored, annotated=annotated, rescale=rescale)
    assert "--box-frame" in caught.value.fix
    for frame in ("raw", "upright"):
        assert place([(0, 0, 90, 90)], stored=stored, annotated=annotated, frame=frame, rescale=rescale).boxes


def test_a_frame_that_the_annotated_size_contradicts():
    for frame, annotated in (("raw", (480, 640)), ("upright", (640, 480))):
        with refusal("D45", "contradicts"):
            place([(0, 0, 90, 90)], stored=image(480, 640, 6), frame=frame, annotated=annotated)


@pytest.mark.parametrize("stored", [image(), image(480, 640, 6)])
def test_an_annotated_size_that_is_not_the_images(stored):
    with refusal("D44", "another size") as caught:
        place([(10, 10, 50, 50)], stored=stored, annotated=(320, 200))
    assert "--rescale" in caught.value.fix


PHOTOS = [(640, 480), (480, 640), (500, 375), (333, 500), (640, 427)]
LARGE = [(4000, 3000), (3024, 4032), (1920, 1080)]


def honest(kind: str, n: int, seed: int) -> np.ndarray:
    """float64 [N, 4] in [0, 1]: boxes as photos, close-ups, products and traffic signs have them."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(np.log(0.15), 0.8, n))
    centre = rng.normal(0.5, 0.24, (n, 2))
    if kind == "large":  # and in the centre, as in cases of COCO
        size, centre = rng.uniform(0.5, 0.75, n), rng.normal(0.5, 0.02, (n, 2))
    elif kind == "product":
        size, centre = rng.uniform(0.1, 0.25, n), rng.normal(0.5, 0.03, (n, 2))
    elif kind == "sign":  # nothing is in the lower half
        size, centre = size / 3, rng.uniform([0, 0.05], [1, 0.4], (n, 2))
    ratio = np.exp(rng.normal(0, 0.4, n))
    extent = np.clip(np.stack([size * ratio, size / ratio], 1), 0.02, 0.98)
    centre = np.clip(centre, extent * 0.3, 1 - extent * 0.3)
    boxes = np.clip(np.concatenate([centre - extent / 2, centre + extent / 2], 1), 0, 1)
    if kind == "sloppy":  # as in scene graphs, one end in ten is a little beyond the edge
        boxes[:, 2:] += (rng.random((n, 2)) < 0.1) * (boxes[:, 2:] > 0.8) * rng.exponential(0.03, (n, 2))
    return boxes


def read_as(true: str, named: str, boxes: np.ndarray, pictures) -> np.ndarray:
    """float64 [N, 4]: boxes that are published in one format and read in another one."""
    drawn = []
    for i, unit in enumerate(boxes):
        size = pictures[i % len(pictures)]
        drawn += place([written(unit, true, *size)], named, image(*size)).drawn
    return np.array(drawn)


@pytest.mark.parametrize("kind", ["photo", "sloppy", "large", "product", "sign"])
@pytest.mark.parametrize("n", [1, 5, 20, 100, 300, 3000])
def test_honest_boxes_raise_no_doubt(kind, n):
    for seed in range(40 if n < 3000 else 3):
        boxes = honest(kind, n, seed)
        for drawn in (boxes, np.clip(boxes, 0, 1)):
            assert doubt(drawn, "xywh") is None
            assert doubt(drawn, "xyxy_1000") is None


def test_no_boxes_placeholders_and_one_box_of_many_rows_raise_no_doubt():
    assert doubt(np.zeros((0, 4)), "") is None
    assert doubt(np.zeros((30, 4)), "xyxy") is None
    assert doubt(np.tile([[0.7, 0.2, 1.4, 0.6]], (300, 1)), "xywh") is None


@pytest.mark.parametrize(
    ("true", "named", "kind", "pictures"),
    [
        ("xyxy", "xywh", "photo", PHOTOS),
        ("xyxy", "xywh", "large", PHOTOS),
        ("xyxy_unit", "cxcywh_unit", "photo", PHOTOS),
        ("cxcywh_unit", "xywh_unit", "photo", PHOTOS),
        ("xywh_unit", "cxcywh_unit", "photo", PHOTOS),
        ("xyxy_unit", "xyxy", "photo", PHOTOS + LARGE),
        ("xyxy_unit", "xyxy_1000", "photo", PHOTOS),
        ("xyxy_unit", "xyxy_percent", "photo", PHOTOS),
        ("xyxy_1000", "xyxy", "photo", PHOTOS),
        ("xyxy_1000", "xyxy", "photo", LARGE),
        ("xyxy_1000", "xyxy", "photo", [(1920, 1080)]),
        ("xyxy", "xyxy_1000", "photo", PHOTOS),
        ("xyxy_percent", "xyxy_1000", "photo", PHOTOS),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_mix_ups_are_doubted(true, named, kind, pictures, seed):
    found = doubt(read_as(true, named, honest(kind, 100, seed), pictures), named)
    assert found
    assert doubt(read_as(true, named, honest(kind, 50, seed), pictures), named)
    assert not set(found.split()) & set(BOX_FORMATS)


def test_corner_and_extent_of_large_centred_boxes_read_as_corners():
    boxes = honest("large", 100, 0)
    boxes[:, 2:] -= boxes[:, :2]
    assert "upper left quarter" in doubt(boxes, "xyxy")


def test_two_shares_among_hundreds_of_pixel_boxes_are_doubted():
    boxes = honest("photo", 300, 0)
    boxes[:2] /= 640, 480, 640, 480
    assert "2 of 300" in doubt(boxes, "xyxy")
    assert doubt(boxes, "xyxy_unit") is None
    assert doubt(np.concatenate([boxes[2:], [[0, 0, 0.01, 0.01], [0, 0, 0.01, 0.02]]]), "xyxy") is None
    assert doubt(boxes[:1], "xyxy")  # all of them


def test_clipped_boxes_still_tell_thousandths_and_centres():
    for true, named, pictures in (("xyxy_1000", "xyxy", LARGE), ("cxcywh_unit", "xywh_unit", PHOTOS)):
        assert doubt(np.clip(read_as(true, named, honest("photo", 300, 1), pictures), 0, 1), named)


def test_a_few_boxes_of_another_format_among_many_and_half_of_a_few_are_doubted():
    rng = np.random.default_rng(0)
    begin, size = rng.uniform(0.3, 0.6, (200, 2)), rng.uniform(0.1, 0.3, (200, 2))
    right, wrong = np.hstack([begin, begin + size]), np.hstack([begin, 2 * begin + size])  # corners read as extents
    assert doubt(right, "xywh") is None
    found = doubt(np.vstack([right[20:], wrong[:20]]), "xywh")
    assert found
    assert "by more than half" in found
    assert doubt(wrong[:6], "xywh")
    assert doubt(right[:6], "xywh") is None
    assert doubt(wrong[:3], "xywh") is None  # too few to judge
