"""The encoded bytes of images: from files and members of zip files, and from nowhere else.

Error codes: D40 a reference that is no plain name, D41 a zip file or member.
"""

import os
import re
import stat
import zipfile
import zlib
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath

from PIL import UnidentifiedImageError

from sayo_verl.data.rows import Drop, ImageRef
from sayo_verl.errors import SayoError

MAX_BYTES = 256 * 2**20  # of one encoded image, in a file or a zip member
MAX_RATIO = 100  # of a zip member's size to its compressed size, ...
RATIO_FROM = 2**20  # ... asked of members from this size on: a small one is no bomb, and a plain small chart packs well
# A scheme before a slash, anywhere, for Path("data") / "http://x" is data/http:/x. Not C:/, whose scheme is one letter.
_URL = re.compile(r"(?:^|/)(?:[A-Za-z][A-Za-z0-9+.-]+:/|data:)")


def read_image(ref: ImageRef) -> bytes:
    """The encoded bytes of an image.

    Raises:
        Drop: ``image_missing`` where there is no such file or member, ``image_unreadable`` where it cannot be read,
            ``image_too_large`` for a file of more than ``MAX_BYTES``.
        SayoError: D40 for a reference that is no plain name of a file, D41 for a zip file that cannot be opened or a
            member that ``check_member`` refuses.
    """
    if ref.data is not None:
        return ref.data
    if ref.path is None:
        raise SayoError(
            "D40",
            "an image has neither bytes nor a path",
            where=f"image {ref.key!r}",
            fix="name the file of the image, or give its bytes",
        )
    path = str(ref.path)
    check_name(path, where=f"image {ref.key!r}")
    if ref.member is not None:
        check_name(ref.member, where=f"image {ref.key!r} in {path}")
        return _read_member(path, ref.member)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise Drop("image_missing", f"{path} is no regular file")
            if found.st_size > MAX_BYTES:
                raise Drop("image_too_large", f"{found.st_size} bytes")
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Drop("image_missing", path) from error
    except OSError as error:
        raise Drop("image_unreadable", one_line(error)) from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for a writer


def check_name(name: str, *, where: str) -> None:
    """Refuse what is no plain name of a file or member. Give the name as the source has it where possible: ``Path``
    makes ``http:/x`` of ``http://x`` (which is refused too).

    Raises:
        SayoError: D40 for a URL, a control character, a part of more than 255 bytes or text that is not UTF-8.
    """
    problem = ""
    if _URL.search(name):
        problem = "a URL"
    elif any(ord(c) < 32 or ord(c) == 127 for c in name):
        problem = "a name with a control character"
    else:
        try:
            if max(len(part) for part in name.encode("utf-8").split(b"/")) > 255:
                problem = "a name of more than 255 bytes"
        except UnicodeEncodeError:
            problem = "a name that is not UTF-8"
    if problem:
        raise SayoError(
            "D40",
            f"{problem} stands for an image",
            where=_shown(where),
            got=_shown(ascii(name)),
            wanted="the plain name of a local file",
            fix="download or rename the file, and correct the reference",
        )


def _shown(text: str) -> str:
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())[:160]


def check_member(
    info: zipfile.ZipInfo, *, where: str, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
) -> None:
    """Refuse a member that could reach outside of where it is unpacked, or that unpacks to far more than it looks.

    Raises:
        SayoError: D41 for an absolute name, one with "..", a link or device, an encrypted member, one of more than
            ``max_bytes``, and one of at least ``RATIO_FROM`` bytes that was packed more than ``max_ratio`` fold.
    """
    kind = stat.S_IFMT(info.external_attr >> 16)
    problem = ""
    if _leaves(info.orig_filename) or _leaves(info.filename):
        problem = "has a name that leads out of its folder"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        problem = "is a link or a device"
    elif info.flag_bits & 0x1:
        problem = "is encrypted"
    elif info.file_size > max_bytes:
        problem = f"has {info.file_size} bytes, more than {max_bytes}"
    elif info.file_size >= RATIO_FROM and info.file_size > max_ratio * info.compress_size:
        problem = f"is packed {info.file_size / max(info.compress_size, 1):.0f} fold, more than {max_ratio:g}"
    if problem:
        raise SayoError(
            "D41",
            f"a member of a zip file {problem}",
            where=_shown(where),
            got=_shown(ascii(info.orig_filename)),
            wanted="plain files below the archive's root",
            fix="do not use this archive, or unpack and check it by hand",
        )


def _leaves(name: str) -> bool:
    windows = PureWindowsPath(name)  # knows drives and backslashes
    return (
        PurePosixPath(name).is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in (*PurePosixPath(name).parts, *windows.parts)
        or "\0" in name
    )


def _read_member(path: str, member: str) -> bytes:
    where = f"{path}, member {member!r}"
    try:
        found = os.stat(path)
        archive = _archive(path, os.getpid(), found.st_mtime_ns, found.st_size)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise SayoError(
            "D41",
            f"a zip file cannot be opened ({one_line(error)})",
            where=_shown(path),
            fix="check the path, and download the file again if it was cut short",
        ) from error
    try:
        info = archive.getinfo(member)
    except KeyError as error:
        if _leaves(member):  # not there, and no name to look for either
            check_member(zipfile.ZipInfo(member), where=where)
        raise Drop("image_missing", where) from error
    check_member(info, where=where)
    if info.is_dir():
        raise Drop("image_missing", f"{where} is a folder")
    try:
        return archive.read(info)
    except NotImplementedError as error:
        raise SayoError(
            "D41",
            f"a member of a zip file is packed in an unknown way ({error})",
            where=_shown(where),
            fix="pack the archive again with deflate",
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise Drop("image_unreadable", one_line(error)) from error


@lru_cache(maxsize=4)
def _archive(path: str, process: int, mtime_ns: int, size: int) -> zipfile.ZipFile:
    """An open archive. Its own per process: those of a fork would share one position in the file."""
    return zipfile.ZipFile(path)


def one_line(error: BaseException) -> str:
    """An error in one line that is the same in every run."""
    if isinstance(error, UnidentifiedImageError):  # its text holds an address in memory, which differs in every run
        return "the header is damaged"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
