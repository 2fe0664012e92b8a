"""What the trainer does now, on the board for the launcher's watchdog (``sayo_verl.launch.watchdog``).

verl times each phase of a step with ``marked_timer``. Here the timer also writes the phase to the board, about 20 times
a step. While rollouts are awaited, new trajectories count as progress. It observes every trainer, those of verl's own
estimators too, and changes no number. A process outside a run of our launcher writes nothing.
"""

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sayo_verl.hooks import board
from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.hooks.phase_names import START

TOPIC, TIMEOUTS = "phase", "reward_timeouts"
BETWEEN = "between"  # the timers of two steps
PROGRESS_S = 2.0  # at most one message of rollouts in so many seconds
TRAINERS = tuple(f"verl.trainer.ppo.v1.trainer_{mode}" for mode in ("base", "sync", "colocate_async", "separate_async"))


class Phases:
    """State of the trainer of this process.

    Attributes:
        phase: verl's name of the innermost timer, ``validate``, ``START`` or ``BETWEEN``.
        step: the current step; 0 before the first.
        seconds: durations of the last steps, from start to start.
    """

    def __init__(self) -> None:
        self.phase, self.step = START, 0
        self.seconds: deque[float] = deque(maxlen=50)
        self._step_began: float | None = None
        self._seen: tuple[int, ...] = ()
        self._told = 0.0
        self._late = 0

    def enter(self, phase: str) -> None:
        """Set the phase."""
        self.phase = phase
        self._tell()

    def begin_step(self, step: int) -> None:
        """Set the step; its start ends the one before."""
        now = time.monotonic()
        if self._step_began is not None:
            self.seconds.append(round(now - self._step_began, 3))
        self.step, self._step_began = step, now
        self._tell()

    def rollouts(self, seen: tuple[int, ...]) -> None:
        """Report progress if the numbers of trajectories and prompts differ from those before."""
        if seen != self._seen and time.monotonic() - self._told >= PROGRESS_S:
            self._seen = seen
            self._tell()

    def late_rewards(self) -> int:
        """Reward calls over their limit since the last call of this method."""
        before, self._late = self._late, len(board.read(TIMEOUTS))
        return self._late - before

    def leave(self, outer: str) -> None:
        """Return to the phase around the one that ends."""
        self.enter(BETWEEN if outer == START else outer)

    def _tell(self) -> None:
        self._told = time.monotonic()
        if os.environ.get(RUN_TOKEN):
            board.put(TOPIC, {"phase": self.phase, "step": self.step, "seconds": list(self.seconds)})


STATE = Phases()


def tell_timers(trainer: ModuleType) -> None:
    """Make ``marked_timer`` of a module with trainers tell its phase.

    Args:
        trainer: one of ``TRAINERS``, just imported. Each has its own name for verl's function.
    """
    original: Any = trainer.marked_timer

    @contextlib.contextmanager
    def marked_timer(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        outer = STATE.phase
        STATE.enter(name)
        with original(name, *args, **kwargs):
            yield
        STATE.leave(outer)  # not after an error, which is of this phase

    trainer.marked_timer = marked_timer  # type: ignore[attr-defined]


def tell_steps(trainer_base: ModuleType) -> None:
    """Make verl's base trainer tell its steps and validations, and count the reward calls over their limit.

    Args:
        trainer_base: ``verl.trainer.ppo.v1.trainer_base``, just imported.
    """
    cls: Any = trainer_base.PPOTrainer
    step, validate = cls.step, cls._validate

    @functools.wraps(step)
    def counted(self: Any, metrics: dict, timing_raw: dict) -> Any:
        STATE.begin_step(int(self.global_steps))
        batch = step(self, metrics, timing_raw)
        if os.environ.get(RUN_TOKEN):
            metrics["sayo/reward_timeouts"] = float(STATE.late_rewards())
        return batch

    @functools.wraps(validate)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = STATE.phase
        STATE.enter("validate")
        result = validate(self, *args, **kwargs)
        STATE.leave(outer)
        return result

    cls.step, cls._validate = counted, told


def tell_rollouts(replay_buffer: ModuleType) -> None:
    """Make verl's replay buffers tell that rollouts arrive: they poll TransferQueue while the trainer waits.

    Args:
        replay_buffer: ``verl.trainer.ppo.v1.replay_buffer``, just imported.
    """
    cls: Any = replay_buffer.ReplayBuffer
    sync = cls._sync_metadata_from_transfer_queue

    @functools.wraps(sync)
    def _sync_metadata_from_transfer_queue(self: Any) -> None:
        sync(self)
        groups = (self.partitions, self.pending_keys, self.running_keys, self.finished_keys, self.failure_keys)
        STATE.rollouts(tuple(sum(map(len, group.values())) for group in groups))

    cls._sync_metadata_from_transfer_queue = _sync_metadata_from_transfer_queue
