"""Signals of some rows of a batch."""

from sayo_verl.methods import Signals


def take(signals: Signals, rows: list[int]) -> Signals:
    """The same signals of some rows, in that order."""
    per_row = {
        name: None if value is None else value[rows]
        for name, value in vars(signals).items()
        if name not in ("statistics", "counterfactuals", "uid", "reports")
    }
    return Signals(
        **per_row,
        statistics={statistic: value[rows] for statistic, value in signals.statistics.items()},
        counterfactuals={intervention: value[rows] for intervention, value in signals.counterfactuals.items()},
        uid=tuple(signals.uid[row] for row in rows),
        reports={name: tuple(values[row] for row in rows) for name, values in signals.reports.items()},
    )
