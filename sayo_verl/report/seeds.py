"""Means over the seeds of a run, with intervals for few of them.

With two to five seeds a bootstrap over seeds is far too narrow: of two values it can draw three means only. Student's t
interval has its nominal coverage for normally distributed means at every number of seeds. So it is what we use, and it
is wide for two or three seeds, as it should be.
"""

import math
from collections.abc import Sequence

import numpy as np

from sayo_verl.estimates import Estimate, t_quantile

SAME = 1e-12  # values closer than this are equal


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value per seed, and its t interval; none for one seed or seeds that agree exactly.

    NaN values are left out. Seeds that agree exactly are no sign of certainty: it may be a rate of few responses, or a
    run that was copied.
    """
    kept = np.array([value for value in values if math.isfinite(value)])
    n = len(kept)
    if n < 2:
        return Estimate(float(kept[0]) if n else math.nan, n=n)
    if np.ptp(kept) < SAME:
        return Estimate(float(kept.mean()), n=n)
    mean, half = float(kept.mean()), t_quantile(n - 1) * float(kept.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def difference_of_means(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of ``values`` minus that of ``baseline``, with Welch's t interval; no interval if a side has one seed."""
    sides = [np.array([value for value in side if math.isfinite(value)]) for side in (values, baseline)]
    sizes = [len(side) for side in sides]
    if not all(sizes):
        return Estimate(math.nan)
    value = float(sides[0].mean() - sides[1].mean())
    if min(sizes) < 2:
        return Estimate(value, n=min(sizes))
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    total = sum(parts)
    if all(np.ptp(side) < SAME for side in sides):
        return Estimate(value, n=min(sizes))
    freedom = total**2 / sum(part**2 / (n - 1) for part, n in zip(parts, sizes, strict=True))
    half = t_quantile(round(freedom, 1)) * math.sqrt(total)
    return Estimate(value, value - half, value + half, min(sizes))
