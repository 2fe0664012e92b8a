"""Run folders: metrics.jsonl (verl's file logger), run.json (written by the launcher) and train.log (its output).

A resumed run has a second metrics file beside the first, since verl's file logger empties the one it opens:
metrics-2.jsonl with run-2.json from our scripts, any other metrics*.jsonl by hand. All of a folder are one run.

verl writes one JSON object per step, ``{"step": n, "data": {name: value}}``, through orjson, which turns NaN and
infinities into ``null``; here both come back as NaN. A metric is a list of (step, value) pairs.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sayo_verl.errors import SayoError

METRICS_FILE, LOG_FILE, RUN_FILE = "metrics.jsonl", "train.log", "run.json"
METRICS_GLOB, RUN_GLOB = "metrics*.jsonl", "run*.json"
UNKNOWN, NOT_MEASURED = "unknown", "not measured"

# verl: val-core/<data source>/acc/mean@<responses per prompt>; the data source may itself hold slashes.
VALIDATION_ACCURACY = re.compile(r"^val-(core|aux)/(?P<source>.+)/acc(uracy)?/mean@\d+$")

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run folder, read once.

    Attributes:
        path: the folder.
        run_id, estimator, started: from run.json, ``"unknown"`` where it says nothing.
        total_steps: steps the launcher asked for; None if unknown.
        versions: package name -> version, from run.json.
        overrides: the launcher's Hydra overrides, from run.json.
        steps: logged steps, ascending; 0 is verl's validation before training.
        series: metric name -> [(step, value)], ascending by step; NaN is kept.
        files: the metrics files read, one per attempt, in the order of the attempts.
        notes: what a reader of the numbers should know (cut line, resume, NaN, missing run.json).
    """

    path: Path
    run_id: str
    estimator: str
    started: str
    total_steps: int | None
    versions: dict[str, str]
    overrides: list[str]
    steps: list[int]
    series: dict[str, Series]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def training(self, name: str) -> Series:
        """The (step, value) pairs of ``name`` in training steps (step 0 left out); empty if it was not measured."""
        return [(step, value) for step, value in self.series.get(name, []) if step > 0]

    def validation_accuracy(self) -> dict[str, Series]:
        """Data source -> (step, value) of verl's validation accuracy; val-core where present, else val-aux."""
        found: dict[str, dict[str, Series]] = {"core": {}, "aux": {}}
        for name, series in self.series.items():
            if match := VALIDATION_ACCURACY.match(name):
                found[match[1]][match["source"]] = series
        return found["core"] or found["aux"]


def parse_metrics_line(line: bytes, where: str) -> tuple[int, dict[str, float], list[str]]:
    """One line of metrics.jsonl -> (step, name -> value, names whose value is no number).

    ``null``, NaN and infinities become NaN.

    Raises:
        SayoError: R01 if the line is not ``{"step": int, "data": {...}}``.
    """

    def broken(got: object) -> SayoError:
        return SayoError(
            "R01",
            "a metrics line is broken",
            where=where,
            got=got,
            wanted='{"step": n, "data": {name: number}}',
            fix="delete that line if it is the rest of a killed attempt; otherwise the file was damaged, copy it anew",
        )

    try:
        record = json.loads(line)
    except ValueError as error:  # bad JSON and bad UTF-8
        raise broken(error) from error
    if not isinstance(record, dict):
        raise broken(type(record).__name__)
    step, data = record.get("step"), record.get("data")
    if isinstance(step, bool) or not isinstance(step, int):
        raise broken(f"step {step!r}")
    if not isinstance(data, dict):
        raise broken(f"data {data!r}")
    values = {}
    for name, value in data.items():
        if value is None:
            values[name] = math.nan
        elif isinstance(value, int | float):
            values[name] = float(value) if math.isfinite(value) else math.nan
    return step, values, [name for name in data if name not in values]


