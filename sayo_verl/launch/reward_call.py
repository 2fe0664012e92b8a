"""Calls of a reward function before the run, in a process that is killed at the time limit.

A function that is still at work costs time, and money if it asks a service. A thread could not be stopped.
"""

import contextlib
import copy
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from sayo_verl.reward.number import number


class Returned(NamedTuple):
    """What one call returned or raised, as plain data.

    Attributes:
        score: the number, or ``score`` of the dict; None if that is no number.
        text: the value, shortened.
        unusable: why verl cannot use the score, such as numpy.float32; "" if it can.
        keys: of a dict; None for another value.
        acc: ``acc`` of the dict, or the number; None if it is missing or no number.
        acc_text: ``acc`` of the dict if it is no number, shortened.
        error: type and message of what was raised.
        missing: name of the package that an import lacks.
        unknown: the function raised NotImplementedError, as verl's rules do for an unknown data source.
    """

    score: float | None = None
    text: str = ""
    unusable: str = ""
    keys: frozenset[str] | None = None
    acc: float | None = None
    acc_text: str = ""
    error: str = ""
    missing: str = ""
    unknown: bool = False


def call_all(
    function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], seconds: float
) -> tuple[list[Returned], str]:
    """Call the function with each of the keywords.

    The process is forked: verl takes seconds to import in a new one.

    Args:
        function: the reward function.
        calls: keywords of each call.
        seconds: the limit for all calls.

    Returns:
        What the calls that ended gave, and why the others did not end; "" if all ended.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [], "its module has started CUDA, which a process that is forked from here cannot use"
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(function, calls, send), name="sayo-reward-check")
    child.start()
    pid: Any = child.pid
    send.close()
    found: list[Returned] = []
    end = time.monotonic() + seconds
    try:
        while len(found) < len(calls):
            if not receive.poll(max(0.0, end - time.monotonic())):
                return found, f"the reward function takes more than {seconds:g} s for {len(found) + 1} responses"
            found.append(receive.recv())
        child.join(1)  # what it has printed is written at its end
    except EOFError:
        child.join(1)
        return found, f"WARNING: the reward function ends its process, exit code {child.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of its processes have ended
            os.killpg(pid, signal.SIGKILL)
        child.kill()
        child.join()
        receive.close()
    return found, ""


def _work(function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], send: Connection) -> None:
    os.setsid()  # so that processes of the function are killed with this one
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that has used it

    def work() -> None:
        for call in calls:
            send.send(_returned(function, call))

    # verl calls it in a thread too, in which signal.alarm is an error
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()


def _unusable(score: Any) -> str:
    """The error of verl's agent loop, which assigns the score to an element of a tensor; "" if it has none."""
    import torch

    try:
        torch.zeros(1)[-1] = score
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _returned(function: Callable[..., Any], call: Mapping[str, Any]) -> Returned:
    try:
        value = function(**copy.deepcopy(dict(call)))  # calls of one row share its values
        of_dict = isinstance(value, Mapping)
        acc = value.get("acc") if of_dict else value
        score = value.get("score") if of_dict else value
        return Returned(
            score=number(score),
            text=f"{value!r:.80}",
            unusable=_unusable(score),
            keys=frozenset(map(str, value)) if of_dict else None,
            acc=number(acc),
            acc_text=f"{acc!r:.80}" if of_dict and "acc" in value and number(acc) is None else "",
        )
    except BaseException as error:  # noqa: BLE001 (a user's function may raise anything, and exit; it is reported)
        return Returned(
            error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            missing=str(error.name or "").partition(".")[0] if isinstance(error, ImportError) else "",
            unknown=isinstance(error, NotImplementedError),
        )
