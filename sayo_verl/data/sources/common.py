"""What all sources do alike: records checked by pydantic, texts, boxes, ids, names of images and of data sets.

Text is taken without the white space around it. A number is written as JSON writes it, a whole one without a fraction.
Null and NaN are no text (the builder leaves such a row out). A list is refused: the user has to choose one entry.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import numbers
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from sayo_verl.data.boxes import FRAMES, four_numbers
from sayo_verl.data.contract import check_placeholders
from sayo_verl.data.rows import IMAGE_TAG, RUNS_CODE, Drop, ImageRef, Source
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.vision.masks import check_nesting

T = TypeVar("T")
_NO_FILE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:|.*[\0-\x1f]|.{1024}|$", re.S)
_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, numbers.Real | Decimal) and not math.isfinite(value)):
        return ""
    if isinstance(value, numbers.Real | Decimal):
        number = float(value)
        return str(value).lower() if isinstance(value, bool) or not number.is_integer() else str(int(number))
    raise ValueError("a list or an object is no text; choose one entry and write it as text")


Text = Annotated[str, BeforeValidator(_as_text)]
Side = Annotated[int, Field(gt=0)]


def shown(value: Any) -> str:
    """A value in a message: on one line, not longer than a line."""
    return line if len(line := repr(value)) <= 80 else line[:77] + "..."


def parse(model: type[T], value: Any, where: str) -> T:
    """A value as a pydantic model, or as another type of pydantic; D58 with the first field that is wrong."""
    try:
        return _adapter(model).validate_python(value)
    except ValidationError as failed:
        faults = failed.errors(include_url=False)
        fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
        key, known, got = ".".join(map(str, fault["loc"])), getattr(model, "model_fields", {}), shown(fault["input"])
        keys = {
            "missing": f"the record has no {key!r}",
            "extra_forbidden": f"unknown key {key!r}{did_you_mean(key, known)}",
        }
        what = keys.get(
            fault["type"], f"{key or 'the record'} is invalid: {fault['msg'].removeprefix('Value error, ')}"
        )
        wanted, fix = ", ".join(known) if fault["type"] in keys else None, "correct the record, or remove it"
        raise SayoError("D58", what, where=where, got=got, wanted=wanted, fix=fix) from failed


def text(value: Any, where: str) -> str:
    """A value as text by the rule of the module; D58 for a list or an object."""
    return parse(Text, value, where)


def picture_size(width: Any, height: Any, where: str) -> tuple[int, int]:
    """Width and height as whole numbers above zero; D58."""
    return parse(tuple[Side, Side], (width, height), where)


def untagged(question: str, n_images: int, where: str) -> str:
    """The question without the image tags around it, which the builder writes anew; D09 for another number of tags.

    A tag within the text stays: its meaning depends on its place, and the builder leaves the row out.
    """
    if IMAGE_TAG not in question:
        return question
    check_placeholders([{"role": "user", "content": question}], {IMAGE_TAG: n_images}, where)
    return re.sub(rf"^(\s*{IMAGE_TAG})+|({IMAGE_TAG}\s*)+$", "", question).strip()


class Ids:
    """The ids so far."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def add(self, id: str, where: str) -> str:
        """The id; D62 if it came before."""
        if id in self._seen:
            fix = "give each record its own id, or none: they are numbered then"
            raise SayoError("D62", "two records have one id", where=where, got=shown(id), wanted="unique ids", fix=fix)
        self._seen.add(id)
        return id


