"""verl's replay buffer, asked more often; configs/hardware/cpu.yaml selects it (``trainer.v1.sampler.custom_sampler``).

verl polls for finished rollouts every two seconds, which is nothing beside a rollout on GPUs and a quarter of a step of
the tiny task. The interval is a parameter of its class that no configuration key reaches.
"""

from typing import Any

from omegaconf import DictConfig
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class PollingReplayBuffer(ReplayBuffer):
    """``ReplayBuffer`` with ``trainer.v1.sampler.sampler_kwargs.poll_interval`` in seconds."""

    def __init__(self, *args: Any, sampler_kwargs: DictConfig, **kwargs: Any) -> None:
        super().__init__(*args, sampler_kwargs=sampler_kwargs, poll_interval=sampler_kwargs.poll_interval, **kwargs)
