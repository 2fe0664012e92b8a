"""Boxes as published data write them, to boxes as the rows hold them: [x0, y0, x1, y1] in [0, 1] of the upright image.

Nothing about a box is guessed. Its format is named by whoever prepares the data (``BOX_FORMATS``), and what it was
drawn on is the size that the source states, if it does, and one of two frames: the file's pixels as they lie ("raw"),
or the picture as its EXIF orientation turns it ("upright"). They differ in a few photos of most collections, and a box
in the wrong frame trains the wrong region without any error.

    format             x0 means                                              whole image of 640 x 480
    xyxy               pixels, corners, x1 and y1 exclusive                  0 0 640 480
    xywh               pixels, corner and extent                             0 0 640 480
    xyxy_unit          share of the width and of the height, corners         0 0 1 1
    xywh_unit          the same, corner and extent                           0 0 1 1
    xyxy_1000          thousandths of the width and of the height            0 0 1000 1000
    xyxy_unit_square   share of the side of the padded square                0 0.125 1 0.875
    xyxy_1000_square   thousandths of the side of the padded square          0 125 1000 875

Padded: the image is pasted into a square of side max(w, h), ``(side - shorter) // 2`` from its upper or left edge
(``expand2square`` of LLaVA, which Visual-CoT's conversations follow).

Mix-ups of formats are looked for twice. Each box is held to its format here; what no single box shows, such as
thousandths among pixels, ``sayo_verl.data.mixups`` finds in many.
"""

import decimal
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sayo_verl.data.images import Stored
from sayo_verl.errors import SayoError, did_you_mean

BOX_FORMATS: Mapping[str, str] = {
    "xyxy": "x0, y0, x1, y1 in pixels",
    "xywh": "x0, y0, width, height in pixels",
    "xyxy_unit": "x0, y0, x1, y1 in [0, 1] of the width and the height",
    "xywh_unit": "x0, y0, width, height in [0, 1] of the image's width and height",
    "xyxy_1000": "x0, y0, x1, y1 in 0 .. 1000 of the width and the height",
    "xyxy_1000_square": "x0, y0, x1, y1 in 0 .. 1000 of the image padded to a centred square",
    "xyxy_unit_square": "x0, y0, x1, y1 in [0, 1] of the image padded to a centred square",
}
FRAMES = ("auto", "raw", "upright")
SLACK = 1e-3  # how far a share of the image may lie outside of [0, 1]: rounding to three digits
LARGEST = 1e9  # no coordinate is larger; keeps all arithmetic finite

Box = tuple[float, float, float, float]


class Form(NamedTuple):
    extent: bool  # width and height instead of the second corner
    scale: float | None  # what 1 is written as; None: pixels
    square: bool


FORMS = {
    name: Form(name.startswith("xywh"), 1000.0 if "1000" in name else 1.0 if "unit" in name else None, "square" in name)
    for name in (*BOX_FORMATS, "xywh_1000")  # the last is only suspected, never asked for
}


@dataclass(frozen=True)
class BoxRules:
    """Which boxes are kept. Areas are shares of the image's area; each drop is counted.

    Attributes:
        min_area_left: a box is dropped when less than this share of its area lies inside the image; the rest are
            clipped. 0 keeps whatever is left.
        merge_iou: a box is dropped when its intersection over union with an earlier one of the same image is larger;
            1 keeps all.
        max_area: a larger box is dropped: attention to nearly everything says little. 1 keeps all.
        min_area: a smaller box is dropped: it is much smaller than a visual token. 0 keeps all.
    """

    min_area_left: float = 0.5
    merge_iou: float = 0.9
    max_area: float = 0.6
    min_area: float = 0.0005

    def __post_init__(self) -> None:
        values = (self.min_area_left, self.merge_iou, self.max_area, self.min_area)
        if not all(0 <= value <= 1 for value in values) or self.min_area >= self.max_area:
            raise SayoError(
                "D46",
                "a rule for boxes is out of range",
                where="BoxRules",
                got=self,
                wanted="each in [0, 1], min_area < max_area",
                fix="leave it out to use its default",
            )


_DEFAULTS = BoxRules()


@dataclass(frozen=True)
class Placed:
    """The boxes of one image.

    Attributes:
        boxes: ``[x0, y0, x1, y1]`` in [0, 1] of the stored image, ``x0 < x1``, ``y0 < y1``, in their order.
        names: one for each.
        left_out: reason (of ``rows.REASONS``) -> how many boxes.
    """

    boxes: tuple[Box, ...]
    names: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)


