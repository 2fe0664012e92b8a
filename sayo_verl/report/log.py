"""Reader of train.log, the output of a run with interleaved lines of many processes.

It finds the current phase of a start and the first cause of a failure. The last lines of a failed run are seldom the
cause, because verl reports later errors and Ray repeats an error in each process that waited.
"""

import re
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Ray and vLLM put "(Name pid=12, ip=10.0.0.1) " before each line, nested if one runs within the other.
_PREFIX = re.compile(r"^\s?(\((?:[^()]*\bpid=\d+[^()]*|raylet[^()]*|gcs_server[^()]*|autoscaler[^()]*)\)\s?)+")
# vLLM's prefix of each line of an engine traceback.
_LEVEL = re.compile(r"^ERROR \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?")
_REPEATED = re.compile(r"\s*\[repeated \d+x across cluster\].*$")
# Blank lines, carets under a traceback line, progress bars, and lines that Hydra and the launcher add below an error.
_NOISE = re.compile(r"^[\s^~]*$|\d+%\||^Set the environment variable HYDRA_FULL_ERROR=1|^to resume after step ")
# Only at the start of a line or of an exception's text; elsewhere it is a mention.
_ERROR = re.compile(r"(?:^\s*|(?:Error|Exception)(?:: |\(['\"]))(SAYO-[A-Z][0-9][0-9]: .*)")


def clean_log_line(raw: bytes) -> str:
    """Remove colours, prefixes of Ray and vLLM, and text overwritten by a carriage return from a line of train.log."""
    text = _ANSI.sub("", raw.decode("utf-8", errors="replace")).rstrip().rsplit("\r", 1)[-1]
    return _REPEATED.sub("", _LEVEL.sub("", _PREFIX.sub("", text)))


STARTING = "starting"
# Lines that verl 0.9.1 and Ray print, in the order of a start, and the phase that each starts. Some are logger.info,
# which VERL_LOGGING_LEVEL can silence; then an earlier phase stays on the screen longer.
PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^ray init kwargs: "), "starting Ray"),
    (re.compile(r"Started a local Ray instance|Connected to Ray cluster"), "starting the trainer"),
    (re.compile(r"^Using dataset class: "), "reading the data"),
    (re.compile(r"worker group kwargs: |^colocated worker base class "), "starting the workers"),
    (re.compile(r"create worker group "), "loading the model"),
    (re.compile(r"actor and ref model engine initialized"), "starting the reward workers"),
    (re.compile(r"reward loop manager initialized|^\['serve',"), "starting the vLLM server"),
    (re.compile(r"checkpoint engine manager initialized"), "looking for a checkpoint"),
    (re.compile(r"all initialize finished, ready to fit"), "starting the agent loop"),
    (re.compile(r"^Creating file logger at "), "validation before training, or the first rollout"),
    (re.compile(r"^['\"]?\(?['\"]?Initial validation metrics: "), "first rollout"),
)


def phase_rank(line: str) -> int:
    """Index in ``PHASES`` of the phase that a cleaned log line starts; -1 for other lines."""
    return next((rank for rank, (pattern, _) in enumerate(PHASES) if pattern.search(line)), -1)


def why_it_failed(log: Path, *, offset: int = 0, lines: int = 30) -> list[str]:
    """Find the first cause of a failure in a log.

    Args:
        log: the train.log, read line by line because it may be large; a missing file gives an empty result.
        offset: byte at which this attempt's output starts.
        lines: number of lines to return if the log contains no cause.

    Returns:
        The log's last line if it is a SAYO-… error, which the launcher prints. Else the distinct SAYO-… errors (the
        first three). Without any, the first exception of any process, the last one if
        it differs (the first may have been handled), each with the line of code that raised it, and the log's last
        line. Without any exception, the last meaningful lines. Of a chain of exceptions the first counts.
    """
    errors: dict[str, None] = {}
    causes: list[_Cause] = []
    last: deque[str] = deque(maxlen=lines)
    tracebacks: defaultdict[str, _Traceback] = defaultdict(_Traceback)
    if log.exists():
        for process, text in _lines_from(log, offset):
            if match := _ERROR.search(text):
                errors[match[1]] = None
            if cause := tracebacks[process].new_cause(text):
                causes.append(cause)
            if not _NOISE.search(text) and (not last or last[-1] != text):
                last.append(text)
    if last and _ERROR.match(last[-1]):  # the launcher's last line
        return [last[-1]]
    if errors:
        return list(errors)[:3]
    causes = [cause for cause in causes if not cause.skipped]
    if not causes:
        return list(last)
    first, final = causes[0], causes[-1]
    shown = [first.exception, first.place]
    if final.exception != first.exception:
        shown += [f"the last traceback: {final.exception}", final.place]
    return shown + [f"the log ends with: {t}" for t in list(last)[-1:] if t not in (first.exception, final.exception)]


