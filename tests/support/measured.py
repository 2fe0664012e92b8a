"""Measurements of invented rows."""

import dataclasses

import torch
from support.probe_rows import (
    ALL,
    PER_HEAD,
    ROW_OFFSET,
    Rows,
    largest_difference,
    statistic,
)

from sayo_verl.probe.statistics import CATALOGUE, Statistic

CONVENTIONS = sorted(ROW_OFFSET)


BY_ROW = [name for name in ALL if CATALOGUE[name].source != "hidden"]  # what is read from queries and keys


def variants(names=ALL, **options) -> list[Statistic]:
    """Each statistic, and its per-head form where there is one."""
    found = [statistic(name, **options) for name in names]
    return found + [dataclasses.replace(s, per_head=True) for s in found if s.name in PER_HEAD]


def compare(rows: Rows, found: dict[Statistic, dict[int, torch.Tensor]]) -> float:
    """Largest difference from float64; indices must be equal."""
    differences = []
    for s, by_row in found.items():
        for n, values in by_row.items():
            difference = largest_difference(values, rows.expected(s, n))
            assert difference == 0 or not s.name.endswith("_index"), f"{s.key} of row {n}"
            differences.append(difference)
    all_of_them = torch.tensor(differences)
    print(f"{len(differences)} results from float64: largest {all_of_them.max():.1e}, mean {all_of_them.mean():.1e}")
    return max(differences)
