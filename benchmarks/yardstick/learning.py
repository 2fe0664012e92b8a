"""What was learned, as a share of a known span: GRPO is 0 and ``oracle_plus`` is 1.

What a run learned is its mean accuracy over all evaluations after the start. A method that ends where GRPO ends, but
sooner, has thus learned more. The final accuracy of a run is the mean of its last three evaluations. Its time to reach
an accuracy is the first evaluation at which the mean of three neighbouring evaluations reaches it. Runs of one start
and seed see the same scenes and are compared in pairs. Intervals are over seeds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.yardstick.store import MixedResults
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
    """Method -> its best rate in the runs that choose it. A method that was not run at each of the rates has none.

    Raises:
        MixedResults: these runs are from different starts.
    """
    tuning = [run for run in runs if run["seed"] == tuning_seed]
    if len(starts := {run["start"] for run in tuning}) > 1:
        raise MixedResults(f"rates were chosen on different starts: {', '.join(sorted(starts))}. Keep the runs of one")
    tried = {run["rate"] for run in tuning}
    rates = {method: {run["rate"] for run in tuning if run["method"] == method} for _, method in best_rates(tuning)}
    return {method: rate for (_, method), rate in best_rates(tuning).items() if rates[method] == tried}
