"""Declarations of metrics: what a number of a training step is, and how ``sayo_verl.report`` shows it.

Methods declare their metrics with these classes. This module does not import torch, because the report reads runs on
machines without it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from typing import Any

PREFIX = "sayo/"  # begins the name of every metric that this package logs


@dataclass(frozen=True)
class Metric:
    """One number per training step.

    Attributes:
        name: as a method logs it, without ``sayo/``; in the report the name in metrics.jsonl.
        text: its meaning, for a table.
        low, high: smallest and largest possible value; None: unbounded.
        unit: unit of the value, for the table; empty if there is none, or if the text names it.
        decimals: number of decimals in a table.
        line: name of its line in a panel of several lines.
        live: name in the live view; empty: not shown there.
        unless_zero: left out of a table if it was zero in every step.
        shown: False: logged, but shown neither in a figure nor in a table.
        note: explanation for docs/metrics.md.
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
        title, unit: text above the diagram and at its vertical axis.
        metrics: one line each: solid, then dashed.
        band: lower and upper end of a shaded range.
        guide: a level to compare with, and its meaning.
        limits: ends of the vertical axis; None: chosen from the values.
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
    """The metrics of panels, then the others."""
    entries = tuple(entries)
    of_panels = chain.from_iterable(entry.every for entry in entries if isinstance(entry, Panel))
    return (*of_panels, *(entry for entry in entries if isinstance(entry, Metric)))


def named(entries: Iterable[Panel | Metric]) -> list[Panel | Metric]:
    """The declarations of a method under the names of metrics.jsonl."""

    def full(metric: Metric) -> Metric:
        return replace(metric, name=PREFIX + metric.name)

    def of_panel(panel: Panel) -> Panel:
        band = (full(panel.band[0]), full(panel.band[1])) if panel.band else None
        return replace(panel, metrics=tuple(map(full, panel.metrics)), band=band)

    return [of_panel(entry) if isinstance(entry, Panel) else full(entry) for entry in entries]


def declaration(method: Any) -> dict[str, Any]:
    """The metrics and the reference that the class of a method declares, as JSON without defaults."""

    def compact(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return [compact(part) for part in entry]
        if not is_dataclass(entry):
            return entry
        values = {field.name: (getattr(entry, field.name), field.default) for field in fields(entry)}
        return {name: compact(value) for name, (value, default) in values.items() if value != default}

    entries = named(getattr(method, "metrics", ()))
    return {"reference": getattr(method, "reference", ("", "")), "metrics": [compact(entry) for entry in entries]}


AS_GRPO, NO_PREFERENCE = (1.0, "as in GRPO"), (0.0, "no preference")