def load_run(path: Path | str) -> Run:
    """Read a run folder.

    All metrics*.jsonl of the folder are read as one run, in the order in which their attempts started: by the time in
    their run cards where each has one, else by their first step, then by name. A last line cut short by a kill is
    ignored; when a step comes back to an earlier number (a resumed run), the later lines win and the abandoned steps of
    the earlier attempt are dropped. All of it is said in ``notes``.

    Raises:
        SayoError: R01 for a broken line (file:line), R02 if no metrics file can be read, R03 if they hold no step,
            R04 if a run card is damaged, R06 if a second file starts anew and so is of another run.
    """
    path = Path(path)
    # Without any, the usual name is opened, for the error of the system.
    attempts = [_read_attempt(file) for file in sorted(path.glob(METRICS_GLOB)) or [path / METRICS_FILE]]
    attempts = [a for a in attempts if a.records] or attempts[:1]
    if not attempts[0].records:
        raise SayoError(
            "R03",
            "no data: not one step was logged",
            where=str(attempts[0].file),
            fix=f"look at {path / LOG_FILE} for the reason",
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
            notes.append(f"{name} changed between the attempts: the last is shown")
    records = [record for attempt in attempts for record in attempt.records]
    by_step, resume_notes = _merge([(step, values) for step, values, _ in records])
    skipped = Counter(name for _, _, names in records for name in names)
    notes += resume_notes
    notes += [f"{name}: left out, {count} values are no numbers" for name, count in skipped.items()]
    series: dict[str, Series] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            series.setdefault(name, []).append((step, value))
    for name, pairs in series.items():
        if missing := nan_count(pairs):
            notes.append(f"{name}: {missing}")
    return Run(path=path, steps=sorted(by_step), series=series, files=[a.file for a in attempts], notes=notes, **launch)


def run_card(metrics: Path) -> Path:
    """The launcher's record of the attempt that writes ``metrics``: run-2.json for metrics-2.jsonl."""
    stem = metrics.stem.removeprefix("metrics") if metrics.stem.startswith("metrics") else f"-{metrics.stem}"
    return metrics.with_name(f"run{stem}.json")


def next_metrics_file(folder: Path) -> Path:
    """The metrics file of a further attempt in ``folder``: metrics-2.jsonl, or the first that no attempt has taken."""
    n = 2
    while (file := folder / f"metrics-{n}.jsonl").exists() or run_card(file).exists():
        n += 1
    return file


@dataclass
class _Attempt:
    """One metrics file and its run card. ``launch`` holds the fields of Run that come from the card."""

    file: Path
    records: list[tuple[int, dict[str, float], list[str]]]
    launch: dict[str, Any]
    has_card: bool
    notes: list[str]

    def starts_anew(self) -> bool:
        """Whether it begins before training or with its first step: what resumes the checkpoint of step n begins with
        step n + 1, or with verl's validation of the weights of step n."""
        step, values, _ = self.records[0]
        return step < 1 or (step == 1 and not all(name.startswith("val-") for name in values))


def _read_attempt(file: Path) -> _Attempt:
    try:
        *lines, tail = file.read_bytes().split(b"\n")
    except OSError as error:
        raise SayoError(
            "R02",
            "the metrics of this run cannot be read",
            where=str(file),
            got=error.strerror,
            fix=f"name a run folder that holds {METRICS_FILE}; a run writes it with its first step",
        ) from error
    card = run_card(file)
    launch, notes = _load_launch(card)
    records = [parse_metrics_line(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if tail.strip():
        try:
            records.append(parse_metrics_line(tail, str(file)))
        except SayoError:
            notes.append(f"line {len(lines) + 1} of {file.name} is cut short (stopped while writing): ignored")
    return _Attempt(file, records, launch, card.exists(), notes)


def _in_order(attempts: list[_Attempt]) -> list[_Attempt]:
    """By start. First steps alone cannot tell an attempt that went further back than the one before it."""
    try:
        return sorted(attempts, key=lambda a: datetime.fromisoformat(a.launch["started"]))
    except (ValueError, TypeError):  # no time, or one without its zone beside one with
        numbers = re.compile(r"(\d+)")
        by_name = sorted(
            attempts, key=lambda a: [(len(x), x) if x.isdigit() else (0, x) for x in numbers.split(a.file.stem)]
        )
        return sorted(by_name, key=lambda a: (a.records[0][0], not a.starts_anew()))


def _check_one_run(attempts: list[_Attempt]) -> None:
    """Refuse a later file that starts anew: its numbers would replace those of the run, as if it had resumed it.

    Raises:
        SayoError: R06.
    """
    for attempt in attempts[1:]:
        if attempt.starts_anew():
            files = [
                f"{a.file.name} (from step {a.records[0][0]} to {a.records[-1][0]})" for a in (attempts[0], attempt)
            ]
            raise SayoError(
                "R06",
                "the folder holds metrics of two runs: the second starts anew, it resumes no checkpoint",
                where=str(attempt.file.parent),
                got=" and ".join(files),
                wanted="the files of one run and of its resumed attempts",
                fix="move the one that does not belong here into a folder of its own, with its run card "
                f"({run_card(attempts[0].file).name} or {run_card(attempt.file).name})",
            )


def nan_count(series: Series) -> str:
    """``"NaN (3 of 40)"``, or an empty string if every value is a number."""
    missing = sum(math.isnan(value) for _, value in series)
    return f"NaN ({missing} of {len(series)})" if missing else ""


def _merge(records: list[tuple[int, dict[str, float]]]) -> tuple[dict[int, dict[str, float]], list[str]]:
    """File order -> step -> values, later lines over earlier ones."""
    by_step: dict[int, dict[str, float]] = {}
    notes, newest = [], None
    for step, values in records:
        if newest is not None and step < newest:
            # The weights behind the steps after `step` were thrown away: their numbers belong to no curve.
            abandoned = [old for old in by_step if old > step]
            notes.append(f"goes back from step {newest} to step {step} (a resumed run): the later lines win")
            for old in abandoned:
                del by_step[old]
        elif step in by_step and values.keys() & by_step[step].keys():
            notes.append(f"step {step} is logged twice: the later line wins")
        # By name, not whole: after a resume verl logs a validation line under a step that has its training line.
        by_step.setdefault(step, {}).update(values)
        newest = step
    return by_step, notes


def _load_launch(file: Path) -> tuple[dict[str, Any], list[str]]:
    """run.json -> (the fields of Run that come from it, notes)."""
    record: Any = {}
    notes = []
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        notes.append(f"no {file.name}: run id, estimator and versions are unknown")
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(record, dict):
        raise _damaged(file, type(record).__name__)
    launch: dict[str, Any] = {name: str(record.get(name, UNKNOWN)) for name in ("run_id", "estimator", "started")}
    for name, kind, absent in (("total_steps", int, None), ("versions", dict, {}), ("overrides", list, [])):
        value = launch[name] = record.get(name, absent)
        if value is not absent and not isinstance(value, kind):
            raise _damaged(file, f"{name}: {value!r}")
    return launch, notes


def _damaged(file: Path, got: object) -> SayoError:
    return SayoError(
        "R04", "the launcher's record is damaged", where=str(file), got=got, fix="delete it: the run reads as 'unknown'"
    )
