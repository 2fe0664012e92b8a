"""Boxes in every published format, for tests of boxes."""

import numpy as np
from hypothesis import assume, settings
from hypothesis import strategies as st

from sayo_verl.data.boxes import Placed, place_boxes
from sayo_verl.data.images import Stored
from sayo_verl.data.rows import REASONS
from sayo_verl.vision.masks import check_box

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def image(width: int = 640, height: int = 480, orientation: int = 1) -> Stored:
    """A stored image of that upright size."""
    raw = (height, width) if orientation >= 5 else (width, height)
    return Stored(b"", width, height, *raw, orientation, ())


def place(boxes, box_format="xyxy", stored=None, *, frame="auto", annotated=None, rescale=False) -> Placed:
    """``place_boxes``, with what holds for every result."""
    names = [f"thing {i}" for i in range(len(boxes))]
    how = {"box_format": box_format, "frame": frame, "annotated": annotated, "rescale": rescale}
    out = place_boxes(boxes, names, stored=stored or image(), where="row 7", **how)
    assert len(out.boxes) == len(out.names) <= len(out.drawn) == len(boxes)
    assert (out.reason in REASONS and not out.boxes) if out.reason else bool(out.boxes) == bool(boxes)
    for box in out.boxes:
        check_box(box, where="here")
    return out


def written(unit, box_format: str, width: int, height: int) -> tuple[float, ...]:
    """A box in [0, 1] as a publisher would write it: the formats, the other way round."""
    corners = np.multiply(unit, (width, height) * 2).reshape(2, 2)
    if box_format.endswith("_square"):
        side = max(width, height)
        corners = np.add(corners, [(side - width) // 2, (side - height) // 2]) / side
    elif "_" in box_format:
        corners = corners / [width, height]
    begin, end = corners * (1000 if "1000" in box_format else 100 if "percent" in box_format else 1)
    orders = {"xyxy": (begin, end), "xywh": (begin, end - begin), "cxcywh": ((begin + end) / 2, end - begin)}
    orders["yxyx"] = (begin[::-1], end[::-1])
    return tuple(float(v) for pair in orders[box_format.split("_")[0]] for v in pair)


@st.composite
def unit_boxes(draw, at_least: float = 0.06):
    """Boxes that no rule leaves out: at least 0.36 % and at most 57 % of the picture."""

    def side(longest):
        a, b = sorted(draw(st.tuples(*[st.floats(0, 1)] * 2)))
        assume(at_least < b - a < longest)
        return a, b

    (x0, x1), (y0, y1) = side(0.75), side(0.75)
    return x0, y0, x1, y1


sizes = st.tuples(st.integers(200, 5000), st.integers(200, 5000))
