"""What was learned, as a share of a known span: GRPO is 0 and ``oracle_plus`` is 1.

What a run learned is its mean accuracy over all evaluations after the start. A method that ends where GRPO ends, but
sooner, has thus learned more. Runs of one start and seed see the same scenes and are compared in pairs. Intervals are
over seeds.
"""

import statistics
from collections.abc import Sequence

from benchmarks.yardstick.plan import Plan
from benchmarks.yardstick.span import Run, best_rates, final, steps_to
from sayo_verl.estimates import Estimate, mean, ratio

BASELINE, CEILING = "grpo", "oracle_plus"


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
    """A method's gain as a share of that of ``oracle_plus``: a ratio of sums over seeds."""
    seeds = sorted(method.keys() & baseline.keys() & ceiling.keys())
    above = [learned(method[s]) - learned(baseline[s]) for s in seeds]
    below = [learned(ceiling[s]) - learned(baseline[s]) for s in seeds]
    return ratio(above, below, seeds)


def speed(ceiling: dict[int, Run], baseline: dict[int, Run]) -> dict[int, tuple[int | None, int | None]]:
    """Seed -> steps of ``oracle_plus`` and of GRPO to GRPO's final accuracy; None: never."""
    seeds = sorted(ceiling.keys() & baseline.keys())
    return {s: tuple(steps_to(run[s], final(baseline[s])) for run in (ceiling, baseline)) for s in seeds}  # type: ignore[misc]


def is_wide(steps: dict[int, tuple[int | None, int | None]], at_most: float = 0.5) -> list[int]:
    """Seeds in which ``oracle_plus`` needs at most this share of GRPO's steps."""
    return [s for s, (fast, slow) in steps.items() if fast is not None and slow is not None and fast <= at_most * slow]


def chosen_rates(runs: Sequence[Run], plan: Plan) -> dict[str, float]:
    """Method -> its best rate in the runs that choose it."""
    tuning = [run for run in runs if run["seed"] == plan.tuning_seed]
    return {method: rate for (_, method), rate in best_rates(tuning).items()}
