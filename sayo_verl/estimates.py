"""Estimates that do not depend on how many tokens are compared, and their intervals.

The fault. SAYO's score of a set Q of k tokens is a function of a ratio of means,

    R_a(Q) = x^2 / (1 + x^2),   x = (mean over Q of a(t) + eps) / (mean over Q of v(t) + eps),

with a(t), v(t) the attention of token t per target and per visual token. Attention is heavy-tailed, so a mean over few
tokens usually misses its large values, and log x is concave in the first mean. The expectation of R_a(Q) over random
sets Q therefore grows with k (Jensen's inequality), although nobody looks differently.

The estimate. ``token_scores`` takes R_a of each token alone, and everything here is a mean of these numbers:

    R_1(Q) = mean over t in Q of r(t),   r(t) = x(t)^2 / (1 + x(t)^2),   x(t) = (a(t) + eps) / (v(t) + eps)

For a random Q of any size its expectation is the mean of r over the response, exactly. It is the U-statistic of a
kernel of one token, so it equals the average of R_a over random draws of k = 1.

Why not the others:

- Draws of a fixed k > 1 from all compared sets are free of the fault, too. A set with fewer than k tokens then has no
  value, which removes short responses and small bins. The result is another number for each k.
- A correction from the expansion of log x, -(var a / mean a^2 - var v / mean v^2) / 2k, has no finite variance to rely
  on with heavy tails, and fails for the few tokens where it matters.

What remains: r(t) depends on the number of *visual* tokens in the boxes in the same way. Rows with boxes of other sizes
and models with other grids are compared by ``lift``, which is linear: its expectation over random boxes is 1 whatever
their size. Means over layers and heads are taken before the ratio, so all compared values use the same layers.

Intervals are over prompts: responses of one prompt stay together, because they are not independent. From ``FEW``
prompts on they are percentiles of a bootstrap that draws prompts with replacement. Below, a bootstrap is too narrow: it
misses a true mean in 46 % of the cases with two prompts and in 16 % with six. There the interval is Student's t of the
jackknife (Tukey's pseudo-values, from the value without each prompt). With fewer than three prompts there is none.

Shape suffixes: T tokens of one response, R responses, C prompts (clusters), D draws, K columns.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

EPS = 1e-8  # eps of SAYO's equation 3
DRAWS, LEVEL = 1000, 0.95
MOST_DEPENDENCE = 10.0  # nats
FEW, FEWEST = 10, 3  # prompts: below the first no bootstrap, below the second no interval
Values = Sequence[float] | np.ndarray
Prompts = Sequence[object] | np.ndarray  # names the prompt of each response


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: NaN: there is nothing to average.
        low, high: ends of the interval of ``LEVEL``; NaN: there is none, because there are fewer than
            ``FEWEST`` prompts, or because all of them agree, where an interval would wrongly have no width.
        n: responses (or rows) behind it.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def text(self, decimals: int = 3, *, sign: bool = False) -> str:
        """Such as ``0.62 [0.58, 0.66]``."""
        form = f"{'+' if sign else ''}.{decimals}f"
        if math.isnan(self.value):
            return "not measured"
        interval = "no interval" if math.isnan(self.low) else f"{self.low:{form}}, {self.high:{form}}"
        return f"{self.value:{form}} [{interval}]"

    def excludes(self, level: float) -> bool:
        """Whether the interval is wholly on one side of ``level``; False without an interval."""
        return self.low > level or self.high < level


def token_scores(target_T: np.ndarray, image_T: np.ndarray) -> np.ndarray:
    """R_a of single tokens, r(t): [T] in (0, 1), 0.5 where the target gets the average attention of a visual token.

    Args:
        target_T: a(t), attention per target visual token.
        image_T: v(t), attention per visual token of all images.
    """
    square = ((target_T + EPS) / (image_T + EPS)) ** 2
    return square / (1 + square)


def pooled_score(target_T: np.ndarray, image_T: np.ndarray) -> float:
    """The paper's R_a of a set of tokens, from the means of a(t) and v(t). It grows with the number of tokens."""
    return float(token_scores(np.mean(target_T), np.mean(image_T)))


