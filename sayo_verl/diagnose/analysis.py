"""What an analysis of ``sayo diagnose`` is, and what it gives: sentences, curves, tables, for one model or two.

Shape suffixes: K bins, L layers, H heads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sayo_verl import estimates as e
from sayo_verl.diagnose.answers import Answer, per_response
from sayo_verl.estimates import Estimate

Answers = Sequence[Answer]
Sets = Mapping[str, Answers]  # label of a model -> its responses
PanelText = tuple[str, str, str, tuple[float, str] | None]  # title, axes, a level with its meaning
RIGHT, WRONG, ALL = "right answers", "wrong answers", "all answers"
# What an analysis needs -> a test of a response, and why there is no result if none passes.
NEEDS: Mapping[str, tuple[Callable[[Answer], bool], str]] = {
    "boxes": (lambda a: a.region_tokens > 0, "no row has a box"),
    "a ground truth": (lambda a: a.right is not None, "no row has a ground truth, so right and wrong are unknown"),
    "a measured map": (lambda a: "seen/sink_mass" in a.values, "no response was measured by head"),
    "several tokens": (lambda a: a.tokens > 1, "every response has one token"),
}


@dataclass(frozen=True)
class Line:
    """One curve of a panel: K places, K estimates, and its style; the colour is a number of the page's colours."""

    label: str
    x: Sequence[float]
    y: Sequence[Estimate]
    panel: int = 0
    dashed: bool = False
    colour: int = 0


@dataclass(frozen=True)
class Result:
    """What an analysis says of one model: the result in plain words, curves, and numbers by name."""

    sentences: tuple[str, ...]
    lines: tuple[Line, ...] = ()
    facts: Mapping[str, Estimate] = field(default_factory=dict)
    bars: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One result of the page.

    Attributes:
        name: of its files.
        title: a heading.
        sentences: the result in plain words.
        needs: what the data must have.
        reference: the paper's figure, or what a reader must know.
        panels: of the figure.
        lines: of the panels.
        bars: texts of the horizontal axis, if values stand side by side there.
        grids: title -> [L, H] values, drawn instead of lines.
        header, rows: of the CSV file.
        table: rows that the page shows under the figure, the first is the header.
        facts: name -> estimate, for ``summary.json``.
        left_out: why there is no result.
    """

    name: str
    title: str
    sentences: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    reference: str = ""
    panels: tuple[PanelText, ...] = ()
    lines: tuple[Line, ...] = ()
    bars: tuple[str, ...] = ()
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    header: tuple[str, ...] = ("panel", "answers", "x", "mean", "low", "high", "responses")
    rows: Sequence[Sequence[Any]] = ()
    table: Sequence[Sequence[str]] = ()
    facts: Mapping[str, Estimate] = field(default_factory=dict)
    left_out: str = ""


@dataclass(frozen=True)
class Analysis:
    """An analysis of one model's responses, for any number of models side by side.

    Attributes:
        of_model: makes the result of the responses that have what it needs.
        others: as in ``Finding``. A panel without a number is not shown.
    """

    name: str
    title: str
    of_model: Callable[[Answers], Result]
    panels: tuple[PanelText, ...]
    needs: tuple[str, ...] = ()
    reference: str = ""

    def __call__(self, sets: Sets) -> Finding:
        finding = Finding(self.name, self.title, needs=self.needs, reference=self.reference)
        usable = {
            label: [a for a in answers if all(NEEDS[need][0](a) for need in self.needs)]
            for label, answers in sets.items()
        }
        for label, answers in sets.items():
            for need in self.needs if not usable[label] else ():
                if not any(map(NEEDS[need][0], answers)):
                    return dataclasses.replace(finding, left_out=NEEDS[need][1])
        lines: list[Line] = []
        sentences: list[str] = []
        facts: dict[str, Estimate] = {}
        bars: tuple[str, ...] = ()
        for i, (label, answers) in enumerate(usable.items()):
            result, several = self.of_model(answers), len(sets) > 1
            for j, line in enumerate(result.lines):
                name = f"{label}, {line.label}" if several and line.label else line.label or label
                lines.append(dataclasses.replace(line, label=name, colour=i if several else line.colour or j % 2))
            sentences += [f"{label}: {sentence}" if several else sentence for sentence in result.sentences]
            facts |= {f"{label}/{name}": estimate for name, estimate in result.facts.items()}
            bars = bars if len(bars) > len(result.bars) else result.bars
        kept = [n for n in range(len(self.panels)) if any(_measured(line) for line in lines if line.panel == n)]
        lines = [dataclasses.replace(line, panel=kept.index(line.panel)) for line in lines if line.panel in kept]
        rows = [
            (self.panels[kept[line.panel]][0], line.label, bars[n] if bars else x, y.value, y.low, y.high, y.n)
            for line in lines
            for n, (x, y) in enumerate(zip(line.x, line.y, strict=True))
        ]
        panels = tuple(self.panels[n] for n in kept)
        own: dict[str, Any] = {"lines": tuple(lines), "rows": rows, "panels": panels, "bars": bars}
        return dataclasses.replace(finding, sentences=tuple(sentences), facts=facts, **own)


def _measured(line: Line) -> bool:
    return any(math.isfinite(estimate.value) for estimate in line.y)


def prompts_of(answers: Answers) -> list[int]:
    return [answer.row for answer in answers]


def mean_of(answers: Answers, value: Callable[[Answer], Any]) -> Estimate:
    """Mean over responses."""
    return e.mean(per_response(answers, value), prompts_of(answers))


def in_words(estimate: Estimate, level: float, more: str, less: str, none: str) -> str:
    """A verdict: ``more`` or ``less`` only if the interval excludes ``level``."""
    if math.isnan(estimate.low):
        return "there is no interval, so this may be chance"
    return (more if estimate.low > level else less) if estimate.excludes(level) else none


def percent(estimate: Estimate) -> str:
    """An estimate of a share, such as ``58 % [51, 64]``."""
    value, _, interval = dataclasses.replace(
        estimate, value=100 * estimate.value, low=100 * estimate.low, high=100 * estimate.high
    ).text(0).partition(" ")  # fmt: skip
    return f"{value} % {interval}" if math.isfinite(estimate.value) else "an unknown share"


def parts(answers: Answers) -> dict[str, Answers]:
    """Right and wrong answers apart; all together without a ground truth."""
    known = {RIGHT: [a for a in answers if a.right is True], WRONG: [a for a in answers if a.right is False]}
    return {name: part for name, part in known.items() if part} or {ALL: answers}


def curves(
    answers: Answers, value: Callable[[Answer], np.ndarray], x: Sequence[float], panel: int = 0
) -> tuple[Line, ...]:
    """A line for right and for wrong answers: means over responses of ``value(answer)`` [K]."""
    lines = []
    for part, own in parts(answers).items():
        y = [e.mean(column_R, prompts_of(own)) for column_R in per_response(own, value).T]
        lines.append(Line(part, x, y, panel, dashed=part == WRONG))
    return tuple(lines)
