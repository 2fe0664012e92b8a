"""From the host to the device, once for many small tensors and without waiting.

A copy from ordinary memory makes the host wait until the device has done all that it was given before. A copy from
pinned memory does not: the host goes on to launch the model's next layers.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

_ALIGNMENT = 8  # bytes of the widest element type


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy small CPU tensors of any types and shapes to a device, as one transfer.

    Args:
        tensors: on the CPU.
        device: where they are wanted.

    Returns:
        The tensors on the device, in order; views of one buffer, or the tensors themselves when they are there already.
    """
    if device == torch.device("cpu"):
        return list(tensors)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    starts = [0, *accumulate(padded)]
    there = _pinned(starts[-1], device)
    for tensor, start, size in zip(tensors, starts[:-1], sizes, strict=True):
        there[start : start + size].view(tensor.dtype).copy_(tensor.flatten())
    there = there.to(device, non_blocking=True)
    return [
        there[start : start + size].view(tensor.dtype).view(tensor.shape)
        for tensor, start, size in zip(tensors, starts[:-1], sizes, strict=True)
    ]


def _pinned(size: int, device: torch.device) -> torch.Tensor:
    """Bytes on the host from which the device copies by itself; only CUDA has such memory in torch."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
