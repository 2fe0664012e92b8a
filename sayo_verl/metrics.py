"""How a number of a training step is shown: the terms in which methods declare metrics and ``sayo_verl.report`` draws.

Light on imports: the report reads runs on machines without torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

PREFIX = "sayo/"  # of every metric that this package logs


@dataclass(frozen=True)
class Metric:
    """One number per training step.

    Attributes:
        name: as a method logs it, without ``sayo/``; in the report the name in metrics.jsonl.
        text: what it is, for a table.
        low, high: the smallest and the largest value it can have; None: unbounded.
        unit: of the value, for the table; empty: none, or said by the text.
        decimals: in a table.
        line: name of its line where a panel holds several.
        live: name in the live view; empty: not shown there.
        unless_zero: left out of a table where it was zero in every step.
        shown: False: logged, and in neither figure nor table.
        note: how to read it, for docs/metrics.md.
    """

    name: str
    text: str
    low: float | None = None
    high: float | None = None
    unit: str = ""
    decimals: int = 3
    line: str = "training"
    live: str = ""
    unless_zero: bool = False
    shown: bool = True
    note: str = ""

    @property
    def label(self) -> str:
        """Text and unit."""
        return f"{self.text} ({self.unit})" if self.unit else self.text


@dataclass(frozen=True)
class Panel:
    """One small diagram of one or two metrics, which are rows of the table too.

    Attributes:
        title, unit: above it and on its vertical axis.
        metrics: a line each: solid, then dashed.
        band: the lower and the upper end of a shaded range.
        guide: a level to compare with, and what it means.
        limits: ends of the vertical axis; None: as the values ask for.
    """

    title: str
    unit: str
    metrics: tuple[Metric, ...] = ()
    band: tuple[Metric, Metric] | None = None
    guide: tuple[float, str] | None = None
    limits: tuple[float | None, float | None] = (None, None)

    @property
    def every(self) -> tuple[Metric, ...]:
        """The metrics of the lines, then those of the band."""
        return self.metrics + (self.band or ())


def every_metric(entries: Iterable[Panel | Metric]) -> tuple[Metric, ...]:
    """The metrics of panels, then those that stand alone."""
    entries = tuple(entries)
    of_panels = chain.from_iterable(entry.every for entry in entries if isinstance(entry, Panel))
    return (*of_panels, *(entry for entry in entries if isinstance(entry, Metric)))


AS_GRPO, NO_PREFERENCE = (1.0, "as in GRPO"), (0.0, "no preference")
