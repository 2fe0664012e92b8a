"""Loaded into a real run by ``sayo.modules``: writes each step's batch, as verl is about to train on it, into a folder.

The folder is named by the variable SAYO_BATCHES, which Ray's workers inherit from the launcher. ``step_<n>.pt`` is a
dict, rows in verl's order (B responses, T tokens, padded on the right with 0):

    step         number of the step, from 1
    id           [B] ``extra_info.id`` of each row
    uid          [B] verl's name of the group
    prompts      B tensors of token ids
    responses, response_mask, old_log_probs, entropy, advantages     [B, T]
    reward       [B] of the reward function
    reports      [B] dicts that the reward function returned beside the score
    signals      what the method of the run read (``sayo_verl.methods.Signals``); None for an estimator of verl's own
"""

import os
from pathlib import Path
from typing import Any

import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from sayo_verl.hooks import store

TOKENS = ("responses", "response_mask", "old_log_probs", "entropy", "advantages")


def batch_of(trainer: Any, batch: KVBatchMeta) -> dict[str, Any]:
    """The batch as the head of this file says."""
    data = store.fetch(batch, [*TOKENS, "prompts", "rm_scores", "uid", "extra_info"])
    method = getattr(trainer, "_method", None)
    signals = None
    if method is not None:
        signals, _ = store.fetch_signals(batch, method.needs(), trainer.config.sayo.get("correct_from"))
    return {
        "step": int(trainer.global_steps),
        "id": [getattr(info, "data", info)["id"] for info in data["extra_info"]],
        "uid": list(map(str, data["uid"])),
        "prompts": [ids.clone() for ids in data["prompts"].unbind()],
        **{name: data[name].to_padded_tensor(0) for name in TOKENS},
        "reward": torch.stack([row.sum() for row in data["rm_scores"].unbind()]).float(),
        "reports": store.reward_info(batch),
        "signals": signals,
    }


def write_batches(folder: Path) -> None:
    """Write the batch of every update from now on."""
    update_actor = PPOTrainer._update_actor

    def _update_actor(self: Any, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        folder.mkdir(parents=True, exist_ok=True)
        found = batch_of(self, batch)
        torch.save(found, folder / f"step_{found['step']}.pt")
        return update_actor(self, batch, *args, **kwargs)

    PPOTrainer._update_actor = _update_actor


write_batches(Path(os.environ["SAYO_BATCHES"]))
