"""Dynamic sampling on the CPU stack: verl's own buffer, with group filtering, asked more often."""

import threading
import time

import pytest
from omegaconf import OmegaConf
from support.replay_queue import CPU, Queue, build
from verl.trainer.ppo.v1 import replay_buffer


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(replay_buffer, "tq", queue)
    return queue


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
