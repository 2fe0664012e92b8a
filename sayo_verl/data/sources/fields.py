"""Reading the fields of published records: text, identifiers and boxes.

Every source reads strange records by the same rules, which are:

    text     a string is taken as it is, without the white space around it; a number is written as JSON writes it, a
             whole one without a fraction (tables turn 3 into 3.0 where a value is missing), true and false as these
             words; anything else (null, a list, an object, NaN) is not text, and its row is left out
    boxes    finite numbers, four to a box; anything else stops the work: a loader that guesses trains on wrong boxes
"""

import decimal
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sayo_verl.data.boxes import BOX_FORMATS, four_numbers
from sayo_verl.data.contract import check_placeholders
from sayo_verl.data.rows import IMAGE_TAG, Drop
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.vision.masks import check_nesting

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def text(value: Any) -> str:
    """A field as text by the rule of the module; "" for anything that is not text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real | decimal.Decimal) and math.isfinite(value):
        number = float(value)
        return str(int(number)) if number.is_integer() else repr(number)
    return ""


def untagged(question: str, n_images: int, where: str) -> str:
    """The question without the image tags around it; ``rows.record`` writes them anew.

    Raises:
        SayoError: D09 where there are tags, but not one for each image.
        Drop: ``reserved_text`` where a tag stands within the text, whose meaning hangs on its place.
    """
    if IMAGE_TAG not in question:
        return question
    check_placeholders([{"role": "user", "content": question}], {IMAGE_TAG: n_images}, where)
    words = question.strip()
    while words.startswith(IMAGE_TAG):
        words = words.removeprefix(IMAGE_TAG).strip()
    while words.endswith(IMAGE_TAG):
        words = words.removesuffix(IMAGE_TAG).strip()
    if IMAGE_TAG in words:
        raise Drop("reserved_text", f"{IMAGE_TAG} within the text")
    return words


# ------------------------------------------------------------------------------------------------------------- records


def refuse(what: str, where: str, fix: str, *, got: object = None, wanted: object = None) -> SayoError:
    """D58: a record does not have the fields of its format."""
    return SayoError("D58", what, where=where, got=got, wanted=wanted, fix=fix)


def shown(value: Any) -> str:
    """A value in a message: on one line, not longer than a line."""
    line = repr(value)
    return line if len(line) <= 80 else line[:77] + "..."


def check_keys(record: Any, required: Iterable[str], optional: Iterable[str], where: str) -> dict[str, Any]:
    """The record, if it is an object that has the required keys and none that are not known.

    Raises:
        SayoError: D58.
    """
    required, optional = tuple(required), tuple(optional)
    if not isinstance(record, dict):
        raise refuse("a record is not an object", where, "write one object {...} for each record", got=shown(record))
    known = required + optional
    for key in record:
        if key not in known:
            raise refuse(
                f"unknown key {key!r}{did_you_mean(str(key), known)}",
                where,
                "correct or remove the key; a key that is not read would be lost without a word",
                got=sorted(map(str, record)),
                wanted=sorted(known),
            )
    missing = [key for key in required if key not in record]
    if missing:
        raise refuse(
            f"the record has no {', '.join(missing)}",
            where,
            "add what is missing",
            got=sorted(map(str, record)),
            wanted=sorted(required),
        )
    return record


def field_of(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``record[key]``, which must be there and of a kind (a bool is not an int here).

    Raises:
        SayoError: D58.
    """
    if not isinstance(record, dict) or key not in record:
        raise refuse(
            f"the record has no {key!r}",
            where,
            "check that the file is of the format it was given as",
            got=sorted(map(str, record)) if isinstance(record, dict) else shown(record),
        )
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise refuse(
            f"{key!r} is of the wrong type",
            where,
            "correct the value",
            got=shown(value),
            wanted=" or ".join(k.__name__ for k in kinds),
        )
    return value


