"""Boxes as published data write them, to boxes as rows store them: [x0, y0, x1, y1] in [0, 1] of the upright image.

Nothing about a box is guessed. The user names its format (``BOX_FORMATS``). It was drawn on one of two frames: the
file's pixels ("raw"), or the picture as its EXIF orientation turns it ("upright"). A padded square is the image pasted
into the middle of a square (``expand2square`` of LLaVA, Visual-CoT).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sayo_verl.data.images import Stored
from sayo_verl.errors import SayoError, did_you_mean

BOX_FORMATS: Mapping[str, str] = {
    "xyxy": "corners x0, y0, x1, y1 in pixels, x1 and y1 exclusive",
    "xywh": "upper left corner, width and height in pixels (COCO, GQA)",
    "cxcywh": "centre, width and height in pixels",
    "xyxy_unit": "corners x0, y0, x1, y1 as shares in [0, 1] of the width and the height",
    "xywh_unit": "upper left corner, width and height as shares in [0, 1]",
    "cxcywh_unit": "centre, width and height as shares in [0, 1] (YOLO)",
    "xyxy_percent": "corners x0, y0, x1, y1 in percent of the width and the height",
    "xywh_percent": "upper left corner, width and height in percent (Label Studio)",
    "xyxy_1000": "corners x0, y0, x1, y1 in thousandths of the width and the height (Qwen3-VL)",
    "yxyx_1000": "corners y0, x0, y1, x1 in thousandths (Gemini's box_2d)",
    "xyxy_unit_square": "corners as shares in [0, 1] of the image padded to a centred square (LLaVA)",
    "xyxy_1000_square": "corners in thousandths of the image padded to a centred square",
}
FRAMES = ("auto", "raw", "upright")
COMPARE = "compare a few boxes with the publisher's description of them and correct --box-format"
MAX_AREA, MIN_AREA = 0.6, 0.0005  # of the image: nearly all of it, or much less than a visual token
_SCALES = {"": 0.0, "unit": 1.0, "percent": 100.0, "1000": 1000.0}  # what 1 is written as; 0: pixels
Box = tuple[float, float, float, float]


class Placed(NamedTuple):
    """The boxes of one image, in [0, 1] of the stored upright picture.

    ``boxes`` are clipped, without exact duplicates. ``drawn``: one for each given box, before clipping and any rule.
    ``reason`` (of ``rows.REASONS``): the whole region is unusable and has no boxes; ``detail``: "1 of 2 boxes".
    """

    boxes: tuple[Box, ...]
    names: tuple[str, ...]
    drawn: tuple[Box, ...]
    reason: str = ""
    detail: str = ""


def place_boxes(
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    box_format: str,
    frame: str,
    stored: Stored,
    annotated: tuple[int, int] | None,
    rescale: bool,
    where: str,
) -> Placed:
    """The boxes of one image in [0, 1] of the image as it is stored. One unusable box makes the region unusable.

    The boxes were drawn on ``frame`` of ``FRAMES`` ("auto": the one that has the annotated size), in the size
    ``annotated`` (None: the source does not say). ``rescale``: the image is a resized copy of that. Wrong for a crop.

    Raises:
        SayoError: D42 of ``four_numbers``, D43 for a box that is impossible in its format, D44 for an annotated size
            that is not the image's, D45 if the frame is ambiguous, D46 of ``check_format``.
    """
    if not len(boxes):
        return Placed((), (), ())
    order, scale, square = check_format(box_format, where)
    values = [_possible(box, box_format, order, scale, f"{where}, box {i}") for i, box in enumerate(boxes)]
    size, turn = _drawn_on(frame, stored, annotated, rescale, where)
    drawn = tuple(_upright(_shares(value, order, scale, square, size), turn) for value in values)
    kept: dict[Box, str] = {}
    reasons = []
    for box, name in zip(drawn, names, strict=True):
        x0, y0, x1, y1 = (min(max(v, 0.0), 1.0) for v in box)
        whole, area = (box[2] - box[0]) * (box[3] - box[1]), (x1 - x0) * (y1 - y0)
        if whole <= 0:
            reasons.append("box_without_area")
        elif area <= 0 or area < (0.5 - 1e-9) * whole:
            reasons.append("box_outside")
        elif area > MAX_AREA:
            reasons.append("box_too_large")
        elif area < max(MIN_AREA, 4 / (stored.width * stored.height)):
            reasons.append("box_too_small")  # 4 pixels at least: a share among pixels is no box in a small image either
        elif not any(max(abs(x0 - a), abs(y0 - b), abs(x1 - c), abs(y1 - d)) < 1e-6 for a, b, c, d in kept):
            kept[x0, y0, x1, y1] = name
    if reasons:
        return Placed((), (), drawn, reasons[0], f"{reasons.count(reasons[0])} of {len(drawn)} boxes")
    return Placed(tuple(kept), tuple(kept.values()), drawn)


def check_format(box_format: str | None, where: str) -> tuple[str, float, bool]:
    """The order of the values, their scale, and whether they refer to a padded square. D46 for an unknown format."""
    if not box_format or box_format not in BOX_FORMATS:
        what = f"unknown box format {box_format!r}{did_you_mean(str(box_format), BOX_FORMATS)}"
        what = what if box_format else "the format of the boxes is not given"
        fix = "set --box-format to the one that the publisher of the data describes"
        raise SayoError("D46", what, where=where, wanted=", ".join(BOX_FORMATS), fix=fix)
    order, scale, square = (*box_format.split("_"), "", "")[:3]
    return order, _SCALES[scale], bool(square)


def four_numbers(box: Any, where: str, wanted: str = "finite numbers, without units") -> Box:
    """The four values of an annotated box as floats, in whatever format. D42 unless they are finite numbers."""
    try:
        values = [] if isinstance(box, str) else [math.nan if isinstance(v, str | bool) else float(v) for v in box]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != 4 or not all(abs(v) <= 1e9 for v in values):
        fix, got = "correct the annotation, or leave this row out", " ".join(f"{box!r}".split())[:120]
        raise SayoError("D42", "a box is not four finite numbers", where=where, got=got, wanted=wanted, fix=fix)
    return values[0], values[1], values[2], values[3]


def _possible(box: Sequence[float], box_format: str, order: str, scale: float, where: str) -> Box:
    meaning = f"{box_format}: {BOX_FORMATS[box_format]}"
    a, b, c, d = values = four_numbers(box, where, meaning)
    slack = 1.0 if scale == 1000 else scale / 2  # over the edge; but above 1000 are pixels of a larger picture
    backwards = min(c, d) < 0 if order in ("xywh", "cxcywh") else c < a or d < b
    if backwards or (scale and not -slack <= min(values) <= max(values) <= scale + slack):
        what = "a box ends before it begins" if backwards else f"a box has values outside of 0 to {scale:g}"
        raise SayoError("D43", what, where=where, got=list(values), wanted=meaning, fix=COMPARE)
    return values


def _shares(box: Box, order: str, scale: float, square: bool, size: tuple[int, int]) -> Box:
    """Corners in shares of the picture, not clipped."""
    a, b, c, d = box
    if order == "yxyx":
        a, b, c, d = b, a, d, c
    elif order == "cxcywh":
        a, b = a - c / 2, b - d / 2
    if order in ("xywh", "cxcywh"):
        c, d = a + c, b + d
    width, height = size if square or not scale else (scale, scale)
    if square:
        side, left, top = max(size), (max(size) - width) // 2, (max(size) - height) // 2
        a, b, c, d = (v * side / scale - edge for v, edge in zip((a, b, c, d), (left, top) * 2, strict=True))
    return a / width, b / height, c / width, d / height


def _upright(box: Box, orientation: int) -> Box:
    x0, y0, x1, y1 = box if orientation < 5 else (box[1], box[0], box[3], box[2])  # transposed first, then mirrored
    x0, x1 = (1 - x1, 1 - x0) if orientation in (2, 3, 6, 7) else (x0, x1)
    y0, y1 = (1 - y1, 1 - y0) if orientation in (3, 4, 7, 8) else (y0, y1)
    return x0, y0, x1, y1


def _drawn_on(
    frame: str, stored: Stored, annotated: tuple[int, int] | None, rescale: bool, where: str
) -> tuple[tuple[int, int], int]:
    """The size of what the boxes were drawn on, and the EXIF orientation that is still to be applied to them."""
    annotated = annotated and (annotated[0], annotated[1])
    raw, upright = (stored.raw_width, stored.raw_height), (stored.width, stored.height)
    if annotated not in (None, raw, upright) and not rescale:
        raise SayoError(
            "D44",
            "the boxes were drawn on an image of another size",
            where=where,
            got=f"annotated {annotated}, image {upright}",
            fix="get the images that the annotations were made on, or add --rescale if these are resized, not cropped",
        )
    if stored.orientation == 1:
        return annotated or upright, 1
    only = "" if raw == upright or not annotated else {raw: "raw", upright: "upright"}.get(annotated, "")
    frame = only or frame if frame == "auto" else frame
    if frame == "auto" or (only and only != frame):
        what = "the data do not show whether boxes were drawn on the picture before or after its EXIF orientation"
        if frame != "auto":
            what = f"--box-frame={frame} contradicts the annotated size, which is that of the {only} picture"
        got = f"orientation {stored.orientation}, raw {raw}, upright {upright}, annotated {annotated}"
        fix = "look at such images and set --box-frame: raw (on the file's pixels) or upright (as viewers show it)"
        raise SayoError("D45", what, where=where, got=got, fix=fix)
    return annotated or (raw if frame == "raw" else upright), stored.orientation if frame == "raw" else 1


def doubt(drawn: np.ndarray, box_format: str) -> str | None:
    """What looks wrong about the boxes of a source (``Placed.drawn``, float [N, 4]; equal ones count once), or None.

    1. Two (over 1 in 1000) or all are shares: they end within 1.5 percent or thousandths, or 0.5 % of a side in pixels.
    2. Three (over 1 in 100) are more than half outside their pictures, or more than 1 in 4 (of 4 to 9: 1 in 2) leave
       them by over 2 % of a side.
    3. (From here on of at least 20.) Boxes begin in the upper left tenth, and 99 % end within half of the area and 95 %
       of both sides; within 1 - 6 / N of the width if that is the longer reach: faces and skies are in the upper half.
    4. All centres are in the upper left quarter.
    5. Three leave on the right or below by 0.5 %, or 12 are nearer to the right edge than half their width, and not a
       tenth as many are that near to the left or to the upper edge. The same from the other side.

    Of clipped boxes 2 finds nothing, and 5 needs 12. Not found: yxyx_1000 as xyxy_1000, thousandths as pixels in
    pictures of about 1000 pixels, a padded square as the image.
    """
    boxes = np.unique(np.round(np.asarray(drawn, dtype=float).reshape(-1, 4), 6), axis=0)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    begin, end, n = boxes[:, :2], boxes[:, 2:], len(boxes)
    scale = check_format(box_format, "box_format")[1] if n else 1.0
    tiny = int((end.max(1) <= (1.5 / scale if scale else 0.005)).sum()) if scale != 1 else 0
    if 0 < tiny == n or (tiny >= 2 and tiny > n / 1000):
        return f"{tiny} of {n} different boxes have no value above 1"
    out = int(((begin < -0.02) | (end > 1.02)).any(1).sum())
    inside = (np.clip(end, 0, 1) - np.clip(begin, 0, 1)).prod(1) / (end - begin).prod(1) if n else np.ones(0)
    outside = int((inside < 0.5).sum())
    if n >= 4 and (out > n / (4 if n >= 10 else 2) or (outside >= 3 and outside > n / 100)):
        return f"{out} of {n} different boxes leave their pictures, {outside} of them by more than half"
    if n < 20:
        return None
    (right, low), first = np.quantile(end, 0.99, axis=0), np.quantile(begin, 0.01, axis=0).max()
    if first < 0.1 and right * low < 0.5 and right < (0.95 if right < low else min(0.95, 1 - 6 / n)) and low < 0.95:
        return f"99 % of {n} different boxes end within {right:.0%} of the width and {low:.0%} of the height"
    if (begin + end).max() <= 1.002:
        return f"the centres of all {n} different boxes are in the upper left quarter of their pictures"
    half = (end - begin) / 2 - 0.003  # the rest is rounding
    for far, near, side in ((begin, 1 - end, "right or lower"), (1 - end, begin, "left or upper")):
        leave, close = int((near < -0.005).any(1).sum()), int((near[:, 0] < half[:, 0]).sum())
        found = leave * (leave >= 3) or close * (close >= 12)
        if found and (far < half).sum(0).max() <= found / 10:
            return f"{found} of {n} different boxes are at a {side} edge, and hardly any at the opposite one"
    return None
