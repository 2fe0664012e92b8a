"""What a source reads from: names of images, folders and zip files of them, parquet files.

Images are named, not read, by sources. A name stays inside the folder that was given; addresses, other folders and
names that no file can have stop the work. Formats that can run code when they are read are not read.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from sayo_verl.data.image_files import check_name
from sayo_verl.data.rows import RUNS_CODE, Drop, ImageRef
from sayo_verl.data.sources.fields import refuse, shown
from sayo_verl.data.streams import place_of
from sayo_verl.errors import SayoError, did_you_mean


def image_name(name: Any, where: str, *, outside: bool = False) -> str:
    """The name of an image file, if a file can have it and it does not lead elsewhere.

    A link inside the folder of images is followed: folders of links to another disk are common.

    Args:
        name: as the record has it.
        where: names the record.
        outside: allow absolute paths and "..".

    Raises:
        SayoError: D40 for a URL or a name that no file can have, D60.
    """
    if not isinstance(name, str):
        what = (
            "an image is given as an object, not as a file" if isinstance(name, dict) else "an image has no file name"
        )
        raise _no_image(what, where, name, "the path of a file", "write the path of the image file")
    if not name:
        raise _no_image("an image has no file name", where, name, "the path of a file", "write the path")
    check_name(name, where=where)
    path = PurePosixPath(name)
    if not outside and (path.is_absolute() or ".." in path.parts):
        raise _no_image(
            "an image lies outside the folder of images",
            where,
            name,
            "a path inside it",
            "name the folder with --images, or allow other folders with --allow-outside",
        )
    return name


def _no_image(what: str, where: str, got: Any, wanted: str, fix: str) -> SayoError:
    """D60: an image cannot be found by its name."""
    return SayoError("D60", what, where=where, got=shown(got), wanted=wanted, fix=fix)


@dataclass
class ImageFolder:
    """Where images are looked up by name: a folder, or a zip file (by full name, or by the one member that ends so).

    Raises:
        SayoError: D63 where there is neither, D60 from ``ref``.
    """

    base: Path
    outside: bool = False

    def __post_init__(self) -> None:
        self._members: dict[str, str] | None = None
        if self.base.is_dir():
            return
        if not zipfile.is_zipfile(self.base):
            raise unreadable(self.base, "there is no such folder or zip file of images", "correct --images")
        with zipfile.ZipFile(self.base) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
        self._members = {}
        for name in names:
            tail = name.partition("/")[2]
            while tail:
                # two members that end alike: neither is the one
                self._members[tail] = "" if tail in self._members else name
                tail = tail.partition("/")[2]
        self._members.update({name: name for name in names})

    def ref(self, name: Any, where: str) -> ImageRef:
        name = image_name(name, where, outside=self.outside)
        if self._members is None:
            return ImageRef(key=str(PurePosixPath(name)), path=self.base / name)
        member = self._members.get(name, name)
        if not member:
            raise _no_image(
                "two members of the zip file end in this name",
                f"{where} in {self.base}",
                name,
                "one",
                "write the whole name of the member",
            )
        return ImageRef(key=name, path=self.base, member=member)


def stored_image(value: Any, where: str, folder: ImageFolder | None = None) -> ImageRef:
    """An image of a table: {"bytes", "path"} as Hugging Face stores it, bytes, or a file name where a folder is given.

    The key is a hash of the bytes: tables give one picture many names.

    Raises:
        SayoError: D60 where there are no bytes, which verl would read as an empty picture.
        Drop: ``image_missing`` where there is nothing at all.
    """
    if value is None:
        raise Drop("image_missing", "null")
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return ImageRef(key=hashlib.sha256(data).hexdigest()[:20], data=data)
    if isinstance(value, str) and folder is not None:
        return folder.ref(value, where)
    raise _no_image(
        "an image has no bytes",
        where,
        value,
        "{'bytes': the encoded image, 'path': ...}",
        "save the data set with its images embedded (push_to_hub and embed_table_storage do that), "
        "or name the folder of its files with --images where they are file names",
    )


# --------------------------------------------------------------------------------------------------------------- files


def unreadable(path: Path | str, what: str, fix: str, *, got: object = None) -> SayoError:
    """D63: the input cannot be read."""
    return SayoError("D63", what, where=str(path), got=got, fix=fix)


def check_file(path: Path) -> Path:
    """The file, or the zip file of "archive.zip::member", if it exists and is of a format that is read.

    Raises:
        SayoError: D63.
    """
    path = place_of(path).path
    if path.suffix.lower() in RUNS_CODE:
        raise unreadable(
            path,
            "files of this format are not read: reading one can run code that it holds",
            "convert it to parquet or JSON where you trust it",
            got=path.suffix,
        )
    if not path.is_file():
        raise unreadable(path, "there is no such file", "correct the path")
    return path


def file_facts(paths: Iterable[Path]) -> dict[str, int]:
    """Name and size of each file, for ``Source.facts``."""
    return {str(path): place_of(path).path.stat().st_size for path in paths}


def parquet_files(path: Path, split: str) -> tuple[Path, ...]:
    """One parquet file, or those of a split in a folder as Hugging Face lays it out ([data/]split-*.parquet, split/*).

    Raises:
        SayoError: D63.
    """
    if not path.is_dir():
        check_file(path)
        if path.suffix.lower() != ".parquet":
            raise unreadable(path, "this is no parquet file", "give a .parquet file or a folder of them")
        return (path,)
    named = re.compile(rf"{re.escape(split)}[-.]")
    found = [f for f in sorted(path.rglob("*.parquet")) if named.match(f.name) or f.parent.name == split]
    if found:
        return tuple(found)
    unsafe = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in RUNS_CODE]
    if unsafe:
        check_file(unsafe[0])
    raise unreadable(
        path,
        f"the folder has no parquet file of the split {split!r}",
        "correct the folder or --split",
        got=sorted(f.name for f in path.rglob("*.parquet"))[:8] or "no parquet file",
    )


def parquet_rows(path: Path, columns: Sequence[str], rows: int = 64) -> Iterator[dict[str, Any]]:
    """Rows of some columns, a few at a time.

    Raises:
        SayoError: D58 for a column that is not there, D63 for a damaged file.
    """
    try:
        with pq.ParquetFile(path) as file:
            need_columns(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
                yield from batch.to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's own errors are among these
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> SayoError:
    """D63 for a parquet file that Arrow cannot read."""
    return unreadable(
        path,
        f"the parquet file cannot be read ({' '.join(str(error).split())})",
        "download it again; it may have been cut short",
        got=f"{path.stat().st_size} bytes",
    )


def need_columns(columns: Iterable[str], there: Iterable[str], where: str) -> None:
    """Refuse columns that are not there.

    Raises:
        SayoError: D58.
    """
    there = list(there)
    for column in columns:
        if column not in there:
            raise refuse(
                f"there is no column {column!r}{did_you_mean(column, there)}",
                where,
                "name the columns as the table does",
                wanted=sorted(there),
            )