def lift(region_mass: np.ndarray, image_mass: np.ndarray, chance: float | np.ndarray) -> np.ndarray:
    """Share of the attention on images that falls on the region, over the region's share of the visual tokens.

    1 is chance. Linear in the region, so it does not depend on its size in expectation. NaN without attention.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(image_mass > 0, region_mass / np.maximum(image_mass, EPS**2) / np.maximum(chance, EPS), np.nan)


def random_tokens(
    responses: Sequence[tuple[np.ndarray, np.ndarray]], sizes: Sequence[int], *, draws: int = 16, seed: int = 0
) -> dict[str, np.ndarray]:
    """The random-token test: both scores of k random tokens of each response, without replacement.

    Args:
        responses: a(t) and v(t), each [T], T at least the largest size.
        sizes: k; 0 is all tokens.
        draws: random sets per response and size.

    Returns:
        ``pooled`` and ``single``: [R, len(sizes)], the mean over the draws.
    """
    random = np.random.default_rng(seed)
    out: dict[str, list[list[float]]] = {"pooled": [], "single": []}
    for target_T, image_T in responses:
        n, score_T = len(target_T), token_scores(target_T, image_T)
        order_DT = random.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
        chosen = [order_DT[:, : k or n] for k in sizes]
        out["pooled"].append([token_scores(target_T[c].mean(1), image_T[c].mean(1)).mean() for c in chosen])
        out["single"].append([score_T[c].mean() for c in chosen])
    return {name: np.array(rows).reshape(-1, len(sizes)) for name, rows in out.items()}


def binned(values_T: np.ndarray, bins_T: np.ndarray, bins: int) -> np.ndarray:
    """Mean of a response's tokens in each bin: [bins], NaN for a bin without tokens. A bin of -1 is left out."""
    kept = (bins_T >= 0) & np.isfinite(values_T)
    count = np.bincount(bins_T[kept], minlength=bins)
    total = np.bincount(bins_T[kept], values_T[kept], minlength=bins)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def rank_bins(values_T: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each token by its rank in its own response, from the lowest (0): int [T]; ties go to earlier tokens."""
    rank_T = np.argsort(np.argsort(values_T, kind="stable"), kind="stable")
    return rank_T * bins // max(len(values_T), 1)


def mean(values: Values, prompts: Prompts, *, seed: int = 0) -> Estimate:
    """Mean over responses, with an interval over prompts. NaN values are left out."""
    values = np.asarray(values, float)
    return ratio(values, np.ones_like(values), prompts, seed=seed)


def ratio(above: Values, below: Values, prompts: Prompts, *, seed: int = 0) -> Estimate:
    """Sum of ``above`` over sum of ``below``, with an interval over prompts. Entries where one is NaN are left out."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    kept = np.isfinite(above) & np.isfinite(below)
    if not kept.any() or below[kept].sum() == 0:
        return Estimate(math.nan)
    _, cluster = np.unique(np.asarray(list(map(str, prompts)))[kept], return_inverse=True)
    sums_2C = np.stack([np.bincount(cluster, part[kept]) for part in (above, below)])
    value = float(sums_2C[0].sum() / sums_2C[1].sum())
    C = sums_2C.shape[1]
    if C < FEW:
        without_C = [float(a / b) if b else math.nan for a, b in (sums_2C.sum(1, keepdims=True) - sums_2C).T]
        return _jackknife(value, without_C, int(kept.sum()))
    drawn_DC = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), DRAWS)
    top, bottom = drawn_DC @ sums_2C[0], drawn_DC @ sums_2C[1]
    return _interval(value, top[bottom != 0] / bottom[bottom != 0], int(kept.sum()))


def difference(first: Values, second: Values, prompts: Prompts, *, seed: int = 0) -> Estimate:
    """Mean of ``first`` minus ``second``, paired by entry; entries where one is NaN are left out."""
    return mean(np.asarray(first, float) - np.asarray(second, float), prompts, seed=seed)


def rank_correlation(x: Values, y: Values, prompts: Prompts, *, seed: int = 0) -> Estimate:
    """Spearman's rho over responses, ties with their mean rank. NaN if a side is constant."""
    return _resampled(np.asarray(x, float), np.asarray(y, float), prompts, _spearman, seed)


def concordance(score: Values, correct: Values, prompts: Prompts, *, seed: int = 0) -> Estimate:
    """Probability that of two responses *to the same prompt* the right one has the higher score; 0.5 is chance.

    Difficulty cannot produce it: only pairs of a right and a wrong response of one prompt count, equal scores as half.
    ``correct`` is right from 0.5 on. Every pair counts the same.
    """
    score, correct = np.asarray(score, float), np.asarray(correct, float)
    names, won, pairs = np.asarray(list(map(str, prompts))), [], []
    kept = np.isfinite(score) & np.isfinite(correct)
    groups = [kept & (names == name) for name in dict.fromkeys(names)]
    for rows in groups:
        right, wrong = score[rows & (correct >= 0.5)], score[rows & (correct < 0.5)]
        gap = right[:, None] - wrong[None]
        won.append(float((gap > 0).sum() + 0.5 * (gap == 0).sum()))
        pairs.append(float(gap.size))
    with_pairs = [i for i, n in enumerate(pairs) if n]
    return ratio([won[i] for i in with_pairs], [pairs[i] for i in with_pairs], with_pairs, seed=seed)


