"""Dynamic sampling on the CPU stack: verl's own buffer, with group filtering, asked more often."""

import threading
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import replay_buffer
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


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(replay_buffer, "tq", queue)
    return queue


def build(repo, refill, *, mode="sync", **filter_groups):
    """The buffer that verl's trainer builds under ``+hardware=cpu``."""
    v1 = {
        "sync": {},
        "colocate_async": {},
        "sampler": {
            "max_off_policy_threshold": 1,
            "max_off_policy_strategy": "drop",
            "custom_sampler": {"path": None, "name": None},
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


def test_a_uniform_group_is_replaced_before_it_is_trained_on(repo, queue):
    """verl asks for two prompts in the place of one, trains on as many as a batch has, and drops what is left over."""
    replaced = []

    def refill(n):
        replaced.append(n)
        for i in range(n):
            queue.add(f"fresh{i}", [1.0, 0.0])

    buffer = build(repo, refill, enable=True, metric="acc", max_inflight_gen_batches=1)
    queue.add("uniform", [1.0, 1.0])
    queue.add("mixed", [1.0, 0.0])
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert replaced == [2]
    assert {key.split("_")[0] for key in batch.keys} <= {"mixed", "fresh0", "fresh1"}
    assert len(batch.keys) == 4
    assert metrics["training/filter_groups/evicted_samples"] == 1


def test_without_dynamic_sampling_a_uniform_group_stays(repo, queue):
    buffer = build(repo, lambda n: pytest.fail("nothing is to be replaced"), enable=False)
    queue.add("uniform", [1.0, 1.0])
    queue.add("mixed", [1.0, 0.0])
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert {key.split("_")[0] for key in batch.keys} == {"uniform", "mixed"}


@pytest.mark.parametrize(("mode", "cls"), [("sync", "ReplayBuffer"), ("colocate_async", "ReplayBufferAsync")])
def test_verls_own_buffers_poll_at_the_configured_interval(repo, monkeypatch, mode, cls):
    buffer = build(repo, print, mode=mode, enable=False)
    assert type(buffer) is getattr(replay_buffer, cls)
    slept, here = [], threading.get_ident()
    original = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: slept.append(s) if threading.get_ident() == here else original(s))
    buffer._wait_for_next_poll("train", time.time())
    assert slept == [OmegaConf.load(repo / CPU).trainer.v1.sampler.sampler_kwargs.poll_interval]


def test_without_the_key_the_interval_is_verls():
    buffer = replay_buffer.ReplayBuffer("sync", OmegaConf.create({}), 1, "drop", OmegaConf.create({}))
    assert buffer.poll_interval == 2.0
