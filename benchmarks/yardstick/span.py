"""How much credit is worth on the walk: learning curves of methods against those of GRPO and of ``oracle_plus``.

The final accuracy of a run is the mean of its last three evaluations. Its time to reach an accuracy is the first
evaluation at which the mean of three neighbouring evaluations reaches it. Runs of one start and seed see the same
scenes, so they are compared in pairs.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def final(run: Run, rate: str = "acc") -> float:
    """Mean of the last three evaluations."""
    return statistics.fmean(point[rate] for point in run["curve"][-3:])


def smoothed(run: Run) -> list[tuple[int, float]]:
    """Steps, and means of three neighbouring evaluations (two at the ends)."""
    points = run["curve"]
    return [
        (point["step"], statistics.fmean(p["acc"] for p in points[max(i - 1, 0) : i + 2]))
        for i, point in enumerate(points)
    ]


def steps_to(run: Run, accuracy: float) -> int | None:
    """The first step at which the smoothed curve reaches an accuracy; None if it never does."""
    return next((step for step, value in smoothed(run) if step and value >= accuracy), None)


def best_rates(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """(start, method) -> the learning rate with the highest mean final accuracy."""
    finals = defaultdict(list)
    for run in runs:
        finals[run["start"], run["method"], run["rate"]].append(final(run))
    best: dict[tuple[str, str], float] = {}
    for (start, method, rate), ends in finals.items():
        known = best.get((start, method))
        if known is None or statistics.fmean(ends) > statistics.fmean(finals[start, method, known]):
            best[start, method] = rate
    return best


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: every start, method and rate, with the steps to the final accuracy of GRPO at its best rate."""
    best = best_rates(runs)
    grpo = {
        (r["start"], r["seed"]): final(r)
        for r in runs
        if r["method"] == "grpo" and r["rate"] == best[r["start"], "grpo"]
    }
    groups = defaultdict(list)
    for run in runs:
        groups[run["start"], run["method"], run["rate"]].append(run)
    lines = [
        "| start | method | rate | seeds | final accuracy | greedy | looks | text | steps to GRPO's end | s/step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (start, method, rate), group in sorted(groups.items()):
        group = sorted(group, key=lambda run: run["seed"])
        ends = [final(run) for run in group]
        shown = f"{statistics.fmean(ends):.3f}" + (f" +- {statistics.stdev(ends):.3f}" if len(ends) > 1 else "")
        reached = [
            steps_to(run, grpo[start, run["seed"]]) if (start, run["seed"]) in grpo else "not run" for run in group
        ]
        other = [statistics.fmean(final(run, name) for run in group) for name in ("look", "text")]
        greedy = statistics.fmean(run["greedy"]["acc"] for run in group)
        seconds = statistics.fmean(run["seconds"] for run in group)
        mark = " (best)" if best[start, method] == rate else ""
        steps = " ".join("never" if step is None else str(step) for step in reached)
        lines.append(
            f"| {start} | {method} | {rate:g}{mark} | {len(group)} | {shown} | {greedy:.3f} | {other[0]:.3f} | "
            f"{other[1]:.3f} | {steps} | {seconds:.2f} |"
        )
    return "\n".join(lines)
