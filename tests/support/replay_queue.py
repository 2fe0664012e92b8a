"""verl's replay buffers over a stand-in for TransferQueue."""

from types import SimpleNamespace

from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

CPU = "configs/hardware/cpu.yaml"


class Queue:
    """TransferQueue's calls of the replay buffer, over dicts."""

    def __init__(self):
        self.tags, self.infos = {}, {}

    def add(self, uid, accuracies):
        """A finished prompt with one trajectory for each accuracy."""
        self.tags[uid] = {"is_prompt": True, "status": "finished", "global_steps": 1}
        for session, acc in enumerate(accuracies):
            self.tags[f"{uid}_{session}_0"] = {}
            self.infos[f"{uid}_{session}_0"] = {"reward_extra_info": {"acc": acc}}

    def kv_list(self):
        return {"train": dict(self.tags)}

    def kv_batch_get(self, keys, partition_id, select_fields):
        assert select_fields == ["extra_fields"]
        return {"extra_fields": [self.infos[key] for key in keys]}

    def kv_clear(self, partition_id, keys):
        for key in keys:
            self.tags.pop(key, None)


def build(repo, refill, *, mode="sync", limit=None, **filter_groups):
    """The buffer that verl's trainer builds under ``+hardware=cpu``, with the limit that the launcher writes."""
    v1 = {
        "sync": {},
        "colocate_async": {},
        "sampler": {
            "max_off_policy_threshold": 1000,  # verl 0.9.0 takes no None
            "max_off_policy_strategy": "drop",
            "custom_sampler": {"path": None, "name": None},
            "sampler_kwargs": {"filter_limit": limit},
        },
    }
    config = OmegaConf.merge(
        {
            "trainer": {"v1": v1},
            "data": {"train_batch_size": 2},
            "algorithm": {"filter_groups": filter_groups},
            "reward": {"reward_model": {"enable": False}},
        },
        {"trainer": {"v1": OmegaConf.load(repo / CPU).trainer.v1}},
    )
    trainer = SimpleNamespace(config=config, trainer_mode=mode, _add_prompts_to_generate=refill)
    trainer._resolve_filter_groups_metric = lambda: PPOTrainer._resolve_filter_groups_metric(trainer)
    return PPOTrainer._build_replay_buffer(trainer)
