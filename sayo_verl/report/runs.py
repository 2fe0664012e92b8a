"""Reader of run folders: metrics.jsonl (verl's file logger), run.json (from the launcher) and train.log (the output).

A resumed run has a second metrics file, because verl's file logger empties the file it opens. Our scripts name it
metrics-2.jsonl, with run-2.json; a user may choose any metrics*.jsonl. All files of a folder are one run.

verl writes one JSON object per step, ``{"step": n, "data": {name: value}}``, with orjson, which turns NaN and
infinities into ``null``. Both are read as NaN. A metric is a list of (step, value) pairs.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.report.card import UNKNOWN, load_launch, run_card

METRICS_FILE, LOG_FILE = "metrics.jsonl", "train.log"
METRICS_GLOB, RUN_GLOB = "metrics*.jsonl", "run*.json"
NOT_MEASURED = "not measured"

# verl's name is val-core/<data source>/acc/mean@<responses per prompt>; the data source may contain slashes.
VALIDATION_ACCURACY = re.compile(r"^val-(core|aux)/(?P<source>.+)/acc(uracy)?/mean@\d+$")

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """The contents of one run folder.

    Attributes:
        path: the folder.
        run_id, estimator, started: from run.json, ``"unknown"`` if missing.
        total_steps: steps that the launcher requested; None if unknown.
        versions: package name -> version, from run.json.
        overrides: the launcher's Hydra overrides, from run.json.
        methods: metrics that the user's own methods declare (``sayo_verl.metrics.declaration``), from run.json.
        steps: logged steps, ascending; 0 is verl's validation before training.
        series: metric name -> [(step, value)], ascending by step; NaN is kept.
        files: the metrics files read, one per attempt, in the order of the attempts.
        data: data file -> bytes, from run.json.
        ended: ``time`` and ``error`` (empty if there was none) of the end that the launcher recorded; empty while the
            run goes on, and after a kill.
        seams: steps from which a resumed attempt continues; its first step is the one after.
        attempts: how often the run was started, of those that logged a step.
        discarded: training steps of an earlier attempt that a later one discarded, most of them trained again.
        notes: remarks for a reader of the numbers (truncated line, resume, NaN, missing run.json).
    """

    path: Path
    run_id: str
    estimator: str
    started: str
    total_steps: int | None
    versions: dict[str, str]
    overrides: list[str]
    methods: dict[str, Any]
    steps: list[int]
    series: dict[str, Series]
    data: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    seams: list[int] = field(default_factory=list)
    attempts: int = 1
    discarded: int = 0
    notes: list[str] = field(default_factory=list)

    def training(self, name: str) -> Series:
        """The (step, value) pairs of ``name`` in training steps (without step 0); empty if it was not measured."""
        return [(step, value) for step, value in self.series.get(name, []) if step > 0]

    def resumed(self) -> str:
        """``"resumed after step 20 (2 attempts)"``; empty for a run that was started once."""
        if not self.seams and self.attempts < 2:
            return ""
        again = {0: "", 1: "; 1 step of an earlier attempt was discarded"}.get(
            self.discarded, f"; {self.discarded} steps of earlier attempts were discarded"
        )
        return f"resumed after step {', '.join(map(str, self.seams))} ({self.attempts} attempts{again})"

    def validation_accuracy(self) -> dict[str, Series]:
        """Data source -> (step, value) of verl's validation accuracy, from val-core if present, else val-aux."""
        found: dict[str, dict[str, Series]] = {"core": {}, "aux": {}}
        for name, series in self.series.items():
            if match := VALIDATION_ACCURACY.match(name):
                found[match[1]][match["source"]] = series
        return found["core"] or found["aux"]


def parse_metrics_line(line: bytes, where: str) -> tuple[int, dict[str, float], list[str]]:
    """Parse one line of metrics.jsonl into (step, name -> value, names with a value that is not a number).

    ``null``, NaN and infinities become NaN.

    Raises:
        SayoError: R01 if the line is not ``{"step": int, "data": {...}}``.
    """

    def invalid(got: object) -> SayoError:
        return SayoError(
            "R01",
            "a metrics line is invalid",
            where=where,
            got=got,
            wanted='{"step": n, "data": {name: number}}',
            fix="delete that line if it is left from a killed attempt; otherwise copy the damaged file again",
        )

    try:
        record = json.loads(line)
    except ValueError as error:  # bad JSON and bad UTF-8
        raise invalid(error) from error
    if not isinstance(record, dict):
        raise invalid(type(record).__name__)
    step, data = record.get("step"), record.get("data")
    if isinstance(step, bool) or not isinstance(step, int):
        raise invalid(f"step {step!r}")
    if not isinstance(data, dict):
        raise invalid(f"data {data!r}")
    values = {}
    for name, value in data.items():
        if value is None:
            values[name] = math.nan
        elif isinstance(value, int | float):
            values[name] = float(value) if math.isfinite(value) else math.nan
    return step, values, [name for name in data if name not in values]


