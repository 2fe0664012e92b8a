"""A time limit for each call of the reward function (``sayo.reward_limit``).

verl awaits the function without a limit, so one call that hangs stops the run. A call over the limit fails as an
exception of the function does: the row has no reward, and its group is handled as verl handles a failed group. It never
gets reward 0. A thread cannot be ended: that of a synchronous function goes on until the run ends.

verl's manager ``rate_limited`` has a limit of its own (``reward.timeout``), and ``remote`` calls the function in other
processes. There only ``sayo.step_limit`` holds, as for a function that keeps Python's lock (regular expressions).
"""

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board
from sayo_verl.hooks.phases import TIMEOUTS
from sayo_verl.launch.limits import read_limits

OTHER_LIMIT = ("RateLimitedRewardManager", "RemoteRewardManager")


def limit_rewards(reward_loop: ModuleType) -> None:
    """Give the reward function of verl's reward workers its limit.

    Args:
        reward_loop: ``verl.experimental.reward_loop.reward_loop``, just imported.
    """
    cls: Any = reward_loop.RewardLoopWorker
    original = cls._init_reward_fn

    @functools.wraps(original)
    def _init_reward_fn(self: Any) -> None:
        original(self)
        manager, limit_s = self.reward_manager, read_limits(self.config).reward_s
        names = {base.__name__ for base in type(manager).__mro__}
        if limit_s is None or names & set(OTHER_LIMIT) or not callable(getattr(manager, "compute_score", None)):
            return
        manager.compute_score = limited(manager.compute_score, limit_s)
        manager.is_async_reward_score = True

    cls._init_reward_fn = _init_reward_fn


def limited(function: Callable[..., Any], limit_s: float) -> Callable[..., Any]:
    """The reward function as a coroutine function that raises X09 after ``limit_s`` seconds of a call.

    A synchronous function runs in as many threads at once as verl's executor has. The time in which a call waits for
    a thread does not count, and a call over its limit gives its place to the next.
    """
    places = asyncio.Semaphore(min(32, (os.cpu_count() or 1) + 4))
    is_async = inspect.iscoroutinefunction(function)

    async def within_limit(call: Any, kwargs: dict[str, Any]) -> Any:
        await asyncio.wait({call}, timeout=limit_s)
        if call.done():
            return call.result()
        call.cancel()
        error = too_long(limit_s, kwargs)
        board.post(TIMEOUTS, {"row": error.where})
        raise error

    @functools.wraps(function)
    async def compute_score(**kwargs: Any) -> Any:
        if is_async:
            return await within_limit(asyncio.ensure_future(function(**kwargs)), kwargs)
        async with places:
            return await within_limit(asyncio.wrap_future(_in_thread(function, kwargs)), kwargs)

    return compute_score


def _in_thread(function: Callable[..., Any], kwargs: dict[str, Any]) -> Future:
    """Call the function in a thread that does not keep this process from ending."""
    future: Future = Future()
    future.set_running_or_notify_cancel()  # a result after the limit is dropped, not an error

    def call() -> None:
        try:
            future.set_result(function(**kwargs))
        except StopIteration as error:  # a future cannot hold it
            raised = RuntimeError("StopIteration in the reward function")
            raised.__cause__ = error
            future.set_exception(raised)
        except BaseException as error:  # noqa: BLE001 (it is raised where the result is awaited)
            future.set_exception(error)

    threading.Thread(target=call, daemon=True, name="reward function").start()
    return future


def too_long(limit_s: float, kwargs: dict[str, Any]) -> SayoError:
    """X09 for a call with these arguments of a reward function."""
    index = (kwargs.get("extra_info") or {}).get("index", "unknown")
    return SayoError(
        "X09",
        f"the reward function did not return within {limit_s:g} s",
        where=f"row with extra_info.index {index} of data_source {kwargs.get('data_source')}",
        got=f"response {str(kwargs.get('solution_str'))[:200]!r}",
        fix="give the function (its requests, its parser) a limit of its own, or set sayo.reward_limit=SECONDS or off",
    )
