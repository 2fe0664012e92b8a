"""Reader of train.log, the output of a run with interleaved lines of many processes.

It finds the current phase of a start and the first cause of a failure. The last lines of a failed run are seldom the
cause, because verl reports later errors and Ray repeats an error in each process that waited.
"""

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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


class Chain(NamedTuple):
    """What ``first_exception`` finds.

    Attributes:
        exception: ``"ValueError: ..."``; empty without a traceback.
        place: ``"reward.py, line 3, in compute_score"``, the last one outside of installed packages if there is one.
        ours: the line of the last ``SayoError`` that it caused, or its own line; empty if there is none.
        handled: the exception that was being handled when it was raised; empty if there was none.
    """

    exception: str
    place: str
    ours: str
    handled: str


def first_exception(text: str) -> Chain:
    """The first exception of a chain of tracebacks, without exceptions that were handled.

    Args:
        text: formatted exceptions, also those of Ray, which hold the tracebacks of other processes.
    """
    lines = [clean_log_line(line.encode()) for line in text.splitlines()]
    start = max((n for n, line in enumerate(lines) if line.startswith(_HANDLING)), default=0)
    handled, cause = (_first(part) for part in (lines[:start], lines[start:]))
    ours = [match[2] for line in lines[start:] if (match := _OURS.search(line))]
    return Chain(
        cause.exception if cause else "",
        cause.place.removeprefix("  at ") if cause else "",
        ours[-1] if ours else "",
        handled.exception if handled else "",
    )


def _first(lines: Sequence[str]) -> "_Cause | None":
    reader = _Traceback()
    causes = [cause for line in lines if (cause := reader.new_cause(line))]
    return causes[0] if causes else None


_FRAME = re.compile(r'^\s+File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$')
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(: .*)?$")
_INSTALLED = re.compile(r"/(site|dist)-packages/|/lib/python3\.\d+/|^<")


_CAUSED, _HANDLING = "The above exception was the direct cause of", "During handling of the above exception"
# The line of a ``SayoError``: its class is at the start, or the text of another exception begins with it.
_OURS = re.compile(r"^([A-Za-z_][\w.]*): (?:[\w.]*Error(?:: |\(['\"]))?(SAYO-[A-Z][0-9][0-9]: .*)")
# A wrapper of ours around verl's code is the place of an error only if it raised it.
_WRAPPER = "/sayo_verl/hooks/"


@dataclass
class _Cause:
    """The first exception of a chain and the place that raised it; ``skipped`` if verl only skipped a sample.

    An exception that was handled where another was raised is not the first.
    """

    exception: str
    place: str
    skipped: bool = False


@dataclass
class _Traceback:
    """The current traceback of one process."""

    frames: list[re.Match[str]] = field(default_factory=list)
    cause: _Cause | None = None
    chain: str = ""

    def new_cause(self, text: str) -> _Cause | None:
        """Read the next line; return the cause if the line ends the first traceback of a chain, else None."""
        # Ray and PyTorch print the traceback of the other process below these lines; that exception is the cause.
        of_other = text.startswith(("ray.exceptions.", "ray::")) and "ray::" in text
        if text.startswith(("Traceback (most recent call last)", "ray.exceptions.RayTaskError(")) or of_other:
            self.frames = []
        elif text.startswith("Original Traceback (most recent call last)"):
            self.frames, self.chain = [], text
        elif text.startswith((_CAUSED, _HANDLING)):
            self.chain = text
        elif frame := _FRAME.match(text):
            self.frames.append(frame)
        elif self.frames and _EXCEPTION.match(text):
            frames, self.frames = self.frames, []
            # verl's length filter catches errors of a sample and prints them with "Error processing one of the
            # samples, skipping...". Ray may separate the two, so the traceback is recognised by its first frame.
            skipped = frames[0]["name"] == "doc2len" and frames[0]["file"].endswith("rl_dataset.py")
            chain, self.chain = self.chain, ""
            if chain and self.cause:
                self.cause.skipped |= skipped
                if not chain.startswith(_CAUSED):
                    self.cause.exception, self.cause.place = text, _place(frames)
                return None
            self.cause = _Cause(text, _place(frames), skipped)
            return self.cause
        return None


def _place(frames: list[re.Match[str]]) -> str:
    """The last frame of the user's code, else the last one."""
    passed = [frame for frame in frames[:-1] if _WRAPPER not in frame["file"]] + frames[-1:]
    own = [frame for frame in passed if not _INSTALLED.search(frame["file"])]
    place = (own or passed)[-1]
    return f"  at {place['file']}, line {place['line']}, in {place['name']}"


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
