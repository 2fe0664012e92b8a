"""A configuration key for verl's polling interval: ``trainer.v1.sampler.sampler_kwargs.poll_interval``, in seconds.

verl looks for finished rollouts every two seconds. That is short compared with a rollout on GPUs, but a quarter of a
step of the tiny task. No configuration key of verl sets this parameter of its replay buffers. A custom sampler could
set it, but verl gives a custom sampler neither group filtering nor the refill of failed groups, and uses it in place of
its asynchronous buffer. So verl's own buffers stay and read the interval from the configuration.
"""

import functools
from types import ModuleType
from typing import Any


def read_poll_interval(replay_buffer: ModuleType) -> None:
    """Make verl's replay buffers read their interval from ``sampler_kwargs.poll_interval`` if it is set.

    Args:
        replay_buffer: ``verl.trainer.ppo.v1.replay_buffer``. Its ``ReplayBufferAsync`` inherits from ``ReplayBuffer``.
    """
    cls: Any = replay_buffer.ReplayBuffer
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        interval = (self.sampler_kwargs or {}).get("poll_interval")
        if interval is not None:
            self.poll_interval = float(interval)

    cls.__init__ = __init__
