"""VGPO: advantages weighted by visual focus, within a response and between the responses of a prompt.

Paper: "Visually-Guided Policy Optimization for Multimodal Reasoning", arXiv 2604.09349. Its full text was not at hand:
the equations are those of the released code (wzb-bupt/VGPO), numbered as third-party notes on the paper number them.
For token t = 1 .. T_i of response i, with h the last hidden state (after the final norm) and mu_v its mean over the
visual tokens:

    S_it   = cos(h_it, mu_v)                                  in [-1, 1], at the row where y_t is the input
    rho_it = (S_it + 1) / 2                                   in [0, 1]                                       (4)
    w_it   = rho_it (1 + G_it beta t / T_i)                   visual compensation against forgetting          (5)
    G_it   = 1 where t lies in the last gamma of the response and rho_it in the top kappa of that tail, else 0 (6)
    u_it   = min-max over t of w_i                            in [0, 1]; w-hat in the notes                  (7)
    psi_it = u_it - mean over t of u_i                                                                        (8)
    s_i    = sum over t of w_it                                                                               (9)
    phi_i  = min-max of s over the rollouts of the prompt, minus its mean over them                           (10), (11)
    A_it   = A_i (1 + psi_it) (1 + phi_i)

Both factors lie in [0, 2] and have mean one, over a response and over a group, so no sign changes. The sign of A_i is
not used: in a wrong answer the focused tokens are punished more. If all scores of a tail are equal, all its tokens pass
the gate. The paper names the schedules step and exponential beside the linear t / T. Their formulas are our reading: 1
in the whole tail, and (e^(t/T) - 1) / (e - 1).

Assumes: the score belongs to the rollout policy and is read once per batch, without gradient. Rows without an image
have factor 1 and do not take part in the min-max of their group.

Options that follow the released code instead, together ``DualConfig.released()``:
 - ``score_offset="minmax"``: rho is S min-maxed together with a zero over what the code calls the micro-batch, padding
   (whose score is 0) included. Here over the group, so that groups stay independent. rho then spreads over [0, 1], and
   the gate's bonus weighs less beside it.
 - ``position="zero_based"``: (t - 1) / (T_i - 1) instead of t / T_i.
 - ``trajectory_score="normalised_sum"``: s_i sums u instead of w. Both sums favour long answers;
   ``"mean"`` (ours) does not.
 - ``clamp="released"``: token factors to [0.1, 2], trajectory factors to [0.9, 2]. Only the lower bounds ever bind, and
   0.9 lifts the group's mean factor above one: the mean advantage is inflated.
Departures from it that have no option: groups are those of a uid, not runs of eight neighbours in a micro-batch; the
score is the rollout policy's, not that of the policy in the middle of its update.

Shape suffixes: B rows, T response tokens, G rows of one group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sayo_verl.methods.base import Credit, CreditKind, Rules, blend, check_setting, distinct_layers, masked_mean
from sayo_verl.methods.group import group_rows
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.metrics import AS_GRPO, Metric, Panel
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest

EPS = 1e-8  # in every min-max, from the released code
TOKEN_CLAMP, TRAJECTORY_CLAMP = (0.1, 2.0), (0.9, 2.0)
CHOICES = {
    "schedule": ("linear", "exponential", "step"),
    "score_offset": ("cosine", "minmax", "none"),
    "position": ("one_based", "zero_based"),
    "trajectory_score": ("sum", "normalised_sum", "mean"),
    "clamp": ("none", "released"),
}
SCORES = ("cosine", "image_mass")


@dataclass(frozen=True)
class DualConfig:
    """How scores become factors. The defaults are those of the paper, see the docstring of this file.

    Attributes:
        beta: strength of the compensation against visual forgetting. [C] [N]
        gamma: length of the tail as a share of the response; 1 is the "full trajectory", the worst in the paper. [C]
            [N]
        kappa: share of the tail that passes the gate. [C] [N]
        schedule: how the compensation grows along the tail. [N: linear is the best]
        intra: weight tokens by psi. [C] [N]
        inter: weight trajectories by phi. [C] [N]
        score_offset: how the score S is mapped to [0, 1]: ``cosine`` by (S + 1) / 2; ``minmax`` as the released code
            does; ``none`` leaves it, for a score that is in [0, 1] already. [N] [C: minmax]
        position: ``one_based`` is t / T, ``zero_based`` is (t - 1) / (T - 1). [N] [C: zero_based]
        trajectory_score: ``sum`` of w, ``normalised_sum`` of u, or ``mean`` of w, which does not favour long
            answers. [N] [C: normalised_sum] [ours: mean]
        clamp: ``released`` limits the factors to [0.1, 2] and [0.9, 2], which inflates the mean advantage. [N] [C:
            released]
    """

    beta: float = 0.3
    gamma: float = 0.5
    kappa: float = 0.2
    schedule: str = "linear"
    intra: bool = True
    inter: bool = True
    score_offset: str = "cosine"
    position: str = "one_based"
    trajectory_score: str = "sum"
    clamp: str = "none"

    def __post_init__(self) -> None:
        check_setting("dual", self, self.rules())

    def rules(self) -> Rules:
        """What each setting must be."""
        named = {key: (vars(self)[key] in choices, " or ".join(choices)) for key, choices in CHOICES.items()}
        return {
            "beta": (0 <= self.beta < math.inf, "a finite number >= 0"),
            "gamma": (0 < self.gamma <= 1, "a number in (0, 1]"),
            "kappa": (0 < self.kappa <= 1, "a number in (0, 1]"),
            **named,
        }

    @classmethod
    def paper(cls) -> "DualConfig":
        """The paper's equations."""
        return cls()

    @classmethod
    def released(cls) -> "DualConfig":
        """The released code's arithmetic, on groups of a uid."""
        return cls(score_offset="minmax", position="zero_based", trajectory_score="normalised_sum", clamp="released")


