"""Evidence-RL: a correct answer counts more if it needs the evidence region than if it needs other regions.

Paper: "Evidence-RL: Towards Evidence-intensive Visual Reasoning", arXiv 2608.08021 (NeurIPS 2026). The authors call the
reward CED, counterfactual evidence disentanglement. [C] is their released code (evidencerl/code), which also quotes
equation 3 of the paper; the paper's text was not available. For a response y with the tokens Y, the image I, the image
I_e whose evidence box is neutralised, and K images I_1 .. I_K in which a matched other region is:

    s(J)  = mean over Y of (log pi(y_t | I) - log pi(y_t | J))             the drop of support, in nats per token  (D1)
    mu, sd = mean and standard deviation (of the population) of s(I_1) .. s(I_K)
    m     = tanh((s(I_e) - mu) / (sd + 1e-6))                              in [-1, 1], the margin                  (D2)
    g     = (1 + tanh(m / tau)) / 2                                        in (0, 1), the gate                     (D3)
    c     = 1 for a correct answer, -0.25 for a wrong one                                                          (D4)
    r     = c g + eps m                                                    takes the place of correctness          (D5)

m is 0 if the box matters as much as other places, and close to 1 if it matters more than they do by more than they
differ. So a correct answer that does not depend on the box keeps half of its reward or less.

``margin="difference"`` is m = s(I_e) - mu, in nats per token. A comment of [C] says that earlier code had it. The
standardised margin divides by the spread of K numbers. If they are nearly equal, it is close to -1 or 1 for a
difference of rounding; ``difference`` does not do that.

How r enters. The task reward holds ``replaced`` for a correct answer already. The term is r - replaced * acc, so with
weight 1 and a task reward of acc alone the sum is r. A weight w in between gives (1 - w) acc + w r, and 0 is GRPO.

Departures from [C]:
 - It averages over the tokens of the final answer. Here Y is the whole response, its option ``full_response``, because
   a method does not know which tokens are the answer.
 - It replaces embeddings of visual tokens at the first decoder layer by the mean of the tokens around them. Here pixels
   are filled before the vision tower, with mid-grey or black. So the object also vanishes from the embeddings around.
 - Its other regions are boxes of the same size, with an IoU of at most 0.05, the same in every step. Here they are of
   the same visual tokens, disjoint from the boxes, and drawn again in each step (``sayo_verl.vision.control``).
 - A row without a box gets a central one there, and is neutral here. So is a row whose boxes cover more than half of
   its visual tokens, since it has no other region of their size.
 - Its responses without a readable answer get -0.75; here they are wrong answers. Its questions of existence (yes or
   no) get correctness alone; here a row without boxes does.

Assumes: log-probs of the rollout policy, without gradient, teacher-forced, with unchanged positions of all tokens.

Shape suffixes: B rows, T response tokens, K control regions.
"""

from dataclasses import dataclass

import torch

from sayo_verl.methods.base import Credit, CreditKind, RewardTerm, Rules, check_setting, masked_mean
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.metrics import NO_PREFERENCE, Metric, Panel
from sayo_verl.probe.statistics import StatisticsRequest
from sayo_verl.vision.control import has_room
from sayo_verl.vision.intervention import FILLS, Intervention

EPS = 1e-6  # of D2 [C]
RIGHT, WRONG = 1.0, -0.25  # c of D4 [C]
MARGINS = ("standardised", "difference")


