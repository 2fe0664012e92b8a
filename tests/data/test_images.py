"""Images of rows: where bytes come from, what is left out, what is changed, and that nothing else is."""

import io
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from qwen_vl_utils.vision_process import to_rgb
from support.pictures import dropped, encoded, kept, picture, png_header, translucent
from support.refusals import refusal

from sayo_verl.data import images
from sayo_verl.data.images import Stored, image_bytes, store_image
from sayo_verl.data.rows import Drop, ImageRef

LOSSLESS = {"lossless": True, "exact": True}


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def seen_by_verl(data: bytes) -> np.ndarray:
    """The pixels that verl's loader hands to the processor, before its resize."""
    return np.asarray(to_rgb(Image.open(io.BytesIO(data)))).astype(int)


def turned(kind: str, orientation: int, mode: str = "RGB", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return encoded(picture(mode), kind, exif=exif, comment=b"a comment", **options)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", LOSSLESS)])
def test_bytes_stay_where_nothing_has_to_change(mode, kind, options):
    data = encoded(picture(mode), kind, **options)
    assert kept(data) == Stored(data, 60, 40, 60, 40, 1, ())


@pytest.mark.parametrize(
    "data",
    [
        *[turned("JPEG", orientation) for orientation in (0, 1, 9, 77)],  # no valid orientation
        encoded(picture(), "PNG", exif=b"Exif\0\0no tiff header here"),
        *[encoded(Image.new("L", size)) for size in ((28, 28), (5600, 28))],  # the smallest and the longest
        encoded(picture("RGBA")),  # without a transparent pixel verl sees RGB
        encoded(picture("RGB"), transparency=(0, 0, 0)),  # verl ignores a colour key
    ],
)
def test_nothing_is_encoded_again_without_need(data):
    assert kept(data).changed == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_image_that_is_cut_short(kind, share):
    data = encoded(picture(size=(200, 150)), kind)
    assert dropped(data[: int(len(data) * share)]) == "image_unreadable"


FRAMES = {"save_all": True, "append_images": [ImageOps.invert(picture())]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image_empty"),
        (b"<html>not found</html>", "image_format"),
        *[(encoded(picture(), kind), "image_format") for kind in ("GIF", "TIFF", "BMP", "PPM")],
        *[(encoded(picture(), kind, **FRAMES), "image_format") for kind in ("PNG", "WEBP")],  # animated
        *[(png_header(*size), "image_too_large") for size in [(20000, 20000), (9000, 9999), (7072, 7072)]],
        *[(encoded(Image.new("L", size)), "image_too_small") for size in [(1, 1), (27, 300), (300, 27)]],
        (encoded(Image.new("L", (28, 5601))), "image_too_long"),
    ],
)
def test_what_is_left_out(data, reason, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # all of it by the header
    assert dropped(data) == reason


@pytest.mark.parametrize(
    ("image", "kind", "options", "changed"),
    [
        (picture("CMYK"), "JPEG", {}, "from CMYK"),
        (picture("P"), "PNG", {}, "from P"),
        (picture("1"), "PNG", {}, "from 1"),
        (picture("L").convert("LA"), "PNG", {}, "from LA"),
        (translucent(), "PNG", {}, "from RGBA over white"),
        (translucent(), "WEBP", LOSSLESS, "from RGBA over white"),
    ],
)
def test_modes_become_rgb_as_verl_sees_them(image, kind, options, changed):
    data = encoded(image, kind, **options)
    out = kept(data)
    assert out.changed == (changed,)
    assert np.abs(seen_by_verl(out.data) - seen_by_verl(data)).max() <= (8 if kind == "JPEG" else 0)
    assert kept(data).data == out.data


def test_a_palette_or_grey_with_alpha_over_white():
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20, 9, 9, 9])
    palette.paste(2, (0, 0, 10, 40))
    grey = Image.merge("LA", (Image.new("L", (40, 40), 30), Image.new("L", (40, 40), 0)))
    grey.putpixel((39, 0), (30, 255))
    for data, opaque in ((encoded(palette, transparency=b"\xff\xff\x00"), [200, 10, 20]), (encoded(grey), [30] * 3)):
        out = kept(data)
        assert "over white" in out.changed[0]
        assert (pixels(out.data)[0, 0].tolist(), pixels(out.data)[0, 39].tolist()) == ([255] * 3, opaque)


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    out = kept(encoded(Image.fromarray(grey)))
    assert out.changed == ("from I;16",)
    assert np.abs(pixels(out.data) - grey / 257).max() <= 0.5


def test_a_jpeg_of_several_pictures_is_its_first():
    data = encoded(picture(), "MPO", **FRAMES)
    out = kept(data)
    assert out.changed == ("first of several pictures",)
    assert np.abs(pixels(out.data).astype(int) - pixels(data)).max() <= 8


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", LOSSLESS)])
def test_orientation_is_baked_in_and_the_metadata_dropped(kind, options, orientation):
    data = turned(kind, orientation, **options)
    out = kept(data)
    assert (out.changed, out.orientation) == (("upright",), orientation)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.abs(pixels(out.data).astype(int) - wanted).max() <= (8 if kind == "JPEG" else 0)
    assert not Image.open(io.BytesIO(out.data)).getexif()
    assert b"a comment" not in out.data
    assert kept(turned("JPEG", orientation, "CMYK")).changed == ("upright", "from CMYK")


