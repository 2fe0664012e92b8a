"""Faithful-MR1, reinforcing stage: a reward for attending to the image at the tokens where the image matters.

OUR READING. Paper: "Faithful Multimodal Reasoning via Anchoring and Reinforcing Visual Attention", arXiv 2605.22072.
Its formulas and code are not public; what its abstract says of this stage is that a counterfactual change of the image
exposes faithful use, and that reinforcement learning rewards answer-correct trajectories that concentrate visual
attention where vision causally matters. We read that as follows, for an image I, the changed image I' and a response:

    delta_t = log pi(y_t | I) - log pi(y_t | I')          the same tokens, teacher-forced, under the rollout policy
    k_t     = clamp(exp(-delta_t) - 1 + delta_t, 0, k_max)   in [0, k_max]: where vision causally matters (E1)
    omega_t = (k_t + eps_k) / sum_t (k_t + eps_k)         (E2)
    m_t     = attention on all visual tokens, mean over heads and layers, in [0, 1]                          (E3)
    F       = tanh(log((sum_t omega_t m_t + eps) / (mean_t m_t + eps)))    in [-1, 1]                        (E4)
    r       = r_task + weight * acc * F                   acc in [0, 1]: the gate on correctness             (E5)

k_t is the k3 estimate of the divergence between the two distributions, clamped as in VPPO (arXiv 2510.09285), which
names the same tokens; PAPO (arXiv 2507.06448) uses it too. F is 0 when attention to the image does not know where the
image matters, in particular when all k_t are equal or zero; it is a ratio, so it rewards looking *when it matters*, not
looking more (the form of SAYO's r_v, ``sayo_verl.methods.region``). |acc * F| <= 1, so beside an accuracy reward of 1,
with a weight below 1, a correct answer keeps more reward than a wrong one, whose term is exactly 0.

Assumes: the change of the image keeps the positions of all tokens (``sayo_verl.vision.intervention``); attention and
log-probs come from the rollout policy, without gradient, and by default from the same row, the one that sampled y_t.
eps_k takes the place of a case for sum k = 0: below it an effect is rounding, and omega goes to 1/n without a jump.

Readings that can be chosen instead: no gate (``gate=false``), the plain mean of m_t as reward (``form=mass``), the
boxes of the row in place of the image (``causal_unit=region``: m_t is the attention on them, I' fills them). Other
readings and the anchoring stage: recipe/faithful/README.md.

Shape suffixes: B rows, T response tokens.
"""

from dataclasses import dataclass, field

import torch

from sayo_verl.methods.base import Credit, CreditKind, RewardTerm, Rules, check_setting, distinct_layers, masked_mean
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.metrics import NO_PREFERENCE, Metric, Panel
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest
from sayo_verl.vision.intervention import Intervention

EPS = 1e-8  # eps of E4, that of SAYO's r_v (ours)
EPS_EFFECT = 1e-6  # eps_k of E2 (ours): an effect of 1e-6 is a difference of 0.0014 nats
EXP_LIMIT = 80.0  # exp of more than 88 is not a float32; k_t is far above any k_max long before
FORMS = ("effect", "mass")
UNITS = ("image", "region")


def causal_effect(
    log_probs: torch.Tensor, counterfactual_log_probs: torch.Tensor, selected: torch.Tensor, k_max: float
) -> torch.Tensor:
    """k_t of E1, the k3 estimate of KL(pi(. | I) || pi(. | I')) from the sampled token.

    Args:
        log_probs: [B, T] in nats, after the image.
        counterfactual_log_probs: [B, T] in nats, of the same tokens after the changed image.
        selected: bool [B, T]; values elsewhere are ignored, whatever they are.
        k_max: largest effect of a token.

    Returns:
        [B, T] in [0, k_max], 0 where not selected.
    """
    delta = torch.where(selected, log_probs - counterfactual_log_probs, torch.zeros_like(log_probs))
    delta = delta.clamp(min=-EXP_LIMIT)
    return (torch.expm1(-delta) + delta).clamp(0.0, k_max)


