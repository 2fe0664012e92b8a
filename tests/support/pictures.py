"""Pictures of every kind as bytes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sayo_verl.data.images import Stored, store_image
from sayo_verl.data.rows import Drop


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Smooth, and different at every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([255 * x, 255 * y, 120 * x * y], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def dropped(data: bytes) -> str:
    with pytest.raises(Drop) as caught:
        store_image(data, where="here")
    return caught.value.reason


def kept(data: bytes) -> Stored:
    """What is stored, with what holds for every stored image."""
    out = store_image(data, where="here")
    with Image.open(io.BytesIO(out.data), formats=("JPEG", "PNG", "WEBP")) as image:
        assert image.size == (out.width, out.height)
        if out.changed:
            assert image.mode in ("RGB", "L")
            assert not set(image.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    raw = (out.raw_width, out.raw_height)
    assert raw == ((out.height, out.width) if out.orientation >= 5 else (out.width, out.height))
    assert (out.data == data) == (out.changed == ())
    return out


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def translucent() -> Image.Image:
    image = picture("RGBA")
    alpha = np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1))
    image.putalpha(Image.fromarray(alpha))
    return image
