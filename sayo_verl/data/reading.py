"""Rows of parquet files and headers of encoded images, read with errors that name the place."""

import hashlib
import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from sayo_verl.data.images import ORIENTATION, ImageRules
from sayo_verl.errors import SayoError

MAX_PIXELS = ImageRules().max_pixels  # refused by the header, before decoding: an image bomb or a mistake
_IMAGE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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
    except (OSError, ValueError, NotImplementedError) as error:  # Arrow's own errors are among these
        raise _unreadable(path, error) from error
    return file


def read_rows(file: pq.ParquetFile, path: Path, columns: list[str], groups: Iterable[int] | None = None
              ) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows as plain containers. A file with a sound footer can still have a damaged page, which shows only here.

    Args:
        file: an open file.
        path: names it in errors.
        columns: names, or dotted paths of leaves.
        groups: row groups to read; all by default.

    Raises:
        SayoError: D02.
    """
    try:
        for batch in file.iter_batches(batch_size=256, columns=columns,
                                       row_groups=None if groups is None else list(groups)):  # fmt: skip
            yield from batch.to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:
        raise _unreadable(path, error) from error


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
    return SayoError("D02", f"the parquet file cannot be read ({' '.join(str(error).split())})", where=str(path),
                     fix="prepare it again; it may have been cut short")  # fmt: skip


def read_image(image: Any, where: str, *, decode: bool = True) -> Header:
    """The header of an image of a row, and, with ``decode``, whether all of it can be decoded.

    Raises:
        SayoError: D06 no bytes, D07 corrupt, D08 too large.
    """
    data = image.get("bytes") if isinstance(image, dict) else None
    if not data:  # verl opens nothing else
        path = image.get("path") if isinstance(image, dict) else None
        raise SayoError("D06", "an image has no bytes", where=where, got=f"the path {path!r} alone" if path else None,
                        fix="store the encoded image as {'bytes': ..., 'path': None}")  # fmt: skip
    try:
        with Image.open(io.BytesIO(data)) as picture:
            size = picture.size
            if picture.width * picture.height > MAX_PIXELS:
                raise SayoError("D08", "an image is too large", where=where, got=f"{picture.width} x {picture.height}",
                                wanted=f"at most {MAX_PIXELS} pixels", fix="resize it")  # fmt: skip
            if decode:
                picture.load()
            frames = getattr(picture, "n_frames", 1)  # only formats that can be animated have it
            return Header(picture.format or "", *size, _orientation(picture), frames)
    except _IMAGE_ERRORS as error:
        raise SayoError("D07", f"an image cannot be decoded ({error})", where=where,
                        fix="remove the row or store the image again") from error  # fmt: skip


def _orientation(picture: Image.Image) -> int:
    try:
        # not PngImageFile's own method, which decodes the picture to look behind its pixels as well
        found = Image.Image.getexif(picture).get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, struct.error):  # a viewer that cannot read it does not turn the picture
        return 1
    return found if found in range(1, 9) else 1


def decoded(image: dict[str, Any], where: str) -> Image.Image:
    """The picture of a row, RGB, with the errors of ``read_image``."""
    read_image(image, where)
    with Image.open(io.BytesIO(image["bytes"])) as picture:
        return picture.convert("RGB")
