"""Boxes that are in another format than the one that was named, seen over many rows.

Error codes: D42, D43, D44 as ``sayo_verl.data.boxes``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sayo_verl.data.boxes import BOX_FORMATS, FORMS, SLACK, Box, area_of, check_size, check_values, form_of, to_unit
from sayo_verl.errors import SayoError

FIRST_LOOK = 200  # boxes
AT_MOST = 20_000  # different boxes that are looked at for what no single box shows
OVERHANG = 0.02  # share of a side: a box runs out of its picture when it ends further out, and fits when it does not
OFTEN = 0.2  # share of boxes that may run out, ...
A_FEW = 5  # ... and how many at least have to, and in how many rows at least the boxes have to fit another format
ENOUGH = 20  # different boxes that can tell formats apart: in each, another format fits by chance in about one of three
TINY = 0.1  # share of boxes that may lie within the first pixel, or the first thousandth
CHANCE = math.log(1e-9)
EDGE = 0.1  # boxes that fill a picture begin and end at most so far from its sides

# What each format is mistaken for, first those that are more likely.
_SUSPECTS: Mapping[str, tuple[str, ...]] = {
    "xyxy": ("xyxy_1000", "xyxy_1000_square"),
    "xywh": ("xyxy", "xyxy_1000", "xywh_1000"),
    "xyxy_unit": ("xyxy_unit_square",),
    "xywh_unit": ("xyxy_unit",),
    "xyxy_1000": ("xyxy", "xyxy_1000_square"),
    "xyxy_1000_square": ("xyxy_1000", "xyxy"),
    "xyxy_unit_square": ("xyxy_unit",),
}


@dataclass
class _Reading:
    """How the boxes seen so far look in one format.

    ``fit``: how many lie within their picture. ``chance``: logarithm of the probability that all would, were their
    positions spread evenly over the picture in the format that was named. The last three: where boxes begin and end.
    """

    fit: int = 0
    chance: float = 0.0
    begin_x: float = math.inf
    begin_y: float = math.inf
    end_x: float = -math.inf
    end_y: float = -math.inf

    def fills(self) -> bool:
        return max(self.begin_x, self.begin_y) <= EDGE and min(self.end_x, self.end_y) >= 1 - EDGE


class FormatWatch:
    """Looks for boxes that are in another format than the one that was named, over many rows.

    Every box is held to its format at once (D42, D43 of ``place_boxes``). Three things show in many boxes only. They
    are looked for when 200 boxes were seen and at the end, in boxes that differ (a box asked about a hundred times is
    one box) and have an area, at most ``AT_MOST`` of them:

    1. One in ten lies within the first pixel, or the first thousandth, of its picture: they are shares in [0, 1].
    2. One in five runs out of its picture by more than 2 % of a side (at least ``A_FEW`` do): whatever they are, they
       are not what was named. The message names formats in which they fit.
    3. All fit another format suspiciously well: none runs out of the picture in it, they begin at its upper and left
       and end at its lower and right sides, and the part of the picture that this leaves them in the format that was
       named is so small that boxes would keep to it with a chance below 1e-9. (Thousandths in photos of 4000 x 3000,
       read as pixels, all lie in the upper left twelfth, and fill just that. Corners read as x, y, width, height are
       all wider than their distance from the left side, and higher than that from the upper one.)

    2 and 3 need the sizes that the boxes were drawn on and look at boxes with one only. Missed, therefore: pixels and
    thousandths mixed up without sizes or on images of about 1000 pixels; squares mixed up on images that are nearly
    square; data of few rows. Taken for a mix-up although it is none: data in which a tenth of the boxes are single
    pixels at the origin, or in which a fifth of the boxes reach far beyond their pictures, as amodal boxes may.

    Args:
        box_format: key of ``BOX_FORMATS``.
    """

    def __init__(self, box_format: str) -> None:
        self._form = form_of(box_format, "FormatWatch")
        self.box_format = box_format
        self._seen: set[tuple[Box, tuple[int, int] | None]] = set()
        self._n = self._n_tiny = self._n_sized = self._n_out = self._rows = 0
        self._first = self._first_tiny = self._first_out = ""
        self._readings = {name: _Reading() for name in _SUSPECTS[box_format]}
        self._looked = False

    def add(
        self,
        boxes: Sequence[Sequence[Sequence[float]]],
        sizes: Sequence[tuple[int, int] | None] | None,
        where: str,
    ) -> None:
        """The boxes of one row.

        Args:
            boxes: [image][box][4], as ``Example.boxes``.
            sizes: [image] (width, height) that they were drawn on, as ``Example.sizes``; None or empty: not known.
            where: names the row in errors.

        Raises:
            SayoError: D42 and D43 as ``place_boxes``, D43 for a likely mix-up, D44 for a size that is none.
        """
        new_row = False
        for image, of_image in enumerate(boxes):
            size = sizes[image] if sizes else None
            if size is not None:
                check_size(size, where)
                size = size[0], size[1]  # hashable, though the source may have made a list of it
            for i, box in enumerate(of_image):
                value = check_values(box, self.box_format, f"{where}, image {image}, box {i}")
                key = (value, size)
                if len(self._seen) < AT_MOST and key not in self._seen:
                    self._seen.add(key)
                    new_row |= self._look_at(value, size, f"{where}, image {image}, box {i}")
        self._rows += new_row
        if self._n >= FIRST_LOOK and not self._looked:
            self._looked = True
            self._judge()

    def finish(self) -> None:
        """All rows were added.

        Raises:
            SayoError: D43 for a likely mix-up.
        """
        self._judge()

    def summary(self) -> str:
        """How many boxes the format was checked on, and whether these are enough."""
        checked = f"box format {self.box_format}: {self._n_sized} different boxes in {self._rows} rows fit it"
        if self._n_sized >= ENOUGH:
            return checked
        return f"{checked}, too few to tell it from other formats: look at the boxes, `sayo inspect --page FILE`"

    def _look_at(self, box: Box, size: tuple[int, int] | None, where: str) -> bool:
        """Count one box; whether its size is known."""
        if area_of(to_unit(box, self._form, size or (1, 1))) <= 0:
            return False
        self._n += 1
        self._first = self._first or where
        if self._form.scale != 1 and max(box) <= 1 and min(box) >= -SLACK:
            self._n_tiny += 1
            self._first_tiny = self._first_tiny or where
        if size is None:
            return False
        self._n_sized += 1
        named = to_unit(box, self._form, size)
        if not _fits(named):
            self._n_out += 1
            self._first_out = self._first_out or where
        for suspect, reading in self._readings.items():
            other = to_unit(box, FORMS[suspect], size)
            if area_of(other) <= 0 or other[2] <= other[0] or not _fits(other):
                continue
            reading.fit += 1
            for axis in (0, 1):
                extent = named[2 + axis] - named[axis]
                if FORMS[suspect].extent == self._form.extent:  # the part of a side that the suspect leaves to boxes
                    share = extent / (other[2 + axis] - other[axis])
                else:  # boxes that are valid as corners begin within their own extent of the left or upper side
                    share = extent / (1 - extent) if extent < 0.5 else 1.0
                reading.chance += math.log(share) if share < 0.8 else 0.0
            reading.begin_x, reading.begin_y = min(reading.begin_x, other[0]), min(reading.begin_y, other[1])
            reading.end_x, reading.end_y = max(reading.end_x, other[2]), max(reading.end_y, other[3])
        return True

    def _judge(self) -> None:
        if self._n_tiny > TINY * self._n:
            unit = self.box_format.replace("_1000", "_unit") if self._form.scale else f"{self.box_format}_unit"
            self._stop(f"{self._n_tiny} of {self._n} boxes have no value above 1", self._first_tiny, [unit])
        if self._n_out >= A_FEW and self._n_out > OFTEN * self._n_sized:
            fitting = [name for name, reading in self._readings.items() if reading.fit >= 0.98 * self._n_sized]
            self._stop(f"{self._n_out} of {self._n_sized} boxes run out of their pictures", self._first_out, fitting)
        for name, reading in self._readings.items():
            if reading.fit == self._n_sized and self._rows >= A_FEW and reading.chance < CHANCE and reading.fills():
                self._stop(
                    f"all {self._n_sized} boxes keep to that part of their pictures which {name} would fill",
                    self._first,
                    [name],
                )

    def _stop(self, found: str, where: str, suspects: Sequence[str]) -> None:
        known = [name for name in suspects if name in BOX_FORMATS]
        looks = " or ".join(f"{name} ({BOX_FORMATS[name]})" if name in known else "thousandths" for name in suspects)
        fix = f"set --box-format={known[0]}" if known else "look up the format and the image sizes of the data"
        raise SayoError(
            "D43",
            f"the boxes are probably not {self.box_format}" + (f"; they look like {looks}" if looks else ""),
            where=f"{where} and others",
            got=found,
            wanted=f"{self.box_format}: {BOX_FORMATS[self.box_format]}",
            fix=f"{fix}, after a look at a few of them",
        )


def _fits(box: Box) -> bool:
    return min(box) >= -OVERHANG and max(box) <= 1 + OVERHANG
