"""A checkpoint that cannot be saved: the reason, the free space, and the last one that is whole.

verl writes the tracker in place. If that fails, it is empty, and no checkpoint is found any more. Here it gets its old
text back. torch names a full disk as "iostream error" or "unexpected pos".
"""

import functools
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.launch.resume import TRACKER
from sayo_verl.report.causes import describe_exception, os_problem

# What torch says where a file could not be written to its end.
TORCH_SAYS = ("iostream error", "unexpected pos", "failed writing file", "PytorchStreamWriter failed")
LITTLE = 64 * 2**20  # bytes: less free space explains such a message


def guard_save(trainer_base: ModuleType) -> None:
    """Make verl's base trainer name the reason of a checkpoint that it could not save.

    Args:
        trainer_base: ``verl.trainer.ppo.v1.trainer_base``.
    """
    cls: Any = trainer_base.PPOTrainer
    save = cls._save_checkpoint

    @functools.wraps(save)
    def _save_checkpoint(self: Any) -> None:
        folder, step = Path(str(self.config.trainer.default_local_dir)), int(self.global_steps)
        tracker = folder / TRACKER
        before = tracker.read_bytes() if tracker.is_file() else None
        # Blocks are taken before the disk is full
        spare = tracker.with_name(f".{TRACKER}.before")
        if before is not None:
            spare.write_bytes(before)
        try:
            save(self)
        except Exception as error:
            if before is None:
                tracker.unlink(missing_ok=True)
            elif tracker.read_bytes() != before:
                spare.replace(tracker)
            if (named := save_error(error, folder, step, before)) is not None:
                raise named from error
            raise
        finally:
            spare.unlink(missing_ok=True)

    cls._save_checkpoint = _save_checkpoint


def save_error(error: BaseException, folder: Path, step: int, tracked: bytes | None) -> SayoError | None:
    """X26, or None for an error that is not of the disk.

    Args:
        error: of the save, perhaps of another process.
        folder: of the checkpoints.
        step: of the checkpoint.
        tracked: what the tracker held before.
    """
    said, _ = describe_exception(error)
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    problem = os_problem(said)
    if problem is None and free < LITTLE and any(words in said for words in TORCH_SAYS):
        problem = "the disk is full"
    if problem is None:
        return None
    last = f"checkpoint {tracked.decode(errors='replace')} stays" if tracked else "there is no earlier checkpoint"
    return SayoError(
        "X26",
        f"{problem}: the checkpoint of step {step} was not saved, {last}",
        where=os.fspath(folder / f"global_step_{step}"),
        got=f"{free / 2**30:.2f} GiB free; {said}",
        fix=f"free space there, delete global_step_{step}, and resume; trainer.max_actor_ckpt_to_keep=2 keeps fewer",
    )