def place_boxes(
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    box_format: str,
    frame: str,
    stored: Stored,
    annotated: tuple[int, int] | None,
    rescale: bool,
    rules: BoxRules = _DEFAULTS,
    where: str,
) -> Placed:
    """The boxes of one image in [0, 1] of the image as it is stored.

    Args:
        boxes: four numbers each, in ``box_format``.
        names: one for each box.
        box_format: key of ``BOX_FORMATS``.
        frame: what the boxes were drawn on: "raw", the file's pixels, "upright", the picture turned by its EXIF
            orientation, or "auto": the one of them that has the annotated size. Where there is no orientation they
            are one and nothing is asked.
        stored: the image.
        annotated: (width, height) of what the boxes were drawn on, as the source says; None: it does not say.
        rescale: the boxes were drawn on a resized copy: take the annotated size for the whole image though the image
            has another one. Wrong for a crop, which nothing here can tell from a resize.
        rules: which boxes are kept.
        where: names the image in errors.

    Returns:
        What is left; dropped for ``box_without_area``, ``box_outside``, ``box_too_large``, ``box_too_small``,
        ``box_twice``, in this order.

    Raises:
        SayoError: D42 for a box that is not four finite numbers, D43 for one that cannot be in its format, D44 for an
            annotated size that is not the image's, D45 if the frame is unknown, D46 for an unknown format or
            frame and for names that do not fit the boxes.
    """
    form = form_of(box_format, where)
    if frame not in FRAMES:
        raise SayoError(
            "D46",
            f"unknown frame {frame!r}{did_you_mean(frame, FRAMES)}",
            where=where,
            wanted=FRAMES,
            fix="set --box-frame to one of them",
        )
    if len(names) != len(boxes):
        raise SayoError(
            "D46",
            "boxes and their names differ in number",
            where=where,
            got=f"{len(boxes)} boxes, {len(names)} names",
            fix="give one name for each box",
        )
    values = [check_values(box, box_format, f"{where}, box {i}") for i, box in enumerate(boxes)]
    if not values:
        return Placed((), ())
    size, turn = _drawn_on(frame, stored, annotated, rescale, where)

    kept: list[Box] = []
    kept_names: list[str] = []
    left_out: dict[str, int] = {}
    for value, name in zip(values, names, strict=True):
        box, reason = _inside(to_unit(value, form, size), rules.min_area_left)
        if not reason:
            (box,) = upright_boxes([box], turn)
            area = area_of(box)
            if area <= 0:  # thinner than a float64 can tell
                reason = "box_without_area"
            elif area > rules.max_area:
                reason = "box_too_large"
            elif area < rules.min_area:
                reason = "box_too_small"
            elif any(_iou(box, other) > rules.merge_iou for other in kept):
                reason = "box_twice"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            kept.append(box)
            kept_names.append(name)
    return Placed(tuple(kept), tuple(kept_names), left_out)


def upright_boxes(boxes: Sequence[Sequence[float]], orientation: int) -> list[Box]:
    """Boxes in [0, 1] of a file's pixels to boxes in [0, 1] of the picture that its EXIF orientation makes of them.

    Args:
        boxes: corners ``[x0, y0, x1, y1]``.
        orientation: 1 (as it lies) to 8, as ``images.TURNS``.
    """
    if orientation not in range(1, 9):
        raise AssertionError(f"no such orientation: {orientation}")
    out: list[Box] = []
    for x0, y0, x1, y1 in boxes:
        if orientation >= 5:  # transposed first, then mirrored
            x0, y0, x1, y1 = y0, x0, y1, x1
        if orientation in (2, 3, 6, 7):
            x0, x1 = 1 - x1, 1 - x0
        if orientation in (3, 4, 7, 8):
            y0, y1 = 1 - y1, 1 - y0
        out.append((x0, y0, x1, y1))
    return out


def _drawn_on(
    frame: str, stored: Stored, annotated: tuple[int, int] | None, rescale: bool, where: str
) -> tuple[tuple[int, int], int]:
    """The size of what the boxes were drawn on, and the EXIF orientation that is still to be applied to them."""
    sizes = {"raw": (stored.raw_width, stored.raw_height), "upright": (stored.width, stored.height)}
    if annotated is not None:
        check_size(annotated, where)
    matching = [name for name, size in sizes.items() if annotated is not None and tuple(annotated) == size]
    if annotated is not None and not matching and not rescale:
        raise SayoError(
            "D44",
            "the boxes were drawn on an image of another size",
            where=where,
            got=f"annotated {_by(annotated)}, image {_by(sizes['upright'])}",
            wanted="equal sizes",
            fix="get the images that the annotations were made on, or, when these are resized (not cropped) copies, "
            "add --rescale",
        )
    if stored.orientation == 1:
        return annotated or sizes["upright"], 1
    if frame == "auto" and len(matching) == 1:
        frame = matching[0]
    elif frame == "auto" or (len(matching) == 1 and matching[0] != frame):
        raise SayoError(
            "D45",
            "the data do not show whether boxes were drawn on the picture as turned by its EXIF orientation or unturned"
            if frame == "auto"
            else f"the boxes are said to be drawn on the {frame} picture but have the size of the {matching[0]} one",
            where=where,
            got=f"orientation {stored.orientation}, raw {_by(sizes['raw'])}, upright {_by(sizes['upright'])}, "
            + (f"annotated {_by(annotated)}" if annotated else "no annotated size"),
            fix="look at a few such images and set --box-frame=raw (boxes on the file's pixels) or --box-frame=upright "
            "(boxes on the picture as viewers and browsers show it)",
        )
    return annotated or sizes[frame], stored.orientation if frame == "raw" else 1


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def form_of(box_format: str, where: str) -> Form:
    if box_format not in BOX_FORMATS:
        raise SayoError(
            "D46",
            f"unknown box format {box_format!r}{did_you_mean(box_format, BOX_FORMATS)}",
            where=where,
            wanted=list(BOX_FORMATS),
            fix="set --box-format to one of them",
        )
    return FORMS[box_format]


