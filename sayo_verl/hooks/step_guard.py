"""The trainer names the cause where verl ends a step for a reason that follows from it, and counts what it leaves out.

It wraps verl's base trainer, for estimators of verl's own too. It reads what workers wrote on the run's board
(``rollout_errors``, ``skipped_updates``) and changes no number of a step, but adds metrics:

- ``sayo/failed_rollouts``: rollouts that failed in the step. verl trains on the rest of their groups.
- ``sayo/skipped_updates``: updates that verl skipped, because the gradient was not finite.
- ``sayo/left_out_rows``: rows whose image cannot be decoded, with ``sayo.bad_rows``.
"""

import functools
import sys
import traceback
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.hooks import bad_images
from sayo_verl.hooks.bad_images import bad_image, take_left_out
from sayo_verl.hooks.phase_names import OF_METHOD
from sayo_verl.hooks.rollout_errors import Failures, RolloutError, failures
from sayo_verl.hooks.skipped_updates import skipped_updates
from sayo_verl.report.causes import NOTE

# What verl raises if every rollout of a batch failed (``ReplayBuffer.sample``).
NOTHING_LEFT = "no materializable trajectories"
# Where verl replaces failed groups it would do so without end: groups that may fail since the last batch, in batches.
MOST_BATCHES = 2


@dataclass
class Seen:
    """What a trainer has seen of its run.

    Attributes:
        failed: rollouts, by split.
        counts: rollouts of each error, by split and key of the error.
        said: errors of rollouts that were printed.
        skipped: updates.
        bad_rows: rows left out for their image: positions in the data, or row and image.
        new_bad_rows: of them, since the last step.
    """

    failed: dict[str, int] = field(default_factory=dict)
    counts: dict[tuple[str, ...], int] = field(default_factory=dict)
    said: set[tuple[str, ...]] = field(default_factory=set)
    skipped: int = 0
    bad_rows: set[Hashable] = field(default_factory=set)
    new_bad_rows: int = 0


def guard_steps(trainer_base: ModuleType) -> None:
    """Wrap verl's base trainer.

    Args:
        trainer_base: ``verl.trainer.ppo.v1.trainer_base``.
    """
    cls: Any = trainer_base.PPOTrainer
    step, validate, fetch = cls.step, cls._validate, cls._fetch_one_gen_batch
    dataloader, buffer, fit = cls._init_dataloader, cls._build_replay_buffer, cls.fit

    @functools.wraps(fit)
    def guarded_fit(self: Any, agent_loop_manager: Any) -> None:
        try:
            fit(self, agent_loop_manager)
        except Exception as error:
            error.add_note(f"{NOTE}{int(self.global_steps)}{_phase_of(error)}")
            raise

    @functools.wraps(buffer)
    def _build_replay_buffer(self: Any) -> Any:
        built = buffer(self)
        built._sayo_most_failed = MOST_BATCHES * int(self.config.data.train_batch_size)
        return built

    @functools.wraps(dataloader)
    def _init_dataloader(self: Any) -> None:
        dataloader(self)
        setattr(self.train_dataset, bad_images.ALLOWED, _allowed(self))

    @functools.wraps(fetch)
    def _fetch_one_gen_batch(self: Any) -> Any:
        batch = fetch(self)
        for row in take_left_out(batch):
            _leave_out(self, row.name, row.image, row.position)
        return batch

    @functools.wraps(step)
    def guarded_step(self: Any, metrics: dict, timing_raw: dict) -> Any:
        try:
            batch = step(self, metrics, timing_raw)
        except RuntimeError as error:
            if NOTHING_LEFT in str(error):
                raise all_failed(_new(self, "train"), int(self.global_steps)) from error
            raise
        new = _new(self, "train")
        _say(self, new, "this step's")
        seen = _seen(self)
        skipped = skipped_updates()
        metrics["sayo/failed_rollouts"] = float(new.total)
        metrics["sayo/skipped_updates"] = float(skipped - seen.skipped)
        if _allowed(self):
            metrics["sayo/left_out_rows"] = float(seen.new_bad_rows)
        seen.skipped, seen.new_bad_rows = skipped, 0
        return batch

    @functools.wraps(validate)
    def _validate(self: Any) -> dict[str, float]:
        try:
            metrics = validate(self)
        except Exception as error:
            new = _new(self, "val")
            if new.total and not isinstance(error, SayoError):
                raise all_failed(new, int(self.global_steps)) from error
            raise
        new = _new(self, "val")
        _say(self, new, "this validation's")
        return {**metrics, "sayo/failed_rollouts/val": float(new.total)} if metrics else metrics

    cls.fit, cls.step, cls._validate = guarded_fit, guarded_step, _validate
    cls._fetch_one_gen_batch = _fetch_one_gen_batch
    cls._init_dataloader, cls._build_replay_buffer = _init_dataloader, _build_replay_buffer


