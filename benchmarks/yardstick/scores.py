"""How well credit agrees with a known truth, on one scale: 0 is the uniform credit of GRPO, 1 is perfect.

Each score is computed for single responses, and means of these are compared. Credit is a factor within a response, so
values of different responses are never ranked against each other. A raw value x becomes

    score = (x - x of uniform credit) / (1 - x of uniform credit)

    score         raw value                                                                         uniform  1 means
    separation    ROC AUC of the token values, perceptual tokens against all others                 0.5      all above
    precision     average precision of the same ranking                                             K / T    all first
    error         ROC AUC of the token values, the first error against the other perceptual tokens  0.5      highest
    blame         share of a wrong response's negative credit on its first error                    1 / T    all of it
    trajectory    Spearman's rho of the trajectory factor with the share of right looks             0        same order
    look          Spearman's rho of a reward term with the attention on each step's own region      0        same order
    seeing        ROC AUC of the attention on each step's own region, right looks against wrong     0.5      all above
    answers       probability that of two responses to a prompt the right one has the higher value  0.5      always

K perceptual tokens of T. A negative score is worse than uniform credit. ``afterwards`` has another scale, for it should
be low: the share of a wrong response's negative credit on the tokens after its first error, over their share of the
tokens, minus 1. 0 is uniform, and -1 is none. Intervals are
over prompts (``sayo_verl.estimates``). ``permuted`` makes the control: the values of each response in random order,
which must score 0 within its interval.

Shape suffixes: B responses, T tokens of a response (padded on the right).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sayo_verl.estimates import Estimate, concordance, mean, rank_correlation, ranks, ratio


@dataclass(frozen=True)
class Truth:
    """What is known of the tokens of a batch.

    Attributes:
        mask: bool [B, T], the response's own tokens.
        perceptual: bool [B, T], tokens whose right value depends on the image, given the text so far.
        right: bool [B, T], whether the token is right, given the text so far.
        correct: bool [B], whether the answer is right.
        prompt: B names; responses of one prompt are not independent.
    """

    mask: np.ndarray
    perceptual: np.ndarray
    right: np.ndarray
    correct: np.ndarray
    prompt: Sequence[object]

    @property
    def first_error(self) -> np.ndarray:
        """[B], the position of the first wrong token, or T if there is none."""
        wrong_BT = self.mask & ~self.right
        return np.where(wrong_BT.any(1), wrong_BT.argmax(1), self.mask.shape[1])

    @property
    def right_looks(self) -> np.ndarray:
        """[B], share of the perceptual tokens that are right; NaN without any."""
        looks_BT = self.mask & self.perceptual
        count_B = looks_BT.sum(1)
        return np.where(count_B, (looks_BT & self.right).sum(1) / np.maximum(count_B, 1), np.nan)


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive entry has the higher value, ties as half; NaN unless both kinds occur."""
    above = int(positive.sum())
    below = len(values) - above
    if not above or not below:
        return float("nan")
    # ``ranks`` starts at 1
    return float((ranks(values)[positive].sum() - above * (above + 1) / 2) / (above * below))


def average_precision(values: np.ndarray, positive: np.ndarray) -> float:
    """Mean precision over the positives, highest value first; entries of equal value enter together.

    Equal values therefore give the share of positives. NaN unless both kinds occur.
    """
    above = int(positive.sum())
    if not above or above == len(values):
        return float("nan")
    levels, inverse = np.unique(-values, return_inverse=True)
    hits = np.cumsum(np.bincount(inverse, positive, len(levels)))
    precision = hits / np.cumsum(np.bincount(inverse, minlength=len(levels)))
    return float((np.diff(hits, prepend=0) * precision).sum() / above)


def separation(values: np.ndarray, truth: Truth) -> Estimate:
    """Do perceptual tokens get the higher values? ``values``: [B, T], such as token factors or a statistic."""
    return _of_tokens(values, truth, truth.mask, truth.perceptual, lambda v, hit: _scaled(auc(v, hit), 0.5))


def precision(values: np.ndarray, truth: Truth) -> Estimate:
    """Are the tokens of the highest values perceptual? ``values``: [B, T]."""

    def score(values_N: np.ndarray, hit_N: np.ndarray) -> float:
        return _scaled(average_precision(values_N, hit_N), hit_N.mean())

    return _of_tokens(values, truth, truth.mask, truth.perceptual, score)


def error(values: np.ndarray, truth: Truth) -> Estimate:
    """Of the perceptual tokens, does the first error get the highest value? Responses whose first error is perceptual.

    ``values``: [B, T].
    """
    at_BT = np.arange(truth.mask.shape[1])[None] == truth.first_error[:, None]
    looks_BT = truth.mask & truth.perceptual
    return _of_tokens(values, truth, looks_BT, at_BT, lambda v, hit: _scaled(auc(v, hit), 0.5))


def blame(credit: np.ndarray, truth: Truth) -> Estimate:
    """Does the negative credit of a wrong response fall on its first error? ``credit``: [B, T], advantages."""
    share_B, uniform_B = _blamed(credit, truth, lambda at, first: at == first)
    one_B = uniform_B >= 1.0  # a response of one token
    return mean(np.where(one_B, np.nan, _scaled(share_B, np.where(one_B, 0.0, uniform_B))), truth.prompt)


def afterwards(credit: np.ndarray, truth: Truth) -> Estimate:
    """How much negative credit of a wrong response falls on what follows its first error? -1: none; 0: uniform.

    Responses whose first error is their last token are left out. ``credit``: [B, T], advantages.
    """
    share_B, uniform_B = _blamed(credit, truth, lambda at, first: at > first)
    some_B = uniform_B > 0
    return mean(np.where(some_B, share_B / np.where(some_B, uniform_B, 1.0) - 1.0, np.nan), truth.prompt)


