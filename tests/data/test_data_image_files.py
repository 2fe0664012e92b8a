"""Damaged image files, and images read from files and archives."""

import io
import os
import resource
import stat
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from support.pictures import dropped, encoded, kept, picture, png_header, translucent
from support.refusals import refusal

from sayo_verl.data import image_files
from sayo_verl.data.image_files import check_member, check_name, read_image
from sayo_verl.data.images import Stored, store_image
from sayo_verl.data.rows import Drop, ImageRef

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


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
