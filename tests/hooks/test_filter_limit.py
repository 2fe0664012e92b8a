"""Group filtering that finds nothing to train on ends, in both buffers of verl, for every estimator."""

import re
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from support.replay_queue import Queue, build
from verl.trainer.ppo.v1 import replay_buffer

from sayo_verl.errors import SayoError
from sayo_verl.launch.training_check import UNIFORM_BATCHES, UNIFORM_GROUPS, describe_filter, filter_limit

BUFFERS = ["sync", "colocate_async"]
FILTER = {"enable": True, "metric": "acc", "max_inflight_gen_batches": 1}


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(replay_buffer, "tq", queue)
    return queue


class Policy:
    """Answers each refill; ``accuracies(n)`` are those of the n-th group, and no run asks for more than 200."""

    def __init__(self, queue, accuracies):
        self.queue, self.accuracies, self.groups = queue, accuracies, 0

    def __call__(self, n=1):
        for _ in range(n):
            self.queue.add(f"group{self.groups}", self.accuracies(self.groups))
            self.groups += 1
        assert self.groups < 200, "the filter has no end"


def sample(repo, queue, accuracies, *, mode="sync", batches=1, limit=None):
    policy = Policy(queue, accuracies)
    buffer = build(repo, policy, mode=mode, limit=limit, **FILTER)
    for step in range(batches):
        policy(2)
        found, _ = buffer.sample(global_steps=step + 1, partition_id="train", batch_size=2)
    return found


@pytest.mark.parametrize("mode", BUFFERS)
def test_a_policy_that_is_always_wrong_ends_with_the_values_it_had(repo, queue, mode):
    with pytest.raises(SayoError) as caught:
        sample(repo, queue, lambda n: [float(n == 7)] * 2, mode=mode, limit={"groups": 40, "needed": 0})
    assert caught.value.code == "A26"
    found = re.fullmatch(
        r"(\d+) dropped groups in a row: (\d+) with acc 0 in every response, 1 with acc 1 in every response",
        caught.value.got,
    )
    assert found, caught.value.got
    assert 40 <= int(found[1]) < 60
    assert int(found[2]) == int(found[1]) - 1
    assert "max_num_gen_batches" in caught.value.fix


@pytest.mark.parametrize("mode", BUFFERS)
def test_without_a_limit_verl_generates_without_end(repo, queue, mode):
    with pytest.raises(AssertionError, match="no end"):
        sample(repo, queue, lambda n: [0.0, 0.0], mode=mode)


@pytest.mark.parametrize("mode", BUFFERS)
def test_rare_mixed_groups_do_not_end_a_run(repo, queue, mode):
    rare = sample(
        repo, queue, lambda n: [1.0, float(n % 12 != 11)], mode=mode, batches=3, limit={"groups": 15, "needed": 0}
    )
    assert len(rare.keys) == 4


@pytest.mark.parametrize("mode", BUFFERS)
def test_the_users_limit_counts_all_groups_since_the_last_batch(repo, queue, mode):
    mixed = {3, 30}
    accuracies = lambda n: [1.0, float(n not in mixed)]  # noqa: E731
    sample(repo, queue, accuracies, mode=mode, limit={"groups": 60, "needed": 2})
    queue.tags.clear()
    with pytest.raises(SayoError, match=r"SAYO-A26: .*not find enough.*1 kept.*2 kept groups of 12"):
        sample(repo, queue, accuracies, mode=mode, limit={"groups": 12, "needed": 2})


def test_a_batch_starts_the_count_anew(repo, queue):
    uniform_first = lambda n: [1.0, float(n % 10 < 8)]  # noqa: E731 (8 of 10 groups are equal)
    sample(repo, queue, uniform_first, batches=6, limit={"groups": 30, "needed": 2})


def test_validation_is_not_filtered(repo, queue):
    buffer = build(repo, print, limit={"groups": 1, "needed": 0}, **FILTER)
    queue.add("val", [0.0, 0.0])
    queue.kv_list = lambda: {"val": dict(queue.tags)}
    assert len(buffer.sample(global_steps=1, partition_id="val", batch_size=1)[0].keys) == 2


def config(*, mode="sync", batch=8, gen_batch=None, **filter_groups):
    v1 = {"trainer_mode": mode, "separate_async": {"parameter_sync_step": 4}}
    return OmegaConf.create(
        {
            "algorithm": {
                "filter_groups": {"enable": True, "metric": "acc", "max_num_gen_batches": 0, **filter_groups}
            },
            "data": {"train_batch_size": batch, "gen_batch_size": gen_batch},
            "trainer": {"v1": v1},
        }
    )


def test_the_limit_follows_verls_key_or_is_a_large_one_of_ours():
    assert filter_limit(config(enable=False)) is None
    assert filter_limit(config()) == {"groups": UNIFORM_GROUPS, "needed": 0}
    assert filter_limit(config(batch=512)) == {"groups": UNIFORM_BATCHES * 512, "needed": 0}
    assert filter_limit(config(max_num_gen_batches=10)) == {"groups": 80, "needed": 8}
    assert filter_limit(config(max_num_gen_batches=10, batch=512, gen_batch=1536)) == {"groups": 15360, "needed": 512}
    assert filter_limit(config(max_num_gen_batches=10, gen_batch=1)) == {"groups": 80, "needed": 8}
    assert filter_limit(config(max_num_gen_batches=10, mode="separate_async")) == {"groups": 80, "needed": 2}


def test_the_plan_says_when_a_run_ends():
    assert describe_filter(config(enable=False)) == ""
    assert describe_filter(config()) == f"the run ends after {UNIFORM_GROUPS} groups in a row with equal acc"
    assert "80 generated groups do not fill a batch" in describe_filter(config(max_num_gen_batches=10))


def test_a_buffer_of_the_users_without_the_key_is_left_alone():
    buffer = SimpleNamespace(sampler_kwargs=None)
    evict = replay_buffer.ReplayBuffer._evict_terminal_groups
    assert evict(buffer, 1, "train", (set(), set(), set(), {})) == (set(), 0, 0, {})
