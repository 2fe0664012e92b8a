"""Images of rows: what is left out, what is changed, that nothing else is, and that no bytes do harm."""

import io
import os
import resource
import stat
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from qwen_vl_utils.vision_process import to_rgb
from support.refusals import refusal

from sayo_verl.data import image_files, images
from sayo_verl.data.image_files import check_member, check_name, read_image
from sayo_verl.data.images import ImageRules, Stored, store_image
from sayo_verl.data.rows import Drop, ImageRef

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Smooth, and different at every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([255 * x, 255 * y, 120 * x * y], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def seen_by_verl(data: bytes) -> np.ndarray:
    """The pixels that verl's loader hands to the processor, before its resize."""
    return np.asarray(to_rgb(Image.open(io.BytesIO(data))))


def dropped(data: bytes, **rules) -> str:
    with pytest.raises(Drop) as caught:
        store_image(data, where="here", options=ImageRules(**rules))
    return caught.value.reason


def kept(data: bytes, **rules) -> Stored:
    """What is stored, with what holds for every stored image."""
    out = store_image(data, where="here", options=ImageRules(**rules))
    with Image.open(io.BytesIO(out.data), formats=("JPEG", "PNG", "WEBP")) as image:
        assert image.size == (out.width, out.height)
        assert image.getexif().get(0x0112, 1) not in images.TURNS
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


# -------------------------------------------------------------------------------------------------------- left as it is


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_bytes_stay_where_nothing_has_to_change(mode, kind, options):
    data = encoded(picture(mode), kind, **options)
    out = kept(data)
    assert out == Stored(data, 60, 40, 60, 40, 1, ())


def test_metadata_without_an_orientation_is_no_reason_to_encode_again():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    assert kept(encoded(picture(), "JPEG", exif=exif)).changed == ()


@pytest.mark.parametrize("orientation", [0, 1, 9, 77])
def test_an_orientation_that_means_nothing_changes_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert kept(encoded(picture(), "JPEG", exif=exif)).orientation == 1


def test_rgba_without_a_transparent_pixel_stays_for_verl_sees_the_same():
    data = encoded(picture("RGBA"))
    assert kept(data).changed == ()
    assert np.array_equal(seen_by_verl(data), pixels(encoded(picture())))


@pytest.mark.parametrize(("mode", "key"), [("RGB", (0, 0, 0)), ("L", 0)])
def test_a_colour_key_is_ignored_as_verl_ignores_it(mode, key):
    data = encoded(picture(mode), transparency=key)
    assert kept(data).changed == ()
    assert np.array_equal(seen_by_verl(data), np.asarray(picture(mode).convert("RGB")))


# --------------------------------------------------------------------------------------------------------- left out


def test_an_image_of_no_bytes():
    assert dropped(b"") == "image_empty"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_cut_short(kind):
    data = encoded(picture(size=(200, 150)), kind)
    for share in (0.1, 0.5, 0.9):
        assert dropped(data[: int(len(data) * share)]) == "image_unreadable"


def test_refuses_to_work_where_cut_images_are_filled_up(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with refusal("D46", "truncated"):
        store_image(encoded(picture()), where="here")


def test_text_named_jpg_is_no_image():
    assert dropped(b"<html>not found</html>" * 9) == "image_format"


@pytest.mark.parametrize("size", [(20000, 20000), (9000, 9999), (7072, 7072), (2**31 - 1, 2**31 - 1)])
def test_an_image_of_too_many_pixels_by_its_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dropped(png_header(*size)) == "image_too_large"


def test_pillows_own_limit_holds_where_ours_is_raised(monkeypatch):
    assert dropped(png_header(10000, 10000), max_pixels=10**9) == "image_too_large"  # Pillow would only warn
    assert dropped(png_header(20000, 20000), max_pixels=10**9) == "image_too_large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert dropped(encoded(picture())) == "image_too_large"


def test_the_size_is_judged_before_decoding(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    data = encoded(picture(size=(300, 300)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert dropped(data, max_pixels=300 * 300 - 1) == "image_too_large"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO"])
def test_other_image_formats(kind):
    assert dropped(encoded(picture(), kind)) == "image_format"


def test_other_image_formats_by_text():
    assert dropped(b'<svg xmlns="http://www.w3.org/2000/svg"/>') == "image_format"
    assert dropped(b"SIMPLE  =                    T") == "image_format"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animated_image(kind):
    frames = [picture(), ImageOps.invert(picture())]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert dropped(data) == "image_format"


@pytest.mark.parametrize(
    ("size", "rules", "reason"),
    [
        ((1, 1), {}, "image_too_small"),
        ((27, 300), {}, "image_too_small"),
        ((300, 27), {}, "image_too_small"),
        ((28, 28), {}, ""),
        ((31, 40), {"min_side": 32}, "image_too_small"),
        ((2, 455), {"min_side": 1}, "image_too_long"),
        ((2, 401), {"min_side": 1}, "image_too_long"),
        ((2, 400), {"min_side": 1}, ""),
        ((28, 5601), {}, "image_too_long"),
        ((5600, 28), {}, ""),
        ((40, 90), {"max_ratio": 2.0}, "image_too_long"),
    ],
)
def test_sides_that_are_too_short_or_too_unequal(size, rules, reason):
    data = encoded(Image.new("L", size))
    assert (dropped(data, **rules) if reason else "".join(kept(data, **rules).changed)) == reason


@pytest.mark.parametrize("rules", [{"max_pixels": 0}, {"min_side": 0}, {"max_ratio": 0.5}, {"max_ratio": float("nan")}])
def test_rules_out_of_range(rules):
    with refusal("D46"):
        ImageRules(**rules)


# ------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "kind", "changed"),
    [
        ("CMYK", "JPEG", "from CMYK"),
        ("P", "PNG", "from P"),
        ("1", "PNG", "from 1"),
        ("LA", "PNG", "from LA"),
    ],
)
def test_modes_become_rgb_as_verl_sees_them(mode, kind, changed):
    image = picture("L").convert("LA") if mode == "LA" else picture(mode)
    data = encoded(image, kind)
    out = kept(data)
    assert out.changed == (changed,)
    difference = np.abs(seen_by_verl(out.data).astype(int) - seen_by_verl(data))
    assert difference.max() <= (8 if kind == "JPEG" else 0)
    assert out.data.startswith(b"\xff\xd8" if kind == "JPEG" else b"\x89PNG")


def translucent() -> Image.Image:
    image = picture("RGBA")
    alpha = np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1))
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparent_pixels_over_white_as_verl_sees_them(kind, options):
    data = encoded(translucent(), kind, **options)
    out = kept(data)
    assert out.changed == ("from RGBA over white",)
    assert np.array_equal(seen_by_verl(out.data), seen_by_verl(data))
    assert pixels(out.data)[0, 0].tolist() == [255, 255, 255]


def test_a_palette_or_grey_with_alpha_over_white():
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20, 9, 9, 9])
    palette.paste(2, (0, 0, 10, 40))
    out = kept(encoded(palette, transparency=b"\xff\xff\x00"))
    assert out.changed == ("from P over white",)
    assert pixels(out.data)[0, 0].tolist() == [255, 255, 255]
    assert pixels(out.data)[0, 39].tolist() == [200, 10, 20]

    grey = Image.merge("LA", (Image.new("L", (40, 40), 30), Image.new("L", (40, 40), 0)))
    grey.putpixel((3, 3), (30, 255))
    out = kept(encoded(grey))
    assert out.changed == ("from LA over white",)
    assert pixels(out.data)[0, 0].tolist() == [255] * 3
    assert pixels(out.data)[3, 3].tolist() == [30] * 3


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    out = kept(encoded(Image.fromarray(grey)))
    assert out.changed == ("from I;16",)
    stored = pixels(out.data)
    assert stored.shape == (40, 60)
    assert np.abs(stored - grey / 257).max() <= 0.5
    assert (stored.min(), stored.max()) == (0, 255)


