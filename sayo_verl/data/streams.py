"""Big JSON as a stream: one record in memory at a time, from a plain file, a .gz, or a member of a .zip.

    json_items(path)                    (key, value) of the entries of one top-level object
    json_array(path, "images.item")     the elements of an array
    json_lines(path)                    (number of the line, value) of a file of one JSON value a line

A path is a file, or "archive.zip::member" where an archive holds more than one file of JSON. What a file is, its first
bytes say, not its name.

A reader that goes on after a fault trains on half a file, or on the second of two values of a key, so there is no
tolerance. These stop the work (D47), with the file, the last entry and the byte or line: a file that was cut short,
text behind the end, NaN and Infinity, text that is not UTF-8, nesting deeper than ``MAX_DEPTH``, another kind of top
level than was asked for, and a key that comes twice in one object. Records are checked whole; of what ``json_array``
passes over, the syntax and the depth are.

Keys of the top level are kept as 64-bit hashes, 12 to 24 bytes each. Of n different keys, two share a hash with a
probability of about n^2 / 2^65 (3e-8 for a million, 5e-6 for fourteen million): the work then stops for a key that came
once. Python draws its hash anew for each process, so a false alarm does not come back.

Archives are not unpacked to disk. A member with a name that leads out of its folder, a link, an encrypted member, and
more than ``MAX_BYTES`` or 100 times the packed size are refused (D41 by ``images.check_member``, D48 here).

The parser is ijson's, with its C part (``BACKEND`` is "yajl2_c") where that is installed; ijson's others are many
times slower and let a few things pass that JSON has not ("+1"). The C part reads half of a surrogate pair ("\\ud800"
alone) as "?" and stops at whole numbers of more than 64 bits. Numbers with a fraction are floats.
"""

import gzip
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import ijson

from sayo_verl.data.building.shards import Hashes
from sayo_verl.data.image_files import MAX_RATIO, RATIO_FROM, check_member
from sayo_verl.errors import SayoError

BACKEND: str = ijson.backend  # the fastest that is installed, or what IJSON_BACKEND names
MAX_DEPTH = 100  # of objects and arrays in one another; published records have less than ten
MAX_BYTES = 64 * 2**30  # of one file, unpacked
MAX_LINE = 64 * 2**20  # bytes

Progress = Callable[[int, int], None]  # bytes read, and of how many

_BOM = b"\xef\xbb\xbf"
_AGAIN = "download or write the file again; it may have been cut short or changed"
_BAD_JSON = (ijson.JSONError, ValueError, OverflowError)  # UnicodeDecodeError and JSON's own are ValueErrors
_BAD_FILE = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class _Fault(Exception):
    """What is wrong with the JSON; the reader knows where."""

    def __init__(self, what: str, *, got: Any = None, wanted: Any = None, fix: str = _AGAIN) -> None:
        super().__init__(what)
        self.what, self.got, self.wanted, self.fix = what, got, wanted, fix


# --------------------------------------------------------------------------------------------------------------- files


class Place(NamedTuple):
    """A file, and which member of it where it is an archive."""

    path: Path
    member: str | None

    def __str__(self) -> str:
        return f"{self.path}::{self.member}" if self.member else str(self.path)


def place_of(path: Path | str, member: str | None = None) -> Place:
    """Path and member of "archive.zip::member"."""
    if member is None and "::" in str(path):
        name, _, member = str(path).partition("::")
        return Place(Path(name), member)
    return Place(Path(path), member)


class _Stream:
    """Bytes of a file as they are unpacked, and how far it has been read."""

    def __init__(self, place: Place, file: IO[bytes], raw: IO[bytes] | None, total: int) -> None:
        self.place, self.total = place, total
        self.bytes = self.entries = self._told = 0
        self.last = ""  # key of the last entry
        self._file, self._raw = file, raw  # raw: of a .gz, whose unpacked size no one knows before its end

    def read(self, size: int = -1) -> bytes:
        return self._checked(self._file.read(size))

    def line(self) -> bytes:
        return self._checked(self._file.readline(MAX_LINE + 1))

    def _checked(self, data: bytes) -> bytes:
        self.bytes += len(data)
        limit = MAX_BYTES
        if self._raw is not None and self.bytes > RATIO_FROM:
            limit = min(limit, int(MAX_RATIO * self._raw.tell()))
        if self._raw is not None and self.bytes > limit:
            raise SayoError(
                "D48",
                "a packed file unpacks to far more than it looks",
                where=str(self.place),
                got=f"{self.bytes} bytes so far, of {self.total} packed ones",
                wanted=f"at most {MAX_RATIO:g} times as much, and {MAX_BYTES} bytes",
                fix="do not use this file, or unpack and check it by hand",
            )
        return data

    def tell(self, progress: Progress, *, end: bool = False) -> None:
        """Report where the reader is, if that is further than it was."""
        if self.bytes == self._told and not end:
            return
        self._told = self.bytes
        at = self.total if end else self.bytes if self._raw is None else self._raw.tell()
        try:
            progress(at, self.total)
        except Exception as error:  # of the caller's code: must not be taken for a fault of the file
            raise RuntimeError("the progress callback failed") from error

    def where(self) -> str:
        after = f", after entry {self.entries}" if self.entries else ""
        after += f" (key {_shown(self.last)})" if self.last else ""
        return f"{self.place}{after}, before byte {self.bytes}"


