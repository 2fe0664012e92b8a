"""Time and memory for ``probe_cost.py`` on a CPU and on a CUDA device, with one interface."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


class Meter(Protocol):
    """Interface of the meters.

    Attributes:
        lacks_memory: the out-of-memory error.
        shortest: seconds below which a function is repeated.

    ``seconds`` runs a function some times and returns the time of one run. ``peak_bytes`` runs it once and returns the
    peak of memory above its previous use.
    """

    lacks_memory: type[Exception]
    shortest: float

    def seconds(self, function: Callable[[], Any], repeat: int = 1) -> float: ...

    def peak_bytes(self, function: Callable[[], Any]) -> int: ...


class CpuMeter:
    """CPU time of this process, which other processes disturb less than wall time, and resident memory.

    Memory needs Linux and a process that returns freed memory at once (``MALLOC`` of probe_cost.py), because memory
    kept from an earlier call would hide a peak. Code counts as memory in its first run, so a function must have run
    before, for example on a short batch.
    """

    lacks_memory: type[Exception] = MemoryError
    shortest = 0.02

    def seconds(self, function: Callable[[], Any], repeat: int = 1) -> float:
        start = time.process_time()
        for _ in range(repeat):
            function()
        return (time.process_time() - start) / repeat

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        kept = function()
        peak = _status_bytes("VmHWM") - before
        del kept
        return max(peak, 0)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


class CudaMeter:
    """CUDA events around a function, and the caching allocator's high-water mark."""

    lacks_memory: type[Exception] = torch.cuda.OutOfMemoryError
    shortest = 0.005

    def seconds(self, function: Callable[[], Any], repeat: int = 1) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / repeat

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak


def meter_of(device: torch.device) -> Meter:
    return CudaMeter() if device.type == "cuda" else CpuMeter()


@dataclass(frozen=True)
class Timed:
    """A function to time.

    Attributes:
        function: what to run.
        rounds: number of rounds, from the first; None: all.
        whole: a whole pass, run once a round; otherwise repeated until it lasts ``Meter.shortest``.
    """

    function: Callable[[], Any]
    rounds: int | None = None
    whole: bool = True


def in_rounds(
    meter: Meter, timed: Mapping[str, Timed], rounds: int, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Time functions in rounds that run each of them in a new order.

    The order is random with a fixed seed. A card cools during short functions and then runs the next pass faster, so a
    pass must not always follow the same function. Python's garbage collection runs only between rounds.

    Returns:
        by name ``{"seconds": [one per round]}``, or ``{"failed": error}`` if it does not fit in memory.
    """
    report(f"{len(timed)} variants: each runs before any is timed")
    repeats: dict[str, int] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, entry in timed.items():
        try:
            entry.function()  # compiles kernels, makes workspaces
            once = meter.shortest if entry.whole else meter.seconds(entry.function)
        except meter.lacks_memory as error:
            results[name] = {"failed": str(error) or type(error).__name__}
            continue
        repeats[name] = min(max(1, round(meter.shortest / max(once, 1e-9))), 1000)
        results[name] = {"seconds": [], "repeat": repeats[name]}
    names, shuffled = list(repeats), random.Random(0)
    for n in range(rounds):
        shuffled.shuffle(names)
        gc.collect()
        gc.disable()
        try:
            for name in names:
                limit = timed[name].rounds
                if limit is None or n < limit:
                    results[name]["seconds"].append(meter.seconds(timed[name].function, repeats[name]))
        finally:
            gc.enable()
        report(f"round {n + 1} of {rounds}")
    return results


def peaks(
    meter: Meter, functions: Mapping[str, Callable[[], Any]], report: Callable[[str], None]
) -> dict[str, int | None]:
    """Peak memory of each function above the previous use, in bytes; None if it did not fit."""
    report(f"memory of {len(functions)} variants")
    gc.collect()  # reference cycles of earlier work
    found: dict[str, int | None] = {}
    for name, function in functions.items():
        try:
            found[name] = meter.peak_bytes(function)
        except meter.lacks_memory:
            found[name] = None
    return found


def machine(device: torch.device, backend: str) -> dict[str, Any]:
    """Description of the machine, for the page."""
    import transformers

    facts: dict[str, Any] = {
        "device": device.type,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": backend,
    }
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        return facts | {
            "name": properties.name,
            "memory": properties.total_memory,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        }
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return facts | {
        "name": names[0] if names else "unknown processor",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def matmul_rate(meter: Meter, n: int, device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of a square matrix product, median of eleven."""
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _median_seconds(meter, lambda: a @ b)


def copy_rate(meter: Meter, n_bytes: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy, median of eleven."""
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _median_seconds(meter, lambda: target.copy_(source))


def _median_seconds(meter: Meter, function: Callable[[], Any]) -> float:
    function()
    return statistics.median(meter.seconds(function) for _ in range(11))
