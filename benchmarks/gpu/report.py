"""A stage of ``on_gpu.py``: its device, its time limit and its report."""

import contextlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cost.cells import duration
from cost.meter import Meter, meter_of
from cost.store import Store, append_line

REPORT, PAGE_NUMBERS = "report.jsonl", "cuda.json"  # files of the output folder


class NoTimeLeftError(Exception):
    """The time limit of the stage does not allow its next finding."""


class Stage:
    """One run of one stage.

    Args:
        name: of the stage.
        out: folder of the report.
        limit: seconds after which no further finding is started.
        tiny: CPU rehearsal at sizes without meaning.
        card: name of the device, for the report.

    Attributes:
        device: of all tensors.
        stood_in: original -> replacement; written on every line from then on.
        wrong: findings that failed or were wrong.
    """

    def __init__(self, name: str, out: Path, limit: float, tiny: bool, card: str) -> None:
        self.name, self.out, self.tiny, self.card = name, out, tiny, card
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.stood_in: dict[str, str] = {"tiny": "a CPU and tiny shapes, so figures have no meaning"} if tiny else {}
        self.wrong: list[str] = []
        self.meter: Meter = meter_of(self.device)
        self.numbers = Store(out / PAGE_NUMBERS)
        self._begin, self._limit = time.monotonic(), limit

    def left(self) -> float:
        """Seconds until the limit."""
        return self._limit - (time.monotonic() - self._begin)

    def write(self, finding: str, **facts: Any) -> None:
        """Append a line to the report."""
        head = {"stage": self.name, "finding": finding, "at_s": round(time.monotonic() - self._begin, 1)}
        append_line(self.out / REPORT, {**head, "card": self.card, "stood_in": self.stood_in, **facts})

    def run(
        self, finding: str, function: Callable[..., dict[str, Any]], *arguments: Any, needs: float = 5
    ) -> dict[str, Any] | None:
        """Run one finding and report its facts or its error; an error does not stop the stage.

        Args:
            finding: its name.
            function: called with ``arguments``; returns facts. A true ``wrong`` among them marks an incorrect result.
            needs: expected seconds.

        Returns:
            The facts; None for an error.

        Raises:
            NoTimeLeftError: when fewer seconds are left.
        """
        if self.left() < needs:
            raise NoTimeLeftError(finding)
        begin = time.monotonic()
        try:
            facts = function(*arguments)
        except Exception as error:  # noqa: BLE001 (it goes into the report, and the stage ends as failed)
            traceback.print_exc()
            self.write(finding, error=f"{type(error).__name__}: {error}"[:1000])
            self.wrong.append(finding)
            return None
        if facts.get("wrong"):
            self.wrong.append(finding)
        self.write(finding, **facts, seconds=round(time.monotonic() - begin, 2))
        return facts

    def figure(self, what: str, value: str) -> None:
        """Store a figure for the page."""
        entry = {"stage": self.name, "what": what, "value": value, "stood_in": self.stood_in, "card": self.card}
        self.numbers.update("figures", f"{self.name}: {what}", entry, replace=True)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any], rounds: int = 10) -> float:
        """Median time of one call, after a first one that is not timed."""
        function()
        times = sorted(self.meter.seconds(function) for _ in range(1 if self.tiny else rounds))
        return 1000 * times[len(times) // 2]

    def timed(self, what: str, function: Callable[[], Any]) -> float:
        """Like ``milliseconds``, and store a figure for the page."""
        took = self.milliseconds(function)
        self.figure(what, duration(took / 1000))
        return took

    def peak_gib(self) -> float | None:
        """Peak memory since ``reset_peak``, in GiB; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else None

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def host_waits(device: torch.device) -> Iterator[dict[str, int]]:
    """Count the host's waits for the device by place, with torch's sync debug mode.

    torch does not report ``torch.cuda.synchronize`` and waits inside other libraries. On a CPU nothing is counted.
    """
    places: dict[str, int] = {}
    if device.type == "cpu":
        yield places
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