def sayo_errors(text: str) -> list[str]:
    """The SAYO-… lines of a text with tracebacks, in its order."""
    lines = (clean_log_line(line.encode()) for line in text.splitlines())
    return [match[1] for line in lines if (match := _ERROR.search(line))]


def first_exception(text: str) -> tuple[str, str]:
    """The first exception of a chain of tracebacks and the line of code that raised it.

    Args:
        text: formatted exceptions, also those of Ray, which hold the tracebacks of other processes.

    Returns:
        ``("ValueError: ...", "reward.py, line 3, in compute_score")``; empty strings without a traceback. The place is
        the last one outside of installed packages, if there is one.
    """
    reader = _Traceback()
    for line in text.splitlines():
        if cause := reader.new_cause(clean_log_line(line.encode())):
            return cause.exception, cause.place.removeprefix("  at ")
    return "", ""


_FRAME = re.compile(r'^\s+File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$')
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(: .*)?$")
_INSTALLED = re.compile(r"/(site|dist)-packages/|/lib/python3\.\d+/|^<")


_CHAIN = ("The above exception was the direct cause of", "During handling of the above exception")


@dataclass
class _Cause:
    """The first exception of a chain and the place that raised it; ``skipped`` if verl only skipped a sample."""

    exception: str
    place: str
    skipped: bool = False


@dataclass
class _Traceback:
    """The current traceback of one process."""

    frames: list[re.Match[str]] = field(default_factory=list)
    cause: _Cause | None = None
    chained: bool = False

    def new_cause(self, text: str) -> _Cause | None:
        """Read the next line; return the cause if the line ends the first traceback of a chain, else None."""
        # Ray prints the traceback of the other process below this line, and that exception is the cause.
        if text.startswith(("Traceback (most recent call last)", "ray.exceptions.RayTaskError(", "ray::")):
            self.frames = []
        elif text.startswith(_CHAIN):
            self.chained = True
        elif frame := _FRAME.match(text):
            self.frames.append(frame)
        elif self.frames and _EXCEPTION.match(text):
            frames, self.frames = self.frames, []
            # verl's length filter catches errors of a sample and prints them with "Error processing one of the
            # samples, skipping...". Ray may separate the two, so the traceback is recognised by its first frame.
            skipped = frames[0]["name"] == "doc2len" and frames[0]["file"].endswith("rl_dataset.py")
            if self.chained and self.cause:
                self.cause.skipped |= skipped
                self.chained = False
                return None
            own = [frame for frame in frames if not _INSTALLED.search(frame["file"])]
            place = (own or frames)[-1]
            where = f"  at {place['file']}, line {place['line']}, in {place['name']}"
            self.cause, self.chained = _Cause(text, where, skipped), False
            return self.cause
        return None


def _lines_from(log: Path, offset: int) -> Iterator[tuple[str, str]]:
    """Yield (Ray's name of the process, the cleaned line)."""
    with log.open("rb") as file:
        file.seek(offset)
        for raw in file:
            match = _PREFIX.match(_ANSI.sub("", raw.decode("utf-8", errors="replace")))
            yield match[0].strip() if match else "", clean_log_line(raw)


class Follower:
    """Reads whole lines appended to a file since the last call. The file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset
        self._rest = b""

    def new_lines(self) -> list[bytes]:
        """Return whole new lines without their ends; a carriage return also ends a line (progress bars)."""
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self.offset:
            # verl's file logger empties its file at every start, also when it resumes.
            self.offset, self._rest = 0, b""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self._rest = re.split(rb"[\r\n]", self._rest + new)
        return [line for line in lines if line.strip()]
