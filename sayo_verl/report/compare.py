"""Compare runs: seeds of the same settings are one group, and each group is set beside a baseline.

The number to compare by is the task reward, ``critic/score/mean``. ``critic/rewards/mean`` has a method's own terms.
All numbers are means of the last steps that every run has.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from sayo_verl.errors import Rule, did_you_mean, raise_first
from sayo_verl.estimates import Estimate
from sayo_verl.metrics import Metric
from sayo_verl.report import catalogue as c
from sayo_verl.report.groups import Group, group_runs, read_member, remarks
from sayo_verl.report.runs import UNKNOWN, Run
from sayo_verl.report.seeds import difference_of_means, over_seeds
from sayo_verl.report.verdict import prompt_key, region_share
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.store import read_steps

ON_BOXES = "attention on the boxes, share of the attention to the image"
CHANCE = "the same if every visual token got the same attention"
PAIRED, UNPAIRED = "paired by seed", "unpaired"
COST = (
    Metric("timing_s/step", "a step", unit="seconds", decimals=2),
    Metric("timing_s/gen", "rollouts", unit="seconds", decimals=2),
    Metric("timing_s/old_log_prob", "log-prob pass of the old policy", unit="seconds", decimals=2),
    Metric("timing_s/update_actor", "update of the policy", unit="seconds", decimals=2),
    Metric("sayo/probe_share_of_log_prob", "probe's share of the log-prob pass"),
    Metric("sayo/counterfactual_seconds", "passes with a changed image", unit="seconds", decimals=2),
    Metric("sayo/viz_seconds", "recording of rollouts", unit="seconds", decimals=2),
)


@dataclass(frozen=True)
class Row:
    """One metric.

    Attributes:
        text: its name and unit.
        decimals: for a table.
        cells: one mean over seeds per group.
        differences: group minus baseline; None for the baseline.
    """

    text: str
    decimals: int
    cells: tuple[Estimate, ...]
    differences: tuple[Estimate | None, ...]


@dataclass(frozen=True)
class Comparison:
    """All that is shown.

    Attributes:
        groups, baseline: the groups and the index of the baseline.
        automatic: whether the baseline was chosen here.
        steps: first and last step of the window.
        rows, cost: what was reached, and what a step cost.
        pairing: how each difference was taken: ``"paired by seed"``, ``"unpaired"``; empty for the baseline.
        unfair: why the runs are not comparable, as sentences.
        notes: other remarks.
    """

    groups: tuple[Group, ...]
    baseline: int
    automatic: bool
    steps: tuple[int, int]
    rows: tuple[Row, ...]
    cost: tuple[Row, ...]
    pairing: tuple[str, ...]
    unfair: tuple[str, ...]
    notes: tuple[str, ...]


def compare(paths: Sequence[Path], labels: Sequence[str] = (), baseline: str = "", k: int = 5) -> Comparison:
    """Read and compare runs.

    Args:
        paths: folders of runs.
        labels: one per run, or none; runs with the same label are one group.
        baseline: label of a group; empty: the first of an estimator of verl's own, else the first group.
        k: steps of the window.

    Raises:
        SayoError: R08 for a run named twice, R09 for another number of labels than runs, R10 for an unknown baseline,
            R11 for a window below 1, and those of ``load_run`` and ``load_config``.
    """
    twice = [str(path) for i, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:i]]]
    raise_first(
        [
            Rule(
                "R08",
                bool(twice),
                "a run is named twice, so that it would count as two seeds",
                where="sayo compare",
                got=", ".join(twice),
                fix="name each folder once",
            ),
            Rule(
                "R09",
                bool(labels) and len(labels) != len(paths),
                "the number of labels is not the number of runs",
                where="--label",
                got=len(labels),
                wanted=len(paths),
                fix="give one label per run, in their order; runs with the same label are one group",
            ),
            Rule("R11", k < 1, "the window has no step", where="--window", got=k, wanted="1 or more", fix="raise it"),
        ]
    )
    members = [read_member(path) for path in paths]
    untrained = [str(m.run.path) for m in members if m.run.steps[-1] < 1]
    raise_first(
        [
            Rule(
                "R12",
                bool(untrained),
                "a run has no training step to compare",
                where=", ".join(untrained),
                got="validation before training only",
                wanted="metrics of one training step or more",
                fix="leave it out, or wait until it has trained",
            )
        ]
    )
    groups = group_runs(members, labels)
    names = [group.label for group in groups]
    raise_first(
        [
            Rule(
                "R10",
                bool(baseline) and baseline not in names,
                f"no group has the label of the baseline{did_you_mean(baseline, names)}",
                where="--baseline",
                got=repr(baseline),
                wanted=", ".join(names),
                fix="name one of these, or leave the option out",
            )
        ]
    )
    plain = [i for i, g in enumerate(groups) if not g.runs[0].estimator.startswith(("attn_", UNKNOWN))]
    chosen = names.index(baseline) if baseline else (plain or [0])[0]
    steps, window_notes = _window([member.run for member in members], k)
    pairing = tuple("" if i == chosen else _pairing(group, groups[chosen]) for i, group in enumerate(groups))
    unfair, notes = remarks(groups)

    def mean(run: Run, name: str) -> float:
        return window_mean(run, name, steps)

    def validated(run: Run, source: str) -> float:
        return dict(run.validation_accuracy().get(source, [])).get(validated_at[source], math.nan)

    def difference(i: int, values: list[list[float]]) -> Estimate:
        if pairing[i] != PAIRED:
            return difference_of_means(values[i], values[chosen])
        of_seed = dict(zip(groups[chosen].seeds, values[chosen], strict=True))
        return over_seeds([x - of_seed[seed] for seed, x in zip(groups[i].seeds, values[i], strict=True)])

    def row(metric: Metric, value: Callable[[Run, str], float]) -> Row:
        values = [[value(run, metric.name) for run in group.runs] for group in groups]
        differences = [None if i == chosen else difference(i, values) for i in range(len(groups))]
        return Row(metric.label, metric.decimals, tuple(map(over_seeds, values)), tuple(differences))

    runs = [member.run for member in members]
    validated_at, validation_notes = _common_validation(runs, steps[1])
    first, *others = [row(metric, mean) for metric in _compared(groups)]
    validation = [row(Metric(source, f"validation accuracy, {source}"), validated) for source in validated_at]
    rows = [first, *validation, *others]
    recorded, recorded_notes = looked(runs)
    rows += [row(Metric(n, n), lambda run, n: recorded[run.path].get(n, math.nan)) for n in (ON_BOXES, CHANCE)]
    if any(not run.training(c.SCORE.name) for run in runs):
        recorded_notes.append("Some runs have no task reward.")
    cost = [row(metric, _median) for metric in COST]
    return Comparison(
        tuple(groups),
        chosen,
        not baseline,
        steps,
        tuple(_measured(rows)),
        tuple(_measured(cost)),
        pairing,
        tuple(unfair),
        (*window_notes, *validation_notes, *recorded_notes, *notes),
    )


def looked(runs: Sequence[Run]) -> tuple[dict[Path, dict[str, float]], list[str]]:
    """Where each run looked at the last step that all runs with boxes recorded, and remarks.

    Returns:
        By folder of the run ``ON_BOXES`` and ``CHANCE``, means over responses with boxes; empty without any.
    """
    found: dict[Path, dict[int, list[tuple[SeenPrompt, SeenResponse]]]] = {run.path: {} for run in runs}
    for run in runs:
        for step in read_steps(run.path, []):
            pairs = [(p, r) for p, responses in step.prompts for r in responses]
            if boxed := [(p, r) for p, r in pairs if p.region_tokens and math.isfinite(region_share(r))]:
                found[run.path][step.step] = boxed
    with_boxes = [set(steps) for steps in found.values() if steps]
    common = set.intersection(*with_boxes) if with_boxes else set()
    values: dict[Path, dict[str, float]] = {path: {} for path in found}
    if not common:
        return values, []
    last, read, shown = max(common), set(), set()
    for path, steps in found.items():
        if pairs := steps.get(last, []):
            values[path] = {
                ON_BOXES: sum(region_share(r) for _, r in pairs) / len(pairs),
                CHANCE: sum(p.chance for p, _ in pairs) / len(pairs),
            }
            read |= {(r.facts.get("query_row", UNKNOWN), *(one.label for one in r.maps)) for _, r in pairs}
            shown.add(frozenset(prompt_key(p) for p, _ in pairs))
    notes = [f"Attention on the boxes is that of the recorded held-out prompts at step {last}."]
    if len(read) > 1:
        notes.append("It was read at different layers or positions, so the runs cannot be compared by it.")
    if len(shown) > 1:
        notes.append("The recorded prompts are not the same, so the runs cannot be compared by attention on the boxes.")
    return values, notes


def window_mean(run: Run, name: str, steps: tuple[int, int]) -> float:
    """Mean of a metric in the window; NaN if it was not logged there, or is NaN in a step."""
    values = [value for step, value in run.training(name) if steps[0] <= step <= steps[1]]
    return sum(values) / len(values) if values else math.nan


def _window(runs: Sequence[Run], k: int) -> tuple[tuple[int, int], list[str]]:
    """First and last step of the window, and a remark if the runs end at different steps."""
    ends = {run.path.name: run.steps[-1] for run in runs}
    last = min(ends.values())
    if len(set(ends.values())) == 1:
        return (max(1, last - k + 1), last), []
    named = ", ".join(f"{name} {end}" for name, end in ends.items())
    return (max(1, last - k + 1), last), [
        f"The runs have different numbers of steps ({named}). Numbers are from the last steps that all of them have."
    ]


def _pairing(group: Group, baseline: Group) -> str:
    seeds, others = group.seeds, baseline.seeds
    known = all(seeds) and len(set(seeds)) == len(seeds) == len(others) > 1
    return PAIRED if known and set(seeds) == set(others) else UNPAIRED


def _compared(groups: Sequence[Group]) -> list[Metric]:
    """Common metrics, then those of methods that at least two groups measured."""
    runs = [run for group in groups for run in group.runs]
    sections = c.sections_of({name: entry for run in runs for name, entry in run.methods.items()})
    measured = [{name for run in group.runs for name in run.series if run.training(name)} for group in groups]
    own = [m for s in sections if s.estimator for m in s.metrics if sum(m.name in names for names in measured) > 1]
    return [c.SCORE, c.ACCURACY, c.LENGTH, c.ENTROPY, *(own if len(groups) > 1 else [])]


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if any(not math.isnan(cell.value) for cell in row.cells)]


def _common_validation(runs: Sequence[Run], last: int) -> tuple[dict[str, int], list[str]]:
    """Data source -> the last step, up to ``last``, at which all runs with this source were validated; and remarks."""
    validations = [run.validation_accuracy() for run in runs]
    at, notes = {}, []
    for source in dict.fromkeys(chain(*validations)):
        steps = [{step for step, _ in own[source] if step <= last} for own in validations if source in own]
        common = set.intersection(*steps)
        if common:
            at[source] = max(common)
        if not common or any(max(own) != max(common) for own in steps):
            chosen = f"step {at[source]}, the last that they have in common" if common else "no step in common"
            notes.append(f"The runs were validated on {source} at different steps: {chosen}.")
    return at, notes


def _median(run: Run, name: str) -> float:
    """Median over training steps without the first, which includes the warm-up."""
    values = [value for _, value in run.training(name)[1:] if math.isfinite(value)]
    return float(np.median(values)) if values else math.nan
