"""Rows of parquet files and headers of encoded images, read with errors that name the place."""

import base64
import hashlib
import io
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image

from sayo_verl.data.images import DAMAGE, ORIENTATION
from sayo_verl.errors import SayoError

_IMAGE_ERRORS = (*DAMAGE, Image.DecompressionBombError)
# What Arrow raises on a damaged page, and on values that Python has no type for.
_ARROW_ERRORS = (OSError, ValueError, TypeError, LookupError, OverflowError, NotImplementedError)


class Header(NamedTuple):
    """What is known of an encoded image.

    Attributes:
        format: Pillow's name: "PNG", "JPEG", ...
        width, height: of the pixels as they are stored.
        orientation: 1 to 8, as EXIF says; 1 where it says nothing.
        frames: more than 1 for an animation.
    """

    format: str
    width: int
    height: int
    orientation: int
    frames: int


def digest(data: bytes) -> bytes:
    """16 bytes that tell encoded images apart."""
    return hashlib.blake2b(data, digest_size=16).digest()


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file with a sound footer.

    Raises:
        SayoError: D02 for any other.
    """
    try:
        file = pq.ParquetFile(path)
        _ = file.schema_arrow
    except _ARROW_ERRORS as error:
        raise _unreadable(path, error) from error
    return file


def read_rows(
    file: pq.ParquetFile, path: Path, columns: list[str], groups: Iterable[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows as plain containers. A file with a sound footer can still have a damaged page, which shows only here.

    Args:
        file: an open file.
        path: names it in errors.
        columns: names, or dotted paths of leaves.
        groups: row groups to read; all by default.

    Raises:
        SayoError: D02.
    """
    batches = file.iter_batches(batch_size=256, columns=columns, row_groups=None if groups is None else list(groups))
    decoded = {name: _as_datasets_decodes for name in image_features(file) if name in columns}
    while True:
        try:  # around the reading alone: what the caller raises on a row is not caught here
            batch = next(batches, None)
            rows = batch.to_pylist() if batch is not None else []
        except _ARROW_ERRORS as error:
            raise _unreadable(path, error) from error
        if batch is None:
            return
        for row in rows:
            yield row | {name: convert(row[name]) for name, convert in decoded.items()}


def image_features(file: pq.ParquetFile) -> list[str]:
    """Columns that `datasets` marks as lists of images. It opens them itself, so that verl gets pictures."""
    try:
        declared = dict(json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return []
    return [
        name for name, kind in declared.items() if kind != {"_type": "Image"} and '"_type": "Image"' in json.dumps(kind)
    ]


def _as_datasets_decodes(images: Any) -> Any:
    """Of a list of images as `datasets` stores them, what verl gets: the bytes, or else the file at the path."""
    if not isinstance(images, list):
        return images
    return [
        {"image": image.get("path")} if isinstance(image, dict) and image.get("bytes") is None else image
        for image in images
    ]


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


def _unreadable(path: Path, error: Exception) -> SayoError:
    return SayoError(
        "D02",
        f"the parquet file cannot be read ({' '.join(str(error).split())})",
        where=str(path),
        fix="prepare it again; it may have been cut short",
    )


def image_source(image: Any, where: str) -> bytes | Path | str:
    """What verl 0.9.1 opens of one entry of the column of images: bytes, the path of a file, or a web address.

    verl opens a text (a path, ``file://``, ``http(s)://`` or ``data:image``), ``{bytes}`` and ``{image: text}``. Of a
    dict with ``bytes`` it opens nothing else, and it never opens ``path``. A relative path counts from the working
    directory.

    Raises:
        SayoError: D06 for no image, D07 for ``data:`` that is not base64, D73 for what verl does not open and for a
            path without a file.
    """
    if isinstance(image, dict) and "bytes" in image:
        if isinstance(image["bytes"], bytes) and image["bytes"]:
            return image["bytes"]
        path = image.get("path") or image.get("image")
        got = f"the path {path!r} beside empty bytes" if path else "empty bytes"
        raise SayoError(
            "D06",
            "an image has no bytes",
            where=where,
            got=got,
            fix="store the encoded bytes, or the path alone: a text, or {'image': path}",
        )
    text = image.get("image", image.get("image_url")) if isinstance(image, dict) else image
    if not isinstance(text, str) or not text:
        none = text is None or text == ""
        raise SayoError(
            "D06" if none else "D73",
            "an image is not there" if none else "verl does not open this image",
            where=where,
            got=f"{type(image).__name__} {str(image)[:80]}",
            wanted="a path, {'bytes': encoded image} or {'image': path}",
            fix="store the encoded image as {'bytes': ..., 'path': None}",
        )
    if text.startswith(("http://", "https://")):
        return text
    if text.startswith("data:image"):
        try:
            return base64.b64decode(text.partition("base64,")[2])
        except ValueError as error:
            raise SayoError(
                "D07", f"an image cannot be decoded ({error})", where=where, fix="store the encoded bytes"
            ) from error
    path = Path(text.removeprefix("file://"))
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        raise SayoError(
            "D73",
            "there is no image at a path",
            where=where,
            got=f"{text[:200]!r} in {Path.cwd()}",
            wanted="a file; relative paths count from the working directory of the run",
            fix="store absolute paths, or start the run where the paths begin",
        )
    return path


def read_image(image: Any, where: str, *, decode: bool = True) -> Header | None:
    """The header of an image of a row, and, with ``decode``, whether all of it can be decoded. None for a web address.

    Raises:
        SayoError: D06, D73 of ``image_source``, D07 corrupt.
    """
    source = image_source(image, where)
    if isinstance(source, str):
        return None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            size = picture.size
            if decode:
                picture.load()
            frames = getattr(picture, "n_frames", 1)  # only formats that can be animated have it
            return Header(picture.format or "", *size, _orientation(picture), frames)
    except _IMAGE_ERRORS as error:
        raise SayoError(
            "D07", f"an image cannot be decoded ({error})", where=where, fix="remove the row or store the image again"
        ) from error


def _orientation(picture: Image.Image) -> int:
    try:
        # not PngImageFile's own method, which decodes the picture to look behind its pixels as well
        found = Image.Image.getexif(picture).get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, struct.error):  # a viewer that cannot read it does not turn the picture
        return 1
    return found if found in range(1, 9) else 1


def decoded(image: Any, where: str) -> Image.Image:
    """The picture of a row, RGB, with the errors of ``read_image``.

    Raises:
        SayoError: D73 for a web address, which is not fetched here.
    """
    read_image(image, where)
    source = image_source(image, where)
    if isinstance(source, str):
        raise SayoError(
            "D73",
            "an image of a web address is not fetched here",
            where=where,
            got=source,
            wanted="bytes or the path of a file",
            fix="store the encoded bytes",
        )
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        return picture.convert("RGB")


def image_digest(image: Any, where: str) -> bytes:
    """``digest`` of the encoded bytes, or of the web address."""
    source = image_source(image, where)
    return digest(
        source.read_bytes() if isinstance(source, Path) else source if isinstance(source, bytes) else source.encode()
    )
