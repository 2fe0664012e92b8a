"""The state of a run in flight, read from its files: phase, step, numbers, remaining time."""

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.report import runs as r
from sayo_verl.report.catalogue import headlines, sections_of
from sayo_verl.report.log import PHASES, STARTING, Follower, clean_log_line, phase_rank

_PACE_STEPS = 10  # recent steps used for the ETA


@dataclass(frozen=True)
class Pace:
    """Intervals in seconds: reading the files, a heartbeat, a warning of a stall (at least three steps long)."""

    poll: float = 0.2
    heartbeat: float = 20.0
    stall: float = 300.0


class Progress:
    """The state of a run, read from its files."""

    def __init__(self, run_dir: Path, total_steps: int | None, pace: Pace, log_offset: int, metrics: Follower) -> None:
        self.log, self.total, self.pace = run_dir / r.LOG_FILE, total_steps, pace
        self._run_dir, self._old_cards = run_dir, set(run_dir.glob(r.RUN_GLOB))
        self.phase, self.step, self.metrics = STARTING, 0, dict[str, float]()
        self._shown = headlines([])
        self._methods: dict[str, Any] = {}  # the user's own, from the card
        self._seen: set[str] = set()
        self.started = self.changed = self.logged = self.step_started = time.monotonic()
        self._log = Follower(self.log, log_offset)
        self._file = metrics
        self._rank = -1
        self._stall_warned = self.started
        self._step_times: deque[tuple[float, int]] = deque(maxlen=_PACE_STEPS + 1)

    def update(self) -> list[tuple[str, str]]:
        """Read new lines and return (kind, line) events of kind phase, step or warning."""
        now = time.monotonic()
        events = self._read_card()
        log_size = self._log.offset
        for raw in self._log.new_lines():
            events += self._read_phase(clean_log_line(raw))
        records = self._file.new_lines()
        for raw in records:
            events += self._read_step(raw, now)
        if self._log.offset != log_size:
            self.logged = now
        # Not a log line: verl prints one a minute while it waits for ever
        if any(kind != "warning" for kind, _ in events):
            self.changed = now
        if now - max(self.changed, self._stall_warned) >= max(self.pace.stall, 3 * self._seconds_per_step()):
            self._stall_warned = now
            quiet, line = duration(now - self.changed), duration(now - self.logged)
            events.append(
                ("warning", f"no step for {quiet} (last log line {line} ago); the run may hang, see {self.log}")
            )
        return events

    def _read_card(self) -> list[tuple[str, str]]:
        """Take steps, metrics file and declared metrics from the card that the launcher writes before training."""
        events: list[tuple[str, str]] = []
        for card in set(self._run_dir.glob(r.RUN_GLOB)) - self._old_cards:
            try:
                launch = json.loads(card.read_text())
            except ValueError:
                continue  # half-written: the next look reads it
            self._old_cards.add(card)
            self.total = self.total or launch.get("total_steps")
            try:
                sections_of(launch.get("methods", {}))
                self._methods = launch.get("methods", {})
            except SayoError as error:
                events.append(("warning", str(error)))  # the run continues
            if (metrics := launch.get("metrics")) and Path(metrics) != self._file.path:
                self._file = Follower(Path(metrics))
        return events

    def of_total(self, step: int) -> str:
        """``"3/30"``; a run that counts epochs says no total."""
        return f"{step}/{self.total or '?'}"

    def _read_phase(self, line: str) -> list[tuple[str, str]]:
        rank = phase_rank(line)
        if self.step or rank <= self._rank:  # only forward, because lines of different processes may be out of order
            return []
        self._rank, self.phase = rank, PHASES[rank][1]
        return [("phase", self.phase)]

    def _read_step(self, raw: bytes, now: float) -> list[tuple[str, str]]:
        try:
            step, values, _ = r.parse_metrics_line(raw, self._file.path.name)
        except SayoError as error:
            return [("warning", str(error))]  # the run continues; the report will refuse the file
        validation = [value for name, value in values.items() if r.VALIDATION_ACCURACY.match(name)]
        checked = "".join(f"  validation accuracy {value:.3f}" for value in validation[:1])
        if step == 0 or r.is_validation(values):
            # verl logs the validation before training separately, under the step that it starts from.
            self.phase = "first rollout"
            return [("phase", f"validated at step {step}{checked}")]
        self._step_times.append((now, step))  # first, because the live display's thread reads it once step is set
        self._seen |= values.keys()
        self._shown = headlines(self._seen, self._methods)
        self.metrics, self.step_started, self.step = values, now, step
        return [("step", f"step {self.of_total(step)}  {self.numbers()}{checked}  {self.eta()}")]

    def numbers(self) -> str:
        """The last step's common metrics and those that a method logged in any step, in one line."""
        values = [(metric.live, self.metrics.get(metric.name)) for metric in self._shown]
        return "  ".join(f"{label} {r.NOT_MEASURED if value is None else f'{value:.3f}'}" for label, value in values)

    def eta(self) -> str:
        """Remaining time at the pace of the last steps; unknown after the first step, which includes the warm-up."""
        if not (seconds := self._seconds_per_step()) or self.total is None:
            return "ETA unknown"
        return f"ETA {duration(seconds * max(0, self.total - self.step))}"

    def _seconds_per_step(self) -> float:
        """Over the last steps; 0 before the second."""
        if len(self._step_times) < 2:
            return 0.0
        (begin, first), (end, last) = self._step_times[0], self._step_times[-1]
        return (end - begin) / (last - first) if last > first else 0.0


def duration(seconds: float) -> str:
    """``"35 s"``, ``"2 min 05 s"``, ``"1 h 02 min"``."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
