"""Updates that verl skips: where gradients are not finite, its FSDP engine prints a line and keeps the weights.

Here each is noted on the run's board, for a metric, and the third in a row ends the run. After a first one the
gradients of the next update are searched for the parameters that are not finite.
"""

import functools
import itertools
import math
import os
from collections import Counter
from types import ModuleType
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board
from sayo_verl.hooks.contract import RUN_TOKEN

TOPIC = "skipped_updates"
MOST_IN_A_ROW = 3
NAMED = 3  # parameters of a message
_skipped: Counter[str] = Counter()  # of this process, by class of the engine: the actor and the critic have one each


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
        _skipped[type(self).__name__] += 1
        if os.environ.get(RUN_TOKEN):
            board.put(f"{TOPIC}/{os.uname().nodename}-{os.getpid()}", {"skipped": dict(_skipped)})
        if in_a_row + 1 >= MOST_IN_A_ROW:
            raise SayoError(
                "A34",
                f"the gradient was not finite in {MOST_IN_A_ROW} updates in a row, and verl skipped them",
                where=named or "gradients that are finite on this device",
                got=f"a norm of {norm}; {_skipped.total()} skipped updates of this process since the start",
                wanted="a finite norm",
                fix="resume from a checkpoint before the first one (sayo/skipped_updates), with a lower "
                "actor_rollout_ref.actor.optim.lr; if it happens in step 1, look at the model's weights and rewards",
            )
        return norm

    cls.optimizer_step = optimizer_step


def skipped_updates() -> int:
    """Updates that the run skipped since its start: of the actor and of the critic, added.

    Of each, the largest count of a process is that of the run, and a sum over processes would count an update once for
    each device. The reason: the norm that decides is the one of the gradient of all shards, which FSDP reduces over all
    ranks before verl looks at it (``FSDPEngine.optimizer_step``). So a NaN on one device makes all ranks skip at once.
    The counts can differ only while some rank has not yet written to the board, which the maximum passes over.
    """
    if not os.environ.get(RUN_TOKEN):
        return 0
    of_engine: dict[str, int] = {}
    for message in board.read(f"{TOPIC}/"):
        for engine, count in message["skipped"].items():
            of_engine[engine] = max(count, of_engine.get(engine, 0))
    return sum(of_engine.values())


def _not_finite(module: Any) -> str:
    """The first parameters whose gradient on this device is not finite, and how many more there are."""
    bad = (name for name, parameter in module.named_parameters() if not _finite(parameter.grad))
    first = [name.replace("_fsdp_wrapped_module.", "") for name in itertools.islice(bad, NAMED)]
    more = sum(1 for _ in bad)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _finite(gradient: Any) -> bool:
    return gradient is None or bool(getattr(gradient, "_local_tensor", gradient).isfinite().all())