def dependence(effect_T: np.ndarray) -> np.ndarray:
    """How much each token depends on the image: exp(-d) - 1 + d of its effect d, at most ``MOST_DEPENDENCE``, [T].

    d is the log-probability given the image minus that given a changed image. The number is the k3 estimate of the
    divergence between the two distributions, as ``methods.faithful.causal_effect`` with its default. It is 0 if the
    change makes no difference, and positive whichever way it goes.
    """
    with np.errstate(over="ignore"):
        return np.clip(np.expm1(-effect_T) + effect_T, 0, MOST_DEPENDENCE)


def attention_by_effect(
    masses: Sequence[np.ndarray], effects: Sequence[np.ndarray], prompts: Prompts, *, seed: int = 0
) -> Estimate:
    """Rank correlation of attention and dependence on the image within a response, mean over responses.

    Within a response, because differences between responses and prompts would count as agreement of tokens.

    Args:
        masses: attention to the image of the row that *sampled* each token, [T] of each response.
        effects: see ``dependence``; entries where one is NaN are left out.
        prompts: of each response.
    """
    found = []
    for mass_T, effect_T in zip(masses, effects, strict=True):
        both = np.isfinite(mass_T) & np.isfinite(effect_T)
        found.append(spearman(mass_T[both], dependence(effect_T[both])))
    return mean(found, prompts, seed=seed)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho of two vectors; NaN with fewer than three entries or a constant side."""
    return float("nan") if len(x) < 3 else _spearman(x, y)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 in rising order, ties with their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    rx, ry = (r - r.mean() for r in (ranks(x), ranks(y)))
    spread = math.sqrt(float(rx @ rx) * float(ry @ ry))
    return float(rx @ ry) / spread if spread else math.nan


def _resampled(
    x: np.ndarray,
    y: np.ndarray,
    prompts: Prompts,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    seed: int,
) -> Estimate:
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if not len(x):
        return Estimate(math.nan)
    _, cluster = np.unique(np.asarray(list(map(str, prompts)))[kept], return_inverse=True)
    rows = [np.flatnonzero(cluster == c) for c in range(cluster.max() + 1)]
    value = statistic(x, y)
    if len(rows) < FEW or math.isnan(value):
        few = len(rows) < FEWEST
        without_C = [] if few else [statistic(np.delete(x, own), np.delete(y, own)) for own in rows]
        return _jackknife(value, without_C, len(x), (-1.0, 1.0))
    random, found = np.random.default_rng(seed), []
    for _ in range(DRAWS // 2):
        drawn = np.concatenate([rows[c] for c in random.integers(0, len(rows), len(rows))])
        found.append(statistic(x[drawn], y[drawn]))
    return _interval(value, np.array(found), len(x))


@functools.cache
def t_quantile(freedom: float) -> float:
    """Half the width of the interval of ``LEVEL`` in standard errors, by Student's t.

    With t = sqrt(freedom) tan(a), the angle a has the density cos(a) ** (freedom - 1), which is integrated here.
    """
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(LEVEL, below / below[-1], angles))


def _jackknife(
    value: float, without_C: Sequence[float], n: int, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """The t interval from the values without each prompt, for few prompts; none if one of these is undefined."""
    C, left = len(without_C), np.array(without_C)
    spread = float((C - 1) * left.std(ddof=1) / math.sqrt(C)) if C >= FEWEST else math.nan
    if not math.isfinite(value) or not math.isfinite(spread) or spread < 1e-12:
        return Estimate(value, n=n)
    half = t_quantile(C - 1) * spread
    return Estimate(value, max(value - half, bounds[0]), min(value + half, bounds[1]), n)


def _interval(value: float, draws_D: np.ndarray, n: int) -> Estimate:
    draws_D = draws_D[np.isfinite(draws_D)]
    if not len(draws_D):
        return Estimate(value, n=n)
    if np.ptp(draws_D) < 1e-12:
        return Estimate(value, n=n)
    low, high = np.quantile(draws_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)
