"""Updates that verl skips: where gradients are not finite, its FSDP engine prints a line and keeps the weights.

Here each is noted on the run's board, for a metric, and the third in a row ends the run. After a first one the
gradients of the next update are searched for the parameters that are not finite.
"""

import functools
import itertools
import math
import os
from types import ModuleType
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board
from sayo_verl.hooks.contract import RUN_TOKEN

TOPIC = "skipped_updates"
MOST_IN_A_ROW = 3
NAMED = 3  # parameters of a message
_skipped = [0]  # of this process, in which the actor and the critic may each have an engine


def count_skipped_updates(fsdp_engine: ModuleType) -> None:
    """Make verl's FSDP engine count skipped updates.

    Args:
        fsdp_engine: ``verl.workers.engine.fsdp.transformer_impl``.
    """
    cls: Any = fsdp_engine.FSDPEngine
    update = cls.optimizer_step

    @functools.wraps(update)
    def optimizer_step(self: Any) -> float:
        in_a_row = self.__dict__.get("_sayo_skipped_in_a_row", 0)
        named = _not_finite(self.module) if in_a_row else ""
        norm = update(self)
        if math.isfinite(norm):
            self._sayo_skipped_in_a_row = 0
            return norm
        self._sayo_skipped_in_a_row = in_a_row + 1
        _skipped[0] += 1
        if os.environ.get(RUN_TOKEN):
            board.put(f"{TOPIC}/{os.uname().nodename}-{os.getpid()}", {"skipped": _skipped[0]})
        if in_a_row + 1 >= MOST_IN_A_ROW:
            raise SayoError(
                "A34",
                f"the gradient was not finite in {MOST_IN_A_ROW} updates in a row, and verl skipped them",
                where=named or "gradients that are finite on this device",
                got=f"a norm of {norm}; {_skipped[0]} skipped updates of this process since the start",
                wanted="a finite norm",
                fix="resume from a checkpoint before the first one (sayo/skipped_updates), with a lower "
                "actor_rollout_ref.actor.optim.lr; if it happens in step 1, look at the model's weights and rewards",
            )
        return norm

    cls.optimizer_step = optimizer_step


def skipped_updates() -> int:
    """Updates that the run skipped since its start. Every worker counts all of them."""
    if not os.environ.get(RUN_TOKEN):
        return 0
    return max((message["skipped"] for message in board.read(f"{TOPIC}/")), default=0)


def _not_finite(module: Any) -> str:
    """The first parameters whose gradient on this device is not finite, and how many more there are."""
    bad = (name for name, parameter in module.named_parameters() if not _finite(parameter.grad))
    first = [name.replace("_fsdp_wrapped_module.", "") for name in itertools.islice(bad, NAMED)]
    more = sum(1 for _ in bad)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _finite(gradient: Any) -> bool:
    return gradient is None or bool(getattr(gradient, "_local_tensor", gradient).isfinite().all())
