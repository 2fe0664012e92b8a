"""Random signals with the shapes and ranges of the probe, for any method: what it needs and nothing else.

The launcher tries a user's own method on them before models are loaded, and the tests use them.

Shape suffixes: B rows, T response tokens, k values per token.
"""

import math

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.probe.statistics import Statistic

HEADS = 2  # of a statistic per head


def random_signals(
    needs: Needs, seed: int, B: int, T: int, *, groups: int = 2, ties: bool = False, unread: float = math.nan
) -> Signals:
    """Rows of every kind: of 0 to T tokens, with and without image and box, and padding rows.

    Args:
        needs: of the method.
        seed: of everything.
        B: rows.
        T: tokens of the longest possible response.
        groups: prompts; rows belong to them at random.
        ties: few different values, so that many are equal.
        unread: value of the tokens that a method must not read; NaN shows that it does. verl pads with 0.

    Raises:
        SayoError: A20 for a statistic that has no value per token.
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
        wide = (HEADS,) if statistic.per_head else (statistic.size,) if statistic.size else ()
        if statistic.name == "patch_sums":
            raise SayoError(
                "A20",
                "a method cannot read this statistic: it has a value per visual token, not per response token",
                where="the method's needs()",
                got=statistic.name,
                fix="name top_patch_index and top_patch_mass instead",
            )
        if statistic.name == "neighbour_index":
            out = _neighbours(mask, statistic.size, g)
        elif statistic.name == "top_patch_index":
            most = torch.arange(statistic.size).expand(B, T, -1)
            out = torch.where(most < image_tokens[:, None, None], most, -1).float()
        elif statistic.name == "image_mass" and not wide:
            out = image_mass.clone()
        elif statistic.name == "region_mass" and not wide:
            out = image_mass * uniform(B, T)
        elif statistic.name == "sink_mass" and not wide:
            out = (1 - image_mass) * uniform(B, T)
        else:
            low, high = max(statistic.spec.low, -3.0), min(statistic.spec.high, 3.0)
            out = low + (high - low) * uniform(B, T, *wide)
        out[off] = unread
        return out

    outside = ~mask.bool()
    entropy, log_probs = uniform(B, T) * 3, -uniform(B, T) * 5
    counterfactuals = {i: log_probs - uniform(B, T) * 2 + 1 for i in needs.interventions}
    for tensor in (entropy, log_probs, *counterfactuals.values()):
        tensor[outside] = unread
    return Signals(
        response_mask=mask,
        entropy=entropy,
        log_probs=log_probs,
        statistics={statistic: values(statistic) for statistic in needs.statistics.statistics},
        image_tokens=image_tokens.float(),
        region_tokens=region_tokens.float(),
        is_padding=is_padding,
        uid=tuple("abcdefgh"[i] for i in torch.randint(0, groups, (B,), generator=g).tolist()),
        counterfactuals={i: changed.clamp(max=0.0) for i, changed in counterfactuals.items()},
        correct=(uniform(B) > 0.5).float() if needs.correctness else None,
        reports={
            one.name: tuple(
                None if padding else one.example(int(n), seed + row)
                for row, (n, padding) in enumerate(zip(length_B.tolist(), is_padding.tolist(), strict=True))
            )
            for one in needs.reported
        },
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
