"""What is shown of a run, in one list. Figures, tables and the live view read it; none keeps a list of its own.

A method is one section. Its class declares it (``metrics``, ``reference``); ``methods.json`` holds what the classes
declare, because they import torch and this room does not. ``python docs/generate.py`` writes that file, and a test
compares. Common panels and rows are always there, so that a run without them says "not measured". Those of a method
appear where it was measured. What a method of your own logs below ``sayo/`` is shown under its own name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sayo_verl.metrics import PREFIX, Metric, Panel, every_metric
from sayo_verl.report.runs import UNKNOWN, Run

MIX = "attn_mix"
MOST_UNLISTED_LIVE = 2  # of a method that is not listed, in the live view
DECLARED = Path(__file__).with_name("methods.json")


@dataclass(frozen=True)
class Section:
    """What belongs together: a method's numbers, or what every run has.

    Attributes:
        entries: panels of the figure, whose metrics are rows of the table too, and metrics of the table only.
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
        """Those that are shown."""
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


# What verl logs here is the reward that advantages are made of: the task reward, less the KL penalty if that is in the
# reward, and the terms that a method adds.
REWARD = Metric("critic/rewards/mean", "reward", live="reward")
ACCURACY = Metric("sayo/accuracy/mean", "accuracy", 0, 1, live="accuracy")
ENTROPY = Metric("actor/entropy", "entropy", 0, unit="nats per token")
LENGTH = Metric("response_length/mean", "response length", 0, unit="tokens", decimals=1)

COMMON = Section(
    (
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
        *(
            Metric(f"sayo/neutral_rows/{reason}", f"neutral rows: {text}", 0, decimals=1, unless_zero=True)
            for reason, text in (
                ("padding", "padding"),
                ("masked", "no token left"),
                ("no_image", "no image"),
                ("no_box", "no box"),
            )
        ),
        Metric("sayo/probe_share_of_log_prob", "probe's share of the log-prob pass", 0),
        Metric("sayo/counterfactual_seconds", "counterfactual pass", 0, unit="seconds"),
        Metric(
            "sayo/credit_wait_seconds",
            "waiting for the method's credit",
            0,
            unit="seconds",
            note="The credit is computed while verl runs the reference pass; this is what is left to wait for.",
        ),
        Metric("sayo/advantage_seconds", "advantages", 0, unit="seconds"),
        Metric("sayo/probe_seconds", "probe, mean over the workers", 0, unit="seconds", shown=False),
        Metric("sayo/credit_seconds", "the method's credit", 0, unit="seconds", shown=False),
    )
)

OF_METHODS = tuple(_section(name, entry) for name, entry in json.loads(DECLARED.read_text()).items())
SECTIONS = (COMMON, *OF_METHODS, ANY_METHOD)
_LISTED = frozenset(chain.from_iterable(section.names for section in SECTIONS))


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The common panels, then those of which any of the runs measured something."""
    measured = {name for run in runs for name in run.series if run.training(name)}
    listed = [
        panel
        for section in SECTIONS
        for panel in section.panels
        if section is COMMON or measured & {metric.name for metric in panel.every}
    ]
    return listed + [Panel(metric.label, "as logged", (metric,)) for metric in _unlisted(measured)]


def rows_of(run: Run) -> list[Metric]:
    """The common rows, then those that the run measured; counts of neutral rows only if there were any."""
    measured = {name for name in run.series if run.training(name)}
    listed = [m for s in SECTIONS for m in s.metrics if s is COMMON or m.name in measured]
    kept = [m for m in listed if not m.unless_zero or any(value != 0 for _, value in run.training(m.name))]
    return kept + _unlisted(measured)


def headlines(seen: Iterable[str]) -> list[Metric]:
    """What the live view shows of a run that has logged these names: the common numbers, then each method's own."""
    seen = set(seen)
    listed = [m for s in SECTIONS for m in s.metrics if m.live and (s is COMMON or m.name in seen)]
    return listed + _unlisted(seen)[:MOST_UNLISTED_LIVE]


def estimator_of(run: Run) -> str:
    """``"attn_region: SAYO, arXiv 2602.08241"``; the bare name where no paper is known to this list."""
    papers = {section.estimator: section.reference for section in OF_METHODS} | {"grpo": ("GRPO", "arXiv 2402.03300")}
    if run.estimator == UNKNOWN:
        return "estimator unknown"
    if run.estimator in papers:
        return f"{run.estimator}: {', '.join(papers[run.estimator])}"
    parts = [section.reference[0] for section in OF_METHODS if section.names & run.series.keys()]
    if run.estimator == MIX and parts:
        # run.json does not hold the composed config: the metrics tell what took part.
        return f"{MIX}: {' + '.join(parts)}{' + others' if _unlisted(run.series) else ''}"
    return run.estimator


def _unlisted(names: Iterable[str]) -> list[Metric]:
    """Metrics below ``sayo/`` that no section knows: those of a user's own method."""
    own = sorted(name for name in names if name.startswith(PREFIX) and name not in _LISTED)
    return [Metric(name, short := name.removeprefix(PREFIX), live=short) for name in own]
