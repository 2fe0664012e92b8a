"""Token filtering by visual sensitivity, after VPPO (arXiv 2510.09285): an example of a method of your own.

    k_t = clamp(exp(-d_t) - 1 + d_t, 0, 10),  d_t = log pi(y_t | image) - log pi(y_t | changed image)
    weight of token t = 1 for the ceil(share * T) tokens of highest k_t in a response, 0 for the others

Only VPPO's token filter is here, not its trajectory factor. Of equal sensitivities the earlier token is kept. The loss
is still divided by all response tokens, as in the released code.

Shape suffixes: B rows, T response tokens.
"""

import math
from dataclasses import dataclass, field

import torch

from sayo_verl.methods import Credit, Needs, Signals, register_method
from sayo_verl.methods.base import blend, check_setting
from sayo_verl.methods.faithful import causal_effect
from sayo_verl.metrics import Metric
from sayo_verl.probe.statistics import StatisticsRequest
from sayo_verl.vision.intervention import Intervention


@register_method
@dataclass(frozen=True)
class SensitivityMethod:
    """``algorithm.adv_estimator=attn_sensitivity``.

    Attributes:
        strength: in [0, 1]; 0 is GRPO.
        share: of a response's tokens that keep their gradient (VPPO: 0.4).
        counterfactual: how the image is changed (VPPO: half of the patches blackened).
    """

    strength: float = 1.0
    share: float = 0.4
    counterfactual: Intervention = field(default_factory=Intervention)
    name = "attn_sensitivity"
    reference = ("VPPO's token filter", "arXiv 2510.09285")
    metrics = (
        Metric("sensitivity/mean", "sensitivity of tokens", low=0, high=10, live="sensitivity"),
        Metric("sensitivity_kept_share", "share of tokens kept", low=0, high=1),
    )

    def __post_init__(self) -> None:
        check_setting(
            "sensitivity",
            self,
            {
                "strength": (0 <= self.strength <= 1, "a number in [0, 1]"),
                "share": (0 < self.share <= 1, "a number in (0, 1]"),
            },
        )

    @property
    def gives(self) -> frozenset:
        return frozenset({"token"} if self.strength else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()), interventions=(self.counterfactual,))

    def credit(self, signals: Signals) -> Credit:
        eligible = signals.eligible_rows(boxes=False)
        tokens = signals.response_mask.bool() & eligible[:, None]
        effect = causal_effect(signals.log_probs, signals.counterfactual(self.counterfactual), tokens, k_max=10.0)
        k_B = torch.ceil(self.share * tokens.sum(-1).double() - 1e-9).long()
        order = effect.masked_fill(~tokens, -math.inf).argsort(dim=-1, descending=True, stable=True)
        kept = (order.argsort(dim=-1) < k_B[:, None]) & tokens
        weight = torch.where(tokens, kept.to(effect.dtype), torch.ones_like(effect))
        metrics = {}
        if eligible.any():
            metrics = {
                "sensitivity/mean": float(effect[tokens].mean()),
                "sensitivity_kept_share": float(kept.sum() / tokens.sum()),
            }
        return Credit(token_weight=blend(weight, self.strength) if self.gives else None, metrics=metrics)
