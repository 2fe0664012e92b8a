"""train.log: what a run wrote to its output, with the lines of many processes between one another.

Read for two things: the phase that a start has come to, and the first cause of a failure. The last lines of a failed
run are seldom the cause: verl reports what followed from it, and Ray repeats an error in each process that waited.
"""

import re
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Ray and vLLM put "(Name pid=12, ip=10.0.0.1) " before each line, nested where one runs within the other.
_PREFIX = re.compile(r"^\s?(\((?:[^()]*\bpid=\d+[^()]*|raylet[^()]*|gcs_server[^()]*|autoscaler[^()]*)\)\s?)+")
# vLLM before each line of a traceback of its engine.
_LEVEL = re.compile(r"^ERROR \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?")
_REPEATED = re.compile(r"\s*\[repeated \d+x across cluster\].*$")
# Blank, the carets under a traceback line, progress bars; what Hydra and the launcher add below an error.
_NOISE = re.compile(r"^[\s^~]*$|\d+%\||^Set the environment variable HYDRA_FULL_ERROR=1|^to resume after step ")
# At the start of a line or of an exception's text; elsewhere it is a mention.
_ERROR = re.compile(r"(?:^\s*|(?:Error|Exception)(?:: |\(['\"]))(SAYO-[A-Z][0-9][0-9]: .*)")


def clean_log_line(raw: bytes) -> str:
    """A line of train.log without colours, prefixes of Ray and vLLM, and what a carriage return overwrote."""
    text = _ANSI.sub("", raw.decode("utf-8", errors="replace")).rstrip().rsplit("\r", 1)[-1]
    return _REPEATED.sub("", _LEVEL.sub("", _PREFIX.sub("", text)))


STARTING = "starting"
# Lines that verl 0.9.1 and Ray print, in the order of a start, and what goes on from there. Some are logger.info, which
# VERL_LOGGING_LEVEL can silence: then an earlier phase stays on the screen longer.
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
    """Index in ``PHASES`` of the phase that a cleaned log line starts, -1 for any other line."""
    return next((rank for rank, (pattern, _) in enumerate(PHASES) if pattern.search(line)), -1)


def why_it_failed(log: Path, *, offset: int = 0, lines: int = 30) -> list[str]:
    """The first cause of a failure, as far as a log names one.

    Args:
        log: the train.log; it may be large, it is read line by line. Absent means an empty answer.
        offset: byte at which this attempt's output starts.
        lines: how many lines to show when the log names no cause.

    Returns:
        The distinct SAYO-… errors (at most three, the first first); else the first exception of any process, the
        last one if it is another (the first may have been handled), each with the line of code that raised it, and the
        log's last line; else the last meaningful lines. Of exceptions raised from one another the first counts.
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


_FRAME = re.compile(r'^\s+File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$')
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(: .*)?$")
_INSTALLED = re.compile(r"/(site|dist)-packages/|/lib/python3\.\d+/|^<")


_CHAIN = ("The above exception was the direct cause of", "During handling of the above exception")


@dataclass
class _Cause:
    """The first exception of a chain and the place that raised it; ``skipped`` if verl only left a sample out."""

    exception: str
    place: str
    skipped: bool = False


@dataclass
class _Traceback:
    """The traceback that one process is printing."""

    frames: list[re.Match[str]] = field(default_factory=list)
    cause: _Cause | None = None
    chained: bool = False

    def new_cause(self, text: str) -> _Cause | None:
        """Take the next line; where it ends the first traceback of a chain, its cause, else None."""
        # Ray puts the traceback of the other process below this line: what that one raised is the cause.
        if text.startswith(("Traceback (most recent call last)", "ray.exceptions.RayTaskError(", "ray::")):
            self.frames = []
        elif text.startswith(_CHAIN):
            self.chained = True
        elif frame := _FRAME.match(text):
            self.frames.append(frame)
        elif self.frames and _EXCEPTION.match(text):
            frames, self.frames = self.frames, []
            # verl's length filter catches what a sample raises and prints it beside "Error processing one of the
            # samples, skipping...". Ray may part the two, so the traceback is known by where it starts.
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
    """(the process as Ray names it, the cleaned line)"""
    with log.open("rb") as file:
        file.seek(offset)
        for raw in file:
            match = _PREFIX.match(_ANSI.sub("", raw.decode("utf-8", errors="replace")))
            yield match[0].strip() if match else "", clean_log_line(raw)


class Follower:
    """Reads what was appended to a file since the last look, in whole lines. The file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset
        self._rest = b""

    def new_lines(self) -> list[bytes]:
        """Whole new lines without their ends; a carriage return ends a line too (progress bars)."""
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self.offset:
            # verl's file logger opens its file anew at every start, resumes included.
            self.offset, self._rest = 0, b""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self._rest = re.split(rb"[\r\n]", self._rest + new)
        return [line for line in lines if line.strip()]
