"""Rows of parquet files, and the images of a row as verl opens them, read with errors that name the place."""

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sayo_verl.data.images import DAMAGE, ORIENTATION
from sayo_verl.errors import SayoError

_FIX = "store the encoded image as {'bytes': ...}, or its path alone: a text, or {'image': path}"


class Header(NamedTuple):
    """Of an encoded image: Pillow's format, stored pixels, EXIF orientation (1 to 8), frames (1: not animated)."""

    format: str
    width: int
    height: int
    orientation: int
    frames: int


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """D02 for what Arrow raises on a damaged file, and on values that Python has no type for."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, OverflowError, NotImplementedError) as error:
        what = f"the parquet file cannot be read ({' '.join(str(error).split())})"
        raise SayoError("D02", what, where=str(path), fix="prepare it again; it may have been cut short") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file whose footer can be read; D02 for any other."""
    with _readable(path):
        file = pq.ParquetFile(path)
        _ = file.schema_arrow
        return file


def read_rows(
    file: pq.ParquetFile, path: Path, columns: list[str], groups: list[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of some columns (names, or dotted paths of leaves) and row groups; D02 for a damaged page."""
    batches = file.iter_batches(batch_size=256, columns=columns, row_groups=groups)
    marked = [name for name in _image_features(file) if name in columns]
    while True:
        with _readable(path):  # around the reading alone: an error of the caller is not caught here
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for row in rows:
            for name in marked:
                empty = [isinstance(image, dict) and image.get("bytes") is None for image in row[name] or []]
                row[name] = [{"image": row[name][i].get("path")} if e else row[name][i] for i, e in enumerate(empty)]
            yield row


def _image_features(file: pq.ParquetFile) -> list[str]:
    """Columns that `datasets` marks as lists of images. It opens them itself, also by their path."""
    try:
        declared = dict(json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return []
    lists = [field.name for field in file.schema_arrow if pa.types.is_list(field.type)]
    return [name for name in lists if '"_type": "Image"' in json.dumps(declared.get(name))]


def rows_at(file: pq.ParquetFile, path: Path, columns: list[str], chosen: set[int]) -> Iterator[tuple[int, dict]]:
    """``(number, row)`` of some rows; only the row groups that hold one are read. Errors as of ``read_rows``."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        n = file.metadata.row_group(group).num_rows
        if any(row in chosen for row in range(first, first + n)):
            for row, values in enumerate(read_rows(file, path, columns, [group]), start=first):
                if row in chosen:
                    yield row, values
        first += n


def leaves(file: pq.ParquetFile) -> list[str]:
    """Dotted paths of the columns as parquet stores them, such as ``images.list.element.bytes``."""
    return [file.schema.column(i).path for i in range(len(file.schema))]


def image_source(image: Any, where: str) -> bytes | Path | str:
    """What verl 0.9.1 opens of one entry of the column of images: bytes, the path of a file, or a web address.

    verl opens a text (a path, ``file://``, ``http(s)://`` or ``data:image``), ``{bytes}`` and ``{image: text}``. Of a
    dict with ``bytes`` it opens nothing else, and it never opens ``path``. Raises D06 for no image, D07 for invalid
    base64, D73 for what verl does not open and for a path without a file.
    """
    fields = image if isinstance(image, dict) else {"image": image}
    text = fields["bytes"] if "bytes" in fields else fields.get("image", fields.get("image_url"))
    if text is None or text in (b"", ""):
        raise SayoError("D06", "an image is missing", where=where, got=str(image)[:80], fix=_FIX)
    if "bytes" in fields and isinstance(text, bytes):
        return text
    if "bytes" in fields or not isinstance(text, str):
        raise SayoError("D73", "verl does not open this image", where=where, got=str(image)[:80], fix=_FIX)
    if text.startswith(("http://", "https://")):
        return text
    if text.startswith("data:image"):
        try:
            return base64.b64decode(text.partition("base64,")[2])
        except ValueError as error:
            raise _undecodable(error, where) from error
    path = Path(text.removeprefix("file://"))
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        got, fix = f"{text[:200]!r} in {Path.cwd()}", "store absolute paths, or start the run where the paths begin"
        wanted = "a file; relative paths count from the working directory of the run"
        raise SayoError("D73", "there is no image at a path", where=where, got=got, wanted=wanted, fix=fix)
    return path


def read_image(image: Any, where: str, *, decode: bool = True) -> Header | None:
    """The header of an image of a row; None for a web address. Errors of ``image_source``, and D07 for a header or,
    with ``decode``, pixels that cannot be read."""
    source = image_source(image, where)
    if isinstance(source, str):
        return None
    try:
        with _opened(source) as picture:
            size = picture.size
            if decode:
                picture.load()
            frames = getattr(picture, "n_frames", 1)  # only formats that can be animated have it
            return Header(picture.format or "", *size, _orientation(picture), frames)
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise _undecodable(error, where) from error


def decoded(image: Any, where: str) -> Image.Image:
    """The picture of a row, RGB, with the errors of ``read_image``; D73 for a web address, which is not fetched."""
    if read_image(image, where) is None:
        what = "an image of a web address is not fetched here"
        raise SayoError("D73", what, where=where, got=image, fix="store the encoded bytes, or the path of a file")
    with _opened(image_source(image, where)) as picture:
        return picture.convert("RGB")


def _opened(source: bytes | Path | str) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _undecodable(error: Exception, where: str) -> SayoError:
    what = f"an image cannot be decoded ({error})"
    return SayoError("D07", what, where=where, fix="remove the row or store the image again")


def _orientation(picture: Image.Image) -> int:
    try:  # not PngImageFile's own method, which decodes the picture
        found = Image.Image.getexif(picture).get(ORIENTATION, 1)
    except DAMAGE:  # a viewer that cannot read it does not turn the picture
        return 1
    return found if found in range(1, 9) else 1


def image_digest(image: Any, where: str) -> bytes:
    """16 bytes that differ between encoded images, of their bytes or of the web address."""
    source = image_source(image, where)
    data = source.read_bytes() if isinstance(source, Path) else source
    return hashlib.blake2b(data if isinstance(data, bytes) else data.encode(), digest_size=16).digest()
