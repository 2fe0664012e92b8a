"""One rank's slice of sequences that several ranks share (Ulysses sequence parallelism, packed rows).

Shape suffixes: B rows of the model's batch, G key heads, S tokens of a slice, D head dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shard:
    """This rank's place in a sequence-parallel group, and so its slice of the packed tokens."""

    rank: int
    size: int
    group: Any

    def gather(self, slice_BGSD: torch.Tensor) -> torch.Tensor:
        """Gather the keys of all ranks in order: [B, G, S, D] of the slice -> [B, G, size * S, D]."""
        slices = [torch.empty_like(slice_BGSD, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(slices, slice_BGSD.contiguous(), group=self.group)
        return torch.cat(slices, dim=2)

    def add_up(self, tensor: torch.Tensor) -> None:
        torch.distributed.all_reduce(tensor, group=self.group)