def test_a_jpeg_of_several_pictures_is_its_first():
    data = encoded(picture(), "MPO", save_all=True, append_images=[ImageOps.invert(picture())])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    out = kept(data)
    assert out.changed == ("first of 2 pictures",)
    assert np.abs(pixels(out.data).astype(int) - pixels(data)).max() <= 8
    assert Image.open(io.BytesIO(out.data)).format == "JPEG"


# ------------------------------------------------------------------------------------------------------- orientation


def turned(kind: str, orientation: int, mode: str = "RGB", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return encoded(picture(mode), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_orientation_is_baked_in(kind, options, orientation):
    data = turned(kind, orientation, **options)
    out = kept(data)
    assert out.changed == ("upright",)
    assert out.orientation == orientation
    assert (out.raw_width, out.raw_height) == (60, 40)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.abs(pixels(out.data).astype(int) - wanted).max() <= (8 if kind == "JPEG" else 0)
    with Image.open(io.BytesIO(out.data)) as image:
        assert image.format == ("JPEG" if kind == "JPEG" else "PNG")
        assert not image.getexif()
        if kind == "JPEG":
            assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # no chroma subsampling


def test_grey_stays_grey_and_modes_are_told_with_it():
    out = kept(turned("JPEG", 6, "L"))
    assert out.changed == ("upright",)
    assert pixels(out.data).shape == (60, 40)
    assert kept(turned("JPEG", 6, "CMYK")).changed == ("upright", "from CMYK")
    assert kept(turned("PNG", 3, "RGBA")).changed == ("upright",)


def test_nothing_else_of_the_file_is_carried_over():
    exif = Image.Exif()
    exif[0x0112] = 3
    extra = {"exif": exif, "comment": b"a comment", "icc_profile": b"a profile", "dpi": (300, 300)}
    out = kept(encoded(picture(), "JPEG", **extra))
    assert b"a comment" not in out.data
    assert b"a profile" not in out.data


@pytest.mark.parametrize("data", [turned("JPEG", 6), turned("PNG", 5), encoded(translucent()), encoded(picture("P"))])
def test_equal_bytes_in_equal_bytes_out(data):
    assert kept(data).data == kept(data).data


def test_pillow_and_warnings_are_left_as_they_were():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    kept(turned("JPEG", 6))
    dropped(png_header(20000, 20000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


# -------------------------------------------------------------------------------------------------------------- fuzz


def small_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    size = (40, 32)
    two = {"save_all": True, "append_images": [ImageOps.invert(picture(size=size))]}
    return [
        encoded(picture(size=size), "JPEG", exif=exif),
        encoded(picture(size=size), "JPEG", progressive=True),
        encoded(picture("CMYK", size), "JPEG"),
        encoded(picture(size=size), "MPO", **two),
        encoded(picture(size=size), "PNG", exif=exif),
        encoded(picture("P", size), "PNG", transparency=b"\x00\xff"),
        encoded(Image.fromarray(np.arange(40 * 32, dtype=np.uint16).reshape(32, 40)), "PNG"),
        encoded(picture(size=size), "PNG", **two),
        encoded(picture(size=size), "WEBP", exif=exif),
        encoded(picture("RGBA", size), "WEBP", lossless=True),
        encoded(picture(size=size), "WEBP", **two),
    ]


FILES = small_files()


def outcome(data: bytes) -> Stored | tuple[str, str]:
    """What is stored, or the reason and the detail for which nothing is; any other exception is a failure."""
    try:
        return store_image(data, where="here")
    except Drop as drop:
        return drop.reason, drop.detail


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on metadata that is odd but can be read
@settings(PROPERTY, max_examples=300)
@given(data=st.data(), file=st.integers(0, len(FILES) - 1))
def test_damaged_files_are_stored_or_left_out_and_nothing_else(data, file):
    damaged = bytearray(FILES[file])
    # half of the changes within the first bytes, where headers are
    place = st.one_of(st.integers(0, min(200, len(damaged) - 1)), st.integers(0, len(damaged) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)):
        damaged[at] = value
    damaged = damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))]
    began = time.perf_counter()
    first, second = (outcome(bytes(damaged)) for _ in range(2))
    assert time.perf_counter() - began < 2
    assert first == second
    if isinstance(first, Stored):
        assert kept(bytes(damaged)) == first


@PROPERTY
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 "])
)
def test_garbage_is_left_out(rest, signature):
    assert dropped(signature + rest).startswith("image_")


