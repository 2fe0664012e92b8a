"""Rollouts that repeat (``sayo.repeatable_rollouts``): the same run samples the same tokens again.

verl gives vLLM no seed per request. A request then draws from the engine's random numbers, in the order in which the
requests arrive, so two runs differ in their first step. Here each request gets a seed of its own, from what is the same
in a repeated and in a resumed run. verl's ``uid`` is a random number, and a batch has the order in which the rollouts
ended. So the ``uid`` becomes the position of the prompt, and the trainer sorts each batch by it: sums of floats over
the rows are then the same too.

Nothing here acts without the setting. ``sayo_verl.launch.repeat_check`` refuses runs in which it cannot hold.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from PIL import Image

from sayo_verl.launch.repeat_check import is_repeatable


def seed_of(run_seed: int, row: Mapping[str, Any], *, validate: bool) -> int:
    """The seed of one request, of 56 bits.

    ``index`` is 0 for each row whose data have none, so pictures tell rows with one question apart. Two rows that are
    equal in all of this have the same seeds.

    Args:
        run_seed: ``actor_rollout_ref.rollout.seed``.
        row: fields of verl's agent loop: the step, the session, and what tells the prompts of a step apart.
        validate: the rollout is not trained on.
    """
    messages = [(message["role"], _content(message["content"])) for message in row["raw_prompt"]]
    index = row["index"].item() if hasattr(row["index"], "item") else row["index"]
    source = str(row.get("data_source"))
    material = (run_seed, validate, int(row["global_steps"]), int(row["session_id"]), source, index, messages)
    return int.from_bytes(hashlib.blake2b(repr(material).encode(), digest_size=7).digest(), "big")


def _content(content: Any) -> Any:
    """What a message says, as values whose ``repr`` is the same in every process: its text, and digests of its media.

    Args:
        content: text, or parts as of verl's data set, such as ``{"type": "image", "bytes": ..., "image": ...}``.
    """
    if isinstance(content, str):
        return content
    text = "".join(str(part.get("text", "")) for part in content)
    media = [_digest(part.get("bytes") or part.get(str(part.get("type")))) for part in content if "text" not in part]
    return (text, media) if any(media) else text


def _digest(value: Any) -> Any:
    """A digest of encoded bytes, a decoded picture or a path, or those of a list; None of anything else."""
    if isinstance(value, list | tuple):
        return [_digest(one) for one in value]
    if isinstance(value, Image.Image):
        value = repr((value.mode, value.size)).encode() + value.tobytes()
    elif isinstance(value, str | os.PathLike):
        value = os.fspath(value).encode()
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else None


def seed_requests(agent_loop: ModuleType) -> None:
    """Give each request of a run with the setting its seed.

    Args:
        agent_loop: ``verl.experimental.agent_loop.agent_loop``, just imported.
    """
    cls: Any = agent_loop.AgentLoopWorker
    original = cls._run_agent_loop

    @functools.wraps(original)
    async def _run_agent_loop(self: Any, sampling_params: dict, trajectory: dict, **kwargs: Any) -> Any:
        if is_repeatable(self.config):
            run_seed = int(self.config.actor_rollout_ref.rollout.get("seed", 0))
            seed = seed_of(run_seed, kwargs, validate=bool(trajectory["validate"]))
            sampling_params = {**sampling_params, "seed": seed}  # a copy: sessions share the dictionary
        return await original(self, sampling_params, trajectory, **kwargs)

    cls._run_agent_loop = _run_agent_loop


def order_batches(trainer_base: ModuleType) -> None:
    """Name prompts by their position and sort each batch by it, in a run with the setting.

    Args:
        trainer_base: ``verl.trainer.ppo.v1.trainer_base``, just imported.
    """
    cls: Any = trainer_base.PPOTrainer
    fetch, balance = cls._fetch_one_gen_batch, cls._balance_batch

    @functools.wraps(fetch)
    def _fetch_one_gen_batch(self: Any) -> Any:
        batch = fetch(self)
        if is_repeatable(self.config):
            from verl.utils.tensordict_utils import assign_non_tensor_stack

            step, first = getattr(self, "_sayo_position", (None, 0))
            first = first if step == self.global_steps else 0
            self._sayo_position = (self.global_steps, first + len(batch))
            names = [f"{self.global_steps:08d}-{first + row:08d}" for row in range(len(batch))]
            assign_non_tensor_stack(batch, "uid", names)
        return batch

    @functools.wraps(balance)
    def _balance_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if is_repeatable(self.config):
            batch.reorder(sorted(range(len(batch.keys)), key=lambda row: place_of(batch.keys[row])))
        return balance(self, batch, *args, **kwargs)

    cls._fetch_one_gen_batch, cls._balance_batch = _fetch_one_gen_batch, _balance_batch


def place_of(key: str) -> tuple[str, int, int]:
    """Position of the prompt, session and output of a row; verl's key is ``<uid>_<session>_<output>``."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)
