"""Figures of the page from raw entries: ratios, floors, exponents, and their formatting.

An entry is one case or one growth series from ``cost.cases``.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cost.shapes import Lengths, Shape, masses_bytes, masses_operations, profile_bytes, profile_operations

Entry = dict[str, Any]
MISSING, NO_ROOM = "not measured", "out of memory"
MIB = 2**20


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:], ""]


def ratios(case: Entry, name: str) -> list[float]:
    """Ratios to the plain pass of the same round, one per measured round; empty if it was not measured."""
    seconds = case["times"].get(name, {}).get("seconds", [])
    return [a / b for a, b in zip(seconds, case["times"]["pass"]["seconds"], strict=False)]


def seconds(entry: Entry, name: str) -> float | None:
    """Median time; None if it was not measured."""
    found = entry["times"].get(name, {}).get("seconds")
    return statistics.median(found) if found else None


def exponent(series: Entry, column: str, what: str) -> float | None:
    """Least-squares slope of log(time) over log(pairs), or of log(memory) over log(tokens); None below three points."""
    points = []
    for row in series["rows"].values():
        value = seconds(row, column) if what == "time" else row.get("memory", {}).get(column)
        if value:
            points.append((math.log(row["pairs" if what == "time" else "tokens"]), math.log(value)))
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else None


def floor_seconds(case: Entry, kernel: str, rates: Mapping[str, float]) -> float:
    """Lower bound of a kernel's time (``"masses"`` or ``"profile"``) from measured rates of products and copies."""
    n = case["lengths"]
    shape, lengths = Shape(**case["shape"]), Lengths(n["before"], tuple(n["image"]), n["after"], n["response"])
    element = {"float32": 4, "bfloat16": 2}[case["dtype"]]
    if kernel == "masses":
        operations, moved = masses_operations(shape, lengths), masses_bytes(shape, lengths, element, 2)
    else:
        operations, moved = profile_operations(shape, lengths), profile_bytes(shape, lengths, element)
    return case["sequences"] * max(operations / rates["matmul_operations"], moved / rates["copy_bytes"])


def ratio_cell(case: Entry, name: str) -> str:
    """``1.012 (0.998 to 1.031)``."""
    if name not in case["times"]:
        return ""
    found = ratios(case, name)
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})" if found else NO_ROOM


def share_cell(case: Entry, name: str) -> str:
    """``0.31 % (0.29 to 0.34)`` of the pass."""
    found = [100 * r for r in ratios(case, name)]
    return f"{statistics.median(found):.3g} % ({min(found):.3g} to {max(found):.3g})" if found else NO_ROOM


def floor_cell(case: Entry, name: str, series: Entry | None) -> str:
    """``210 us / 98 us = 2.1``."""
    took = seconds(case, name)
    if took is None:
        return NO_ROOM
    if series is None:
        return f"{duration(took)}, floor {MISSING}"
    floor = floor_seconds(case, name.split()[0], series["rates"])
    return f"{duration(took)} / {duration(floor)} = {took / floor:.3g}"


def more_cell(memory: Mapping[str, int | None], name: str) -> str:
    """Difference of a peak from that of the plain pass."""
    if name not in memory:
        return ""
    peak, plain = memory[name], memory["pass"]
    if peak is None or plain is None:
        return NO_ROOM
    return f"{'+' if peak >= plain else '-'}{abs(peak - plain) / MIB:,.1f} MiB"


def size_cell(memory: Mapping[str, int | None], name: str) -> str:
    if name not in memory:
        return MISSING
    size = memory[name]
    return NO_ROOM if size is None else f"{size / MIB:,.1f} MiB"


def span(values: Iterable[float], unit: str, digits: int) -> str:
    """``0.02 to 0.08 %``."""
    low, *_, high = sorted(values) * 2
    return f"{low:.{digits}f} to {high:.{digits}f} {unit}"


def duration(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"