def test_a_jpeg_of_thousands_of_scans_is_left_out_at_once():
    data = encoded(picture(size=(800, 800)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * 5000 + b"\xff\xd9"
    began = time.perf_counter()
    assert dropped(bomb) == "image_unreadable"
    assert time.perf_counter() - began < 1
    assert kept(data).changed == ()


def webp_header(width: int, height: int) -> bytes:
    """A WEBP with alpha that says how large it is, around a picture of 60 x 40."""
    data = bytearray(encoded(translucent(), "WEBP"))
    assert data[12:16] == b"VP8X"
    data[24:27], data[27:30] = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    return bytes(data)


def test_headers_that_promise_much_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in [(16383, 16383), (16000, 11000), (2**24, 2**24)]:
        assert dropped(webp_header(*size)) in ("image_too_large", "image_unreadable")
    for size in [(7000, 7000), (50_000_000 // 28, 28)]:
        assert dropped(png_header(*size), max_ratio=1e9) == "image_unreadable"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # in KiB


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])  # Pillow takes that of a JPEG for an empty one
def test_a_damaged_exif_block_is_dropped_and_the_picture_kept(kind):
    data = encoded(picture(), kind, exif=b"Exif\0\0no tiff header here")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    out = kept(data)
    assert out.changed == ("without its damaged EXIF",)
    assert out.orientation == 1
    assert b"no tiff header" not in out.data


def test_running_out_of_memory_on_one_image_leaves_that_one_out(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert dropped(encoded(picture(), "JPEG")) == "image_unreadable"


# ------------------------------------------------------------------------------------------------------ reading bytes


def unread(ref: ImageRef) -> str:
    with pytest.raises(Drop) as caught:
        read_image(ref)
    return caught.value.reason


def test_reads_bytes_files_and_members(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"content")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images/b.jpg", b"member")
        archive.writestr("images/", b"")
    assert read_image(ImageRef("a", data=b"here")) == b"here"
    assert read_image(ImageRef("a", data=b"")) == b""
    assert read_image(ImageRef("a", path=tmp_path / "a.jpg")) == b"content"
    assert read_image(ImageRef("a", path=tmp_path / "a.zip", member="images/b.jpg")) == b"member"
    assert unread(ImageRef("a", path=tmp_path / "a.zip", member="images/c.jpg")) == "image_missing"
    assert unread(ImageRef("a", path=tmp_path / "a.zip", member="images/")) == "image_missing"


def test_missing_and_unreadable_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("b.jpg", "a.jpg/b.jpg", "", "pipe.jpg"):
        assert unread(ImageRef("a", path=tmp_path / name)) == "image_missing"
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert unread(ImageRef("a", path=tmp_path / "loop.jpg")) == "image_unreadable"
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(image_files.MAX_BYTES + 1)
    assert unread(ImageRef("a", path=tmp_path / "large.jpg")) == "image_too_large"


def test_neither_bytes_nor_a_path():
    with refusal("D40", "neither bytes nor a path"):
        read_image(ImageRef("a"))


LONG = "x" * 300
BAD_NAMES = [
    "http://h/a.jpg",
    "https://h/a.jpg",
    "file:///etc/passwd",
    "S3://bucket/a",
    "data:image/png;base64,AAAA",
    "a\0.jpg",
    "a\n.jpg",
    "a\x1b[31m.jpg",
    f"{LONG}.jpg",
    "\u00e9" * 128,
    "\udcff.jpg",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_image_names_that_no_file_can_have(name, tmp_path):
    for ref in (
        ImageRef(name, path=Path(name)),
        ImageRef(name, path=Path(tmp_path, name)) if not Path(name).is_absolute() else ImageRef(name, path=Path(name)),
        ImageRef(name, path=tmp_path / "a.zip", member=name),
    ):
        with refusal("D40") as caught:
            read_image(ref)
        str(caught.value).encode("ascii")  # no byte of it can garble a terminal or a log
    with refusal("D40"):
        check_name(name, where="here")


@pytest.mark.parametrize(
    "name", ["a.jpg", "a b/c:d.jpg", "C:/a.jpg", "\u00e9" * 127, "x" * 255, "2024-01-01T10:20:30.jpg"]
)
def test_names_that_are_fine(name):
    check_name(name, where="here")


def archive_of(path: Path, name: str, content: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> Path:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, content)
    return path


@pytest.mark.parametrize(
    "name", ["../../x.jpg", "/x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "\\\\host\\x.jpg"]
)
def test_members_that_lead_out(name, tmp_path):
    path = archive_of(tmp_path / "a.zip", name)
    with refusal("D41", "leads out"):
        read_image(ImageRef("a", path=path, member=name))
    with refusal("D41", "leads out"):  # asked for, but not there
        read_image(ImageRef("a", path=archive_of(tmp_path / "b.zip", "fine.jpg"), member=name))


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFCHR, stat.S_IFIFO])
def test_members_that_are_links_or_devices(mode, tmp_path):
    path = archive_of(tmp_path / "a.zip", "a.jpg", b"/etc/passwd", mode)
    with refusal("D41", "link or a device"):
        read_image(ImageRef("a", path=path, member="a.jpg"))


def test_zip_bombs(tmp_path):
    path = archive_of(tmp_path / "a.zip", "a.jpg", bytes(3 * 2**20))
    with refusal("D41", "fold"):
        read_image(ImageRef("a", path=path, member="a.jpg"))
    info = zipfile.ZipInfo("a.jpg")
    info.file_size, info.compress_size = image_files.MAX_BYTES + 1, image_files.MAX_BYTES
    with refusal("D41", "more than"):
        check_member(info, where="here")
    check_member(info, where="here", max_bytes=2 * image_files.MAX_BYTES)
    small = archive_of(tmp_path / "b.zip", "a.jpg", bytes(2**19))  # packs as well, and does no harm
    assert len(read_image(ImageRef("a", path=small, member="a.jpg"))) == 2**19


def test_members_whose_name_goes_on_behind_a_nul():
    info = zipfile.ZipInfo("a.jpg\0/../../x.jpg")
    assert info.filename == "a.jpg"
    with refusal("D41", "leads out"):
        check_member(info, where="here")


def test_encrypted_members():
    info = zipfile.ZipInfo("a.jpg")
    info.flag_bits |= 1
    with refusal("D41", "encrypted"):
        check_member(info, where="here")


def test_archives_that_are_none(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK not really")
    for name in ("a.zip", "missing.zip"):
        with refusal("D41", "cannot be opened"):
            read_image(ImageRef("a", path=tmp_path / name, member="a.jpg"))


def test_a_damaged_member_is_left_out(tmp_path):
    path = archive_of(tmp_path / "a.zip", "a.jpg", os.urandom(1000))
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    assert unread(ImageRef("a", path=path, member="a.jpg")) == "image_unreadable"


def test_archives_stay_open_and_a_new_file_is_read_anew(tmp_path, monkeypatch):
    opened = []
    real = zipfile.ZipFile

    def counting(path, *rest):
        opened.append(path)
        return real(path, *rest)

    path = archive_of(tmp_path / "a.zip", "a.jpg", b"one")
    ref = ImageRef("a", path=path, member="a.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(image_files.zipfile, "ZipFile", counting)
        assert [read_image(ref) for _ in range(5)] == [b"one"] * 5
    assert len(opened) == 1
    archive_of(path, "a.jpg", b"another")
    assert read_image(ref) == b"another"


def test_a_forked_process_does_not_share_the_position_in_an_archive(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(200):
            archive.writestr(f"{i}.jpg", os.urandom(5000) + bytes([i]))
    refs = [ImageRef(str(i), path=path, member=f"{i}.jpg") for i in range(200)]
    wanted = [read_image(ref) for ref in refs]
    child = os.fork()
    same = all([read_image(ref) == w for ref, w in zip(refs, wanted, strict=True)] * 5)
    if child == 0:
        os._exit(0 if same else 1)
    assert same
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
