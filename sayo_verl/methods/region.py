"""SAYO: a reward for attending to the target region at high-entropy tokens.

Paper: "Do MLLMs Really See It: Reinforcing Visual Attention in Multimodal LLMs", arXiv 2602.08241. For a response with
the tokens Q of highest entropy, target visual tokens T_tgt inside all visual tokens T_all, and attention averaged over
the heads of the last layer (equation numbers of the paper):

    a(t)  = mean over T_tgt of attention(t -> token)                                    (1)
    v(t)  = mean over T_all of attention(t -> token)                                    (2)
    R_a   = (1 + tanh(log((a + eps) / (v + eps)))) / 2                  in (0, 1)       (3), a diagnostic
    a_q, v_q = means of a(t), v(t) over Q                                               (5), (6)
    r_v   = tanh(log((a_q + eps) / (v_q + eps)))                        in (-1, 1)      (7), the reward
    r_o   = r_v + r_f                                                   r_f: format reward

r_v is 0 when the target gets the average attention of a visual token: it is a ratio of densities, so it rewards looking
at the target more than at the rest, not looking at the image more. Exactly, r_v = (x^2 - 1) / (x^2 + 1) with x = a/v.

Assumes: attention is a true softmax over all causal keys of the token's own sequence (the mean over heads and tokens is
taken before the ratio, so denominators do not cancel), read at the row where y_t is the input, from the rollout policy,
without gradient.

Departures from the released code (Cratileo/Sayo), which
 - takes the top 30 % over padded positions, with k from the longest response of the batch: here per response, over its
   valid tokens, k = max(1, floor(fraction * n));
 - locates the image in unpadded ids while its attention rows are left-padded: here positions are those of the row;
 - clamps boxes before it scales them: here boxes are stored normalised, see ``sayo_verl.vision.masks``;
 - leaves out the response's last token, which decoding never feeds back: the log-prob pass has its row, so it counts.
Its formula is unchanged and agrees with it on recorded inputs (tests/test_region.py).

Shape suffixes: B rows, T response tokens.
"""

from dataclasses import dataclass

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods.base import RewardTerm, Signals
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

EPS = 1e-8  # eps of equations 3 and 7, from the released code


