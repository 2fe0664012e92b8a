"""What every method stands on: signals in, reward terms out, and the GRPO core that turns rewards into advantages.

A method is a small object that names the attention statistics it needs and adds reward terms to the task reward. The
core here is blind to methods:

    r_i  = task reward_i + sum of weight * term_i                      over the rows a term is valid for
    A_i  = (r_i - mean of its group) / (std of its group + eps)        groups by uid, never by adjacency
    A_it = A_i * response_mask_it

With every weight at zero this is verl's GRPO bit for bit, which is why the group statistics are taken with the same
operations as in ``verl.trainer.ppo.core_algos.compute_grpo_outcome_advantage``: one 1-D ``mean`` and ``std`` a group,
in row order, in the dtype of the rewards.

Shape suffixes: B rows (one response each), T response tokens (padded on the right), G rows of one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

GRPO_EPSILON = 1e-6  # verl's default in compute_grpo_outcome_advantage


@dataclass(frozen=True)
class Signals:
    """What the log-prob pass of the rollout policy tells about a batch. Detached float32; row order is the batch's.

    Attributes:
        response_mask: [B, T], 1 on the response's own tokens.
        entropy: [B, T] in nats, of the distribution that sampled token t.
        statistics: what the method asked for -> [B, T], or [B, T, W] for statistics of several values per token.
        image_tokens: [B] number of visual tokens of the row (0: no image).
        region_tokens: [B] number of visual tokens in the target region (0: no box).
        is_padding: [B] bool, synthetic rows that verl appends to make the batch divisible.
    """

    response_mask: torch.Tensor
    entropy: torch.Tensor
    statistics: Mapping[Statistic, torch.Tensor]
    image_tokens: torch.Tensor
    region_tokens: torch.Tensor
    is_padding: torch.Tensor

    def __getitem__(self, statistic: Statistic) -> torch.Tensor:
        """A statistic's values.

        Raises:
            SayoError: A10 when it was not measured.
        """
        if statistic not in self.statistics:
            raise SayoError(
                "A10",
                "a method reads a statistic that was not measured",
                where=f"statistic {statistic.key}",
                got=[s.key for s in self.statistics],
                fix="name it in the method's statistics()",
            )
        return self.statistics[statistic]

    def neutral_reasons(self) -> dict[str, torch.Tensor]:
        """Why a row cannot carry a region term: reason -> bool [B]. A row has at most one, the first that fits."""
        reasons: dict[str, torch.Tensor] = {}
        taken = torch.zeros_like(self.is_padding)
        for name, hit in (
            ("padding", self.is_padding),
            ("masked", ~self.response_mask.bool().any(-1)),
            ("no_image", self.image_tokens == 0),
            ("no_box", self.region_tokens == 0),
        ):
            reasons[name] = hit & ~taken
            taken = taken | hit
        return reasons

    def check(self) -> None:
        """Assert shapes, presence and finiteness where a method will read.

        Raises:
            SayoError: A02 for a shape that does not fit, A03 for a number that is not finite or out of range.
        """
        B, T = self.response_mask.shape
        per_row = {name: getattr(self, name) for name in ("image_tokens", "region_tokens", "is_padding")}
        per_token = {"entropy": self.entropy, **{s.key: values for s, values in self.statistics.items()}}
        for tensors, shape in ((per_row, (B,)), (per_token, (B, T))):
            for name, tensor in tensors.items():
                if tuple(tensor.shape[: len(shape)]) != shape:
                    raise SayoError(
                        "A02",
                        f"the statistic {name} does not have the shape of the batch",
                        where=f"signals of {B} rows, {T} response tokens",
                        got=tuple(tensor.shape),
                        wanted=shape,
                        fix="this is a defect of sayo-verl or a changed verl; run `sayo doctor` and report both",
                    )
        valid = self.response_mask.bool() & ~self.is_padding[:, None]
        on_image = valid & (self.image_tokens > 0)[:, None]
        _check_range("entropy", self.entropy[valid], 0.0, float("inf"))
        for statistic, values in self.statistics.items():
            _check_range(statistic.key, values[on_image], statistic.fact.low, statistic.fact.high)


def _check_range(name: str, values: torch.Tensor, low: float, high: float) -> None:
    """Raises: SayoError A03."""
    slack = 1e-3  # softmax in float32 over long rows; bf16 models round entropy below zero
    bad = ~torch.isfinite(values) | (values < low - slack) | (values > high + slack)
    if bad.any():
        raise SayoError(
            "A03",
            f"{int(bad.sum())} of {bad.numel()} values of {name} are not finite or out of range",
            where="the response tokens of the log-prob pass",
            got=values[bad][:3].tolist(),
            wanted=f"finite, in [{low}, {high}]",
            fix="a NaN here is a row that the probe never computed or a policy that diverged; look at "
            "actor/grad_norm and lower the learning rate, or report the batch",
        )


@dataclass(frozen=True)
class RewardTerm:
    """One number per response that joins the task reward before group normalisation.

    Attributes:
        name: as in ``sayo/<name>/mean``.
        value: [B]; read only where ``valid``.
        valid: [B] bool; other rows are neutral: left out of the term and of its group statistics.
        weight: strength; a term of weight 0 is not applied at all.
    """

    name: str
    value: torch.Tensor
    valid: torch.Tensor
    weight: float


class Method(Protocol):
    """One way to assign credit. Implementations are frozen dataclasses, one file each, torch only."""

    name: str

    def statistics(self) -> StatisticsRequest:
        """What the probe must measure."""
        ...

    def reward_terms(self, signals: Signals) -> list[RewardTerm]:
        """Terms to add to the task reward."""
        ...

    def metrics(self, signals: Signals) -> dict[str, float]:
        """Scalars to log, without prefix."""
        ...


def group_rows(uid: Sequence[object]) -> list[list[int]]:
    """Row indices of each group, groups in order of first appearance, rows in batch order."""
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


def group_advantage(
    task_reward: torch.Tensor,
    response_mask: torch.Tensor,
    uid: Sequence[object],
    terms: Sequence[RewardTerm] = (),
    *,
    norm_by_std: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO advantages of the task reward plus reward terms.

    A row that is neutral to an applied term takes no part in the mean and spread of a group in which other rows carry
    that term; its own advantage compares its task reward with the others' as if its term were their average. Groups in
    which no row carries a term are plain GRPO. A group of one keeps its raw reward as advantage, as in verl.

    Args:
        task_reward: [B] outcome reward of each response.
        response_mask: [B, T]; read, never edited.
        uid: B names of the prompts.
        terms: reward terms, see ``RewardTerm``.
        norm_by_std: divide by the group's standard deviation (GRPO) or not (Dr. GRPO).

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
    carried_B = torch.zeros(B, dtype=torch.bool, device=reward_B.device)
    neutral_B = torch.zeros_like(carried_B)
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
        reward_B = reward_B + torch.where(term.valid, term.weight * term.value, torch.zeros_like(reward_B))
        carried_B |= term.valid
        neutral_B |= ~term.valid
    if not torch.isfinite(reward_B).all():
        row = int((~torch.isfinite(reward_B)).nonzero()[0])
        raise SayoError(
            "A03",
            "a reward is not finite",
            where=f"row {row}, uid {uid[row]}",
            got=float(reward_B[row]),
            wanted="a finite number",
            fix="check the reward function; one such reward would poison its whole group",
        )

    advantage_B = torch.empty_like(reward_B)
    for rows in group_rows(uid):
        index_G = torch.tensor(rows, device=reward_B.device)
        # Statistics over the rows that carry every term, unless none of the group does.
        full_G = carried_B[index_G] & ~neutral_B[index_G]
        counted_G = index_G[full_G] if full_G.any() else index_G
        counted = reward_B[counted_G]
        if counted.numel() == 1:
            mean, std = torch.zeros_like(counted[0]), torch.ones_like(counted[0])
        else:
            mean, std = counted.mean(), counted.std()
        scale = std + GRPO_EPSILON
        advantage_B[index_G] = (reward_B[index_G] - mean) / scale if norm_by_std else reward_B[index_G] - mean
        if full_G.any() and not full_G.all():
            rest_G = index_G[~full_G]
            task_mean = task_reward[counted_G].mean() if counted.numel() > 1 else torch.zeros_like(mean)
            gap = task_reward[rest_G] - task_mean
            advantage_B[rest_G] = gap / scale if norm_by_std else gap
    return advantage_B.unsqueeze(-1) * response_mask, reward_B