def strings(value: Any, where: str, what: str) -> tuple[str, ...]:
    """A list of strings.

    Raises:
        SayoError: D58.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise refuse(f"{what} are not a list of strings", where, "write a list of strings", got=shown(value))
    return tuple(value)


def picture_size(width: Any, height: Any, where: str) -> tuple[int, int]:
    """Width and height as whole numbers above zero.

    Raises:
        SayoError: D58.
    """
    sides = []
    for side in (width, height):
        whole = isinstance(side, numbers.Real | decimal.Decimal) and not isinstance(side, bool) and side == side // 1
        if not whole or side < 1:
            raise refuse(
                "the size of an image is not two whole numbers above zero",
                where,
                "write width and height in pixels",
                got=shown((width, height)),
            )
        sides.append(int(side))
    return sides[0], sides[1]


@dataclass
class Seen:
    """The identifiers so far; each may come once.

    Raises:
        SayoError: D62 from ``add``.
    """

    ids: set[str] = field(default_factory=set)

    def add(self, id: str, where: str) -> str:
        if id in self.ids:
            raise SayoError(
                "D62",
                "an id stands for two records",
                where=where,
                got=shown(id),
                wanted="unique ids",
                fix="give each record its own id, or none: they are numbered then",
            )
        self.ids.add(id)
        return id


# --------------------------------------------------------------------------------------------------------------- boxes


def no_box(what: str, where: str, got: Any, wanted: str) -> SayoError:
    """D59: boxes do not have the form of their format."""
    return SayoError(
        "D59", what, where=where, got=shown(got), wanted=wanted, fix="correct the boxes, or remove the record"
    )


def boxes_of_images(value: Any, n_images: int, where: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Boxes nested by image. One image may have them without that nesting; None and [] are no boxes.

    Raises:
        SayoError: D05 for a nesting that is not the images', D42 for a box that is not four finite numbers, D59 for
            anything that is not a list.
    """
    if value is None or value == [] or value == ():
        return ((),) * n_images
    if not isinstance(value, list | tuple):
        raise SayoError(
            "D59",
            "boxes are not a list",
            where=where,
            got=shown(value),
            wanted="a list of boxes of four numbers",
            fix="write [[...], ...]",
        )
    nested = all(isinstance(b, list | tuple) and all(isinstance(v, list | tuple) for v in b) for b in value)
    if not nested and n_images == 1:
        return (tuple(four_numbers(b, f"{where}, box {i}") for i, b in enumerate(value)),)
    check_nesting(value, n_images, where=where)
    return tuple(
        tuple(four_numbers(b, f"{where}, image {i} box {j}") for j, b in enumerate(of)) for i, of in enumerate(value)
    )


def names_of_boxes(value: Any, boxes: Sequence[Sequence[Any]], where: str) -> tuple[tuple[str, ...], ...]:
    """Names nested as the boxes; None: every name is "".

    Raises:
        SayoError: D58 for what is not strings, D59 for names that are not as many as the boxes.
    """
    if value is None:
        return tuple(("",) * len(of_image) for of_image in boxes)
    flat = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    if flat and len(boxes) == 1:
        value = [value]
    if not isinstance(value, list | tuple):
        raise refuse("names of boxes are not a list", where, "write a list of strings", got=shown(value))
    names = tuple(strings(of_image, where, "names of boxes") for of_image in value)
    if [len(of_image) for of_image in names] != [len(of_image) for of_image in boxes]:
        raise SayoError(
            "D59",
            "there are not as many names as boxes",
            where=where,
            got=shown(value),
            wanted=f"{[len(of_image) for of_image in boxes]} names by image",
            fix="name every box, or leave the names out",
        )
    return names


def check_box_format(box_format: str, where: str = "--box-format") -> str:
    """The name of a box format.

    Raises:
        SayoError: D46.
    """
    if box_format not in BOX_FORMATS:
        raise SayoError(
            "D46",
            f"there is no box format {box_format!r}{did_you_mean(box_format, BOX_FORMATS)}",
            where=where,
            wanted=", ".join(BOX_FORMATS),
            fix="name the format that the boxes are written in",
        )
    return box_format


def box_format_help() -> str:
    """The formats by name, for ``--help``."""
    return f"format of the numbers, explained in docs/data.md: {', '.join(BOX_FORMATS)}"


def check_name(name: str) -> str:
    """A name that may stand in ``data_source``: verl's metrics are called after it.

    Raises:
        SayoError: D58.
    """
    if not _NAME.fullmatch(name):
        raise refuse("the name of a data set is not plain", "--name", "use small letters, digits and _ . -", got=name)
    return name