def check_size(size: Sequence[int], where: str) -> None:
    if len(size) != 2 or not all(
        isinstance(v, numbers.Integral) and not isinstance(v, bool) and 0 < v <= LARGEST for v in size
    ):
        raise SayoError(
            "D44",
            "the annotated size is no size",
            where=where,
            got=f"{size!r}"[:80],
            wanted="(width, height), positive integers",
            fix="correct the annotation",
        )


def four_numbers(box: Any, where: str, wanted: str = "finite numbers, without units") -> Box:
    """The four values of an annotated box as floats, in whatever format.

    Raises:
        SayoError: D42 for another number of values, and for what is not a finite number.
    """
    try:
        values = [] if isinstance(box, str | bytes) else list(box)
    except TypeError:  # no collection at all
        values = []
    if len(values) != 4 or not all(is_coordinate(value) for value in values):
        raise SayoError(
            "D42",
            "a box is not four finite numbers",
            where=where,
            got=" ".join(f"{box!r}".split())[:120],
            wanted=wanted,
            fix="correct the annotation, or leave this box out",
        )
    a, b, c, d = (float(value) for value in values)
    return a, b, c, d


def is_coordinate(value: Any) -> bool:
    """Whether a value is a number, finite and not absurdly large. JSON readers give ``Decimal``."""
    number = isinstance(value, numbers.Real | decimal.Decimal) and not isinstance(value, bool)
    return number and value == value and -LARGEST <= value <= LARGEST  # comparing a Decimal NaN raises, but for ==


def check_values(box: Sequence[float], box_format: str, where: str) -> Box:
    """The four values as floats.

    Raises:
        SayoError: D42, D43, as ``place_boxes``.
    """
    meaning = f"{box_format}: {BOX_FORMATS[box_format]}"
    a, b, c, d = values = four_numbers(box, where, meaning)
    form = FORMS[box_format]
    problem = fix = ""
    if form.extent and (c < 0 or d < 0):
        problem, fix = "has a negative width or height", "correct the annotation, or leave this box out"
    elif not form.extent and (c < a or d < b):
        as_extent = box_format.replace("xyxy", "xywh")
        problem = "ends before it begins; looks like xywh"
        fix = f"set --box-format={as_extent}" if as_extent in BOX_FORMATS else "convert the boxes to corners"
    elif form.scale is not None and not all(-SLACK <= v / form.scale <= 1 + SLACK for v in values):
        problem = f"lies outside of 0 .. {form.scale:g}"
        if max(values) > form.scale:
            problem += "; looks like " + ("pixels" if max(values) > 1000 else "pixels or thousandths")
        fix = "set --box-format to what the publisher of the data states"
    if problem:
        raise SayoError("D43", f"a box {problem}", where=where, got=values, wanted=meaning, fix=fix)
    return a, b, c, d


def to_unit(box: Box, form: Form, size: tuple[int, int]) -> Box:
    """Corners in shares of the picture, not clipped."""
    x0, y0, x1, y1 = box
    if form.extent:
        x1, y1 = x0 + x1, y0 + y1
    width, height = size
    if form.square:
        side = max(width, height)
        pixels = side / (form.scale or 1.0)
        left, top = (side - width) // 2, (side - height) // 2
        x0, x1 = x0 * pixels - left, x1 * pixels - left
        y0, y1 = y0 * pixels - top, y1 * pixels - top
    elif form.scale is not None:
        width = height = form.scale  # type: ignore[assignment]
    return x0 / width, y0 / height, x1 / width, y1 / height


def area_of(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _inside(box: Box, min_area_left: float) -> tuple[Box, str]:
    """The box within the picture, and the reason to leave it out, or ""."""
    if area_of(box) <= 0:
        return box, "box_without_area"
    x0, y0, x1, y1 = (min(max(v, 0.0), 1.0) for v in box)
    left = area_of((x0, y0, x1, y1)) / area_of(box)
    return (x0, y0, x1, y1), "box_outside" if left <= 0 or left < min_area_left - 1e-9 else ""


def _iou(a: Box, b: Box) -> float:
    common = area_of((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return common / (area_of(a) + area_of(b) - common)
