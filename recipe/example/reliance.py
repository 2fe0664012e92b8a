"""More advantage for tokens whose probability the image raises: an example of a method of your own that adds a bonus.

    c_t  = 1 - pi(y_t | changed image) / pi(y_t | image),  cut at -1        in [-1, 1]
    A_it = A_i + weight abs(A_i) c_it, with the sign of A_i

c_t is the first part of the allocation of PIVOT (arXiv 2609.18057), without its term for later tokens.

Shape suffixes: B rows, T response tokens.
"""

from dataclasses import dataclass, field

import torch

from sayo_verl.methods import Credit, Needs, Signals, TokenBonus, register_method
from sayo_verl.methods.base import check_setting
from sayo_verl.metrics import Metric
from sayo_verl.probe.statistics import StatisticsRequest
from sayo_verl.vision.intervention import Intervention


@register_method
@dataclass(frozen=True)
class RelianceMethod:
    """``algorithm.adv_estimator=attn_reliance``.

    Attributes:
        weight: 0 is GRPO.
        counterfactual: how the image is changed (half of the patches blackened).
    """

    weight: float = 0.5
    counterfactual: Intervention = field(default_factory=Intervention)
    name = "attn_reliance"
    reference = ("the first part of PIVOT's allocation", "arXiv 2609.18057")
    metrics = (Metric("reliance/mean", "reliance of tokens on the image", low=-1, high=1, live="reliance"),)

    def __post_init__(self) -> None:
        check_setting("reliance", self, {"weight": (0 <= self.weight < float("inf"), "a finite number >= 0")})

    @property
    def gives(self) -> frozenset:
        return frozenset({"bonus"} if self.weight else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()), interventions=(self.counterfactual,))

    def credit(self, signals: Signals) -> Credit:
        eligible = signals.eligible_rows(boxes=False)
        tokens = signals.response_mask.bool() & eligible[:, None]
        change = signals.counterfactual(self.counterfactual) - signals.log_probs  # [B, T]; read in ``tokens`` only
        reliance = torch.where(tokens, -torch.expm1(change.clamp(max=1.0)), torch.zeros_like(change)).clamp(min=-1.0)
        bonus = TokenBonus(self.weight * reliance, relative=True, protect_sign=True)
        metrics = {"reliance/mean": float(reliance[tokens].mean())} if tokens.any() else {}
        return Credit(bonuses=(bonus,) if self.gives else (), metrics=metrics)