def causal_weights(effect: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """omega_t of E2: [B, T] >= 0 with sum 1 over the selected tokens of a row, 0 elsewhere."""
    share = torch.where(selected, effect + EPS_EFFECT, torch.zeros_like(effect))
    return share / share.sum(-1, keepdim=True).clamp(min=EPS_EFFECT)


def faithful_ratio(causal: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
    """F of E4: [B] in [-1, 1], of ``causal`` [B] = sum omega_t m_t and ``average`` [B] = mean m_t, both in [0, 1]."""
    return torch.tanh(torch.log((causal + EPS) / (average + EPS)))


@dataclass(frozen=True)
class FaithfulMethod:
    """``algorithm.adv_estimator=attn_faithful``.

    Attributes:
        weight: strength of the term; 0 is GRPO. At 1 or more it can outvote correctness. [ours]
        layers: decoder layers to average over. The last exists in every model; floor(2 L / 3) of L layers, as in EASE
            (arXiv 2605.30912), is 18 for Qwen2.5-VL-7B and 24 for the 3B. [ours]
        query_row: ``predicting``, the row that sampled y_t, to which k_t belongs; or ``input`` (as SAYO). [ours]
        gate: multiply the term by the answer's correctness. [A]
        form: ``effect`` (F), or ``mass``: mean m_t itself, in [0, 1], an ablation. [A] [ours: the formula]
        causal_unit: ``image``, or ``region``, which needs ``counterfactual.kind=region``. [ours]
        k_max: largest effect of a token. [precedent: VPPO]
        coverage: share of a visual token's cell that a box must cover, see ``sayo_verl.vision.masks``. [ours]
        counterfactual: how the image is changed. With ``region`` and ``elsewhere`` a row without a box is neutral. [A:
            that it is]

    Raises:
        SayoError: A05 for a value out of range.
    """

    weight: float = 0.2
    layers: tuple[int, ...] = (-1,)
    query_row: str = "predicting"
    gate: bool = True
    form: str = "effect"
    causal_unit: str = "image"
    k_max: float = 10.0
    coverage: float = 0.5
    counterfactual: Intervention = field(default_factory=Intervention)
    name = "attn_faithful"
    reference = ("our reading of Faithful-MR1", "arXiv 2605.22072")
    metrics = (
        Panel(
            "Faithful reward",
            "mean, from -1 to 1",
            (
                Metric("faithful_reward/mean", "faithful reward", -1, 1, line="reward", live="faithful reward"),
                Metric("faithful_ratio/mean", "faithful ratio F, before the gate", -1, 1, line="$F$, before the gate"),
            ),
            guide=NO_PREFERENCE,
        ),
        Panel(
            "Causal effect $k$",
            "nats per token",
            (
                Metric(
                    "counterfactual_effect/mean",
                    "counterfactual effect k",
                    0,
                    unit="nats per token",
                    live="effect",
                    note="Near 0, the model does not use the image, or the change is too weak to show it.",
                ),
            ),
            limits=(0, None),
        ),
        Panel(
            "Causal attention",
            "share of attention",
            (
                Metric("causal_attention/mean", "attention mass, weighted by effect", 0, 1, line="weighted by effect"),
                Metric("causal_attention_all_tokens/mean", "attention mass, all tokens", 0, 1, line="all tokens"),
            ),
        ),
        Metric("faithful_gate_rate", "rows through the gate", 0, 1, "share"),
        Metric("counterfactual_effect/share_above_0.1", "tokens with an effect above 0.1", 0, 1, "share"),
        Metric("faithful_rows_share", "share of rows that can carry the reward", 0, 1),
        Metric("faithful_reward/std", "faithful reward, standard deviation", 0, 1, shown=False),
    )

    def __post_init__(self) -> None:
        check_setting("faithful", self, self.rules())

    def rules(self) -> Rules:
        """What each setting must be."""
        return {
            "weight": (0 <= self.weight < float("inf"), "a finite number >= 0"),
            "layers": distinct_layers(self.layers),
            "query_row": (self.query_row in QUERY_ROWS, " or ".join(QUERY_ROWS)),
            "form": (self.form in FORMS, " or ".join(FORMS)),
            "causal_unit": (self.causal_unit in UNITS, " or ".join(UNITS)),
            "k_max": (0 < self.k_max < float("inf"), "a finite number > 0"),
            "coverage": (0 < self.coverage <= 1, "a number in (0, 1]"),
            "counterfactual": (
                self.causal_unit != "region" or self.counterfactual.kind == "region",
                "kind=region with causal_unit=region",
            ),
        }

    @property
    def gives(self) -> frozenset[CreditKind]:
        return frozenset({"reward"} if self.weight else ())

    @property
    def _mass(self) -> Statistic:
        return Statistic(f"{self.causal_unit}_mass", layers=self.layers, query_row=self.query_row)

    @property
    def _boxes(self) -> bool:
        return self.counterfactual.of_boxes

    def needs(self) -> Needs:
        request = StatisticsRequest((self._mass,), coverage=self.coverage)
        return Needs(request, interventions=(self.counterfactual,), correctness=self.gate, boxes=self._boxes)

    def credit(self, signals: Signals) -> Credit:
        valid = signals.eligible_rows(boxes=self._boxes)
        tokens = signals.response_mask.bool() & valid[:, None]
        effect = causal_effect(signals.log_probs, signals.counterfactual(self.counterfactual), tokens, self.k_max)
        mass = torch.where(tokens, signals[self._mass], torch.zeros_like(effect))
        causal, average = (causal_weights(effect, tokens) * mass).sum(-1), masked_mean(mass, tokens)
        F = faithful_ratio(causal, average)
        value = F if self.form == "effect" else average
        metrics = {"faithful_rows_share": float(valid.sum() / (~signals.is_padding).sum().clamp(min=1))}
        if self.gate:
            correct = torch.where(valid, signals.required("correct"), torch.zeros_like(value))
            value = correct * value
            if valid.any():
                metrics["faithful_gate_rate"] = float(correct[valid].mean())
        if valid.any():
            metrics |= {
                "faithful_reward/mean": float(value[valid].mean()),
                "faithful_reward/std": float(value[valid].std(correction=0)),
                "faithful_ratio/mean": float(F[valid].mean()),
                "counterfactual_effect/mean": float(effect[tokens].mean()),
                "counterfactual_effect/share_above_0.1": float((effect[tokens] > 0.1).float().mean()),
                "causal_attention/mean": float(causal[valid].mean()),
                "causal_attention_all_tokens/mean": float(average[valid].mean()),
            }
        return Credit((RewardTerm("faithful_reward", value, valid, self.weight),), metrics=metrics)
