"""A stand-in for a device, on the CPU, that counts where the host would wait for it.

On an accelerator, work is queued: a function that needs a value on the host waits until the queue is empty. The
stand-in marks tensors that would be on the device and looks at every call of torch's Python functions. It counts
reading a value, copying from memory that is not pinned, and indexing by anything that torch must look at first. Values
are real, so a test can compare them too. What C++ does inside one call it does not see.
``torch.cuda.set_sync_debug_mode`` sees that, on a GPU.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from sayo_verl.probe import transfer

DEVICE = torch.device("cpu:0")  # not equal to torch.device("cpu"), which is the host's
READS = {
    "tolist",
    "item",
    "numpy",
    "cpu",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "allclose",
    "bincount",
    "repeat_interleave",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
}
FACTORIES = {"zeros", "ones", "full", "empty", "arange"}


class OnDevice(torch.Tensor):
    """A tensor that would be on the device; what is computed from it is, too."""


class Waits(TorchFunctionMode):
    """Counts waits by the function that causes them, while it is entered.

    Attributes:
        found: "function at file:line" -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        there = any(isinstance(x, OnDevice) for x in _leaves((args, kwargs)))
        if there and name in READS:
            self._note(name)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnDevice) and _looked_at(args[1]):
            self._note("index")
        elif there and not name.startswith("_nested") and any(_on_host(x) for x in _leaves((args, kwargs))):
            # a jagged tensor is made with a placeholder that stays on the host
            self._note(f"{name} of a host's and a device's tensor")
        moves = name == "to" and not there and (DEVICE in args or kwargs.get("device") == DEVICE)
        if moves and not (kwargs.get("non_blocking") and getattr(args[0], "pinned_here", False)):
            self._note("to")
        if name in ("tensor", "as_tensor") and "device" in kwargs:
            self._note(name)
            moves = True
        result = func(*args, **kwargs)
        if moves or (name in FACTORIES and "device" in kwargs):
            return result.as_subclass(OnDevice)
        return result

    def _note(self, what: str) -> None:
        frame = next((f for f in reversed(traceback.extract_stack()) if "sayo_verl" in f.filename), None)
        place = f"{frame.filename.rpartition('sayo_verl/')[2]}:{frame.lineno}" if frame else "the test"
        self.found[f"{what} at {place}"] += 1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count waits; memory that the probe asks for as pinned is marked so."""
    original = transfer._pinned

    def pinned(size: int, device: torch.device) -> torch.Tensor:
        buffer = original(size, device)
        buffer.pinned_here = True
        return buffer

    with mock.patch.object(transfer, "_pinned", pinned), Waits() as waits:
        yield waits.found


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) and value.ndim > 0


def _looked_at(index: Any) -> bool:
    """Whether an index is a list, a mask, or a tensor that has to be copied first."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(x, list) or _on_host(x) or (isinstance(x, torch.Tensor) and x.dtype == torch.bool) for x in parts
    )