def trajectory(factor: np.ndarray, truth: Truth) -> Estimate:
    """Do responses with more right looks get the larger factor? ``factor``: [B]."""
    return rank_correlation(factor, truth.right_looks, truth.prompt)


def answers(value: np.ndarray, truth: Truth) -> Estimate:
    """Do responses with the right answer have the higher value? Pairs of one prompt only. ``value``: [B]."""
    found = concordance(value, truth.correct, truth.prompt)
    return Estimate(*(_scaled(part, 0.5) for part in (found.value, found.low, found.high)))


def look(reward: np.ndarray, attention: np.ndarray, truth: Truth) -> Estimate:
    """Does a reward term grow with the attention on each step's own region?

    Args:
        reward: [B], NaN for a response that does not carry the term.
        attention: [B, T], attention of the row that sampled the token on the region that the token depends on, as a
            share of the attention on the image; read at perceptual tokens.
        truth: of the batch.
    """
    return rank_correlation(reward, _own(attention, truth), truth.prompt)


def seeing(attention: np.ndarray, truth: Truth) -> Estimate:
    """Do right looks attend more to their own region than wrong ones? ``attention``: [B, T], as for ``look``."""
    looks_BT = truth.mask & truth.perceptual
    return _of_tokens(attention, truth, looks_BT, truth.right, lambda v, hit: _scaled(auc(v, hit), 0.5))


def own_share(attention: np.ndarray, truth: Truth) -> Estimate:
    """Mean of the attention on each step's own region; no score. ``attention``: [B, T], as for ``look``."""
    return mean(_own(attention, truth), truth.prompt)


def late_over_early(mass: np.ndarray, truth: Truth) -> Estimate:
    """Mean of a statistic over the last third of a response, over its mean in the first third. ``mass``: [B, T]."""
    late, early = [], []
    for mass_T, mask_T in zip(mass, truth.mask, strict=True):
        own_T = mass_T[mask_T]
        third = len(own_T) // 3
        late.append(own_T[len(own_T) - third :].mean() if third else np.nan)
        early.append(own_T[:third].mean() if third else np.nan)
    return ratio(late, early, truth.prompt)


def carriers(values: np.ndarray, truth: Truth, share: float) -> Estimate:
    """Share of a response's tokens that hold ``share`` of its sum, highest first. ``values``: [B, T] >= 0."""
    found = []
    for values_T, mask_T in zip(values, truth.mask, strict=True):
        held = np.cumsum(np.sort(values_T[mask_T])[::-1])
        found.append((np.searchsorted(held, share * held[-1]) + 1) / len(held) if len(held) and held[-1] else np.nan)
    return mean(found, truth.prompt)


def half(truth: Truth, late: bool) -> Truth:
    """The truth with a mask of the first or the second half of each response's tokens."""
    count_B = truth.mask.sum(1, keepdims=True)
    late_BT = truth.mask.cumsum(1) > count_B // 2
    return replace(truth, mask=truth.mask & (late_BT if late else ~late_BT))


def permuted(values: np.ndarray, truth: Truth, seed: int | None = None) -> np.ndarray:
    """[B, T]: the values of each response in random order, as a control.

    Without a ``seed`` the order depends on the values. Controls of several starts must not share one order: they would
    err together, and an interval over the starts would not show it.
    """
    random, out = np.random.default_rng(zlib.crc32(values.tobytes()) if seed is None else seed), values.copy()
    for row, mask_T in enumerate(truth.mask):
        out[row, mask_T] = random.permutation(values[row, mask_T])
    return out


def _own(attention_BT: np.ndarray, truth: Truth) -> np.ndarray:
    """[B], mean over the perceptual tokens; NaN without any."""
    looks_BT = truth.mask & truth.perceptual
    total_B = np.where(looks_BT, attention_BT, 0.0).sum(1)
    return np.where(looks_BT.any(1), total_B / np.maximum(looks_BT.sum(1), 1), np.nan)


def _scaled(value: Any, uniform: Any) -> Any:
    return (value - uniform) / (1.0 - uniform)


def _of_tokens(
    values_BT: np.ndarray,
    truth: Truth,
    among_BT: np.ndarray,
    hit_BT: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], float],
) -> Estimate:
    """Mean over responses of a score of the tokens ``among``, of which ``hit`` are the positives."""
    found = [score(v[among], hit[among]) for v, among, hit in zip(values_BT, among_BT, hit_BT, strict=True)]
    return mean(found, truth.prompt)


def _blamed(
    credit_BT: np.ndarray, truth: Truth, where: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the negative credit on the chosen tokens, and their share of the tokens: [B] each.

    NaN for right responses, and for wrong ones without negative credit, whose group has no contrast.
    """
    T = truth.mask.shape[1]
    chosen_BT = where(np.arange(T)[None], truth.first_error[:, None]) & truth.mask
    negative_BT = np.where(truth.mask, np.maximum(-credit_BT, 0.0), 0.0)
    total_B = negative_BT.sum(1)
    read_B = ~truth.correct & (total_B > 0) & (truth.first_error < T)
    share_B = (negative_BT * chosen_BT).sum(1) / np.where(total_B > 0, total_B, 1.0)
    uniform_B = chosen_BT.sum(1) / np.maximum(truth.mask.sum(1), 1)
    return np.where(read_B, share_B, np.nan), np.where(read_B, uniform_B, np.nan)
