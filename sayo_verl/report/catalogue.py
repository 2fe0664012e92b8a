"""The list of what figures, tables and the live view show of a run. None of them keeps a list of its own.

A method is one section, which its class declares (``metrics``, ``reference``). The classes import torch, and this room
must not. So ``methods.json`` holds the declarations of the built-in methods: ``python docs/generate.py`` writes it, and
a test compares. The declarations of a user's own methods are in run.json.

Common panels and rows are always shown, so that a run without them says "not measured". Those of a method are shown if
the run measured them. A metric below ``sayo/`` that nobody declares is shown under its own name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.metrics import PREFIX, Metric, Panel, every_metric
from sayo_verl.report.runs import UNKNOWN, Run

MIX = "attn_mix"
PASSES = "sayo/counterfactual_seconds"  # with /<key of the intervention> the seconds of one pass of several
MOST_UNLISTED_LIVE = 2  # metrics in the live view that nobody declares
DECLARED = Path(__file__).with_name("methods.json")


@dataclass(frozen=True)
class Section:
    """The metrics of a method, or those of every run.

    Attributes:
        entries: panels of the figure, whose metrics are also rows of the table, and metrics of the table only.
        estimator: the method's ``algorithm.adv_estimator``.
        reference: the method's name and its paper.
    """

    entries: tuple[Panel | Metric, ...]
    estimator: str = ""
    reference: tuple[str, str] = ("", "")

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, Panel))

    @property
    def every(self) -> tuple[Metric, ...]:
        """All metrics, those of panels first."""
        return every_metric(self.entries)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that are shown."""
        return tuple(metric for metric in self.every if metric.shown)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(metric.name for metric in self.every)


def _panel(title: str, unit: str, metrics: Sequence[Any] = (), band: Any = None, **frame: Any) -> Panel:
    """A panel from its form in JSON."""
    ends = (Metric(**band[0]), Metric(**band[1])) if band else None
    lines = tuple(Metric(**metric) for metric in metrics)
    return Panel(title, unit, lines, ends, **{key: tuple(value) for key, value in frame.items()})


def _section(estimator: str, declared: Mapping[str, Any]) -> Section:
    """A method's section from its form in JSON."""
    entries = tuple(_panel(**entry) if "title" in entry else Metric(**entry) for entry in declared["metrics"])
    return Section(entries, estimator, tuple(declared["reference"]))


# The reward function's value. Runs of different methods compare by it, because it has no term of a method.
SCORE = Metric("critic/score/mean", "task reward")
# verl logs here the reward from which it computes advantages: the task reward, minus the KL penalty if that is part of
# the reward, plus the terms of a method.
REWARD = Metric("critic/rewards/mean", "total reward", live="reward")
ACCURACY = Metric("sayo/accuracy/mean", "accuracy", 0, 1, live="accuracy")
ENTROPY = Metric("actor/entropy", "entropy", 0, unit="nats per token")
LENGTH = Metric("response_length/mean", "response length", 0, unit="tokens", decimals=1)

COMMON = Section(
    (
        Panel("Task reward", "mean of the reward function", (SCORE,)),
        Panel("Total reward", "mean, with method's terms", (REWARD,)),
        Panel("Accuracy", "share of answers", (ACCURACY,), limits=(0, 1)),
        Panel("Entropy", "nats per token", (ENTROPY,), limits=(0, None)),
        Panel("Response length", "tokens", (LENGTH,)),
        Metric("sayo/format/mean", "format", 0, 1),
    )
)

ANY_METHOD = Section(
    (
        Panel(
            "Mean weight",
            "factor on the advantage",
            (
                Metric("sayo/token_weight/mean", "mean weight of tokens", 0, line="tokens"),
                Metric("sayo/trajectory_weight/mean", "mean weight of trajectories", 0, line="trajectories"),
            ),
            guide=(1.0, "size of the step kept"),
        ),
        Metric("sayo/token_bonus/mean", "mean bonus of tokens", decimals=3, note="Added to the advantage."),
        Metric("sayo/token_bonus/size", "mean size of the bonus of tokens", 0, decimals=3),
        *(
            Metric(f"sayo/neutral_rows/{reason}", f"neutral rows: {text}", 0, decimals=1, unless_zero=True)
            for reason, text in (
                ("padding", "padding"),
                ("masked", "no token left"),
                ("no_image", "no image"),
                ("no_box", "no box"),
            )
        ),
        Metric("sayo/failed_rollouts", "failed rollouts", 0, decimals=1, unless_zero=True),
        Metric("sayo/failed_rollouts/val", "failed rollouts of a validation", 0, decimals=1, unless_zero=True),
        Metric("sayo/skipped_updates", "skipped updates", 0, decimals=1, unless_zero=True),
        Metric("sayo/left_out_rows", "rows left out for their image", 0, decimals=1, unless_zero=True),
        Panel(
            "Staleness of rollouts",
            "versions of the weights",
            (
                Metric(
                    "sayo/staleness/mean",
                    "staleness of rollouts, mean",
                    0,
                    unit="versions",
                    line="mean",
                    note="Versions between the weights of a rollout's first token and the old policy. Asynchronous "
                    "trainer modes only.",
                ),
                Metric("sayo/staleness/max", "staleness of rollouts, largest", 0, unit="versions", line="largest"),
            ),
            limits=(0, None),
        ),
        Metric(
            "sayo/partial_rollouts",
            "share of rollouts by several versions of the weights",
            0,
            1,
            note="An update interrupted them. Asynchronous trainer modes only.",
        ),
        Metric("sayo/probe_share_of_log_prob", "probe's share of the log-prob pass", 0),
        Metric(
            PASSES,
            "passes with a changed image",
            0,
            unit="seconds",
            note=f"All of them together. If there are several, `{PASSES}/` and the name of each has its own time.",
        ),
        Metric(
            "sayo/credit_wait_seconds",
            "waiting for the method's credit",
            0,
            unit="seconds",
            note="The credit is computed while verl runs the reference pass; this is the time that remains.",
        ),
        Metric("sayo/advantage_seconds", "advantages", 0, unit="seconds"),
        Metric(
            "sayo/viz_seconds",
            "recording of held-out rollouts",
            0,
            unit="seconds",
            note="Their log-prob passes and their file, in steps that record (`sayo.viz_every`).",
        ),
        Metric(
            "sayo/viz_wait_seconds",
            "waiting for held-out rollouts",
            0,
            unit="seconds",
            shown=False,
            note="The rollouts of the training batch are generated at the same time, so verl's `timing_s/gen` is "
            "shorter.",
        ),
        Metric(
            "sayo/reward_timeouts",
            "reward calls over their limit",
            0,
            decimals=0,
            unless_zero=True,
            note="Calls of the reward function that took longer than `sayo.reward_limit` ([running](running.md)).",
        ),
        Metric("sayo/probe_seconds", "probe, mean over the workers", 0, unit="seconds", shown=False),
        Metric("sayo/credit_seconds", "the method's credit", 0, unit="seconds", shown=False),
    )
)