def select_tokens(entropy: torch.Tensor, response_mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """The tokens Q: the ``fraction`` of a response's valid tokens with the highest entropy.

    Args:
        entropy: [B, T] in nats; values outside the mask are ignored, whatever they are.
        response_mask: [B, T].
        fraction: in (0, 1]; 1 selects every valid token.

    Returns:
        bool [B, T] with k = max(1, floor(fraction * n)) tokens in a row of n > 0 valid tokens, none in an empty row.
        Of equal entropies the earlier token is taken.
    """
    valid = response_mask.bool()
    n_B = valid.sum(-1)
    # floor(0.58 * 50) must be 29 although the product is 28.999... in binary
    k_B = torch.floor(fraction * n_B.double() + 1e-9).long().clamp(min=1).minimum(n_B)
    order = entropy.masked_fill(~valid, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < k_B[:, None]) & valid


def _mean_over_selected(per_token: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B]; 0 for a row with nothing selected. Values outside the selection may be NaN."""
    kept = torch.where(selected, per_token, torch.zeros_like(per_token))
    return kept.sum(-1) / selected.sum(-1).clamp(min=1)


def region_reward(target_mean: torch.Tensor, image_mean: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """r_v of equations 5 to 7.

    Args:
        target_mean: [B, T] a(t), attention per target visual token, averaged over heads, in [0, 1].
        image_mean: [B, T] v(t), the same per visual token of the image.
        selected: bool [B, T], the tokens Q.

    Returns:
        [B] in (-1, 1); 0 for a row with nothing selected.
    """
    a_B, v_B = _mean_over_selected(target_mean, selected), _mean_over_selected(image_mean, selected)
    return torch.tanh(torch.log((a_B + EPS) / (v_B + EPS)))


def target_attention(target_mean: torch.Tensor, image_mean: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """R_a of equation 3 on the pooled a_q and v_q: [B] in (0, 1), 0.5 when the target gets no more than its share."""
    return 0.5 * (1.0 + region_reward(target_mean, image_mean, selected))


@dataclass(frozen=True)
class RegionMethod:
    """``algorithm.adv_estimator=attn_region``; the defaults are the paper's.

    Attributes:
        weight: strength of r_v; 0 is GRPO.
        entropy_fraction: size of Q as a share of the response, in (0, 1] (paper: 0.3; 1 is its "all tokens" ablation).
        layers: decoder layers to average over (paper and released code: the last).
        coverage: share of a cell that a box must cover, see ``sayo_verl.vision.masks`` (ours: 0.5).
    """

    weight: float = 1.0
    entropy_fraction: float = 0.3
    layers: tuple[int, ...] = (-1,)
    coverage: float = 0.5
    name = "attn_region"

    def __post_init__(self) -> None:
        for key, ok, wanted in (
            ("weight", 0 <= self.weight < float("inf"), "a finite number >= 0"),
            ("entropy_fraction", 0 < self.entropy_fraction <= 1, "a number in (0, 1]"),
            ("layers", len(self.layers) > 0 and len(set(self.layers)) == len(self.layers), "distinct layer numbers"),
            ("coverage", 0 < self.coverage <= 1, "a number in (0, 1]"),
        ):
            if not ok:
                raise SayoError(
                    "A05",
                    f"{key} is out of range",
                    where=f"algorithm.attn.region.{key}",
                    got=getattr(self, key),
                    wanted=wanted,
                    fix=f"set algorithm.attn.region.{key} to {wanted}",
                )

    @property
    def _image_mass(self) -> Statistic:
        return Statistic("image_mass", layers=self.layers, query_row="input")

    @property
    def _region_mass(self) -> Statistic:
        return Statistic("region_mass", layers=self.layers, query_row="input")

    def statistics(self) -> StatisticsRequest:
        return StatisticsRequest((self._image_mass, self._region_mass), coverage=self.coverage)

    def _means(self, signals: Signals) -> tuple[torch.Tensor, torch.Tensor]:
        """a(t), v(t): masses divided by the number of tokens they spread over."""
        target = signals[self._region_mass] / signals.region_tokens.clamp(min=1)[:, None]
        return target, signals[self._image_mass] / signals.image_tokens.clamp(min=1)[:, None]

    def _valid(self, signals: Signals) -> torch.Tensor:
        return ~torch.stack(list(signals.neutral_reasons().values())).any(0)

    def reward_terms(self, signals: Signals) -> list[RewardTerm]:
        selected = select_tokens(signals.entropy, signals.response_mask, self.entropy_fraction)
        value = region_reward(*self._means(signals), selected)
        return [RewardTerm("region_reward", value, self._valid(signals), self.weight)]

    def metrics(self, signals: Signals) -> dict[str, float]:
        valid = self._valid(signals)
        mask = signals.response_mask.bool()
        selected = select_tokens(signals.entropy, signals.response_mask, self.entropy_fraction)
        real = ~signals.is_padding
        out = {
            "rows_with_region_share": float(valid.sum() / real.sum().clamp(min=1)),
            "selected_token_share": float(selected[real].sum() / mask[real].sum().clamp(min=1)),
        }
        for reason, hit in signals.neutral_reasons().items():
            out[f"neutral_rows/{reason}"] = float(hit.sum())
        if valid.any():
            target, image = (x[valid] for x in self._means(signals))
            r_v = region_reward(target, image, selected[valid])
            out["region_reward/mean"] = float(r_v.mean())
            out["region_reward/std"] = float(r_v.std(correction=0))
            out["target_attention/mean"] = float(target_attention(target, image, selected[valid]).mean())
            out["target_attention_all_tokens/mean"] = float(target_attention(target, image, mask[valid]).mean())
            out["image_mass/mean"] = float(_mean_over_selected(signals[self._image_mass][valid], mask[valid]).mean())
            out["region_mass/mean"] = float(_mean_over_selected(signals[self._region_mass][valid], mask[valid]).mean())
        return out
