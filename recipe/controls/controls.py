"""Controls: credit within a response from the probabilities of its tokens.

With the surprise s_it = -log pi(y_it) of a token, and its mean over the n_i tokens of a response, m_i:

    surprise   A_it = A_i s_it / m_i          in a wrong response (``acc`` below 1) whose m_i is above 0
               A_it = A_i                     in the others
    sharpen    A_it = m_i - s_it              in every response; the reward is not read

They use no attention, no changed image, and nothing of which token is wrong. ``surprise`` asks whether a gain needs
more than the policy's own doubt: the blame of a wrong response falls on its unlikely tokens. ``sharpen`` asks whether a
gain needs a reward at all: it makes likely tokens more likely, as reinforcement learning with negative entropy as the
only reward does (EM-RL, arXiv 2505.15134, in a form of ours). A method that gains no more than a control may have
learned certainty, and nothing of the image.

Rows without an image have GRPO's advantages in both. Both are in one file because they read the same surprise.

Shape suffixes: B rows (one response each), T response tokens.
"""

from dataclasses import dataclass

import torch

from sayo_verl.methods import Credit, Needs, Signals, TokenBonus, register_method
from sayo_verl.methods.base import blend, check_setting
from sayo_verl.probe.statistics import StatisticsRequest


def surprise_of(signals: Signals, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Surprise of the tokens of some rows.

    Args:
        signals: with the log-probs of the responses.
        rows: bool [B], which are read.

    Returns:
        ``(surprise, mean, tokens)``: [B, T] in nats, 0 elsewhere; [B, 1], its mean over a response; bool [B, T], the
        tokens that were read.
    """
    tokens = signals.response_mask.bool() & rows[:, None]
    surprise = torch.where(tokens, -signals.log_probs.detach(), torch.zeros_like(signals.log_probs)).clamp(min=0.0)
    return surprise, surprise.sum(-1, keepdim=True) / tokens.sum(-1, keepdim=True).clamp(min=1), tokens


@register_method
@dataclass(frozen=True)
class SurpriseMethod:
    """``algorithm.adv_estimator=attn_surprise``: the blame of a wrong response in proportion to surprise.

    Attributes:
        strength: weights are 1 + strength (weight - 1); 0 is GRPO. [ours]
    """

    strength: float = 1.0
    name = "attn_surprise"
    reference = ("control: blame by surprise", "ours")

    def __post_init__(self) -> None:
        check_setting("surprise", self, {"strength": (0 <= self.strength <= 1, "a number in [0, 1]")})

    @property
    def gives(self) -> frozenset:
        return frozenset({"token"} if self.strength else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()), correctness=True)

    def credit(self, signals: Signals) -> Credit:
        if not self.gives:
            return Credit()
        surprise, mean, tokens = surprise_of(signals, signals.eligible_rows(boxes=False))
        wrong = (signals.required("correct") != 1)[:, None] & tokens & (mean > 0)
        weight = torch.where(wrong, surprise / mean.where(mean > 0, torch.ones_like(mean)), torch.ones_like(surprise))
        return Credit(token_weight=blend(weight, self.strength))


@register_method
@dataclass(frozen=True)
class SharpenMethod:
    """``algorithm.adv_estimator=attn_sharpen``: likely tokens become more likely, and the reward is not read.

    Attributes:
        strength: advantages are those of GRPO plus strength times the difference; 0 is GRPO. [ours]
    """

    strength: float = 1.0
    name = "attn_sharpen"
    reference = ("control: sharpening without reward", "ours, after EM-RL, arXiv 2505.15134")

    def __post_init__(self) -> None:
        check_setting("sharpen", self, {"strength": (0 <= self.strength <= 1, "a number in [0, 1]")})

    @property
    def gives(self) -> frozenset:
        return frozenset({"token", "bonus"} if self.strength else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()))

    def credit(self, signals: Signals) -> Credit:
        if not self.gives:
            return Credit()
        surprise, mean, tokens = surprise_of(signals, signals.eligible_rows(boxes=False))
        weight = (~tokens).float()  # the group's advantage leaves, the bonus replaces it
        bonus = torch.where(tokens, mean - surprise, torch.zeros_like(surprise))
        return Credit(token_weight=blend(weight, self.strength), bonuses=(TokenBonus(self.strength * bonus),))
