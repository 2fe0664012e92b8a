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

import pyarrow.parquet as pq
from PIL import Image

from sayo_verl.data.images import DAMAGE, orientation_of
from sayo_verl.errors import SayoError

# Formats that are opened. Of the others that Pillow knows, EPS starts another program (Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
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
        _ = file.schema_arrow  # types that Arrow cannot convert are refused here
        return file


def read_rows(
    file: pq.ParquetFile, path: Path, columns: list[str], groups: list[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of some columns (names, or dotted paths of leaves) and row groups; D02 for a damaged page."""
    batches = file.iter_batches(batch_size=256, columns=columns, row_groups=groups)
    with _readable(path):
        image_columns = [name for name in _image_columns(file) if name in columns]
    while True:
        with _readable(path):  # around the reading alone: an error of the caller is not caught here
            batch = next(batches, None)
            rows = batch.to_pylist() if batch else []
        if batch is None:
            return
        for row in rows:
            for name in image_columns:
                if isinstance(row[name], list):
                    row[name] = [_by_path(image) for image in row[name]]
            yield row


def _image_columns(file: pq.ParquetFile) -> list[str]:
    """Columns that `datasets` marks as images. It opens them itself, also by their path."""
    marks = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    types = marks.get("info", {}).get("features", {})
    return [name for name, kind in types.items() if '"_type": "Image"' in json.dumps(kind)]


def _by_path(image: Any) -> Any:
    """An image without bytes as verl opens it by its path: {image: path}."""
    empty = isinstance(image, dict) and image.get("bytes") is None
    return {"image": image.get("path")} if empty else image


def image_source(image: Any, where: str) -> bytes | Path | str:
    """What verl 0.9.1 opens of one entry of the column of images: bytes, the path of a file, or a web address.

    verl opens a text (a path, ``file://``, ``http(s)://`` or ``data:image``), ``{bytes}`` and ``{image: text}``. Of a
    dict with ``bytes`` it opens nothing else, and it never opens ``path``. Raises D06 for no image, D07 for invalid
    base64, D73 for what verl does not open and for a path without a file.
    """
    fields = image if isinstance(image, dict) else {"image": image}
    stored = fields["bytes"] if "bytes" in fields else fields.get("image", fields.get("image_url"))
    if stored is None or stored in (b"", ""):
        raise SayoError("D06", "an image is missing", where=where, got=str(image)[:80], fix=_FIX)
    if "bytes" in fields and isinstance(stored, bytes):
        return stored
    if "bytes" in fields or not isinstance(stored, str):
        raise SayoError("D73", "verl does not open this image", where=where, got=str(image)[:80], fix=_FIX)
    if stored.startswith(("http://", "https://")):
        return stored
    if stored.startswith("data:image"):
        with _decodable(where):
            return base64.b64decode(stored.partition("base64,")[2])
    path = Path(stored.removeprefix("file://"))
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        got = f"{stored[:200]!r}, read from the working directory {Path.cwd()}"
        fix = "store absolute paths, or start the run where the paths begin"
        raise SayoError("D73", "there is no image at a path", where=where, got=got, wanted="a file", fix=fix)
    return path


def read_image(image: Any, where: str, *, decode: bool = True, web: bool = True) -> Header | None:
    """The header of an image of a row; None for a web address. Errors of ``image_source``, D07 for a header or, with
    ``decode``, pixels that cannot be read, and D79 for a web address if ``web`` is false."""
    with _opened(image, where) as picture:
        if picture is None:
            if web:
                return None
            raise SayoError(
                "D79",
                "an image is a web address, which verl would fetch in every rollout, from inside your network",
                where=where,
                got=f"{image!s:.200}",
                fix="download the images and store their bytes; or allow it with sayo.web_images=True",
            )
        if decode:
            picture.load()
        frames = getattr(picture, "n_frames", 1)  # only formats that can be animated have it
        return Header(picture.format or "", *picture.size, orientation_of(picture), frames)


def decoded(image: Any, where: str) -> Image.Image:
    """The picture of a row, RGB, with the errors of ``read_image``; D73 for a web address, which is not fetched."""
    with _opened(image, where) as picture:
        if picture is None:
            what = "an image of a web address is not fetched here"
            raise SayoError("D73", what, where=where, got=image, fix="store the encoded bytes, or the path of a file")
        return picture.convert("RGB")


@contextmanager
def _opened(image: Any, where: str) -> Iterator[Image.Image | None]:
    """The picture, not yet decoded; None for a web address. D07 for damage, also for what the caller finds."""
    source = image_source(image, where)
    if isinstance(source, str):
        yield None
        return
    with (
        _decodable(where),
        Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture,
    ):
        yield picture


@contextmanager
def _decodable(where: str) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, Image.DecompressionBombError) as error:
        what = f"an image cannot be decoded ({error})"
        fix = "remove the row or store the image again; sayo.bad_rows leaves rows out during a run (X24), not here"
        raise SayoError("D07", what, where=where, fix=fix) from error


def image_digest(image: Any, where: str) -> bytes:
    """16 bytes that differ between encoded images, of their bytes or of the web address."""
    source = image_source(image, where)
    data = source.read_bytes() if isinstance(source, Path) else source
    return hashlib.blake2b(data if isinstance(data, bytes) else data.encode(), digest_size=16).digest()