def support_drop(log_probs: torch.Tensor, changed: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """s of D1.

    Args:
        log_probs: [B, T] in nats, after the image.
        changed: [B, T] in nats, of the same tokens after a changed image.
        tokens: bool [B, T], the tokens Y; values elsewhere are ignored, whatever they are.

    Returns:
        [B] float64 in nats per token; 0 for a row without a token.
    """
    return masked_mean(log_probs.double() - changed.double(), tokens)


def evidence_margin(evidence: torch.Tensor, controls: torch.Tensor, margin: str = "standardised") -> torch.Tensor:
    """m of D2.

    Args:
        evidence: [B], the drop of support without the box.
        controls: [B, K], the drops without each control region.
        margin: ``standardised`` or ``difference``.

    Returns:
        [B] in [-1, 1], or in nats per token.
    """
    gap = evidence - controls.mean(-1)
    return gap if margin == "difference" else torch.tanh(gap / (controls.std(-1, correction=0) + EPS))


def evidence_gate(margin: torch.Tensor, tau: float) -> torch.Tensor:
    """g of D3: [B] in [0, 1], of the margin [B]; it grows with the margin, and is 0.5 at 0."""
    return 0.5 * (1.0 + torch.tanh(margin / tau))


def evidence_reward(correct: torch.Tensor, margin: torch.Tensor, tau: float, eps: float) -> torch.Tensor:
    """r of D4 and D5: [B], of correctness [B] in [0, 1], where 1 alone is correct, and the margin [B]."""
    c = torch.where(correct >= 1, RIGHT, WRONG)
    return c * evidence_gate(margin, tau) + eps * margin


@dataclass(frozen=True)
class EvidenceMethod:
    """``algorithm.adv_estimator=attn_evidence``.

    Attributes:
        weight: strength of the term; 0 is GRPO, 1 is the paper's reward. [P] [ours: other values]
        tau: temperature of the gate. [C]
        eps: weight of the margin beside the gated correctness. [C]
        controls: number of control regions; each costs a log-prob pass. [C]
        margin: ``standardised``, or ``difference`` in nats per token. [P equation 3, as quoted by C] [C: difference]
        replaced: what the task reward gives a correct answer, whose place the reward takes. [ours]
        fill: of the box and of the control regions, ``grey`` (127.5 of 255) or ``black``. [ours: C fills
            embeddings with the mean of those around]
        coverage: share of a visual token's cell that a box must cover, see ``sayo_verl.vision.masks``. [ours]
        seed: seed of the control regions. [ours]

    Raises:
        SayoError: A05 for a value out of range.
    """

    weight: float = 1.0
    tau: float = 0.2
    eps: float = 0.1
    controls: int = 3
    margin: str = "standardised"
    replaced: float = 1.0
    fill: str = "grey"
    coverage: float = 0.5
    seed: int = 0
    name = "attn_evidence"
    reference = ("Evidence-RL", "arXiv 2608.08021")
    metrics = (
        Panel(
            "Evidence margin $m$",
            "mean, from -1 to 1",
            (
                Metric(
                    "evidence_margin/mean",
                    "evidence margin m",
                    live="margin",
                    note="From -1 to 1; with `margin=difference` in nats per token.",
                ),
            ),
            guide=NO_PREFERENCE,
        ),
        Panel(
            "Drop of support",
            "nats per token",
            (
                Metric(
                    "evidence_drop/mean",
                    "drop of support without the evidence",
                    unit="nats per token",
                    line="evidence region",
                    live="drop",
                    note="Near 0, the response does not depend on the region, or the change is too weak to show it.",
                ),
                Metric(
                    "evidence_control_drop/mean",
                    "drop of support without a control region",
                    unit="nats per token",
                    line="control regions",
                ),
            ),
        ),
        Metric("evidence_gate/mean", "evidence gate g", 0, 1),
        Metric("evidence_reward/mean", "evidence reward r"),
        Metric("evidence_rows_share", "share of rows with an evidence margin", 0, 1),
        Metric(
            "evidence_no_room_share",
            "share of rows whose boxes leave no room for a control region",
            0,
            1,
            note="The boxes cover more than half of the row's visual tokens. Such rows are neutral.",
        ),
        Metric("evidence_margin/std", "evidence margin m, standard deviation", 0, shown=False),
    )

    def __post_init__(self) -> None:
        check_setting("evidence", self, self.rules())

    def rules(self) -> Rules:
        """What each setting must be."""
        least = 2 if self.margin == "standardised" else 1  # one number has no spread
        return {
            "weight": (0 <= self.weight < float("inf"), "a finite number >= 0"),
            "tau": (0 < self.tau < float("inf"), "a finite number > 0"),
            "eps": (0 <= self.eps < float("inf"), "a finite number >= 0"),
            "controls": (least <= self.controls <= 16, f"a whole number from {least} to 16"),
            "margin": (self.margin in MARGINS, " or ".join(MARGINS)),
            "replaced": (0 <= self.replaced < float("inf"), "a finite number >= 0"),
            "fill": (self.fill in FILLS, " or ".join(FILLS)),
            "coverage": (0 < self.coverage <= 1, "a number in (0, 1]"),
            "seed": (self.seed >= 0, "a whole number >= 0"),
        }

    @property
    def gives(self) -> frozenset[CreditKind]:
        return frozenset({"reward"} if self.weight else ())

    @property
    def evidence(self) -> Intervention:
        """The change of the box."""
        return Intervention("region", fill=self.fill)

    @property
    def others(self) -> tuple[Intervention, ...]:
        """The changes of K control regions."""
        return tuple(Intervention("elsewhere", fill=self.fill, seed=self.seed, draw=k) for k in range(self.controls))

    def needs(self) -> Needs:
        request = StatisticsRequest((), coverage=self.coverage)
        return Needs(request, interventions=(self.evidence, *self.others), correctness=True, boxes=True)

    def credit(self, signals: Signals) -> Credit:
        boxed, room = signals.eligible_rows(), has_room(signals.region_tokens, signals.image_tokens)
        valid = boxed & room
        tokens = signals.response_mask.bool() & valid[:, None]

        def drop(intervention: Intervention) -> torch.Tensor:
            return support_drop(signals.log_probs, signals.counterfactual(intervention), tokens)

        evidence, controls = drop(self.evidence), torch.stack([drop(other) for other in self.others], -1)
        margin = evidence_margin(evidence, controls, self.margin)
        correct = torch.where(valid, signals.required("correct"), 0.0)
        reward = evidence_reward(correct, margin, self.tau, self.eps)
        value = (reward - self.replaced * correct).to(signals.log_probs.dtype)
        real = (~signals.is_padding).sum().clamp(min=1)
        metrics = {
            "evidence_rows_share": float(valid.sum() / real),
            "evidence_no_room_share": float((boxed & ~room).sum() / real),
        }
        if valid.any():
            metrics |= {
                "evidence_margin/mean": float(margin[valid].mean()),
                "evidence_margin/std": float(margin[valid].std(correction=0)),
                "evidence_drop/mean": float(evidence[valid].mean()),
                "evidence_control_drop/mean": float(controls[valid].mean()),
                "evidence_gate/mean": float(evidence_gate(margin, self.tau)[valid].mean()),
                "evidence_reward/mean": float(reward[valid].mean()),
            }
        return Credit((RewardTerm("evidence_reward", value, valid, self.weight),), metrics=metrics)
