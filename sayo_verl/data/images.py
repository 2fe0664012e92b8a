"""Images as the rows hold them: checked, upright, in the bytes of the file wherever nothing has to change.

What a file shows is decided here once, so that boxes and pixels cannot part later:

- The header is judged before anything is decoded: JPEG, PNG or WEBP by its signature, not by its name; pixels, sides.
- Then the whole picture is decoded. A file that was cut short is left out, never filled up with grey.
- An EXIF orientation (as Pillow reads it, so an XMP one too where there is no EXIF one) is baked into the pixels and
  the metadata dropped: Pillow, and verl with it, ignores it, while the tools that people draw boxes with follow it.
- Modes: RGB and grey stay. All others become RGB with the pixels that verl would make of them (``to_rgb`` of
  qwen-vl-utils: RGBA over white), with two exceptions that verl gets wrong: 16-bit grey is scaled, not clipped, and a
  palette or grey with alpha is put over white as well. RGBA without a transparent pixel is RGB to verl and stays. So
  does a colour key in an RGB or grey PNG, which verl ignores.
- An EXIF block that cannot be read is dropped: nobody turns such a picture, but some readers fail on it.
- A JPEG of several pictures (MPO: stereo pairs, previews, gain maps) is its first picture, which is the one that every
  reader shows. Animated PNG and WEBP are left out: no frame of theirs is *the* picture.

Pictures that change are encoded again: JPEG as JPEG of quality 95 without chroma subsampling, others as PNG; equal
input gives equal bytes with one version of Pillow. Bytes that stay keep their metadata, also an EXIF block that has
nothing to turn (it may tell where and when a photo was taken).

Pillow's global settings are left alone. One thread at a time: Python's warning filters are changed during a call.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from sayo_verl.data.image_files import one_line
from sayo_verl.data.rows import Drop
from sayo_verl.errors import SayoError

JPEG_QUALITY = 95
MAX_PIXELS = 50_000_000  # of an image, by its header: more is an image bomb or a mistake
MAX_RATIO = 200.0  # of the sides: Qwen's resize refuses more
MAX_SCANS = 300  # of a progressive JPEG, which has about 10: each one costs a pass over the whole picture
ORIENTATION = 0x0112  # the EXIF tag

# EXIF orientation -> what makes the picture upright
TURNS: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged files. Only calls of Pillow stand under it, so no fault of ours hides in it.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class ImageRules:
    """Which images become part of a row. Sides and pixels are those of the file's header.

    Attributes:
        max_pixels: more are left out, before decoding. Pillow's own limit (89 million by default) holds as well.
        min_side: an image with a shorter side is left out. 28 is the side of a visual token of Qwen2.5-VL; it is 32
            for Qwen3-VL.
        max_ratio: an image is left out whose longer side is more than this many times the shorter one. Qwen's resize
            refuses more than 200.
    """

    max_pixels: int = MAX_PIXELS
    min_side: int = 28
    max_ratio: float = MAX_RATIO

    def __post_init__(self) -> None:
        if not (self.max_pixels >= 1 and self.min_side >= 1 and self.max_ratio >= 1):
            raise SayoError(
                "D46",
                "a rule for images is out of range",
                where="ImageRules",
                got=self,
                wanted="each at least 1",
                fix="leave the rule out to use its default",
            )


@dataclass(frozen=True)
class Stored:
    """An image as a row holds it.

    Attributes:
        data: encoded JPEG, PNG or WEBP, upright.
        width, height: of that picture, in pixels.
        raw_width, raw_height: of the file's pixels before its EXIF orientation.
        orientation: the file's EXIF orientation, 1 to 8; 1 where it has none or no valid one.
        changed: what was done, such as ``("upright", "from CMYK")``; empty: ``data`` is the file as it was.
    """

    data: bytes
    width: int
    height: int
    raw_width: int
    raw_height: int
    orientation: int
    changed: tuple[str, ...]


_DEFAULTS = ImageRules()


def store_image(data: bytes, *, where: str, options: ImageRules = _DEFAULTS) -> Stored:
    """Check one encoded image and make it what a row holds.

    Args:
        data: the file's bytes.
        where: names the image in errors.
        options: which images are left out.

    Raises:
        Drop: ``image_empty``, ``image_format``, ``image_unreadable``, ``image_too_large``, ``image_too_small``,
            ``image_too_long``.
        SayoError: D46 when Pillow fills up truncated images in this process.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise SayoError(
            "D46",
            "Pillow fills up truncated images with grey in this process",
            where=where,
            got="PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set",
            fix="remove what sets it",
        )
    if not data:
        raise Drop("image_empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on damaged metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(data), formats=(_format(data),))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Drop("image_too_large", str(error)) from error
        except DAMAGE as error:
            raise Drop("image_unreadable", one_line(error)) from error
        with picture:
            _check_header(picture, data, options)
            try:
                picture.load()
            except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
                raise Drop("image_too_large", str(error)) from error
            except DAMAGE as error:
                raise Drop("image_unreadable", one_line(error)) from error
            orientation = _orientation(picture)
            width, height = picture.size
            pixels, changed = _plain(picture)
            if orientation is None:
                changed = (*changed, "without its damaged EXIF")
            elif orientation != 1:
                pixels, changed = pixels.transpose(TURNS[orientation]), ("upright", *changed)
            if changed:
                data = _encoded(pixels, as_jpeg=picture.format in ("JPEG", "MPO"))
            return Stored(data, *pixels.size, width, height, orientation or 1, changed)


def _format(data: bytes) -> str:
    """Pillow's name of the format that the first bytes tell."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    raise Drop("image_format", f"begins with {data[:12]!r}")


def _check_header(picture: ImageFile.ImageFile, data: bytes, rules: ImageRules) -> None:
    short, long = sorted(picture.size)
    size = f"{picture.width} x {picture.height}"
    if short * long > rules.max_pixels:
        raise Drop("image_too_large", size)
    if short < rules.min_side:
        raise Drop("image_too_small", size)
    if long > rules.max_ratio * short:
        raise Drop("image_too_long", size)
    frames = getattr(picture, "n_frames", 1)  # Pillow defines it where a format can have several
    if frames > 1 and picture.format != "MPO":
        raise Drop("image_format", f"{picture.format} of {frames} frames")
    if "progressive" in picture.info and data.count(b"\xff\xda") > MAX_SCANS:
        raise Drop("image_unreadable", f"a JPEG of {data.count(bytes((0xFF, 0xDA)))} scans")


def _orientation(picture: ImageFile.ImageFile) -> int | None:
    """1 to 8; 1 where there is none or no valid one; None where the EXIF block cannot be read: nobody turns it."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return None
    return found if isinstance(found, int) and found in TURNS else 1


def _plain(picture: ImageFile.ImageFile) -> tuple[Image.Image, tuple[str, ...]]:
    """The loaded picture as RGB or grey of 8 bits, and what was done; (the picture itself, ()) when nothing was."""
    changed: tuple[str, ...] = (f"first of {picture.n_frames} pictures",) if picture.format == "MPO" else ()  # type: ignore[attr-defined]
    mode = picture.mode
    if mode in ("RGB", "L"):
        return picture, changed
    if mode.startswith("I"):  # 16-bit grey, in Pillow's modes I;16, I;16B or, before Pillow 10, I
        grey = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((np.clip(grey, 0, 65535) + 128) // 257).astype(np.uint8)), (*changed, f"from {mode}")
    if mode in ("RGBA", "LA", "PA") or (mode == "P" and picture.has_transparency_data):
        full = picture.convert("RGBA")
        alpha = full.getchannel("A")
        opaque = alpha.getextrema() == (255, 255)
        if opaque and mode == "RGBA" and not changed:
            return picture, ()
        white = Image.new("RGB", full.size, (255, 255, 255))
        white.paste(full, mask=alpha)
        return white, (*changed, f"from {mode}" if opaque else f"from {mode} over white")
    return picture.convert("RGB"), (*changed, f"from {mode}")


def _encoded(pixels: Image.Image, *, as_jpeg: bool) -> bytes:
    plain = pixels.copy() if pixels.mode in ("RGB", "L") else pixels.convert("RGB")  # the latter: RGBA without alpha
    plain.info = {}  # Pillow writes comments, profiles and colour keys that it finds here
    out = io.BytesIO()
    if as_jpeg:
        plain.save(out, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        plain.save(out, format="PNG")
    return out.getvalue()
