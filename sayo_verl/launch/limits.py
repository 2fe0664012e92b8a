"""Limits of time of a run: ``sayo.step_limit``, ``sayo.start_limit`` and ``sayo.reward_limit``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError

OFF, AUTO = "off", "auto"
STEPS, LEAST_S = 10, 600.0  # auto: so many median steps, and at least so many seconds
LONG = ("start", "save_checkpoint")  # phases in which nothing tells progress, however long they are
LIMITS = ("sayo.step_limit", "sayo.start_limit", "sayo.reward_limit")


@dataclass(frozen=True)
class Limits:
    """Limits in seconds; None: off.

    Attributes:
        step_s: without progress in a step; 0: from the median step.
        start_s: without progress before the end of the first step and while a checkpoint is saved.
        reward_s: for one call of the reward function.
    """

    step_s: float | None
    start_s: float | None
    reward_s: float | None

    def of_phase(self, phase: str, step_seconds: Sequence[float]) -> float | None:
        """The limit in a phase, in seconds without progress; None: no limit.

        Args:
            phase: verl's name (``sayo_verl.hooks.phases``).
            step_seconds: durations of the last steps; empty in the first step, which compiles and warms up.
        """
        step = self.step_s
        if step == 0 and step_seconds:
            step = max(LEAST_S, STEPS * median(step_seconds))
        if phase in LONG or not step_seconds:
            return None if self.start_s is None else max(step or 0.0, self.start_s)
        return step


def read_limits(config: DictConfig) -> Limits:
    """The limits of a configuration; all off in one without them, which is verl's own.

    Raises:
        SayoError: X10 for a value that is no limit.
    """
    values = {key: OmegaConf.select(config, key, default=OFF) for key in LIMITS}
    return Limits(*(_seconds(key, value, auto=key == LIMITS[0]) for key, value in values.items()))


def _seconds(key: str, value: object, *, auto: bool) -> float | None:
    if value is False or value == OFF:  # YAML reads off as false
        return None
    if auto and value == AUTO:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SayoError(
            "X10",
            "not a limit of time",
            where=key,
            got=repr(value),
            wanted=f"a number of seconds above 0{', auto' if auto else ''} or off",
            fix="correct it (docs/running.md)",
        )
    return float(value)