def load_run(path: Path | str) -> Run:
    """Read a run folder.

    All metrics*.jsonl of the folder are read as one run, in the order of their attempts: by the time in their run cards
    if each has one, else by their first step, then by name. A truncated last line (from a kill) is ignored. If a step
    number goes back (a resumed run), the later lines win and the abandoned steps of the earlier attempt are dropped.
    ``notes`` reports all of this.

    Raises:
        SayoError: R01 for an invalid line (file:line), R02 if no metrics file can be read, R03 if they contain no step,
            R04 if a run card is damaged, R06 if a second file starts from the beginning, so that it is another run.
    """
    path = Path(path)
    # Without any file, the usual name is opened for the system's error.
    attempts = [_read_attempt(file) for file in sorted(path.glob(METRICS_GLOB)) or [path / METRICS_FILE]]
    attempts = [a for a in attempts if a.records] or attempts[:1]
    if not attempts[0].records:
        raise SayoError(
            "R03",
            "no data: no step was logged",
            where=str(attempts[0].file),
            fix=f"see {path / LOG_FILE} for the reason",
        )
    attempts = _in_order(attempts)
    _check_one_run(attempts)
    notes = [note for attempt in attempts for note in attempt.notes]
    if len(attempts) > 1:
        notes.insert(0, f"one run in several attempts, in this order: {', '.join(a.file.name for a in attempts)}")
    launch = attempts[-1].launch
    if attempts[0].launch["started"] != UNKNOWN:
        launch["started"] = attempts[0].launch["started"]
    for name in ("estimator", "versions"):
        if any(attempt.launch[name] != launch[name] for attempt in attempts if attempt.has_card):
            notes.append(f"{name} changed between the attempts; the last is shown")
    records = [record for attempt in attempts for record in attempt.records]
    by_step, discarded, resume_notes = _merge([(step, values) for step, values, _ in records])
    seams, starts = _seams([[step for step, values, _ in a.records if not is_validation(values)] for a in attempts])
    skipped = Counter(name for _, _, names in records for name in names)
    notes += resume_notes
    notes += [f"{name}: left out, {count} values are not numbers" for name, count in skipped.items()]
    series: dict[str, Series] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            series.setdefault(name, []).append((step, value))
    for name, pairs in series.items():
        if missing := nan_count(pairs):
            notes.append(f"{name}: {missing}")
    files = [a.file for a in attempts]
    return Run(
        path=path,
        steps=sorted(by_step),
        series=series,
        files=files,
        seams=seams,
        attempts=max(len(files), starts),
        discarded=discarded,
        notes=notes,
        **launch,
    )


def next_metrics_file(folder: Path) -> Path:
    """The metrics file of a further attempt in ``folder``: metrics-2.jsonl, or the first that no attempt has taken."""
    n = 2
    while (file := folder / f"metrics-{n}.jsonl").exists() or run_card(file).exists():
        n += 1
    return file


def is_validation(values: Mapping[str, float]) -> bool:
    """Whether a line is verl's validation of the weights that an attempt starts from, not a training step."""
    return bool(values) and all(name.startswith("val-") for name in values)


def _seams(attempts: list[list[int]]) -> tuple[list[int], int]:
    """Steps that resumed attempts started from, of those whose curves remain, and how many attempts there were.

    ``attempts`` has the training steps of each file. One file holds several if another logger appended to it.
    """
    starts: list[int] = []
    count = 1
    newest: int | None = None
    for steps in attempts:
        for i, step in enumerate(steps):
            if newest is not None and (i == 0 or step <= newest):
                starts = [start for start in starts if start < step - 1] + [step - 1]
                count += 1
            newest = step
    return starts, count


