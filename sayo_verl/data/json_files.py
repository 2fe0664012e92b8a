"""Large JSON, one record in memory at a time, from a plain file, a .gz or a .zip with one file of JSON.

    json_items(path)                    (key, value) of the entries of one object at the top
    json_items(path, "images.item")     (index, element) of an array, here below the key "images"
    json_lines(path)                    (number of the line, value) of a file with one JSON value a line

The first bytes of a file show how it is packed. A byte order mark of UTF-8 is skipped. A fault ends in D47 with the
file and the record or line. Whole numbers of more than 64 bits are a fault for ijson's C part.
"""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import ijson

from sayo_verl.errors import SayoError

MAX_LINE = 64 * 2**20  # bytes of a line, which is in memory as a whole
# Bytes that a packed file may hold: JSON of repeated records packs to a hundredth, a bomb to a thousandth.
MAX_UNPACKED, MAX_RATIO = 2**28, 250
# Levels that one piece of 64 KiB opens more than it closes. ijson's memory grows with the square of the depth.
MAX_DEPTH = 1000
_MARK = b"\xef\xbb\xbf"  # UTF-8 with a byte order mark


def json_items(path: Path, prefix: str = "") -> Iterator[tuple[Any, Any]]:
    """Entries of an object, or elements of the array at ``prefix`` ("item": at the top) with their index.

    A missing key is an empty array. Raises D47 for what is not JSON or of another kind at the top, D48 for a file that
    cannot be read.
    """
    last: Any = None
    with _opened(path) as file:
        kind, wanted = _start(file), "[" if prefix == "item" else "{"
        if kind != wanted:
            fix = "name a file of the published format; one JSON value a line is another format"
            raise SayoError("D47", "the JSON is of another kind", where=str(path), got=kind, wanted=wanted, fix=fix)
        found = (ijson.items if prefix else ijson.kvitems)(_Shallow(file), prefix, use_float=True)
        try:
            for last, value in enumerate(found) if prefix else found:
                yield last, value
        except (ijson.JSONError, ValueError) as error:
            where = str(path) if last is None else f"{path}, after record {last!r}"
            raise _not_json(error, where) from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line that is not blank; D47, D48 as ``json_items``."""
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                what, got = "a line is too long for a record", f"more than {MAX_LINE:,} bytes"
                fix = "write one JSON object on each line, and name images instead of storing them in it"
                raise SayoError("D47", what, where=f"{path} line {number}", got=got, fix=fix)
            if number == 1 and line.strip().startswith(b"["):
                fix = "write one JSON object on each line"
                raise SayoError("D47", "the file is a JSON array", where=str(path), got="[", fix=fix)
            try:
                value = json.loads(line.decode()) if line.strip() else None
                if rb"\ud" in line.lower():
                    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            except (ValueError, RecursionError) as error:
                raise _not_json(error, f"{path} line {number}") from error
            if line.strip():
                yield number, value


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of an array, or values of lines, whichever the file has, with their numbers from 1."""
    with _opened(path) as file:
        array = _start(file) == "["
    return ((i + 1, value) for i, value in json_items(path, "item")) if array else json_lines(path)


def _start(file: IO[bytes]) -> str:
    """The first character that is no white space; the file is not moved."""
    return cast(io.BufferedReader, file).peek(4096).decode("utf-8", "replace").strip()[:1]


def _not_json(error: Exception, where: str) -> SayoError:
    message = " ".join(str(error).split())[:160]
    if isinstance(error, UnicodeDecodeError) or "UTF8" in message:
        convert = "convert it: iconv -f GB18030 -t UTF-8 (or from the encoding that it has)"
        return SayoError("D47", "the file is not UTF-8", where=where, got=message[:60], fix=convert)
    fix = "correct it, or download the file again if it was cut short"
    return SayoError("D47", f"this is not JSON ({message})", where=where, wanted="complete JSON in UTF-8", fix=fix)


class _Shallow:
    """A file of JSON for ijson; ValueError for what is nested as no record is."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if data.count(b"[") + data.count(b"{") - data.count(b"]") - data.count(b"}") > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels")
        return data


class _Bounded(io.RawIOBase):
    """A file that is unpacked while it is read, up to a limit."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit, self._left = file, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {self._limit:,} bytes, far more than JSON does")
        return len(data)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file behind its byte order mark."""
    try:
        with open(path, "rb") as raw:
            first, file = raw.read(2), cast(IO[bytes], raw)
            limit = max(MAX_UNPACKED, MAX_RATIO * raw.seek(0, io.SEEK_END))
            raw.seek(0)
            if first == b"\x1f\x8b":
                file = cast(IO[bytes], _Bounded(cast(IO[bytes], gzip.GzipFile(fileobj=raw)), limit))
            elif first == b"PK":
                archive = zipfile.ZipFile(raw)
                names = [name for name in archive.namelist() if not name.startswith("__MACOSX/") and ".json" in name]
                if len(names) != 1:
                    got, unpack = ", ".join(names[:8]) or "none", "unpack it, and name the file that is meant"
                    raise SayoError(
                        "D48", "the zip file has not one file of JSON", where=str(path), got=got, fix=unpack
                    )
                file = cast(IO[bytes], _Bounded(archive.open(names[0]), limit))
            file = cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, file)))
            mark = cast(io.BufferedReader, file).peek(4)[:4]
            if mark[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in mark:
                raise _not_json(UnicodeDecodeError("utf-8", mark, 0, 1, "the file looks like UTF-16"), str(path))
            file.read(len(_MARK) if mark.startswith(_MARK) else 0)
            yield file
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
        fix = "correct the path, or download the file again if it was cut short"
        raise SayoError("D48", f"the file cannot be read ({error})", where=str(path), fix=fix) from error
