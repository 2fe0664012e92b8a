"""What all sources do alike: records checked by pydantic, texts, boxes, names of images.

Text is taken without the white space around it. A number is written as JSON writes it, a whole one without a fraction.
Null and NaN are no text (the builder leaves such a row out). A list is refused: the user has to choose one entry.
"""

import argparse
import functools
import hashlib
import math
import numbers
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from posixpath import normpath
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.contract import check_placeholders
from sayo_verl.data.rows import RUNS_CODE, Drop, ImageRef, Source
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.reward.prompts import IMAGE_TAG
from sayo_verl.vision.masks import check_nesting

T = TypeVar("T")
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (isinstance(value, numbers.Real | Decimal) and not math.isfinite(value)):
        return ""
    if isinstance(value, numbers.Real | Decimal):
        return str(value) if value % 1 else str(math.floor(value))
    raise ValueError("a list or an object is no text; choose one entry and write it as text")


Text = Annotated[str, BeforeValidator(_as_text)]
Side = Annotated[int, Field(gt=0)]  # of a picture, in pixels


def parse(model: type[T], value: Any, where: str) -> T:
    """A value as a pydantic model, or as another type of pydantic; D58 with the first field that is wrong."""
    try:
        return _adapter(model).validate_python(value)
    except ValidationError as failed:
        faults = failed.errors(include_url=False)
    unknown_keys = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    fault = (unknown_keys or faults)[0]  # a misspelt key is missing, too
    known = {n: getattr(f.validation_alias, "choices", [n]) for n, f in getattr(model, "model_fields", {}).items()}
    key, keys = ".".join(map(str, fault["loc"])), ", ".join(" or ".join(names) for names in known.values())
    what, wanted = f"{key or 'the record'} is invalid: {fault['msg'].removeprefix('Value error, ')}", None
    if unknown_keys:
        what, wanted = f"unknown key {key!r}{did_you_mean(key, keys.replace(' or ', ', ').split(', '))}", keys
    elif fault["type"] == "missing":
        what, wanted = f"the record has no {key!r}", keys
    got, fix = f"{fault['input']!r:.80}", "correct the record, or remove it"
    raise SayoError("D58", what, where=where, got=got, wanted=wanted, fix=fix)


def untagged(question: str, n_images: int, where: str) -> str:
    """The question without the image tags around it, which the builder writes anew; D09 for another number of tags.

    A tag within the text stays: its meaning depends on its place, and the builder leaves the row out.
    """
    if IMAGE_TAG in question:
        check_placeholders([{"role": "user", "content": question}], {IMAGE_TAG: n_images}, where)
    return re.sub(rf"^(\s*{IMAGE_TAG})+|({IMAGE_TAG}\s*)+$", "", question).strip()


