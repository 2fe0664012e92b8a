"""The GRPO core: from rewards and credit to advantages. Blind to methods.

    r_i  = task reward_i + sum of weight * term_i                      over the rows a term is valid for
    A_i  = (r_i - mean of its group) / (std of its group + eps)        groups by uid, never by adjacency
    A_it = A_i * token_weight_it * trajectory_weight_i + bonus_it      within the response mask, 0 outside it

Without terms, weights and bonuses this is verl's GRPO bit for bit. That is why the group statistics are taken with the
same operations as in ``verl.trainer.ppo.core_algos.compute_grpo_outcome_advantage``: one 1-D ``mean`` and ``std`` a
group, in row order, in the dtype of the rewards.

It differs in one place, on purpose. In float32 the mean of eight rewards of 0.95 is not 0.95, and verl's GRPO gives
each of them an advantage of 0.056 although they are equal. Here a group whose rewards spread over no more than
``spread_floor`` times the largest of them (at least 1) gets exactly zero. ``spread_floor=None`` keeps verl's
arithmetic.

Shape suffixes: B rows (one response each), T response tokens (padded on the right), G rows of one group.
"""

import dataclasses
from collections.abc import Sequence

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods.base import Credit, RewardTerm, check_shape
from sayo_verl.methods.bonus import add_bonuses

GRPO_EPSILON = 1e-6  # verl's default in compute_grpo_outcome_advantage
SPREAD_FLOOR = 1e-6  # about eight roundings of float32


def group_rows(uid: Sequence[object]) -> list[list[int]]:
    """Row indices of each group, groups in order of first appearance, rows in batch order.

    Raises:
        SayoError: A04 for a row without uid.
    """
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(uid):
        if name is None:
            raise SayoError(
                "A04",
                "a row has no uid, so its group is unknown",
                where=f"row {row} of the batch",
                fix="keep verl's own agent loop, which gives every prompt a uid",
            )
        groups.setdefault(str(name), []).append(row)
    return list(groups.values())


