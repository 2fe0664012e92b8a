"""Statistics of attention profiles, one sequence at a time, because profiles are too large to keep.

Shape suffixes: T response tokens, V visual tokens, k the requested size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe.neighbours import top_neighbours
from sayo_verl.probe.statistics import Statistic

# Limit for the profiles of a micro-batch that are kept at once because a statistic averages them over layers.
MAX_PROFILE_BYTES = 2**30


@dataclass
class Profiles:
    """Statistics that share the same profiles, and the profiles read so far.

    Attributes:
        layers: numbers from 0, over which a profile is averaged.
        query_row: the row convention.
        statistics: computed from the profiles.
        not_finite: int64 on the device, number of values that are not finite in profiles to compare.
        held: row -> sum of its profiles so far [T, V] and their number, while layers are missing.
    """

    layers: frozenset[int]
    query_row: str
    statistics: list[Statistic]
    not_finite: torch.Tensor
    held: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def take(self, n: int, profile_TV: torch.Tensor) -> Iterator[tuple[Statistic, torch.Tensor]]:
        """Add one layer's share of row n's profile.

        Yields:
            Every statistic that this completes, with its values: [V] of ``patch_sums`` for each layer, which the caller
            sums; [T, k] of the others, which are not linear in a profile and need the mean over layers.
        """
        for statistic in self.statistics:
            if not statistic.size:
                yield statistic, profile_TV.sum(0)
        sized = [s for s in self.statistics if s.size]
        if not sized:
            return
        before, reads = self.held.pop(n, (None, 0))
        profile_TV, reads = profile_TV if before is None else before + profile_TV, reads + 1
        if reads < len(self.layers):
            self.held[n] = profile_TV, reads
            return
        ranked: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}  # kind and size -> index, values
        for statistic in sized:
            kind = statistic.name.rpartition("_")[0]
            if (kind, statistic.size) not in ranked:
                ranked[kind, statistic.size] = self._rank(kind, profile_TV, statistic.size)
            index_Tk, values_Tk = ranked[kind, statistic.size]
            yield statistic, index_Tk.float() if statistic.name.endswith("_index") else values_Tk

    def _rank(self, kind: str, profile_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return index [T, k] and attention or similarity [T, k]."""
        if kind == "top_patch":
            mass_Tk, index_Tk = profile_TV.topk(min(k, profile_TV.shape[1]))
            return _widen(index_Tk, k, -1.0), _widen(mass_Tk, k, 0.0)
        self.not_finite += (~profile_TV.isfinite()).sum()
        return top_neighbours(profile_TV, k)


def grouped(statistics: Mapping[Statistic, set[int]], device: torch.device) -> list[Profiles]:
    """Group statistics of profiles by the profiles they need; ``statistics`` maps each to its layer numbers."""
    groups: dict[tuple[frozenset[int], str], list[Statistic]] = {}
    for statistic, numbers in statistics.items():
        if statistic.spec.source == "profile":
            groups.setdefault((frozenset(numbers), statistic.query_row), []).append(statistic)
    return [Profiles(*key, group, torch.zeros((), dtype=torch.int64, device=device)) for key, group in groups.items()]


def check_held(groups: Sequence[Profiles]) -> None:
    """Refuse a micro-batch whose kept profiles take too much memory.

    Raises:
        SayoError: P23.
    """
    size = sum(profile.numel() * 4 for group in groups for profile, _ in group.held.values())
    if size > MAX_PROFILE_BYTES:
        raise SayoError(
            "P23",
            "attention profiles of several layers take too much memory",
            where="Measurement.read",
            got=f"{size / 2**20:.0f} MiB in one micro-batch",
            wanted=f"at most {MAX_PROFILE_BYTES / 2**20:.0f} MiB",
            fix="request one layer, or lower actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
        )


def _widen(values_Tn: torch.Tensor, k: int, fill: float) -> torch.Tensor:
    """Pad [T, n] to [T, k] if there are fewer visual tokens than requested."""
    return torch.nn.functional.pad(values_Tn.float(), (0, k - values_Tn.shape[1]), value=fill)
