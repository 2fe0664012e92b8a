"""Images: their encoded bytes, and the form in which rows store them.

``image_bytes`` reads a file or a member of a zip file. ``store_image`` decides what a picture shows:

- The format is JPEG, PNG or WEBP by the first bytes, not by the name. Animated files are left out.
- The header is checked before decoding. A file that was cut short is left out, not filled up with grey.
- An EXIF orientation is baked into the pixels. Pillow and verl ignore it; most annotation tools follow it.
- RGB, grey and RGBA without a transparent pixel stay. Others become RGB as verl makes it (alpha over white), but 16-bit
  grey is scaled, not clipped, and a palette or grey with alpha is put over white as well, which verl gets wrong.
- A JPEG that holds several pictures (MPO: stereo pairs, previews, gain maps) becomes its first picture.

The bytes of the file are kept where nothing changes. Changed pictures are encoded again without metadata.
"""

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps

from sayo_verl.data.rows import Drop, ImageRef
from sayo_verl.errors import SayoError

MAX_PIXELS = 50_000_000
MAX_BYTES = 4 * MAX_PIXELS  # of an encoded picture: what a bomb unpacks to is not kept in memory
MIN_SIDE = 28  # pixels: a visual token of Qwen2.5-VL; one of Qwen3-VL has 32
MAX_RATIO = 200.0  # of the longer side to the shorter one: Qwen's resize refuses more
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # of JPEG, PNG, WEBP
ORIENTATION = 0x0112  # the EXIF tag
DAMAGE = (  # what Pillow's readers raise on damaged files
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError),
    *(EOFError, MemoryError, struct.error, zlib.error),
)
# A scheme before a slash, also within a path: Path("data") / "http://x" is data/http:/x. C:/ has one letter only.
_URL = re.compile(r"(?:^|/)(?:[A-Za-z][A-Za-z0-9+.-]+:/|data:)")


@dataclass(frozen=True)
class Stored:
    """An image as a row stores it: upright JPEG, PNG or WEBP, and its size in pixels.

    ``raw_width`` and ``raw_height`` are those of the file's pixels before its EXIF ``orientation`` (1 to 8; 1 if it has
    no valid one). ``changed`` says what was done, such as ``("upright", "from CMYK")``; empty: the file as it was.
    """

    data: bytes
    width: int
    height: int
    raw_width: int
    raw_height: int
    orientation: int
    changed: tuple[str, ...]


def image_bytes(ref: ImageRef) -> bytes:
    """The encoded bytes of an image.

    Raises:
        Drop: ``image_missing``, ``image_unreadable``, ``image_too_large`` for more than ``MAX_BYTES``.
        SayoError: D40 for a web address or a name that no file can have, D41 for a damaged or encrypted zip file.
    """
    if ref.data is not None:
        return ref.data
    path, name = os.fspath(ref.path or ""), ref.member or os.fspath(ref.path or "")
    try:
        with open(path, "rb") if ref.member is None else _open_member(path, ref.member) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ValueError) or _URL.search(name):
            where, got = f"image {ascii(ref.key)[:160]}", ascii(name)[:160]
            fix = "download the images and name their files, or members of a zip file"
            raise SayoError("D40", "an image is not the name of a local file", where=where, got=got, fix=fix) from error
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | KeyError):
            raise Drop("image_missing", name) from error
        raise Drop("image_unreadable", f"{name}: {_one_line(error)}") from error
    if len(data) > MAX_BYTES:
        raise Drop("image_too_large", f"{name}: more than {MAX_BYTES:,} bytes")
    return data


def _open_member(path: str, member: str) -> IO[bytes]:
    parts = member.replace("\\", "/").split("/")
    try:
        if ".." in parts or not parts[0]:
            raise zipfile.BadZipFile("the name of a member leads out of its folder")
        return _archive(path, os.getpid()).open(member)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: it is encrypted
        what, got = f"a zip file cannot be read ({_one_line(error)})", f"member {ascii(member)[:160]}"
        fix = "check the path and the names of images, and download the archive again if it was cut short"
        raise SayoError("D41", what, where=ascii(path)[:160], got=got, fix=fix) from error