def stop_endless_refill(replay_buffer: ModuleType) -> None:
    """Make verl's replay buffers raise X23 where each group that replaces a failed one fails too.

    Args:
        replay_buffer: ``verl.trainer.ppo.v1.replay_buffer``.
    """
    cls: Any = replay_buffer.ReplayBuffer
    evict, materialize = cls._evict_terminal_groups, cls._materialize_batch

    @functools.wraps(evict)
    def _evict_terminal_groups(self: Any, global_steps: int, partition_id: str, eviction_reasons: Any) -> Any:
        if partition_id != "val":
            failed = self.__dict__.get("_sayo_failed_groups", 0) + len(eviction_reasons[2])
            self._sayo_failed_groups = failed
            if failed > self.__dict__.get("_sayo_most_failed", failed):
                raise all_failed(failures("train"), int(global_steps), replaced=failed)
        return evict(self, global_steps, partition_id, eviction_reasons)

    @functools.wraps(materialize)
    def _materialize_batch(self: Any, partition_id: str, *args: Any, **kwargs: Any) -> Any:
        if partition_id != "val":
            self._sayo_failed_groups = 0
        return materialize(self, partition_id, *args, **kwargs)

    cls._evict_terminal_groups, cls._materialize_batch = _evict_terminal_groups, _materialize_batch


def all_failed(failed: Failures, step: int, replaced: int = 0) -> SayoError:
    """X24 if an image is the cause, else X23.

    Args:
        failed: rollouts since the last step.
        step: training step.
        replaced: groups that verl replaced since the last batch.
    """
    errors = sorted(failed.errors, key=lambda error: -error.count)
    if errors and errors[0].image:
        return bad_image(errors[0].row, errors[0].image)
    first = errors[0] if errors else RolloutError("no error was noted", "", "", step, count=0)
    others = "".join(f"; {error.count} x {error.error}" for error in errors[1:3])
    return SayoError(
        "X23",
        f"all rollouts of step {step} failed"
        if not replaced
        else f"{replaced} groups failed in step {step}, more than verl should replace",
        where=first.place or "the agent loop",
        got=f"{first.count} x {first.error}, first of {first.row or 'an unknown row'}{others}",
        fix="correct what raises it (of a reward function: reward.custom_reward_function.path); for rollouts that fail "
        "by chance, trainer.v1.sampler.sync_refill_failed_groups=True replaces groups without any rollout",
    )


def _phase_of(error: BaseException) -> str:
    """``", update of the actor"`` by the method of the trainer that raised; empty if it has no phase."""
    found: list[str] = []
    raised: BaseException | None = error
    while raised is not None:
        found += [frame.name for frame in traceback.extract_tb(raised.__traceback__)]
        raised = raised.__cause__
    return next((f", {OF_METHOD[name].says}" for name in found if name in OF_METHOD), "")


def _seen(trainer: Any) -> Seen:
    return trainer.__dict__.setdefault("_sayo_seen", Seen())


def _allowed(trainer: Any) -> int:
    return int((trainer.config.get("sayo") or {}).get("bad_rows", 0))


def _new(trainer: Any, split: str) -> Failures:
    """Failed rollouts since the last call; rows with a bad image are counted or end the run."""
    seen, found, errors = _seen(trainer), failures(split), []
    total = found.total - seen.failed.get(split, 0)
    seen.failed[split] = found.total
    for error in found.errors:
        key = (split, *error.key)
        if count := error.count - seen.counts.get(key, 0):
            seen.counts[key] = error.count
            errors.append(replace(error, count=count))
    new = Failures(total, tuple(errors))
    for error in new.errors if split == "train" else ():
        if error.image:
            _leave_out(trainer, error.row, error.image)
    return new


def _leave_out(trainer: Any, row: str, image: str, position: int | None = None) -> None:
    """Count a row with a bad image.

    Args:
        trainer: verl's.
        row: its name, which other rows may have too.
        image: the image and its error.
        position: of the row in the data; None for a row that only the agent loop decodes.

    Raises:
        SayoError: X24 over ``sayo.bad_rows``.
    """
    seen, allowed = _seen(trainer), _allowed(trainer)
    identity = (row, image) if position is None else position
    if identity in seen.bad_rows:
        return
    if len(seen.bad_rows) >= allowed:
        raise bad_image(row, image, allowed, len(seen.bad_rows))
    seen.bad_rows.add(identity)
    seen.new_bad_rows += 1
    print(f"warning: left out {row}, {len(seen.bad_rows)} of {allowed} (sayo.bad_rows): {image}", file=sys.stderr)


def _say(trainer: Any, new: Failures, whose: str) -> None:
    """Print each error of a rollout once."""
    said = _seen(trainer).said
    for error in new.errors:
        if error.key[:2] in said:
            continue
        said.add(error.key[:2])
        at = f" at {error.place}" if error.place else ""
        print(
            f"warning: {new.total} of {whose} rollouts failed and are left out (sayo/failed_rollouts counts them); "
            f"{error.error}, first of {error.row}{at}",
            file=sys.stderr,
        )
