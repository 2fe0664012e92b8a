"""Bonuses per token: what a credit adds to advantages after all factors.

Shape suffixes: B rows (one response each), T response tokens.
"""

from collections.abc import Sequence

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods.base import TokenBonus, check_shape


def add_bonuses(
    advantage: torch.Tensor, size: torch.Tensor, mask: torch.Tensor, bonuses: Sequence[TokenBonus]
) -> torch.Tensor:
    """Advantages with all bonuses: first the sum of those without ``protect_sign``, then the sum of those with it.

    The second sum keeps the sign of what it finds, and keeps 0.

    Args:
        advantage: [B, T] with all factors, 0 outside the mask.
        size: [B, T], abs(A_i) on the tokens of row i, the unit of relative bonuses.
        mask: bool [B, T]; bonuses are not read outside it.
        bonuses: in the order in which they are added.

    Returns:
        [B, T]; where all bonuses of a token are 0, the same bits as ``advantage``.
    """
    for protected in (False, True):
        added = [_read(bonus, size, mask) for bonus in bonuses if bonus.protect_sign is protected]
        if not added:
            continue
        total = torch.stack(added).sum(0)
        changed = advantage + total
        if protected:
            negative = torch.where(advantage < 0, changed.clamp(max=0), advantage)
            changed = torch.where(advantage > 0, changed.clamp(min=0), negative)
        # -0.0 + 0.0 is +0.0, so a bonus of 0 is not added
        advantage = torch.where(mask & (total != 0), changed, advantage)
    return advantage


def _read(bonus: TokenBonus, size: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T] in units of the advantage, 0 outside the mask."""
    check_shape("token bonus", bonus.value, tuple(mask.shape))
    value = torch.where(mask, bonus.value.detach(), torch.zeros_like(bonus.value))
    bad = ~torch.isfinite(value)
    if bad.any():
        row = int(bad.any(-1).nonzero()[0])
        error = SayoError(
            "A22",
            f"{int(bad.sum())} values of a token bonus are not finite",
            where=f"row {row} of the batch",
            got=value[bad][:3].tolist(),
            wanted="finite numbers",
            fix="correct the method's credit()",
        )
        error.row = row
        raise error
    return value * size if bonus.relative else value