@contextmanager
def _reading(path: Path | str, member: str | None, suffixes: tuple[str, ...]) -> Iterator[_Stream]:
    """The bytes of a file; what goes wrong with them leaves as SayoError."""
    place = place_of(path, member)
    stream: _Stream | None = None
    try:
        if not place.path.is_file():
            raise SayoError("D48", "there is no such file", where=str(place), fix="correct the path")
        with open(place.path, "rb") as raw:
            first = raw.read(4)
            raw.seek(0)
            packed = place.path.stat().st_size
            if first[:2] == b"PK":
                with zipfile.ZipFile(raw) as archive:
                    info = _member(archive, place, suffixes)
                    with archive.open(info) as file:
                        stream = _Stream(Place(place.path, info.filename), file, None, info.file_size)
                        yield stream
                return
            if place.member:
                raise SayoError(
                    "D48",
                    "a member is named of a file that is no zip file",
                    where=str(place),
                    fix="name the file alone",
                )
            if first[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    stream = _Stream(place, unpacked, raw, packed)  # type: ignore[arg-type]
                    yield stream
                return
            if first[:3] == _BOM or first[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise _Fault(
                    "the file starts with a byte order mark",
                    got=first[:3].hex(),
                    wanted="UTF-8 without one",
                    fix="save it again as plain UTF-8",
                )
            stream = _Stream(place, raw, None, packed)
            yield stream
    except _Fault as fault:
        raise SayoError(
            "D47",
            fault.what,
            where=stream.where() if stream else str(place),
            got=fault.got,
            wanted=fault.wanted,
            fix=fault.fix,
        ) from fault
    except _BAD_JSON as error:
        raise SayoError(
            "D47",
            f"this is not JSON ({_told(error)})",
            where=stream.where() if stream else str(place),
            wanted="one complete JSON text in UTF-8",
            fix=_AGAIN,
        ) from error
    except (*_BAD_FILE, NotImplementedError) as error:
        raise SayoError(
            "D48",
            f"the file cannot be read ({_told(error)})",
            where=stream.where() if stream else str(place),
            fix=_AGAIN,
        ) from error


def _member(archive: zipfile.ZipFile, place: Place, suffixes: tuple[str, ...]) -> zipfile.ZipInfo:
    """The named member of an archive without unsafe ones, or its only one of JSON."""
    infos = [i for i in archive.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX/")]
    for info in infos:
        check_member(info, where=str(place.path), max_bytes=2**63, max_ratio=math.inf)
    if place.member is None:
        found = [i for i in infos if i.filename.lower().endswith(suffixes)]
    else:
        found = [i for i in infos if i.filename == place.member]
        found = found or [i for i in infos if i.filename.rpartition("/")[2] == place.member]
    if len(found) != 1:
        names = [i.filename for i in (found or infos)]
        raise SayoError(
            "D48",
            "which member of the archive is meant is not clear",
            where=str(place),
            got=f"{len(found)} members to choose from; {', '.join(names[:8])}{', ...' * (len(names) > 8)}",
            wanted="one",
            fix=f"write {place.path.name}::NAME with the member's name",
        )
    check_member(found[0], where=str(place.path), max_bytes=MAX_BYTES)
    return found[0]


def _told(error: BaseException) -> str:
    """The first line of a parser's message; yajl's can be bytes."""
    first = error.args[0] if error.args and isinstance(error.args[0], bytes) else str(error)
    text = first.decode("ascii", "backslashreplace") if isinstance(first, bytes) else first
    return " ".join(text.split("\n")[0].split())[:160] or type(error).__name__


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 60 else ascii(text[:57]) + "..."


# -------------------------------------------------------------------------------------------------------------- values


def json_items(
    path: Path | str,
    member: str | None = None,
    *,
    seen: Hashes | None = None,
    progress: Progress | None = None,
    backend: str = BACKEND,
) -> Iterator[tuple[str, Any]]:
    """The entries of one top-level object, in the order of the file.

    Args:
        path: see the module.
        member: of a zip file; may also stand in ``path``.
        seen: hashes of keys that must not come again; give one to several calls for keys that are unique over files.
        progress: is called with bytes read and their total (of a .gz: packed bytes) when more have been read.
        backend: of ijson.

    Raises:
        SayoError: D41, D47, D48 (see the module); D47 may come after entries were given out.
    """
    seen = Hashes() if seen is None else seen
    with _reading(path, member, (".json",)) as stream:
        events = _events(stream, backend)
        event, _ = next(events)
        if event != "start_map":
            raise _wrong_kind("the file", event, "an object {...}")
        for event, key in events:
            if event == "end_map":
                break
            if not seen.add(hash(key) & 0xFFFFFFFFFFFFFFFF):
                raise _Fault(
                    f"the key {_shown(key)} comes twice",
                    wanted="each key once",
                    fix="remove one of the two; of several files, leave out the one that repeats",
                )
            yield key, _value(events, *next(events))
            stream.entries += 1
            stream.last = key
            if progress is not None:
                stream.tell(progress)
        _finish(events, stream, progress)


def json_array(
    path: Path | str,
    prefix: str = "item",
    member: str | None = None,
    *,
    progress: Progress | None = None,
    backend: str = BACKEND,
) -> Iterator[Any]:
    """The elements of an array, in the order of the file.

    Args:
        path: see the module.
        prefix: where the array is, as ijson writes it: "item" at the top level, "images.item" under the key "images".
        member: of a zip file; may also stand in ``path``.
        progress: as of ``json_items``.
        backend: of ijson.

    Raises:
        SayoError: D41, D47, D48 (see the module); D47 too where there is no array at ``prefix``.
    """
    *keys, last = prefix.split(".")
    if last != "item":
        raise AssertionError(f"the prefix of an array ends in item: {prefix}")
    with _reading(path, member, (".json",)) as stream:
        events = _events(stream, backend)
        for value in _elements(events, keys, "the file"):
            yield value
            stream.entries += 1
            if progress is not None:
                stream.tell(progress)
        _finish(events, stream, progress)


def _events(stream: _Stream, backend: str) -> Iterator[tuple[str, Any]]:
    return ijson.get_backend(backend).basic_parse(stream, use_float=True)


def _finish(events: Iterator[tuple[str, Any]], stream: _Stream, progress: Progress | None) -> None:
    for _ in events:  # the parser looks for text behind the end only when it is asked for more
        raise _Fault("there is text behind the end")
    if progress is not None:
        stream.tell(progress, end=True)


def _elements(events: Iterator[tuple[str, Any]], keys: Sequence[str], name: str) -> Iterator[Any]:
    """The elements of the array below ``keys``, and then all the rest is read too, for its faults."""
    event, _ = next(events)
    if not keys:
        if event != "start_array":
            raise _wrong_kind(name, event, "an array [...]")
        for event, value in events:
            if event == "end_array":
                return
            yield _value(events, event, value)
    if event != "start_map":
        raise _wrong_kind(name, event, f"an object with the key {keys[0]!r}")
    there: set[str] = set()
    for event, key in events:
        if event == "end_map":
            break
        if key in there:
            raise _Fault(f"the key {_shown(key)} comes twice", wanted="each key once", fix="remove one of the two")
        there.add(key)
        if key == keys[0]:
            yield from _elements(events, keys[1:], f"the value of {key!r}")
        else:
            _skip(events, next(events)[0])
    if keys[0] not in there:
        raise _Fault(
            f"{name} has no key {keys[0]!r}",
            got=", ".join(sorted(there)[:12]) or "no keys",
            wanted=keys[0],
            fix="check that this is the file that is meant",
        )


def _value(events: Iterator[tuple[str, Any]], event: str, value: Any) -> Any:
    """The value that begins with this event, by as many events as it has. No recursion, whatever the depth."""
    node: Any
    if event == "start_map":
        node = {}
    elif event == "start_array":
        node = []
    else:
        return _scalar(event, value)
    above: list[tuple[Any, str | None]] = []
    key: str | None = None  # None while node is a list
    for event, value in events:
        if event == "map_key":
            if value in node:
                raise _Fault(
                    f"the key {_shown(value)} comes twice in one object",
                    wanted="each key once",
                    fix="remove one of the two: which one is meant, no reader can know",
                )
            key = value
            continue
        if event == "end_map" or event == "end_array":
            if not above:
                return node
            node, key = above.pop()
            continue
        opens = event == "start_map" or event == "start_array"
        new: Any = ({} if event == "start_map" else []) if opens else value
        if key is None:
            node.append(new)
        else:
            node[key] = new
        if opens:
            above.append((node, key))
            node, key = new, None
            if len(above) > MAX_DEPTH - 2:  # the top level is one, the outermost container of the record another
                raise _too_deep()
        elif event == "number":
            _scalar(event, value)
    raise AssertionError("the parser ended within a value")


def _scalar(event: str, value: Any) -> Any:
    if event == "number" and not math.isfinite(value):
        raise _Fault("a number is not finite", got=value, wanted="JSON knows finite numbers only", fix="correct it")
    return value


def _skip(events: Iterator[tuple[str, Any]], event: str) -> None:
    depth = 1
    while True:
        if event == "start_map" or event == "start_array":
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep()
        elif event == "end_map" or event == "end_array":
            depth -= 1
        if depth == 1:
            return
        event = next(events)[0]
        while event == "map_key":
            event = next(events)[0]


def _too_deep() -> _Fault:
    return _Fault(
        "objects and arrays are nested too deep",
        got=f"more than {MAX_DEPTH} levels",
        wanted=f"at most {MAX_DEPTH}",
        fix="this is no data set; do not use the file",
    )


def _wrong_kind(name: str, event: str, wanted: str) -> _Fault:
    kinds = {"start_map": "an object {...}", "start_array": "an array [...]"}
    return _Fault(
        f"{name} is of another kind than was expected",
        got=kinds.get(event, f"a {event}"),
        wanted=wanted,
        fix="check that this is the file that is meant, and in its published format",
    )


# --------------------------------------------------------------------------------------------------------------- lines


def json_lines(
    path: Path | str, member: str | None = None, *, progress: Progress | None = None
) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line that is not blank.

    Args:
        path: see the module.
        member: of a zip file; may also stand in ``path``.
        progress: is called with bytes read and their total (of a .gz: packed bytes) after each line.

    Raises:
        SayoError: D41, D47, D48 (see the module).
    """
    with _reading(path, member, (".jsonl", ".ndjson", ".json")) as stream:
        number = 0
        while line := stream.line():
            number += 1
            value = _line(line, number)
            if progress is not None:
                stream.tell(progress)
            if value is not _BLANK:
                yield number, value


_BLANK = object()


def _line(line: bytes, number: int) -> Any:
    if len(line) > MAX_LINE:
        raise _Fault(
            f"line {number} is too long",
            got=f"more than {MAX_LINE} bytes",
            wanted=f"at most {MAX_LINE}",
            fix="write one record on each line",
        )
    if not line.strip():
        return _BLANK
    if line.startswith(_BOM):
        raise _Fault(f"line {number} starts with a byte order mark", fix="save the file again as plain UTF-8")
    try:
        text = line.decode()
        if text.count("{") + text.count("[") > MAX_DEPTH:
            _check_depth(text)
        value = _DECODER.decode(text.strip(" \t\r\n"))
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair: no text, and no file can hold it
    except _Fault as fault:
        raise _Fault(f"line {number}: {fault.what}", got=fault.got, wanted=fault.wanted, fix=fault.fix) from fault
    except ValueError as error:
        raise _Fault(
            f"line {number} is not JSON ({_told(error)})",
            got=ascii(line[:60])[2:-1],
            wanted="one JSON value on each line, in UTF-8",
            fix="correct the line",
        ) from error
    return value


def _check_depth(text: str) -> None:
    """Brackets outside strings; the decoder itself goes as deep as Python's stack allows."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise _Fault(
            f"the key {_shown(twice)} comes twice in one object",
            wanted="each key once",
            fix="remove one of the two: which one is meant, no reader can know",
        )
    return value


def _float(text: str) -> float:
    value: float = _scalar("number", float(text))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=lambda text: _float(text))
