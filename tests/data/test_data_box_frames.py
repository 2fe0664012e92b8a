"""Boxes of raw and upright pictures and of pictures of another size, and the tokens that they cover."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.boxes import PROPERTY, image, place, sizes, unit_boxes, written
from support.refusals import refusal

from sayo_verl.data.boxes import BOX_FORMATS, upright_boxes
from sayo_verl.data.mixups import FormatWatch
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import box_masks

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
        with refusal("D45", "do not show whether") as caught:
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