@lru_cache(maxsize=4)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """An open archive, one per process: archives of a fork would share one position in the file."""
    return zipfile.ZipFile(path)


def store_image(data: bytes, *, where: str) -> Stored:
    """Check one encoded image and bring it into the form that rows store; ``where`` names it in drops.

    Raises:
        Drop: ``image_`` with empty, format, unreadable, too_large, too_small or too_long.
    """
    if not data.startswith(_SIGNATURES):
        raise Drop("image_format" if data else "image_empty", f"{where}: begins with {data[:12]!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata
        try:
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            _check_header(picture, where)
            picture.load()
        except DAMAGE as error:
            raise Drop("image_unreadable", f"{where}: {_one_line(error)}") from error
        except Image.DecompressionBombError as error:
            raise Drop("image_too_large", f"{where}: {error}") from error
        orientation = orientation_of(picture)
        pixels, changed = _plain(picture)
    if picture.format == "MPO":
        changed = ("first of several pictures", *changed)
    if orientation > 1:
        pixels, changed = _upright(pixels, orientation), ("upright", *changed)
    if changed:
        data = _encoded(pixels, "PNG" if picture.format in ("PNG", "WEBP") else "JPEG")
    return Stored(data, *pixels.size, *picture.size, orientation, changed)


def orientation_of(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is no valid one, as for a viewer. Pixels are not decoded."""
    try:  # PngImageFile's own method would decode
        found = Image.Image.getexif(picture).get(ORIENTATION, 1)
    except DAMAGE:
        return 1
    return found if found in range(1, 9) else 1


def _check_header(picture: ImageFile.ImageFile, where: str) -> None:
    short, long = sorted(picture.size)
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # Pillow defines it for some formats
    size = "too_large" if short * long > MAX_PIXELS else "too_small" if short < MIN_SIDE else ""
    reason = size or ("too_long" if long > MAX_RATIO * short else "format" if frames > 1 else "")
    if reason:
        raise Drop(f"image_{reason}", f"{where}: {picture.format}, {picture.width} x {picture.height}, {frames} frames")


def _upright(pixels: Image.Image, orientation: int) -> Image.Image:
    """As ``ImageOps.exif_transpose``, which writes the EXIF block again and can fail on that."""
    pixels = pixels.transpose(Image.Transpose.TRANSPOSE) if orientation >= 5 else pixels
    pixels = ImageOps.mirror(pixels) if orientation in (2, 3, 6, 7) else pixels
    return ImageOps.flip(pixels) if orientation in (3, 4, 7, 8) else pixels


def _plain(picture: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The loaded picture as RGB or grey of 8 bits, or RGBA without transparency, and what was done."""
    mode = picture.mode
    if mode in ("RGB", "L"):
        return picture, ()
    if mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((np.clip(grey, 0, 65535) + 128) // 257).astype(np.uint8)), (f"from {mode}",)
    if not picture.has_transparency_data:
        return picture.convert("RGB"), (f"from {mode}",)
    full = picture.convert("RGBA")
    alpha = full.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return (picture, ()) if mode == "RGBA" else (full, (f"from {mode}",))
    white = Image.new("RGB", full.size, (255, 255, 255))
    white.paste(full, mask=alpha)
    return white, (f"from {mode} over white",)


def _encoded(pixels: Image.Image, kind: str) -> bytes:
    plain = pixels.convert("RGB") if pixels.mode == "RGBA" else pixels.copy()
    plain.info = {}  # Pillow would write the comments, profiles and colour keys in it
    out = io.BytesIO()
    plain.save(out, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return out.getvalue()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).split(" <_io")[0]  # without an address in memory
    return f"{type(error).__name__}: {text}"[:200]
