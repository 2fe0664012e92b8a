"""The agent loop of recorded rollouts: the row's own loop, with the sampling of training.

verl generates rows of the partition "val" with ``rollout.val_kwargs``, which are greedy by default. All rollouts of a
prompt would then be equal. Rows of the partition "train" would be trained on. An agent loop gets the sampling
parameters and may replace them, which is what this one does.
"""

from types import ModuleType
from typing import Any

import hydra

NAME = "sayo_recorded"
INNER = "sayo_agent"  # field of a row: the agent loop that training would use


def register(agent_loop: ModuleType) -> None:
    """Add the loop to verl's registry; called after the import of verl's module."""
    agent_loop._agent_loop_registry[NAME] = {"_target_": f"{__name__}.RecordedAgentLoop"}


class RecordedAgentLoop:
    """Runs the agent loop that the row names with ``temperature``, ``top_p`` and ``top_k`` of training."""

    def __init__(self, trainer_config: Any, **kwargs: Any) -> None:
        self._rollout = trainer_config.config.actor_rollout_ref.rollout
        self._arguments = {"trainer_config": trainer_config, **kwargs}

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """verl's output of the row's own agent loop."""
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

        loop = hydra.utils.instantiate(_agent_loop_registry[kwargs.pop(INNER)], **self._arguments)
        training = {name: self._rollout[name] for name in ("temperature", "top_p", "top_k")}
        return await loop.run({**sampling_params, **training}, **kwargs)