FILES = [turned("JPEG", 6), encoded(picture(), "MPO", **FRAMES), encoded(picture("P"), transparency=b"\x00\xff")]
FILES += [turned("PNG", 5), turned("WEBP", 8), encoded(translucent(), "WEBP"), encoded(picture(), "PNG", **FRAMES)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on odd metadata
@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data(), file=st.sampled_from(FILES))
def test_damaged_files_are_stored_or_left_out_and_nothing_else(data, file):
    damaged = bytearray(file)
    place = st.one_of(st.integers(0, 200), st.integers(0, len(damaged) - 1))  # half of it where headers are
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)):
        damaged[at] = value
    filters = list(warnings.filters)
    try:
        store_image(bytes(damaged), where="here")
    except Drop:
        return
    finally:
        assert filters == warnings.filters
    kept(bytes(damaged))


def archive_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_reads_bytes_files_and_members(tmp_path):
    path = archive_of(tmp_path / "a.zip", **{"images/b.jpg": b"member", "C:\\b.jpg": b"windows"})
    assert image_bytes(ImageRef("a", data=b"")) == b""
    for name in ("a.jpg", "a b:c\\d.jpg", "2024-01-01T10:20:30.jpg", "x" * 255):  # all of them names on Linux
        (tmp_path / name).write_bytes(b"content")
        assert image_bytes(ImageRef("a", path=tmp_path / name)) == b"content"
    assert image_bytes(ImageRef("a", path=path, member="images/b.jpg")) == b"member"
    assert image_bytes(ImageRef("a", path=path, member="C:\\b.jpg")) == b"windows"


@pytest.mark.parametrize(
    ("reason", "found"),
    [
        ("image_missing", [("b.jpg", None), ("a.jpg/b.jpg", None), (".", None), ("a.zip", "b.jpg")]),
        ("image_unreadable", [("loop.jpg", None), ("a.zip", "damaged.jpg")]),
    ],
)
def test_missing_and_unreadable_files_and_members(reason, found, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"content")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    data = bytearray(archive_of(tmp_path / "a.zip", **{"damaged.jpg": os.urandom(1000)}).read_bytes())
    data[200] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    for name, member in found:
        with pytest.raises(Drop) as caught:
            image_bytes(ImageRef("a", path=tmp_path / name, member=member))
        assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["http://h/a.jpg", "file:///etc/x", "s3://b/a", "data:image/png;base64,A", "a\0.jpg"])
def test_references_that_are_no_local_file(name, tmp_path):
    for ref in (ImageRef(name, path=Path(name)), ImageRef(name, path=tmp_path / name)):
        with refusal("D40", "not the name of a local file"):
            image_bytes(ref)


@pytest.mark.parametrize("member", ["../../x.jpg", "/x.jpg", "a/../../x.jpg", "..\\x.jpg", "\\\\host\\x.jpg"])
def test_members_that_lead_out_and_archives_that_are_none(member, tmp_path):
    (tmp_path / "b.zip").write_bytes(b"PK not really")
    with refusal("D41", "leads out"):
        image_bytes(ImageRef("a", path=archive_of(tmp_path / "a.zip", **{member: b"x"}), member=member))
    for name in ("b.zip", "missing.zip"):
        with refusal("D41", "cannot be read"):
            image_bytes(ImageRef("a", path=tmp_path / name, member="a.jpg"))


def test_a_picture_of_too_many_bytes_is_left_out_and_a_link_in_an_archive_is_not_followed(tmp_path, monkeypatch):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.png", b"\0" * 1_000_000)
    assert image_bytes(ImageRef("a", path=tmp_path / "a.zip", member="link.png")) == b"/etc/passwd"
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    (tmp_path / "large.png").write_bytes(b"\0" * 1001)
    for ref in (
        ImageRef("a", path=tmp_path / "a.zip", member="bomb.png"),
        ImageRef("a", path=tmp_path / "large.png"),
    ):
        with pytest.raises(Drop) as caught:
            image_bytes(ref)
        assert caught.value.reason == "image_too_large"


def test_a_forked_process_does_not_share_the_position_in_an_archive(tmp_path):
    path = archive_of(tmp_path / "a.zip", **{f"{i}.jpg": os.urandom(5000) for i in range(200)})
    refs = [ImageRef(str(i), path=path, member=f"{i}.jpg") for i in range(200)]
    wanted = [image_bytes(ref) for ref in refs]
    child = os.fork()
    same = all([image_bytes(ref) == w for ref, w in zip(refs, wanted, strict=True)] * 5)
    if child == 0:
        os._exit(0 if same else 1)
    assert same
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
