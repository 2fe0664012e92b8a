"""VPPO: the gradient of the tokens that depend on the image, and more of it for responses that depend on it.

Paper: "Spotlight on Token Perception for Multimodal Reinforcement Learning", arXiv 2510.09285 (ICLR 2026), [P].
Released code: huaixuheqing/VPPO-RL, [C]. For an image I, the changed image I' and response i of n tokens:

    k_it    = clamp(exp(-d) - 1 + d, 0, k_max),   d = log pi(y_t | I) - log pi(y_t | I')    in [0, k_max]    (3)
    m_it    = 1 for the ceil(share n) tokens of highest k_it, 0 for the others                               (4)
    s_i     = mean over t of k_it
    alpha_i = factor_min + (factor_max - factor_min) (s_i - min s) / (max s - min s)     over the batch      (5)
    A_it    = A_i alpha_i m_it                                                                               (6)

The paper writes the divergence over the vocabulary in (3). Its appendix B and the code take the k3 estimate from the
sampled token, as here. ``factor_max=0`` is the paper's dynamic upper end, factor_min + (1 - factor_min) / u, where u is
the mean of the fraction in (5): the factors then have mean one over the batch [C]. With few responses far above the
others u is small and the largest factor is large. If max s - min s is at most 1e-6, every factor is 1 [C].

``share=1`` leaves the filter out and ``factor_min=1`` the factor: the two ablations of table 2. The factor depends on
what else is in the batch. This is the paper's; ``scope=group`` compares the responses of a prompt alone.

Assumes: log-probs of the rollout policy, without gradient; the change of the image keeps the positions of all tokens
(``sayo_verl.vision.intervention``). Of equal k the earlier token is kept. The loss is still divided by all response
tokens [C]. Departures: recipe/vppo/README.md.

Shape suffixes: B rows (one response each), T response tokens, G rows that are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sayo_verl.methods.base import Credit, CreditKind, Rules, blend, check_setting, masked_mean
from sayo_verl.methods.faithful import causal_effect
from sayo_verl.methods.group import group_rows
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.metrics import AS_GRPO, Metric, Panel
from sayo_verl.probe.statistics import StatisticsRequest
from sayo_verl.vision.intervention import Intervention

LEAST_SPREAD = 1e-6  # of s, [C]
EPS = 1e-8  # added to u, [C]
SCOPES = ("batch", "group")


def kept_tokens(effect: torch.Tensor, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """m_it of (4): bool [B, T].

    Args:
        effect: [B, T] k_it; not read where not in ``tokens``.
        tokens: bool [B, T].
        share: in (0, 1], of a row's tokens, rounded up.
    """
    # ceil(0.1 * 70) must be 7 although the product is 7.000...01 in binary
    k_B = torch.ceil(share * tokens.sum(-1).double() - 1e-9).long()
    order = effect.masked_fill(~tokens, -math.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < k_B[:, None]) & tokens


def trajectory_factors(
    score: torch.Tensor, compared: Sequence[Sequence[int]], factor_min: float, factor_max: float = 0.0
) -> torch.Tensor:
    """alpha_i of (5).

    Args:
        score: [B] s_i; read in the compared rows.
        compared: rows that share a minimum and a maximum; rows in none of the lists have factor 1.
        factor_min: of the row with the lowest score.
        factor_max: of the row with the highest; 0: so that each list has mean one.

    Returns:
        [B] >= 0; 1 in a list of one row, and where the scores spread over at most 1e-6.
    """
    factor = torch.ones_like(score)
    for rows in compared:
        score_G = score[list(rows)]
        if len(rows) < 2 or float(score_G.max() - score_G.min()) <= LEAST_SPREAD:
            continue
        fraction_G = (score_G - score_G.min()) / (score_G.max() - score_G.min())
        high = factor_max or factor_min + (1 - factor_min) / (fraction_G.mean() + EPS)
        factor[list(rows)] = factor_min + (high - factor_min) * fraction_G
    return factor


@dataclass(frozen=True)
class SensitivityMethod:
    """``algorithm.adv_estimator=attn_sensitivity``.

    Attributes:
        strength: weights and factors are 1 + strength (factor - 1); 0 is GRPO. [ours]
        share: of a response's tokens that keep their gradient; 1 is no filter. [P]
        factor_min: factor of the response that depends least on the image; 1 is no trajectory factor. [P]
        factor_max: factor of the response that depends most on the image; 0 is the value that gives the factors mean
            one. [P]
        scope: responses that are compared for the factor: all of the ``batch``, or those of a prompt (``group``). [P]
            [ours: group]
        k_max: largest k of a token. [C]
        counterfactual: how the image is changed. [P]

    Raises:
        SayoError: A05 for a value out of range.
    """

    strength: float = 1.0
    share: float = 0.4
    factor_min: float = 0.9
    factor_max: float = 0.0
    scope: str = "batch"
    k_max: float = 10.0
    counterfactual: Intervention = field(default_factory=Intervention)
    name = "attn_sensitivity"
    reference = ("VPPO", "arXiv 2510.09285")
    metrics = (
        Panel(
            "Sensitivity $k$",
            "nats per token",
            (
                Metric("sensitivity/mean", "sensitivity k of tokens", 0, unit="nats", live="sensitivity"),
                Metric("sensitivity_kept/mean", "sensitivity k of kept tokens", 0, unit="nats", line="kept tokens"),
            ),
            limits=(0, None),
        ),
        Panel(
            "Sensitivity factor",
            "factor on the advantage",
            band=(
                Metric("sensitivity_factor/min", "factor by sensitivity, smallest", 0),
                Metric("sensitivity_factor/max", "factor by sensitivity, largest", 0, live="largest factor"),
            ),
            guide=AS_GRPO,
        ),
        Metric("sensitivity_kept_share", "share of tokens kept", 0, 1),
        Metric(
            "sensitivity_kept_effect",
            "share of k on kept tokens",
            0,
            1,
            note="Equal to the share of tokens kept if k does not differ between tokens.",
        ),
    )

    def __post_init__(self) -> None:
        check_setting("sensitivity", self, self.rules())

    def rules(self) -> Rules:
        """What each setting must be."""
        return {
            "strength": (0 <= self.strength <= 1, "a number in [0, 1]"),
            "share": (0 < self.share <= 1, "a number in (0, 1]"),
            "factor_min": (0 < self.factor_min <= 1, "a number in (0, 1]"),
            "factor_max": (
                self.factor_max == 0 or self.factor_min <= self.factor_max < math.inf,
                "0 or a finite number >= factor_min",
            ),
            "scope": (self.scope in SCOPES, " or ".join(SCOPES)),
            "k_max": (0 < self.k_max < math.inf, "a finite number > 0"),
        }

    @property
    def gives(self) -> frozenset[CreditKind]:
        factors = self.factor_min < 1 or self.factor_max > 1
        parts: tuple[tuple[bool, CreditKind], ...] = ((self.share < 1, "token"), (factors, "trajectory"))
        return frozenset(kind for on, kind in parts if on and self.strength > 0)

    def needs(self) -> Needs:
        return Needs(
            StatisticsRequest(()), interventions=(self.counterfactual,), boxes=self.counterfactual.kind == "region"
        )

    def credit(self, signals: Signals) -> Credit:
        eligible = signals.eligible_rows(boxes=self.needs().boxes)
        tokens = signals.response_mask.bool() & eligible[:, None]
        effect = causal_effect(signals.log_probs, signals.counterfactual(self.counterfactual), tokens, self.k_max)
        kept = kept_tokens(effect, tokens, self.share)
        weight = torch.where(tokens, kept.to(effect.dtype), torch.ones_like(effect))

        compared = [list(range(len(eligible)))] if self.scope == "batch" else group_rows(signals.uid)
        compared = [[row for row in rows if eligible[row]] for rows in compared]
        # in float64: a min-max of nearly equal scores would blow the rounding of float32 means up
        score = masked_mean(effect.double(), tokens)
        factor = trajectory_factors(score, compared, self.factor_min, self.factor_max).to(effect.dtype)

        metrics: dict[str, float] = {}
        if eligible.any():
            metrics = {
                "sensitivity/mean": float(effect[tokens].mean()),
                "sensitivity_kept/mean": float(effect[kept].mean()),
                "sensitivity_kept_share": float(kept.sum() / tokens.sum()),
                "sensitivity_factor/min": float(factor[eligible].min()),
                "sensitivity_factor/max": float(factor[eligible].max()),
            }
            if effect[tokens].sum() > 0:
                metrics["sensitivity_kept_effect"] = float(effect[kept].sum() / effect[tokens].sum())
        return Credit(
            token_weight=blend(weight, self.strength) if "token" in self.gives else None,
            trajectory_weight=blend(factor, self.strength) if "trajectory" in self.gives else None,
            metrics=metrics,
        )
