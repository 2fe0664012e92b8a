"""Rollouts that fail: of which row, by which error, how often.

verl logs the error of a rollout and trains on the rest of its group. It ends the run only if a whole batch fails, with
a message that names no error. Here each agent-loop worker also writes its errors on the run's board, where the trainer
reads them (``sayo_verl.hooks.step_guard``). Nothing else changes, with one exception: a reward that is not finite makes
its rollout fail. verl would train on it, and lose the whole update.
"""

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board
from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.report.causes import describe_exception, one_line

TOPIC = "failed_rollouts"
MOST = 20  # errors that a worker keeps by their message; those after are kept by type and place


@dataclass
class RolloutError:
    """One error, and the first rollout that it ended.

    Attributes:
        error: ``"ZeroDivisionError: division by zero"``, or the line of a ``SayoError``.
        place: file, line and function that raised it; empty if unknown.
        row: of the data.
        step: training step. ``error`` and ``row`` are the first of the last step that had the error.
        image: the image that cannot be decoded, if that is the cause.
        count: rollouts that it ended.
        kind: ``error`` of the first one; only its type if the worker had ``MOST`` messages before.
    """

    error: str
    place: str
    row: str
    step: int
    image: str = ""
    count: int = 1
    kind: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other errors: kind and place; row and image if an image is the cause."""
        return (self.kind, self.place, *([self.row, self.image] if self.image else []))


@dataclass(frozen=True)
class Failures:
    """Failed rollouts since the start of the run.

    Attributes:
        total: rollouts.
        errors: by key, in no order.
    """

    total: int
    errors: tuple[RolloutError, ...]


_total: dict[str, int] = {}
_errors: dict[str, dict[tuple[str, ...], RolloutError]] = {}


def note(split: str, error: BaseException, row: str, step: int, messages: Any) -> None:
    """Add a failed rollout of this process to the board.

    Args:
        split: ``train`` or ``val``.
        error: what ended it.
        row: as ``row_name`` gives it.
        step: training step.
        messages: of the prompt, whose images are decoded to see whether one is the cause.
    """
    from sayo_verl.data.images import DAMAGE  # takes 0.3 s, and every process of a run loads this module

    said, place = describe_exception(error)
    broken = broken_image(messages) if isinstance(getattr(error, "cause", error), DAMAGE) else None
    known = _errors.setdefault(split, {})
    new = RolloutError(said, place, row, step, broken or "", kind=said)
    if new.key not in known and len(known) >= MOST and not new.image:
        new.kind = said.partition(":")[0]
    _add(known, new)
    _total[split] = _total.get(split, 0) + 1
    if not os.environ.get(RUN_TOKEN):  # verl's own launcher: nobody reads the board
        return
    message = {"failed": _total[split], "errors": [asdict(error) for error in known.values()]}
    board.put(f"{TOPIC}/{split}/{os.uname().nodename}-{os.getpid()}", message)


def failures(split: str) -> Failures:
    """What all agent-loop workers of the run noted; ``split`` is ``train`` or ``val``."""
    if not os.environ.get(RUN_TOKEN):
        return Failures(0, ())
    messages = board.read(f"{TOPIC}/{split}/")
    merged: dict[tuple[str, ...], RolloutError] = {}
    for entry in (RolloutError(**error) for message in messages for error in message["errors"]):
        _add(merged, entry)
    return Failures(sum(message["failed"] for message in messages), tuple(merged.values()))


def _add(known: dict[tuple[str, ...], RolloutError], new: RolloutError) -> None:
    """Add an error to those of the same key."""
    old = known.get(new.key)
    if old is not None and old.step >= new.step:
        old.count += new.count
        return
    new.count += old.count if old is not None else 0
    known[new.key] = new


def row_name(row: Mapping[str, Any]) -> str:
    """A row by what a user knows: ``row 17 of 'scenes' (extra_info.index; id train-4)``."""
    found = row.get("extra_info")
    info: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    index, source, name = info.get("index"), row.get("data_source"), info.get("id")
    of = f" of {str(source)!r}" if source is not None else ""
    named = f"; id {name}" if name is not None else ""
    if index is None:
        return f"a row{of} without extra_info.index{named}"
    return f"row {index}{of} (extra_info.index{named})"


def broken_image(messages: Any, *, paths: bool = True) -> str | None:
    """Name and error of the first image of a prompt that cannot be decoded; None if all can.

    Args:
        messages: verl's ``raw_prompt``: images are opened pictures or paths. Web addresses are not read.
        paths: read files as well.
    """
    from sayo_verl.data.images import DAMAGE

    for picture, name in _images(messages):
        try:
            if isinstance(picture, Image.Image):
                picture.load()
            elif paths and isinstance(picture, str) and "://" not in picture.removeprefix("file://"):
                with Image.open(picture.removeprefix("file://")) as opened:
                    opened.load()
        except (*DAMAGE, Image.DecompressionBombError) as error:
            return f"{name}: {one_line(error)}"
    return None


def _images(messages: Any) -> Iterable[tuple[Any, str]]:
    """(picture, name) of the images of verl's messages."""
    number = 0
    for message in messages if isinstance(messages, Sequence) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, Sequence) and not isinstance(content, str) else ():
            if not isinstance(part, Mapping) or part.get("type") != "image":
                continue
            picture, path = part.get("image", part.get("path")), part.get("path")
            named = path or (picture if isinstance(picture, str | Path) else None)
            yield picture, f"images[{number}] ({named or 'stored in the row'})"
            number += 1


def report_rollout_errors(agent_loop: ModuleType) -> None:
    """Make verl's agent-loop workers note the errors of their rollouts.

    Args:
        agent_loop: ``verl.experimental.agent_loop.agent_loop``. The worker of V1 inherits from its ``AgentLoopWorker``.
    """
    cls: Any = agent_loop.AgentLoopWorker
    run, score = cls._run_agent_loop, cls._compute_score

    @functools.wraps(run)
    async def _run_agent_loop(
        self: Any, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any
    ) -> Any:
        try:
            return await run(self, sampling_params, trajectory, **kwargs)
        except Exception as error:
            split = "val" if trajectory["validate"] else "train"
            note(split, error, row_name(kwargs), int(trajectory["step"]), kwargs.get("raw_prompt"))
            raise

    @functools.wraps(score)
    async def _compute_score(self: Any, outputs: list[Any], kwargs: dict) -> None:
        await score(self, outputs, kwargs)
        reward = outputs[-1].reward_score
        if isinstance(reward, int | float) and not math.isfinite(reward):
            raise SayoError(
                "A33",
                "the reward function returned a score that is not finite",
                where=row_name(kwargs),
                got=reward,
                wanted="a finite number",
                fix="correct the reward function (reward.custom_reward_function.path)",
            )

    cls._run_agent_loop, cls._compute_score = _run_agent_loop, _compute_score
