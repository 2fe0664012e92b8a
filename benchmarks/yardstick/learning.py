"""What was learned, as a share of a known span: GRPO is 0 and ``oracle_plus`` is 1.

What a run learned is its mean accuracy over all evaluations after the start. A method that ends where GRPO ends, but
sooner, has thus learned more. The final accuracy of a run is the mean of its last three evaluations. Its time to reach
an accuracy is the first evaluation at which the mean of three neighbouring evaluations reaches it. Runs of one start
and seed see the same scenes and are compared in pairs. Intervals are over seeds.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sayo_verl.estimates import Estimate, mean, ratio

BASELINE, CEILING = "grpo", "oracle_plus"
Run = Mapping[str, Any]


def final(run: Run, rate: str = "acc") -> float:
    """Mean of the last three evaluations after the start."""
    return statistics.fmean(point[rate] for point in run["curve"][1:][-3:])


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


def finals(runs: Sequence[Run]) -> dict[tuple[str, float], float]:
    """(method, learning rate) -> its mean final accuracy."""
    ends = defaultdict(list)
    for run in runs:
        ends[run["method"], run["rate"]].append(final(run))
    return {at: statistics.fmean(each) for at, each in ends.items()}


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """Method -> the learning rate with the highest mean final accuracy; of equal ones the first that was run."""
    ends = finals(runs)
    best: dict[str, float] = {}
    for method, rate in ends:
        if method not in best or ends[method, rate] > ends[method, best[method]]:
            best[method] = rate
    return best


def learned(run: Run, rate: str = "acc") -> float:
    """Mean of a rate over the evaluations after the start."""
    return statistics.fmean(point[rate] for point in run["curve"][1:])


def kind_of(run: Run) -> str:
    """The kind of its start."""
    return str(run["start"]).rsplit("-", 2)[0]


def by_seed(runs: Sequence[Run], kind: str, method: str, rate: float) -> dict[int, Run]:
    """Seed -> run."""
    found = {}
    for run in runs:
        seed = int(str(run["start"]).rsplit("-", 2)[1])
        if (kind_of(run), run["method"], run["rate"]) == (kind, method, rate) and run["seed"] == seed:
            found[seed] = run
    return found


def gain(method: dict[int, Run], baseline: dict[int, Run], rate: str = "acc") -> Estimate:
    """What a method learned more than GRPO, paired by seed."""
    seeds = sorted(method.keys() & baseline.keys())
    return mean([learned(method[s], rate) - learned(baseline[s], rate) for s in seeds], seeds)


def share(method: dict[int, Run], baseline: dict[int, Run], ceiling: dict[int, Run]) -> Estimate:
    """A method's gain as a share of that of ``oracle_plus``: a ratio of sums over seeds.

    NaN if there is no span to be shared: the gain of ``oracle_plus`` is not above 0, or its interval is not.
    """
    seeds = sorted(method.keys() & baseline.keys() & ceiling.keys())
    above = [learned(method[s]) - learned(baseline[s]) for s in seeds]
    below = [learned(ceiling[s]) - learned(baseline[s]) for s in seeds]
    span = mean(below, seeds)
    if not span.value > 0 or span.low <= 0:  # without an interval ``low`` is NaN
        return Estimate(math.nan)
    return ratio(above, below, seeds)


def speed(ceiling: dict[int, Run], baseline: dict[int, Run]) -> dict[int, tuple[int | None, int | None]]:
    """Seed -> steps of ``oracle_plus`` and of GRPO to GRPO's final accuracy; None: never."""
    seeds = sorted(ceiling.keys() & baseline.keys())
    return {s: tuple(steps_to(run[s], final(baseline[s])) for run in (ceiling, baseline)) for s in seeds}  # type: ignore[misc]


def is_wide(steps: dict[int, tuple[int | None, int | None]], at_most: float = 0.5) -> list[int]:
    """Seeds in which ``oracle_plus`` needs at most this share of GRPO's steps."""
    return [s for s, (fast, slow) in steps.items() if fast is not None and slow is not None and fast <= at_most * slow]


def chosen_rates(runs: Sequence[Run], tuning_seed: int) -> dict[str, float]:
    """Method -> its best rate in the runs that choose it. A method that lacks a rate on a start has none."""
    tuning = tuning_runs(runs, tuning_seed)
    starts, rates = ({run[name] for run in tuning} for name in ("start", "rate"))
    best = best_rates(tuning)
    ran = {method: {(run["start"], run["rate"]) for run in tuning if run["method"] == method} for method in best}
    return {method: rate for method, rate in best.items() if ran[method] == set(itertools.product(starts, rates))}


def tuning_runs(runs: Sequence[Run], tuning_seed: int) -> list[Run]:
    """The runs that choose rates."""
    return [run for run in runs if run["seed"] == tuning_seed]
