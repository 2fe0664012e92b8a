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
Its formula is unchanged and agrees with it on recorded inputs (tests/methods/test_region.py).

The paper's r_v grows with the number of pooled tokens, although nobody looks differently. It is the logarithm of a
ratio of means. Attention is heavy-tailed, and a mean over more tokens holds its large values more often. So the length
of a response and ``entropy_fraction`` move the reward. ``pooling="ratio"`` (ours) takes the ratio of each token first:

    r_v = mean over Q of tanh(log((a(t) + eps) / (v(t) + eps)))         in (-1, 1)

A mean of Q tokens drawn at random from a response has the mean over the whole response as its expectation, whatever the
size of Q. ``tests/methods/test_region.py`` shows both. For the same reason R_a over Q cannot be compared with R_a over
all tokens: the metrics that compare them are means of the tokens' own R_a.

``per_token`` is our extension, after the motivating equation 4, which the paper does not train with. It gives no reward
term, but a factor 1 + weight * tanh(log(a(t) / v(t))) on the advantage of each token of Q, 1 on all other tokens.

Shape suffixes: B rows, T response tokens.
"""

from dataclasses import dataclass

import torch

from sayo_verl.methods.base import Credit, CreditKind, RewardTerm, Rules, check_setting, distinct_layers, masked_mean
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.metrics import NO_PREFERENCE, Metric, Panel
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest

EPS = 1e-8  # eps of equations 3 and 7, from the released code
POOLINGS = ("attention", "ratio")


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


def region_reward(
    target_mean: torch.Tensor, image_mean: torch.Tensor, selected: torch.Tensor, pooling: str = "attention"
) -> torch.Tensor:
    """r_v of equations 5 to 7.

    Args:
        target_mean: [B, T] a(t), attention per target visual token, averaged over heads, in [0, 1].
        image_mean: [B, T] v(t), the same per visual token of the image.
        selected: bool [B, T], the tokens Q.
        pooling: ``attention``: the ratio of means (the paper's); ``ratio``: the mean of the tokens' ratios (ours).

    Returns:
        [B] in (-1, 1); 0 for a row with nothing selected.
    """
    if pooling == "ratio":
        return masked_mean(token_ratio(target_mean, image_mean), selected)
    a_B, v_B = masked_mean(target_mean, selected), masked_mean(image_mean, selected)
    return torch.tanh(torch.log((a_B + EPS) / (v_B + EPS)))


def target_attention(target_mean: torch.Tensor, image_mean: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """R_a of equation 3 on the pooled a_q and v_q: [B] in (0, 1), 0.5 when the target gets no more than its share."""
    return 0.5 * (1.0 + region_reward(target_mean, image_mean, selected))


def token_ratio(target_mean: torch.Tensor, image_mean: torch.Tensor) -> torch.Tensor:
    """tanh(log(a(t) / v(t))) of each token: [B, T] in (-1, 1), 0 where the target gets its share."""
    return torch.tanh(torch.log((target_mean + EPS) / (image_mean + EPS)))


@dataclass(frozen=True)
class RegionMethod:
    """``algorithm.adv_estimator=attn_region``.

    Attributes:
        weight: strength of r_v; 0 is GRPO. With ``per_token`` at most 1: a larger one could turn signs. [P section 3:
            r_o = r_v + r_f]
        entropy_fraction: size of Q as a share of the response; 1 is all tokens. [P: the best of the ranges tried] [C]
        layers: decoder layers to average over. [P equation 1: the last] [C: index 35 of 36]
        query_row: ``input``, the row in which y_t is the input; or ``predicting``, the row that sampled y_t. [C] [ours:
            predicting]
        coverage: share of a visual token's cell that a box must cover, see ``sayo_verl.vision.masks``. [ours]
        pooling: of the tokens Q: ``attention`` is a ratio of means, ``ratio`` a mean of ratios, whose expectation does
            not depend on their number. [P equations 5 to 7] [ours: ratio]
        per_token: a factor on each token's advantage instead of the reward; an extension. [ours]
    """

    weight: float = 1.0
    entropy_fraction: float = 0.3
    layers: tuple[int, ...] = (-1,)
    query_row: str = "input"
    coverage: float = 0.5
    pooling: str = "attention"
    per_token: bool = False
    name = "attn_region"
    reference = ("SAYO", "arXiv 2602.08241")
    metrics = (
        Panel(
            "Region reward $r_v$",
            "mean, from -1 to 1",
            (
                Metric(
                    "region_reward/mean",
                    "region reward r_v",
                    -1,
                    1,
                    live="r_v",
                    note="With `pooling=attention` it grows with the number of pooled tokens, as R_a does.",
                ),
            ),
            guide=NO_PREFERENCE,
        ),
        Panel(
            "Target attention $R_a$",
            "mean, from 0 to 1",
            (
                Metric(
                    "target_attention/mean",
                    "pooled R_a, high-entropy tokens",
                    0,
                    1,
                    live="R_a",
                    note="It grows with the number of pooled tokens, `selected_tokens/mean`, although the attention is "
                    "the same. Compare it only where that number is equal.",
                ),
            ),
            guide=(0.5, "no preference"),
        ),
        # A mean over more tokens raises R_a, so tokens are compared one by one.
        Panel(
            "$R_a$ of single tokens",
            "mean over tokens",
            (
                Metric(
                    "token_target_attention/mean",
                    "R_a of single tokens, high-entropy tokens",
                    0,
                    1,
                    line="high-entropy tokens",
                    note="Its expectation does not depend on the number of tokens, so it can be compared with that of "
                    "all tokens, and between responses of other lengths.",
                ),
                Metric("token_target_attention_all/mean", "R_a of single tokens, all tokens", 0, 1, line="all tokens"),
            ),
            guide=(0.5, "no preference"),
        ),
        Metric("selected_tokens/mean", "high-entropy tokens per response", 0, decimals=1),
        Metric("image_mass/mean", "attention mass on the image", 0, 1),
        Metric(
            "region_token_weight/mean",
            "token weight in rows with a region, mean",
            0,
            2,
            note="Logged with `per_token` only.",
        ),
        Metric("rows_with_region_share", "share of rows with a region", 0, 1),
        Metric("region_reward/std", "region reward r_v, standard deviation", 0, 1, shown=False),
        Metric("region_mass/mean", "attention mass on the target", 0, 1, shown=False),
        Metric("selected_token_share", "high-entropy tokens, share of all", 0, 1, shown=False),
    )

    def __post_init__(self) -> None:
        check_setting("region", self, self.rules())

    def rules(self) -> Rules:
        """What each setting must be."""
        highest = 1.0 if self.per_token else float("inf")
        return {
            "weight": (
                0 <= self.weight <= highest and self.weight < float("inf"),
                "a number in [0, 1] with per_token" if self.per_token else "a finite number >= 0",
            ),
            "entropy_fraction": (0 < self.entropy_fraction <= 1, "a number in (0, 1]"),
            "layers": distinct_layers(self.layers),
            "query_row": (self.query_row in QUERY_ROWS, " or ".join(QUERY_ROWS)),
            "coverage": (0 < self.coverage <= 1, "a number in (0, 1]"),
            "pooling": (self.pooling in POOLINGS, " or ".join(POOLINGS)),
        }

    @property
    def gives(self) -> frozenset[CreditKind]:
        if self.weight == 0:
            return frozenset()
        return frozenset({"token" if self.per_token else "reward"})

    @property
    def _image_mass(self) -> Statistic:
        return Statistic("image_mass", layers=self.layers, query_row=self.query_row)

    @property
    def _region_mass(self) -> Statistic:
        return Statistic("region_mass", layers=self.layers, query_row=self.query_row)

    def needs(self) -> Needs:
        return Needs(StatisticsRequest((self._image_mass, self._region_mass), coverage=self.coverage), boxes=True)

    def credit(self, signals: Signals) -> Credit:
        mask, valid = signals.response_mask.bool(), signals.eligible_rows()
        image_mass, region_mass = signals[self._image_mass], signals[self._region_mass]
        # a(t), v(t): masses divided by the number of tokens they spread over
        target = region_mass / signals.region_tokens.clamp(min=1)[:, None]
        image = image_mass / signals.image_tokens.clamp(min=1)[:, None]
        selected = select_tokens(signals.entropy, mask, self.entropy_fraction)
        r_v = region_reward(target, image, selected, self.pooling)
        of_token = 0.5 * (1.0 + token_ratio(target, image))  # R_a of single tokens

        real = ~signals.is_padding
        metrics = {
            "rows_with_region_share": float(valid.sum() / real.sum().clamp(min=1)),
            "selected_token_share": float(selected[real].sum() / mask[real].sum().clamp(min=1)),
        }
        if valid.any():
            metrics |= {
                "region_reward/mean": float(r_v[valid].mean()),
                "region_reward/std": float(r_v[valid].std(correction=0)),
                "target_attention/mean": float(target_attention(target, image, selected)[valid].mean()),
                "token_target_attention/mean": float(masked_mean(of_token, selected)[valid].mean()),
                "token_target_attention_all/mean": float(masked_mean(of_token, mask)[valid].mean()),
                "selected_tokens/mean": float(selected.sum(-1)[valid].float().mean()),
                "image_mass/mean": float(masked_mean(image_mass, mask)[valid].mean()),
                "region_mass/mean": float(masked_mean(region_mass, mask)[valid].mean()),
            }
        if not self.per_token:
            return Credit((RewardTerm("region_reward", r_v, valid, self.weight),), metrics=metrics)
        counts = selected & valid[:, None]
        weight = torch.where(counts, 1 + self.weight * token_ratio(target, image), torch.ones_like(target))
        if valid.any():
            metrics["region_token_weight/mean"] = float(weight[mask & valid[:, None]].mean())
        return Credit(token_weight=weight if self.gives else None, metrics=metrics)
