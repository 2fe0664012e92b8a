"""Signals with random content that keep every promise of the probe, for any method: what it needs and nothing else.

Shape suffixes: B rows, T response tokens, k values per token.
"""

import torch

from sayo_verl.methods import Needs, Signals
from sayo_verl.probe.statistics import Statistic

NAN = float("nan")


def invent(needs: Needs, seed: int, B: int, T: int, *, groups: int = 2, ties: bool = False) -> Signals:
    """Rows of every kind: of 0 to T tokens, with and without image and box, padding; NaN wherever nobody may read.

    Args:
        needs: of the method.
        seed: of everything.
        B: rows.
        T: tokens of the longest possible response.
        groups: prompts; rows belong to them at random.
        ties: few different values, so that many are equal.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        x = torch.rand(shape, generator=g)
        return (x * 3).round() / 3 if ties else x

    length_B = torch.randint(0, T + 1, (B,), generator=g)
    mask = (torch.arange(T) < length_B[:, None]).long()
    image_tokens = torch.randint(0, 5, (B,), generator=g).clamp(max=3) * 4  # a fifth has no image
    region_tokens = torch.minimum(torch.randint(0, 4, (B,), generator=g), image_tokens)
    is_padding = (torch.rand(B, generator=g) < 0.1) & (torch.arange(B) > 0)
    mask[is_padding] = 0
    off = ~(mask.bool() & (image_tokens > 0)[:, None])
    image_mass = uniform(B, T) * 0.8

    def values(statistic: Statistic) -> torch.Tensor:
        if statistic.name == "image_mass":
            out = image_mass.clone()
        elif statistic.name == "region_mass":
            out = image_mass * uniform(B, T)
        elif statistic.name == "sink_mass":
            out = (1 - image_mass) * uniform(B, T)
        elif statistic.name == "image_cosine":
            out = uniform(B, T) * 2 - 1
        elif statistic.name == "neighbour_index":
            out = _neighbours(mask, statistic.size, g)
        elif statistic.name == "neighbour_similarity":
            out = uniform(B, T, statistic.size)
        else:
            raise AssertionError(f"teach this file to invent {statistic.name}")
        out[off] = NAN
        return out

    outside = ~mask.bool()
    entropy, log_probs = uniform(B, T) * 3, -uniform(B, T) * 5
    counterfactual = log_probs - uniform(B, T) * 2 + 1
    for tensor in (entropy, log_probs, counterfactual):
        tensor[outside] = NAN
    counterfactual.clamp_(max=0.0)
    return Signals(
        response_mask=mask,
        entropy=entropy,
        log_probs=log_probs,
        statistics={statistic: values(statistic) for statistic in needs.statistics.statistics},
        image_tokens=image_tokens.float(),
        region_tokens=region_tokens.float(),
        is_padding=is_padding,
        uid=tuple("abcdefgh"[i] for i in torch.randint(0, groups, (B,), generator=g).tolist()),
        counterfactual_log_probs=counterfactual if needs.intervention is not None else None,
        correct=(uniform(B) > 0.5).float() if needs.correctness else None,
    )


def _neighbours(mask: torch.Tensor, k: int, g: torch.Generator) -> torch.Tensor:
    """[B, T, k] distinct other tokens of the response, -1 where there are fewer."""
    B, T = mask.shape
    out = torch.full((B, T, k), -1.0)
    for b in range(B):
        n = int(mask[b].sum())
        for t in range(n):
            others = [i for i in torch.randperm(n, generator=g).tolist() if i != t][:k]
            out[b, t, : len(others)] = torch.tensor(others, dtype=torch.float32)
    return out


def take(signals: Signals, rows: list[int]) -> Signals:
    """The same signals of some rows, in that order."""
    per_row = {
        name: None if value is None else value[rows]
        for name, value in vars(signals).items()
        if name not in ("statistics", "uid")
    }
    return Signals(
        **per_row,
        statistics={statistic: value[rows] for statistic, value in signals.statistics.items()},
        uid=tuple(signals.uid[row] for row in rows),
    )
