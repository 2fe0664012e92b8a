"""The first cause of an exception, which may be of another process, in one line."""

import errno
import re
import traceback

from sayo_verl.errors import SayoError
from sayo_verl.report.log import clean_log_line, first_exception

# How the note begins that the trainer adds to an exception; Python prints it below the exception.
NOTE = "in step "
HANDLING = "; raised while handling "
# Errors of a connection, whose numbers tell nothing about a disk.
_NETWORK = re.compile(r"Connect|Socket|HTTP|URL|SSL|Proxy|Timeout")
# Numbers of operating system errors -> what they mean for a run.
PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "a folder or file cannot be used by this user",
    errno.EIO: "the disk reports an error",
}


def describe_exception(error: BaseException) -> tuple[str, str]:
    """The first cause of an exception in one line, and the place that raised it; see ``first_exception``.

    Of a ``SayoError``, in this or another process, the line is its own, and the place is empty: the line names it. An
    exception that was handled follows the one that was raised meanwhile.
    """
    found = first_exception("".join(traceback.format_exception(error)))
    if found.ours:
        return found.ours, ""
    if isinstance(error, SayoError):  # it was never raised
        return str(error), ""
    said = (found.exception or " ".join(f"{type(error).__name__}: {error}".split()))[:300]
    return said + (f"{HANDLING}{found.handled[:200]}" if found.handled else ""), found.place


def note_of_step(error: BaseException) -> str:
    """``"in step 3, update of the actor"``, if the trainer added it to the exception; else empty."""
    text = "".join(traceback.format_exception(error))
    lines = (clean_log_line(line.encode()).strip() for line in text.splitlines())
    return next((line for line in lines if line.startswith(NOTE)), "")


def os_problem(said: str) -> str | None:
    """What an ``OSError`` means for a run, by its number in ``[Errno 28] No space left on device``; None if nothing.

    A number in an error of a connection means nothing.

    Libraries in Rust, such as safetensors, write ``(os error 28)``.
    """
    if _NETWORK.search(said.partition(":")[0]):
        return None
    found = re.search(r"(?:\[Errno|\(os error) (\d+)[\])]", said)
    return PROBLEMS.get(int(found[1])) if found else None


def one_line(error: BaseException) -> str:
    """Type and message of an exception in one line, without the address of a file object."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).split(' <_io')[0]}"[:300]
