"""A call of the reward function that hangs fails its row, and the others go on."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board, reward_limit


@pytest.fixture(autouse=True)
def posted(monkeypatch):
    posted = []
    monkeypatch.setattr(board, "post", lambda topic, message: posted.append((topic, message)))
    return posted


def call(function, *answers, limit_s=0.3):
    """Results or errors of calls at once, one for each ground truth."""

    async def all_calls():
        limited = reward_limit.limited(function, limit_s)
        rows = (
            limited(data_source="geo", solution_str="so", ground_truth=answer, extra_info={"index": n})
            for n, answer in enumerate(answers)
        )
        return await asyncio.gather(*rows, return_exceptions=True)

    return asyncio.run(all_calls())


def sync(data_source, solution_str, ground_truth, extra_info):
    if ground_truth == "hang":
        time.sleep(5)
    if ground_truth == "bad":
        raise ValueError("no number")
    return {"score": 1.0, "thread": threading.current_thread().name}


async def coroutine(data_source, solution_str, ground_truth, extra_info):
    if ground_truth == "hang":
        await asyncio.sleep(5)
    if ground_truth == "bad":
        raise ValueError("no number")
    return {"score": 1.0}


def test_a_function_that_raises_stop_iteration_is_not_a_hang(posted):
    (error,) = call(lambda **_: next(iter([])), "right", limit_s=5)
    assert isinstance(error, RuntimeError)
    assert str(error) == "StopIteration in the reward function"
    assert not posted


@pytest.mark.parametrize("function", [sync, coroutine])
def test_a_call_that_hangs_is_an_error_of_its_row_and_counted(function, posted):
    started = time.monotonic()
    good, late, bad = call(function, "right", "hang", "bad")
    assert time.monotonic() - started < 3
    assert good["score"] == 1.0
    assert isinstance(bad, ValueError)
    assert isinstance(late, SayoError)
    assert late.code == "X09"
    assert "extra_info.index 1 of data_source geo" in late.where
    assert posted == [("reward_timeouts", {"row": late.where})]


def test_a_call_that_hangs_gives_its_place_to_the_next(monkeypatch):
    monkeypatch.setattr(reward_limit.os, "cpu_count", lambda: -3)  # one place
    late, good = call(sync, "hang", "right")
    assert late.code == "X09"
    assert good["score"] == 1.0, "the time in which it waited for a place does not count"


@pytest.mark.parametrize(
    ("limit", "name", "wrapped"), [(9, "NaiveRewardManager", True), ("off", "NaiveRewardManager", False)]
    + [(9, name, False) for name in reward_limit.OTHER_LIMIT],
)  # fmt: skip
def test_the_functions_of_verls_managers_get_the_limit(limit, name, wrapped):
    manager = type(name, (), {"compute_score": staticmethod(sync), "is_async_reward_score": False})()

    class Worker:
        config = OmegaConf.create({"sayo": {"reward_limit": limit}})

        def _init_reward_fn(self):
            self.reward_manager = manager

    reward_limit.limit_rewards(SimpleNamespace(RewardLoopWorker=Worker))
    Worker()._init_reward_fn()
    assert manager.is_async_reward_score is wrapped
    assert asyncio.iscoroutinefunction(manager.compute_score) is wrapped
