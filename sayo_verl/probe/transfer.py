"""One copy of many small tensors from the host to the device, without waiting.

A copy from pageable memory makes the host wait until the device has finished all earlier work. A copy from pinned
memory does not, so the host continues to launch the model's next layers.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

_ALIGNMENT = 8  # bytes of the widest element type


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy small CPU tensors of any types and shapes to a device in one transfer.

    Args:
        tensors: on the CPU.
        device: the target.

    Returns:
        The tensors on the device, in order: views of one buffer, or the tensors themselves if the device is the CPU.
    """
    if device == torch.device("cpu"):
        return list(tensors)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    starts = [0, *accumulate(padded)]
    buffer = _pinned(starts[-1], device)
    for tensor, start, size in zip(tensors, starts[:-1], sizes, strict=True):
        buffer[start : start + size].view(tensor.dtype).copy_(tensor.flatten())
    buffer = buffer.to(device, non_blocking=True)
    return [
        buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        for tensor, start, size in zip(tensors, starts[:-1], sizes, strict=True)
    ]


def _pinned(size: int, device: torch.device) -> torch.Tensor:
    """Allocate bytes on the host, pinned on CUDA; torch has pinned memory for CUDA only."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