OF_METHODS = tuple(_section(name, entry) for name, entry in json.loads(DECLARED.read_text()).items())
SECTIONS = (COMMON, *OF_METHODS, ANY_METHOD)


def sections_of(methods: Mapping[str, Any]) -> tuple[Section, ...]:
    """All sections, with those of the user's own methods.

    Args:
        methods: name -> its declaration, from run.json.

    Raises:
        SayoError: R04 for a declaration that this version cannot read.
    """
    try:
        guests = tuple(_section(name, entry) for name, entry in methods.items())
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise SayoError(
            "R04",
            "the launcher's record of a method's metrics is damaged",
            where="methods in run.json",
            got=error,
            fix='delete the entry "methods"; the metrics are then shown under their own names',
        ) from error
    return (COMMON, *OF_METHODS, *guests, ANY_METHOD)


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The common panels, then those with a metric that any of the runs measured."""
    measured = {name for run in runs for name in run.series if run.training(name)}
    sections = sections_of({name: entry for run in runs for name, entry in run.methods.items()})
    listed = [
        panel
        for section in sections
        for panel in section.panels
        if section is COMMON or measured & {metric.name for metric in panel.every}
    ]
    return listed + [Panel(metric.label, "as logged", (metric,)) for metric in _unlisted(measured, sections)]


def rows_of(run: Run) -> list[Metric]:
    """The common rows, then those that the run measured; counts of neutral rows only if there were any."""
    measured = {name for name in run.series if run.training(name)}
    sections = sections_of(run.methods)
    listed = [m for s in sections for m in s.metrics if s is COMMON or m.name in measured]
    kept = [m for m in listed if not m.unless_zero or any(value != 0 for _, value in run.training(m.name))]
    return kept + _passes(measured) + _unlisted(measured, sections)


def headlines(seen: Iterable[str], methods: Mapping[str, Any] | None = None) -> list[Metric]:
    """The metrics of the live view, for a run that has logged these names: the common ones, then each method's own.

    ``methods`` as in ``sections_of``.
    """
    seen, sections = set(seen), sections_of(methods or {})
    listed = [m for s in sections for m in s.metrics if m.live and (s is COMMON or m.name in seen)]
    return listed + _unlisted(seen, sections)[:MOST_UNLISTED_LIVE]


def estimator_of(run: Run) -> str:
    """``"attn_region: SAYO, arXiv 2602.08241"``; the bare name if no section names a paper."""
    sections = sections_of(run.methods)
    papers = {section.estimator: section.reference for section in sections if section.reference[0]}
    papers["grpo"] = ("GRPO", "arXiv 2402.03300")
    if run.estimator == UNKNOWN:
        return "estimator unknown"
    if run.estimator in papers:
        return f"{run.estimator}: {', '.join(papers[run.estimator])}"
    parts = [s.reference[0] or s.estimator for s in sections if s.estimator and s.names & run.series.keys()]
    if run.estimator == MIX and parts:
        # run.json does not hold the composed config, so the parts are found by their metrics
        return f"{MIX}: {' + '.join(parts)}{' + others' if _unlisted(run.series, sections) else ''}"
    return run.estimator


def _passes(names: Iterable[str]) -> list[Metric]:
    """The seconds of each pass with a changed image, of a run with several."""
    keys = sorted(name.removeprefix(f"{PASSES}/") for name in names if name.startswith(f"{PASSES}/"))
    return [Metric(f"{PASSES}/{key}", f"pass {key}", 0, unit="seconds") for key in keys]


def _unlisted(names: Iterable[str], sections: Sequence[Section]) -> list[Metric]:
    """Metrics below ``sayo/`` that no section lists: those that a user's own method does not declare."""
    listed = frozenset(chain.from_iterable(section.names for section in sections))
    ours = (name for name in names if name.startswith(PREFIX) and not name.startswith(f"{PASSES}/"))
    own = sorted(name for name in ours if name not in listed)
    return [Metric(name, short := name.removeprefix(PREFIX), live=short) for name in own]