def minmax(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(x - min) / (max - min + eps) over the last axis among the counted; 0 elsewhere and where nothing is counted."""
    low = values.masked_fill(~counted, math.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~counted, -math.inf).amax(-1, keepdim=True)
    scaled = (values - low) / (high - low + EPS)
    return torch.where(counted, scaled, torch.zeros_like(scaled))


def focus_score(score: torch.Tensor, mask: torch.Tensor, groups: Sequence[Sequence[int]], offset: str) -> torch.Tensor:
    """rho of equation 4: [B, T] in [0, 1] for a score in its range, 0 outside the mask."""
    kept = torch.where(mask, score, torch.zeros_like(score))
    if offset == "none":
        return kept
    if offset == "cosine":
        return torch.where(mask, (kept + 1) / 2, torch.zeros_like(kept))
    out = torch.zeros_like(kept)
    for rows in groups:
        low, high = kept[rows].amin().clamp(max=0.0), kept[rows].amax().clamp(min=0.0)  # a padded token scores 0
        out[rows] = torch.where(mask[rows], (kept[rows] - low) / (high - low + EPS), out[rows])
    return out


def compensation_gate(rho: torch.Tensor, mask: torch.Tensor, gamma: float, kappa: float) -> torch.Tensor:
    """G of equation 6.

    Args:
        rho: [B, T].
        mask: bool [B, T].
        gamma, kappa: see ``DualConfig``.

    Returns:
        bool [B, T]; of n tokens the tail begins after floor((1 - gamma) n), and of its m tokens those reach the gate
        that score no less than the k-th best, k = max(1, floor(kappa m)): ties pass together.
    """
    n_B = mask.sum(-1)
    start_B = torch.floor((1 - gamma) * n_B.double() + 1e-9).long()
    tail = mask & (mask.long().cumsum(-1) > start_B[:, None])
    k_B = torch.floor(kappa * tail.sum(-1).double() + 1e-9).long().clamp(min=1)
    best = rho.masked_fill(~tail, -math.inf).sort(dim=-1, descending=True).values
    return tail & (rho >= best.gather(-1, k_B[:, None] - 1))


def compensated(rho: torch.Tensor, mask: torch.Tensor, config: DualConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """w of equation 5 and the gate: [B, T] and bool [B, T]; w is 0 outside the mask."""
    n_B1, t = mask.sum(-1, keepdim=True), mask.long().cumsum(-1)
    zero_based = config.position == "zero_based"
    share = ((t - int(zero_based)) / (n_B1 - int(zero_based)).clamp(min=1)).to(rho.dtype)
    ramp = {"linear": share, "exponential": torch.expm1(share) / math.expm1(1.0), "step": torch.ones_like(share)}
    gate = compensation_gate(rho, mask, config.gamma, config.kappa)
    return rho * torch.where(gate, 1 + config.beta * ramp[config.schedule], torch.ones_like(rho)), gate


def dual_grained_factors(
    score: torch.Tensor,
    response_mask: torch.Tensor,
    uid: Sequence[object],
    config: DualConfig,
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 + psi and 1 + phi.

    Args:
        score: [B, T] visual focus of each token, in the range that ``config.score_offset`` expects; values outside the
            mask are not read.
        response_mask: [B, T]; not edited.
        uid: B names of the prompts.
        config: see ``DualConfig``.
        counted: bool [B], rows that have a score; the others get factor 1 and take no part in their group. None: all.
            Rows without a token never do.

    Returns:
        ``(token_factor [B, T], trajectory_factor [B])``, >= 0. Without clamps the first has mean one over each
        response, the second over the counted rows of each group. 1 outside the mask, and where nothing can be compared.
    """
    mask = response_mask.bool()
    counted = mask.any(-1) if counted is None else counted & mask.any(-1)
    mask = mask & counted[:, None]
    groups = [kept for rows in group_rows(uid) if (kept := [row for row in rows if counted[row]])]
    # in float64: a min-max with so small an eps would blow the rounding of float32 sums up to the whole range
    rho = focus_score(score.detach().double(), mask, groups, config.score_offset)
    w, _ = compensated(rho, mask, config)
    u = minmax(w, mask)

    psi = torch.where(mask, u - masked_mean(u, mask)[:, None], torch.zeros_like(u))
    token_factor = 1 + psi if config.intra else torch.ones_like(psi)

    s_B = {"sum": w.sum(-1), "normalised_sum": u.sum(-1), "mean": masked_mean(w, mask)}[config.trajectory_score]
    trajectory_factor = torch.ones_like(s_B)
    for rows in groups if config.inter else ():
        s_G = minmax(s_B[rows], torch.ones(len(rows), dtype=torch.bool, device=s_B.device))
        trajectory_factor[rows] = 1 + s_G - s_G.mean()
    if config.clamp == "released":
        token_factor, trajectory_factor = token_factor.clamp(*TOKEN_CLAMP), trajectory_factor.clamp(*TRAJECTORY_CLAMP)
    return token_factor.to(score.dtype), trajectory_factor.to(score.dtype)


@dataclass(frozen=True)
class DualMethod(DualConfig):
    """``algorithm.adv_estimator=attn_dual``: the settings of ``DualConfig`` and where the score comes from.

    Attributes:
        strength: factors are 1 + strength (factor - 1); 0 is GRPO. [ours]
        score: ``cosine`` of last hidden states, or ``image_mass``, the attention on the image. [C] [ours: image_mass]
        layers: decoder layers over which ``image_mass`` is averaged; ``cosine`` uses the last hidden state. [C]
        query_row: ``input``, the row in which y_t is the input; or ``predicting``, the row that sampled y_t. [C] [ours:
            predicting]
    """

    strength: float = 1.0
    score: str = "cosine"
    layers: tuple[int, ...] = (-1,)
    query_row: str = "input"
    name = "attn_dual"
    reference = ("VGPO", "arXiv 2604.09349")
    metrics = (
        Panel(
            "Visual score $S$", "cosine (or attention mass)", (Metric("visual_score/mean", "visual score S", -1, 1),)
        ),
        Panel(
            "Late to early score",
            "ratio of their means",
            (
                Metric(
                    "late_early_visual_score",
                    "late to early visual score",
                    0,
                    unit="ratio",
                    note="Visual focus of the second half of a response over that of the first.",
                ),
            ),
            guide=(1.0, "late as early"),
        ),
        Panel(
            "Gate rate",
            "share of tokens",
            (Metric("dual_gate_rate", "tokens through the gate", 0, 1, "share", live="gate rate"),),
        ),
        Panel(
            "Token factor spread",
            "standard deviation",
            (Metric("dual_token_factor/std", "token factor, standard deviation", 0, 1, live="token factor std"),),
        ),
        Panel(
            "Trajectory factor",
            "factor on the advantage",
            (Metric("dual_trajectory_factor/mean", "trajectory factor, mean", 0, 2, line="mean"),),
            band=(
                Metric("dual_trajectory_factor/min", "trajectory factor, smallest", 0, 2),
                Metric("dual_trajectory_factor/max", "trajectory factor, largest", 0, 2),
            ),
            guide=AS_GRPO,
        ),
    )

    def rules(self) -> Rules:
        cosine = self.score == "cosine"
        return {
            "score": (self.score in SCORES, " or ".join(SCORES)),
            **super().rules(),
            "strength": (0 <= self.strength <= 1, "a number in [0, 1]"),
            "layers": (
                self.layers == (-1,),
                "[-1] if score is cosine, which uses the last hidden state; else distinct layer numbers",
            )
            if cosine
            else distinct_layers(self.layers),
            "query_row": (self.query_row in QUERY_ROWS, " or ".join(QUERY_ROWS)),
            "score_offset": (
                self.score_offset in ("minmax", "cosine" if cosine else "none"),
                "cosine or minmax if score is cosine; none or minmax if score is image_mass",
            ),
        }

    @property
    def gives(self) -> frozenset[CreditKind]:
        parts: tuple[tuple[bool, CreditKind], ...] = ((self.intra, "token"), (self.inter, "trajectory"))
        return frozenset(kind for on, kind in parts if on and self.strength > 0)

    @property
    def _statistic(self) -> Statistic:
        name = "image_cosine" if self.score == "cosine" else "image_mass"
        return Statistic(name, layers=self.layers, query_row=self.query_row)

    def needs(self) -> Needs:
        return Needs(StatisticsRequest((self._statistic,)))

    def credit(self, signals: Signals) -> Credit:
        score, eligible = signals[self._statistic], signals.eligible_rows(boxes=False)
        mask = signals.response_mask.bool() & eligible[:, None]
        token, trajectory = dual_grained_factors(score, signals.response_mask, signals.uid, self, eligible)
        metrics: dict[str, float] = {}
        if eligible.any():
            groups = [kept for rows in group_rows(signals.uid) if (kept := [row for row in rows if eligible[row]])]
            rho = focus_score(score, mask, groups, self.score_offset)
            _, gate = compensated(rho, mask, self)
            late = mask & (2 * mask.long().cumsum(-1) > mask.sum(-1, keepdim=True))
            metrics = {
                "visual_score/mean": float(score[mask].mean()),
                "dual_gate_rate": float(gate.sum() / mask.sum()),
                "dual_token_factor/std": float(token[mask].std(correction=0)),
                "dual_trajectory_factor/mean": float(trajectory[eligible].mean()),
                "dual_trajectory_factor/min": float(trajectory[eligible].min()),
                "dual_trajectory_factor/max": float(trajectory[eligible].max()),
            }
            early = mask & ~late
            if early.any() and rho[early].mean() > 0:
                # our reading of the paper's late against early visual accumulation, on rho, which is not negative
                metrics["late_early_visual_score"] = float(rho[late].mean() / rho[early].mean())
        return Credit(
            token_weight=blend(token, self.strength) if "token" in self.gives else None,
            trajectory_weight=blend(trajectory, self.strength) if "trajectory" in self.gives else None,
            metrics=metrics,
        )