def boxes_of_images(value: Any, n_images: int, where: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Boxes nested by image; of one image also without that nesting, or one box alone. None and [] are no boxes.

    Raises D05 for another nesting than that of the images, D42 for a box that is not four finite numbers.
    """
    if value is None or value == [] or value == ():
        return ((),) * n_images
    if n_images == 1 and isinstance(value, list | tuple):
        value = [value] if all(isinstance(number, numbers.Real) for number in value) else value
        if not all(isinstance(b, list | tuple) and all(isinstance(v, list | tuple) for v in b) for b in value):
            return (tuple(four_numbers(b, f"{where}, box {i}") for i, b in enumerate(value)),)
    check_nesting(value, n_images, where=where)
    return tuple(tuple(four_numbers(b, f"{where}, box {i}") for i, b in enumerate(of)) for of in value)


def names_of_boxes(value: Any, boxes: Sequence[Sequence[Any]], where: str) -> tuple[tuple[str, ...], ...]:
    """Names nested as the boxes; None: every name is "". D58 for other types, D59 for another number of names."""
    if value is None:
        return tuple(("",) * len(of_image) for of_image in boxes)
    flat = len(boxes) == 1 and isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    names = parse(tuple[tuple[str, ...], ...], [value] if flat else value, where)
    if [len(of_image) for of_image in names] != [len(of_image) for of_image in boxes]:
        fix = "name every box, or leave the names out"
        raise SayoError("D59", "there is not one name for each box", where=where, got=shown(value), fix=fix)
    return names


def format_of(box_format: str | None, boxes: Any, where: str) -> str:
    """The format that the command names; D46 where it names none and a row has boxes."""
    if box_format is None and any(boxes):
        fix = "add --box-format; docs/data.md explains the formats, and the publisher of the data names its own"
        raise SayoError("D46", "the format of the boxes is not named", where=where, fix=fix)
    return box_format or ""


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


def data_source(name: str) -> str:
    """``sayo/<name>``, by which verl's metrics are named; D58 for a name that is not plain."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", name):
        fix = "use small letters, digits and _ . -"
        raise SayoError("D58", "the name of a data set is not plain", where="--name", got=shown(name), fix=fix)
    return f"sayo/{name}"


class ImageFolder:
    """Images by name in a folder, or in a zip file (by member, or by the last parts of its name if they are unique).

    A name with backslashes or a drive letter is read as Windows means it. An absolute name of a file that is not there
    is looked up in the folder by its last parts. D63 where there is neither folder nor zip file.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self._members: dict[str, str] | None = None
        self._moved: dict[str, str] = {}
        if base.is_dir():
            return
        if not zipfile.is_zipfile(base):
            raise SayoError("D63", "no folder or zip file of images", where=str(base), fix="correct --images")
        with zipfile.ZipFile(base) as archive:
            pairs = [(tail, name) for name in archive.namelist() for tail in _tails(name)]
        times = Counter(tail for tail, _ in pairs)
        self._members = {tail: name for tail, name in pairs if times[tail] == 1 or tail == name}

    def ref(self, name: Any, where: str) -> ImageRef:
        """The image of a name. D40 for what no file can be called; D60 outside the folder, or for two names of one."""
        if not isinstance(name, str) or _NO_FILE.match(name):
            local, download = "an image is not given by the name of a local file", "write the name of a downloaded file"
            raise SayoError("D40", local, where=where, got=shown(name), fix=download)
        found = plain = normpath(re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/"))
        if plain.startswith("../"):
            outside, whole = "an image is outside the folder of images", "set --images, or write the whole path"
            raise SayoError("D60", outside, where=where, got=shown(name), fix=whole)
        if plain.startswith("/"):
            if Path(plain).is_file():
                return ImageRef(plain, Path(plain))
            found = next((tail for tail in _tails(plain) if self._has(tail)), PurePosixPath(plain).name)
            if self._moved.setdefault(found, plain) != plain:
                twice, got = "two images have one name in the folder of images", f"{self._moved[found]} and {plain}"
                raise SayoError("D60", twice, where=where, got=got, fix="write their paths in this folder")
        if self._members is None:
            return ImageRef(found, self.base / found)
        member = self._members.get(found, found)
        return ImageRef(member, self.base, member)

    def _has(self, name: str) -> bool:
        return (self.base / name).is_file() if self._members is None else self._members.get(name) == name


def _tails(name: str) -> list[str]:
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
    raise SayoError("D60", "an image has no bytes", where=where, got=shown(value), fix=fix)


class FieldSource(Source):
    """A dataclass whose fields are the facts of the source."""

    def facts(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return fields | {"files": file_facts(v for v in fields.values() if isinstance(v, Path) and v.is_file())}


@dataclass(frozen=True)
class FileSource(FieldSource):
    """A file of records and perhaps one of validation rows; fields as the flags of ``add_file_flags``."""

    file: Path
    box_format: str | None = None
    images: Path | None = None
    val_file: Path | None = None
    name: str = "mine"

    def records(self, read: Callable[[Path], Iterable[tuple[int, Any]]]) -> Iterator[tuple[Any, Path, int, str]]:
        """Value, file, number and split of each record."""
        for path, split in ((self.file, "train" if self.val_file else ""), (self.val_file, "val")):
            for number, value in read(check_input(path)) if path else ():
                yield value, path, number, split  # type: ignore[misc]


def add_box_flags(parser: argparse._ActionsContainer) -> None:
    """Flags of the builder for boxes whose frame or size the data may not show."""
    parser.add_argument("--box-frame", choices=FRAMES, metavar="FRAME", help=f"of EXIF: {', '.join(FRAMES)}")
    parser.add_argument("--rescale", action="store_true", help="boxes were drawn on resized copies")
    parser.add_argument("--trust-boxes", action="store_true", help="the format was checked: build in any case")


def add_file_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Flags of a ``FileSource``."""
    parser.add_argument("--file", type=Path, required=True, help="the file of records (.gz and .zip are read too)")
    parser.add_argument("--images", type=Path, help="folder or zip file of the images (default: the file's folder)")
    parser.add_argument("--val-file", type=Path, help="a file of the same form, whose rows are the validation split")
    parser.add_argument("--name", default=name, help="name of the data set in metrics (default: %(default)s)")
