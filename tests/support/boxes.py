"""Boxes in every published format, for tests of boxes."""

from hypothesis import assume, settings
from hypothesis import strategies as st

from sayo_verl.data.boxes import BoxRules, place_boxes
from sayo_verl.data.images import Stored
from sayo_verl.data.rows import REASONS
from sayo_verl.vision.masks import check_box

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


KEEP_ALL = BoxRules(min_area_left=0.0, merge_iou=1.0, max_area=1.0, min_area=0.0)


PIXELS = ("xyxy", "xywh")


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