@dataclass
class _Attempt:
    """One metrics file and its run card. ``launch`` has the fields of ``Run`` from the card."""

    file: Path
    records: list[tuple[int, dict[str, float], list[str]]]
    launch: dict[str, Any]
    has_card: bool
    notes: list[str]

    def starts_from_scratch(self) -> bool:
        """Whether the attempt starts before training or with its first step.

        An attempt that resumes the checkpoint of step n starts with step n + 1, or with verl's validation of the
        weights of step n.
        """
        step, values, _ = self.records[0]
        return step < 1 or (step == 1 and not is_validation(values))


def _read_attempt(file: Path) -> _Attempt:
    try:
        *lines, tail = file.read_bytes().split(b"\n")
    except OSError as error:
        raise SayoError(
            "R02",
            "the metrics of this run cannot be read",
            where=str(file),
            got=error.strerror,
            fix=f"name a run folder with {METRICS_FILE}, which a run writes in its first step",
        ) from error
    card = run_card(file)
    launch, notes = load_launch(card)
    records = [parse_metrics_line(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if tail.strip():
        try:
            records.append(parse_metrics_line(tail, str(file)))
        except SayoError:
            notes.append(f"line {len(lines) + 1} of {file.name} is truncated (stopped while writing) and ignored")
    return _Attempt(file, records, launch, card.exists(), notes)


def _in_order(attempts: list[_Attempt]) -> list[_Attempt]:
    """Sort by start time, because first steps do not show an attempt that went further back than the one before."""
    try:
        return sorted(attempts, key=lambda a: datetime.fromisoformat(a.launch["started"]))
    except (ValueError, TypeError):  # a missing time, or times with and without a zone
        numbers = re.compile(r"(\d+)")
        by_name = sorted(
            attempts, key=lambda a: [(len(x), x) if x.isdigit() else (0, x) for x in numbers.split(a.file.stem)]
        )
        if all(re.fullmatch(r"metrics(-\d+)?", a.file.stem) for a in attempts):  # numbered by the scripts, in order
            return by_name
        return sorted(by_name, key=lambda a: (a.records[0][0], not a.starts_from_scratch()))


def _check_one_run(attempts: list[_Attempt]) -> None:
    """Refuse a later file that starts from scratch, because its numbers would replace those of the run.

    Raises:
        SayoError: R06.
    """
    for attempt in attempts[1:]:
        if attempt.starts_from_scratch():
            files = [
                f"{a.file.name} (from step {a.records[0][0]} to {a.records[-1][0]})" for a in (attempts[0], attempt)
            ]
            raise SayoError(
                "R06",
                "the folder has metrics of two runs; the second does not resume a checkpoint",
                where=str(attempt.file.parent),
                got=" and ".join(files),
                wanted="the files of one run and of its resumed attempts",
                fix="move one of the two to another folder, with its run card "
                f"({run_card(attempts[0].file).name} or {run_card(attempt.file).name})",
            )


def nan_count(series: Series) -> str:
    """Return ``"NaN (3 of 40)"``, or an empty string if every value is a number."""
    missing = sum(math.isnan(value) for _, value in series)
    return f"NaN ({missing} of {len(series)})" if missing else ""


def _merge(records: list[tuple[int, dict[str, float]]]) -> tuple[dict[int, dict[str, float]], int, list[str]]:
    """Merge records in file order into step -> values; later lines replace earlier ones.

    Returns:
        The values, the number of training lines that were discarded, and notes.
    """
    by_step: dict[int, dict[str, float]] = {}
    notes, newest, discarded = [], None, 0
    for step, values in records:
        training = not is_validation(values)
        if newest is not None and step < newest:
            notes.append(f"goes back from step {newest} to step {step} (a resumed run); the later lines win")
        elif step in by_step and values.keys() & by_step[step].keys():
            notes.append(f"step {step} is logged twice; the later line wins")
        # The weights of these steps were discarded, so their numbers belong to no curve. A validation line is of the
        # weights that an attempt starts from; the training line of that step remains.
        for old in [old for old in by_step if old > step or (training and old == step)]:
            was = by_step.pop(old)
            discarded += not is_validation(was)
            if old == step and is_validation(
                was
            ):  # of the weights before this step, such as step 1 of verl's own loggers
                by_step[old] = was
        by_step.setdefault(step, {}).update(values)
        newest = step
    return by_step, discarded, notes