def advantages(
    task_reward: torch.Tensor,
    response_mask: torch.Tensor,
    uid: Sequence[object],
    credit: Credit | None = None,
    *,
    norm_by_std: bool = True,
    spread_floor: float | None = SPREAD_FLOOR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of the task reward under a method's credit.

    Args:
        task_reward: [B] outcome reward of each response.
        response_mask: [B, T]; read, never edited.
        uid: B names of the prompts.
        credit: terms, weights and bonuses; None is GRPO.
        norm_by_std: divide by the group's standard deviation (GRPO) or not (Dr. GRPO).
        spread_floor: see the head of this file.

    Returns:
        ``(advantages [B, T], reward [B])``; the reward is the task reward plus the valid terms. Inputs are not mutated.

    Raises:
        SayoError: A02 for shapes that do not fit, A03 for a reward that is not finite, A11 for a weight that is not
            finite or negative, A22 for a bonus that is not finite.
    """
    credit = credit or Credit()
    advantage, reward = group_advantage(
        task_reward, response_mask, uid, credit.terms, norm_by_std=norm_by_std, spread_floor=spread_floor
    )
    B, T = response_mask.shape
    size_BT = advantage.abs()
    for name, weight, shape in (
        ("token_weight", credit.token_weight, (B, T)),
        ("trajectory_weight", credit.trajectory_weight, (B,)),
    ):
        if weight is None:
            continue
        check_shape(name, weight, shape)
        column = weight.detach() if name == "token_weight" else weight.detach().unsqueeze(-1).expand(B, T)
        read = torch.where(response_mask.bool(), column, torch.ones_like(column))
        bad = ~torch.isfinite(read) | (read < 0)
        if bad.any():
            row = int(bad.any(-1).nonzero()[0])
            error = SayoError(
                "A11",
                f"{int(bad.sum())} values of the {name} are negative or not finite",
                where=f"row {row} of the batch",
                got=read[bad][:3].tolist(),
                wanted="finite, 0 or more, so that no advantage changes its sign",
                fix="correct the method's credit()",
            )
            error.row = row
            raise error
        advantage = advantage * read
    return add_bonuses(advantage, size_BT, response_mask.bool(), credit.bonuses), reward


def added_by_bonuses(
    advantage: torch.Tensor,
    task_reward: torch.Tensor,
    response_mask: torch.Tensor,
    uid: Sequence[object],
    credit: Credit,
    *,
    norm_by_std: bool = True,
    spread_floor: float | None = SPREAD_FLOOR,
) -> torch.Tensor | None:
    """What the bonuses of a credit added to each advantage, for logs and pages.

    Args:
        advantage: [B, T] of ``advantages`` with the other arguments.

    Returns:
        [B, T], up to rounding; None for a credit without bonuses.
    """
    if not credit.bonuses:
        return None
    without, _ = advantages(
        task_reward,
        response_mask,
        uid,
        dataclasses.replace(credit, bonuses=()),
        norm_by_std=norm_by_std,
        spread_floor=spread_floor,
    )
    return advantage - without


def group_advantage(
    task_reward: torch.Tensor,
    response_mask: torch.Tensor,
    uid: Sequence[object],
    terms: Sequence[RewardTerm] = (),
    *,
    norm_by_std: bool = True,
    spread_floor: float | None = SPREAD_FLOOR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO advantages of the task reward plus reward terms.

    Each term is treated by itself in each group:

    - A term that at most one row of the group carries is left out there: nothing can be compared with it.
    - Of a term that two or more rows carry, every other row gets the mean of those rows.

    Mean and spread of the group are taken over the rows that carry every term that was not left out. Where fewer than
    two rows do, or where nothing tells these rows apart, they are taken over all rows. A group of one keeps its raw
    reward, as in verl. An example with one term of weight 1 and four rows, of which the last cannot carry it:

        task reward     1     0     0     5
        term            0.5   0.5   0.0   -      the last row gets 1/3
        compared        1.5   0.5   0.0   5.33   mean and spread over the first three

    A row that rejection sampling masked cannot carry a term. It takes part in the statistics at weight 0, where no term
    is applied and this is verl's GRPO, and leaves them at any weight above 0. So with rejection sampling the advantages
    jump between weight 0 and the smallest weight above it.

    Args:
        task_reward: [B] outcome reward of each response.
        response_mask: [B, T]; read, never edited.
        uid: B names of the prompts.
        terms: reward terms, see ``RewardTerm``.
        norm_by_std: divide by the group's standard deviation (GRPO) or not (Dr. GRPO).
        spread_floor: see the head of this file.

    Returns:
        ``(advantages [B, T], reward [B])``; the reward is the task reward plus the valid terms. Inputs are not mutated.

    Raises:
        SayoError: A02 for shapes that do not fit, A03 for a reward that is not finite.
    """
    B = task_reward.shape[0]
    if task_reward.ndim != 1 or response_mask.ndim != 2 or response_mask.shape[0] != B or len(uid) != B:
        raise SayoError(
            "A02",
            "rewards, mask and uids do not describe the same rows",
            where="group_advantage",
            got=f"reward {tuple(task_reward.shape)}, mask {tuple(response_mask.shape)}, {len(uid)} uids",
            wanted="[B], [B, T] and B uids",
            fix="pass one outcome reward per response",
        )
    applied = [term for term in terms if term.weight != 0.0]
    reward_B = task_reward.detach().clone()
    for term in applied:
        if term.value.shape != (B,) or term.valid.shape != (B,):
            raise SayoError(
                "A02",
                f"the reward term {term.name} is not one number per response",
                where="group_advantage",
                got=f"value {tuple(term.value.shape)}, valid {tuple(term.valid.shape)}",
                wanted=f"({B},)",
                fix="reduce the term over tokens first",
            )
        reward_B = reward_B + torch.where(term.valid, term.weight * term.value.detach(), torch.zeros_like(reward_B))
    if not torch.isfinite(reward_B).all():
        row = int((~torch.isfinite(reward_B)).nonzero()[0])
        error = SayoError(
            "A03",
            "a reward is not finite",
            where=f"row {row} of the batch, uid {uid[row]}",
            got=float(reward_B[row]),
            wanted="a finite number",
            fix="check the reward function; one such reward would poison its whole group",
        )
        error.row = row
        raise error

    advantage_B = torch.empty_like(reward_B)
    for rows in group_rows(uid):
        index_G = torch.tensor(rows, device=reward_B.device)
        value_G, full_G = task_reward.detach()[index_G], torch.ones_like(index_G, dtype=torch.bool)
        for term in applied:
            valid_G, term_G = term.valid[index_G], term.weight * term.value.detach()[index_G]
            carriers = int(valid_G.sum())
            if carriers == 0 or carriers == 1 < len(rows):
                continue
            value_G = value_G + torch.where(valid_G, term_G, term_G[valid_G].mean())
            full_G &= valid_G
        counted = value_G[full_G] if int(full_G.sum()) > 1 else value_G
        if _same(counted, spread_floor):
            counted = value_G
        if counted.numel() == 1:
            mean, std = torch.zeros_like(counted[0]), torch.ones_like(counted[0])
        else:
            mean, std = counted.mean(), counted.std()
        centred_G = value_G - mean
        advantage_B[index_G] = centred_G / (std + GRPO_EPSILON) if norm_by_std else centred_G
        if _same(value_G, spread_floor):
            advantage_B[index_G] = 0.0
    return advantage_B.unsqueeze(-1) * response_mask, reward_B


def _same(reward_G: torch.Tensor, spread_floor: float | None) -> bool:
    """Whether nothing tells these rewards apart; one reward alone keeps verl's rule for a group of one."""
    if spread_floor is None or reward_G.numel() < 2:
        return False
    spread = reward_G.max() - reward_G.min()
    return bool(spread <= spread_floor * reward_G.abs().max().clamp(min=1.0))