def boxes_of_images(value: Any, n_images: int, where: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Boxes nested by image; of one image also without that nesting, or one box alone. None and [] are no boxes.

    Raises D05 for another nesting than that of the images, D42 for a box that is not four finite numbers.
    """
    if value in (None, [], ()):
        return ((),) * n_images
    if n_images == 1 and isinstance(value, list | tuple):
        if all(isinstance(number, numbers.Real) for number in value):
            value = [value]  # one box
        if not all(isinstance(part, list | tuple) and all(isinstance(v, list | tuple) for v in part) for part in value):
            return (tuple(four_numbers(box, f"{where}, box {i}") for i, box in enumerate(value)),)
    check_nesting(value, n_images, where=where)
    return tuple(tuple(four_numbers(box, f"{where}, box {i}") for i, box in enumerate(boxes)) for boxes in value)


def names_of_boxes(value: Any, boxes: Sequence[Sequence[Any]], where: str) -> tuple[tuple[str, ...], ...]:
    """Names nested as the boxes, of one image also without that nesting; None: all are "". D58 for other types."""
    if value is None:
        return tuple(("",) * len(of_image) for of_image in boxes)
    flat = len(boxes) == 1 and isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return parse(tuple[tuple[str, ...], ...], [value] if flat else value, where)


def check_input(path: Path) -> Path:
    """The file, if it exists and cannot run code when it is loaded; D63."""
    if path.suffix.lower() in RUNS_CODE:
        fix = "convert it to parquet or JSON where you trust it"
        raise SayoError("D63", "files of this format can run code when they are loaded", where=str(path), fix=fix)
    if not path.is_file():
        raise SayoError("D63", "there is no such file", where=str(path), fix="correct the path")
    return path


def file_facts(paths: Iterable[Path]) -> dict[str, int]:
    """Size of each file by name, for ``Source.facts``."""
    return {str(path): path.stat().st_size for path in paths}


class ImageFolder:
    """Images by name in a folder or a zip file; D63 where there is neither.

    Backslashes and drive letters are read as Windows means them. An absolute name of no file is looked up by its end,
    and so is any name in a zip file ("a.jpg" of val2017/a.jpg) if only one member ends so.
    """

    def __init__(self, base: Path, prefix: str = "") -> None:
        self.base, self.prefix = base, prefix  # the latter: of the keys
        self._members: dict[str, str] = {}  # of a zip file: end of a name -> name
        self._absolute: dict[str, str] = {}  # name in the folder -> the absolute name that led to it
        if base.is_dir():
            return
        if not zipfile.is_zipfile(base):
            raise SayoError("D63", "no folder or zip file of images", where=str(base), fix="correct --images")
        with zipfile.ZipFile(base) as archive:
            ends = [(end, name) for name in archive.namelist() for end in _ends(name)]
        times = Counter(end for end, _ in ends)
        self._members = {end: name for end, name in ends if times[end] == 1 or end == name}

    def ref(self, name: str, where: str) -> ImageRef:
        """The image of a name; D60 if two absolute names are found as one file."""
        plain = normpath(re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/"))
        absolute = plain if plain.startswith("/") else ""
        if absolute:
            if os.path.isfile(absolute):
                return ImageRef(absolute, Path(absolute))
            there = (end for end in _ends(absolute) if end in self._members or os.path.isfile(self.base / end))
            plain = next(there, _ends(absolute)[-1])
        found = self._members.get(plain, plain)
        if absolute and self._absolute.setdefault(found, absolute) != absolute:
            what, got = "two images have one name in the folder of images", f"{self._absolute[found]} and {absolute}"
            raise SayoError("D60", what, where=where, got=got, fix="write their paths in this folder")
        key = self.prefix + found
        return ImageRef(key, self.base, found) if self._members else ImageRef(key, self.base / found)


def _ends(name: str) -> list[str]:
    """a/b/c.png, b/c.png, c.png"""
    parts = name.strip("/").split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def stored_image(value: Any, where: str, folder: ImageFolder | None = None) -> ImageRef:
    """An image of a table: {"bytes", "path"} as Hugging Face stores it, bytes, or a name where a folder is given.

    The key of bytes is their hash. Raises D60 where there are none, and the ``Drop`` image_missing for null.
    """
    if value is None:
        raise Drop("image_missing", "null")
    data = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return ImageRef(key=hashlib.sha256(data).hexdigest()[:20], data=data)
    if isinstance(data, str) and folder is not None:
        return folder.ref(data, where)
    fix = "store the images in the table, or name the folder of their files with --images"
    raise SayoError("D60", "an image has no bytes", where=where, got=f"{value!r:.80}", fix=fix)


class FieldSource(Source):
    """A dataclass whose fields are the facts of the source."""

    def facts(self) -> dict[str, Any]:
        files = [value for value in vars(self).values() if isinstance(value, Path) and value.is_file()]
        return {**vars(self), "files": file_facts(files)}


@dataclass(frozen=True)
class FileSource(FieldSource):
    """A file of records and perhaps one of validation rows; fields as the flags of ``add_file_flags``."""

    file: Path
    box_format: str | None = None
    images: Path | None = None
    val_file: Path | None = None
    name: str = "mine"

    def folder(self, path: Path) -> ImageFolder:
        """The images of a file. Two files in two folders may name two pictures alike, so their keys differ."""
        prefix = "val/" if self.images is None and path.parent != self.file.parent else ""
        return ImageFolder(self.images or path.parent, prefix)

    def records(self, read: Callable[[Path], Iterable[tuple[int, Any]]]) -> Iterator[tuple[Any, Path, int, str]]:
        """Value, file, number and split of each record."""
        splits = {self.file: "train", self.val_file: "val"} if self.val_file else {self.file: ""}
        for path, split in splits.items():
            for number, value in read(check_input(path)):
                yield value, path, number, split


def add_file_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Flags of a ``FileSource``."""
    parser.add_argument("--file", type=Path, required=True, help="file of the records (also .gz and .zip)")
    parser.add_argument("--images", type=Path, help="folder or zip of images (default: that of --file)")
    parser.add_argument("--val-file", type=Path, metavar="FILE", help="file of the validation rows")
    parser.add_argument("--name", default=name, help="name of the data in metrics (default: %(default)s)")
