"""Credit by the truth, for tasks in which it is known which word of a response is wrong: an upper line, not a method.

The reward function reports ``walk_marks``: one letter for each word of the response.

    .   not perceptual, right        P   perceptual (right only if the image was read), right
    x   not perceptual, wrong        E   perceptual, wrong

With j the first wrong word of response i (x or E; the end token of a wrong response that ended before any wrong word),
the advantages are, at strength 1:

    oracle        A_it = A_i if t = j, else 0        in a wrong response (``acc`` below 1) that has a j
                  A_it = A_i                         in the others
    oracle_plus   A_it = abs(A_i) (+1 on P before j, -1 on j, 0 elsewhere)         in every response

``oracle`` is the best that a redistribution of blame can do. ``oracle_plus`` sees more than the reward: it also praises
right looks of wrong responses and blames the first error of responses that reach the right answer by luck. In a group
without contrast both give 0, as GRPO does.

Assumes that a word is a token, as in the vocabulary of the tiny policy: n words are n tokens, or n + 1 with the end
token. Another count stops the run. Rows without an image have GRPO's advantages. Both methods are in one file because
they read the same marks.

Shape suffixes: B rows (one response each), T response tokens.
"""

import random
from dataclasses import dataclass

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods import Credit, Needs, Reported, Signals, TokenBonus, register_method
from sayo_verl.methods.base import blend, check_setting
from sayo_verl.metrics import Metric
from sayo_verl.probe.statistics import StatisticsRequest

NAME = "walk_marks"
LETTERS = ".xPE"
FIX = (
    "an oracle is for the walk task, whose reward function gives one letter per word, and for a tokenizer like that of "
    "the tiny policy, which makes one token of a word"
)


def example_marks(tokens: int, seed: int) -> str:
    """Marks of a response of ``tokens`` tokens, the last of which ends it."""
    draw = random.Random(seed)
    return "".join(draw.choice(LETTERS) for _ in range(max(tokens - 1, 0)))


MARKS = Reported(NAME, example_marks)


def read_marks(signals: Signals, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Right looks before the first error, and the first error.

    Args:
        signals: with the marks.
        rows: bool [B], which are read.

    Returns:
        ``(looks, first)``, both bool [B, T]; ``first`` has at most one token in a row, and none in a right response
        without a wrong word, and in one that was cut off before any wrong word.

    Raises:
        SayoError: A35 for marks that are no text of the four letters, A36 for a number of words that does not fit the
            tokens.
    """
    mask = signals.response_mask.bool()
    looks, first = torch.zeros_like(mask), torch.zeros_like(mask)
    right_B = signals.required("correct") == 1
    for row in rows.nonzero().flatten().tolist():
        marks, places = signals.reported(NAME)[row], mask[row].nonzero().flatten()
        n = places.numel()
        if not isinstance(marks, str) or set(marks) - set(LETTERS):
            raise _of_row(
                SayoError(
                    "A35",
                    "the marks of a response are not the letters that an oracle reads",
                    where=f"{NAME} of row {row} of the batch",
                    got=f"{marks!r:.80}",
                    wanted=f"text of the letters {LETTERS}",
                    fix=FIX,
                ),
                row,
            )
        if len(marks) not in (n, n - 1):
            raise _of_row(
                SayoError(
                    "A36",
                    "the marks of a response do not fit its tokens",
                    where=f"{NAME} of row {row} of the batch",
                    got=f"{len(marks)} letters for {n} tokens",
                    wanted="a letter per token, but for the end token",
                    fix=FIX,
                ),
                row,
            )
        wrong = [at for at, letter in enumerate(marks) if letter in "xE"]
        end = wrong[0] if wrong else len(marks)
        if wrong or (end < n and not right_B[row]):
            first[row, places[end]] = True
        right = [at for at, letter in enumerate(marks[:end]) if letter == "P"]
        looks[row, places[right]] = True
    return looks, first


def _of_row(error: SayoError, row: int) -> SayoError:
    """The error, with the row of the batch that the trainer names in it."""
    error.row = row
    return error


def _metrics(signals: Signals, rows: torch.Tensor, looks: torch.Tensor, first: torch.Tensor) -> dict[str, float]:
    if not rows.any():
        return {}
    found, tokens = first[rows].any(-1), signals.response_mask.bool()[rows]
    return {
        "oracle_first_error_share": float(found.float().mean()),
        "oracle_looks_share": float(looks[rows].sum() / tokens.sum()),
    }


METRICS = (
    Metric("oracle_first_error_share", "responses with a first error", 0, 1, "share", live="with an error"),
    Metric("oracle_looks_share", "right looks before the first error", 0, 1, "share of tokens"),
)


@register_method
@dataclass(frozen=True)
class OracleMethod:
    """``algorithm.adv_estimator=attn_oracle``: the blame of a wrong response falls on its first error alone.

    Attributes:
        strength: weights are 1 + strength (weight - 1); 0 is GRPO. [ours]
    """

    strength: float = 1.0
    name = "attn_oracle"
    reference = ("blame on the first error, by the truth", "ours")
    metrics = METRICS

    def __post_init__(self) -> None:
        check_setting("oracle", self, self.rules())

    def rules(self) -> dict[str, tuple[bool, str]]:
        """What each setting must be."""
        return {"strength": (0 <= self.strength <= 1, "a number in [0, 1]")}

    @property
    def gives(self) -> frozenset:
        return frozenset({"token"} if self.strength else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()), correctness=True, reported=(MARKS,))

    def credit(self, signals: Signals) -> Credit:
        eligible = signals.eligible_rows(boxes=False)
        looks, first = read_marks(signals, eligible)
        # ``first`` has no token in rows that are not eligible
        blamed = first.any(-1) & (signals.required("correct") != 1)  # [B]
        weight = torch.where(blamed[:, None], first, torch.ones_like(first)).float()
        metrics = _metrics(signals, eligible, looks, first)
        return Credit(token_weight=blend(weight, self.strength) if self.gives else None, metrics=metrics)


@register_method
@dataclass(frozen=True)
class OraclePlusMethod:
    """``algorithm.adv_estimator=attn_oracle_plus``: also praise for right looks before the first error.

    Attributes:
        strength: advantages are those of GRPO plus strength times the difference; 0 is GRPO. [ours]
    """

    strength: float = 1.0
    name = "attn_oracle_plus"
    reference = ("praise of right looks and blame on the first error, by the truth", "ours")
    metrics = METRICS

    def __post_init__(self) -> None:
        check_setting("oracle_plus", self, self.rules())

    def rules(self) -> dict[str, tuple[bool, str]]:
        """What each setting must be."""
        return {"strength": (0 <= self.strength <= 1, "a number in [0, 1]")}

    @property
    def gives(self) -> frozenset:
        return frozenset({"token", "bonus"} if self.strength else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()), correctness=True, reported=(MARKS,))

    def credit(self, signals: Signals) -> Credit:
        eligible = signals.eligible_rows(boxes=False)
        looks, first = read_marks(signals, eligible)
        metrics = _metrics(signals, eligible, looks, first)
        if not self.gives:
            return Credit(metrics=metrics)
        weight = (~eligible).float()[:, None].expand(looks.shape)  # the group's advantage leaves, the bonus replaces it
        sign = looks.float() - first.float()
        bonus = TokenBonus(self.strength * sign, relative=True)
        return Credit(token_weight=blend(weight, self.strength), bonuses=(bonus,), metrics=metrics)
