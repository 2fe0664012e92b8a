"""The checkpoints in a folder: which are complete, what is damaged in the others. Needs neither verl nor torch.

verl saves ``global_step_<n>`` with actor, critic, ``data.pt`` and, in asynchronous modes, ``transfer_queue``. It then
writes the step into the tracker. A kill in between leaves files that are missing, empty or truncated. ``sayo.json``
(``fingerprint.py``) is written first and names what the checkpoint has to contain.
"""

import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACKER, FINGERPRINT = "latest_checkpointed_iteration.txt", "sayo.json"
SCHEMA = 1  # of sayo.json; a number per incompatible change
# Contents of a checkpoint -> how verl's FSDP files of it begin.
STATE = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
LOADER, QUEUE = "data.pt", "transfer_queue"
LAST_OF_QUEUE = f"{QUEUE}/metadata.json"  # written last by TransferQueue, which then moves the folder into place
_FOLDER = re.compile(r"global_step_(\d+)")
_SHARD = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")


@dataclass(frozen=True)
class Expected:
    """What a complete checkpoint contains.

    Attributes:
        devices: of the trainer: each state has one file per device. None: as many as the files say.
        parts: subfolders with states, such as ``("actor", "critic")``.
        fsdp: whether verl's FSDP saved it; the files of other strategies are not checked.
        queue: whether it was saved in an asynchronous mode, with the prompts in flight. A ``sayo.json`` knows better.
    """

    devices: int | None = None
    parts: tuple[str, ...] = ("actor",)
    fsdp: bool = True
    queue: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """One ``global_step_<n>`` folder.

    Attributes:
        folder: its path.
        step: the number in its name.
        damage: file -> ``missing``, ``empty`` or ``truncated``, for what verl would load; empty: complete.
        devices: the numbers of devices that its files were saved on.
        tracked: whether the tracker names it, so that verl resumes it.
        removed: whether verl deleted its weights for newer ones (``trainer.max_actor_ckpt_to_keep``).
    """

    folder: Path
    step: int
    damage: dict[str, str]
    devices: frozenset[int]
    tracked: bool
    removed: bool

    @property
    def complete(self) -> bool:
        """Whether a run can resume it."""
        return not self.damage

    def __str__(self) -> str:
        if self.complete:
            return f"{self.folder.name}: complete{', the tracker names it' if self.tracked else ''}"
        if self.removed:
            return f"{self.folder.name}: its weights were removed for newer ones (trainer.max_actor_ckpt_to_keep)"
        return f"{self.folder.name}: {summary(self.damage)}"


def judge_checkpoints(folder: Path | str, expected: Expected | None = None) -> list[Checkpoint]:
    """Every checkpoint of a folder, ascending by step. Empty if there is none, or no folder.

    Args:
        folder: ``trainer.default_local_dir``, such as ``<run>/checkpoints``.
        expected: what a checkpoint has to contain; None: what its ``sayo.json`` names, else an actor of as many devices
            as its files say, and a critic if there is a folder of one.
    """
    folder = Path(folder)
    tracked = tracked_step(folder)
    return [judge(path, expected, tracked=step_of(path) == tracked) for path in step_folders(folder)]


def newest_complete(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The complete checkpoint of the largest step."""
    return max((c for c in checkpoints if c.complete), key=lambda c: c.step, default=None)


def steps_lost(checkpoints: Sequence[Checkpoint], last: int) -> int:
    """How many steps are trained again if the newest complete checkpoint is resumed; ``last`` is the last step run."""
    newest = newest_complete(checkpoints)
    return max(0, last - (newest.step if newest else 0))


def step_folders(folder: Path) -> list[Path]:
    """The ``global_step_<n>`` folders, ascending by number."""
    return sorted((f for f in folder.glob("global_step_*") if _FOLDER.fullmatch(f.name) and f.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The number in the name of a ``global_step_<n>`` folder."""
    return int(folder.name.rpartition("_")[2])


def tracked_step(folder: Path) -> int | None:
    """The step that the tracker names; None if there is no tracker that can be read."""
    try:
        return int((folder / TRACKER).read_bytes().decode())
    except (OSError, ValueError):  # bad UTF-8 as well
        return None


def judge(folder: Path, expected: Expected | None = None, *, tracked: bool = False) -> Checkpoint:
    """Judge one ``global_step_<n>`` folder; arguments as of ``judge_checkpoints``."""
    shards = [match for file in folder.glob("*/*.pt") if (match := _SHARD.fullmatch(file.name))]
    devices = frozenset(int(match[2]) for match in shards)
    recorded = _recorded(folder)
    expected = expected or recorded or _apparent(folder)
    wanted = [LOADER]
    if expected.fsdp:
        world = expected.devices or max(devices, default=1)
        wanted += [
            f"{part}/{state}_world_size_{world}_rank_{rank}.pt"
            for part in expected.parts
            for state in STATE.values()
            for rank in range(world)
        ]
    damage = {name: found for name in wanted if (found := _damage(folder / name))}
    if (recorded or expected).queue and not (folder / LAST_OF_QUEUE).is_file():
        damage[LAST_OF_QUEUE if (folder / QUEUE).is_dir() else QUEUE] = "missing"
    # verl's retention deletes the folder of each part and leaves the rest. It saves ``data.pt`` after the parts.
    removed = LOADER not in damage and not any((folder / part).exists() for part in expected.parts)
    return Checkpoint(folder, step_of(folder), damage, devices, tracked, removed)


def write_fingerprint(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``sayo.json`` of a checkpoint that is about to be saved; nobody ever reads half of it.

    An abandoned attempt may have left a complete checkpoint of the same step, which verl overwrites file by file. What
    verl saves last is removed here, so that a kill in between does not leave a mixture that looks complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOADER).unlink(missing_ok=True)
    if (folder / QUEUE).exists():
        shutil.rmtree(folder / QUEUE)
    record = {**record, "step": step_of(folder), "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    temporary = folder / f".{FINGERPRINT}.new"
    with temporary.open("w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FINGERPRINT)
    of_folder = os.open(folder, os.O_RDONLY)  # the new name is on the disk too
    try:
        os.fsync(of_folder)
    finally:
        os.close(of_folder)


def summary(damage: dict[str, str]) -> str:
    """``"data.pt missing and 3 more"``."""
    name, found = next(iter(damage.items()))
    return f"{name} {found}" + (f" and {len(damage) - 1} more" if damage.keys() - {name} else "")


def _damage(file: Path) -> str:
    """Why a file of ``torch.save`` cannot be loaded; empty if it can, as far as its directory says.

    Such a file is a zip archive, whose directory is at the end. Reading that is cheap at any size.
    """
    try:
        if file.stat().st_size == 0:
            return "empty"
        with zipfile.ZipFile(file):
            return ""
    except FileNotFoundError:
        return "missing"
    except zipfile.BadZipFile:
        return "truncated"
    except OSError as error:
        return str(error.strerror)


def _recorded(folder: Path) -> Expected | None:
    """What ``sayo.json`` names; None if there is none that can be read."""
    try:
        saved = json.loads((folder / FINGERPRINT).read_bytes())["saved"]
        return Expected(int(saved["devices"]), tuple(saved["parts"]), bool(saved["fsdp"]), bool(saved["queue"]))
    except (OSError, ValueError, KeyError, TypeError):  # a resume refuses a damaged one (L95)
        return None


def _apparent(folder: Path) -> Expected:
    parts = ("actor", *(["critic"] if (folder / "critic").is_dir() else []))
    megatron = any((folder / part / "dist_ckpt").exists() for part in parts)
    return Expected(parts=parts, fsdp=not megatron, queue=(folder / QUEUE).exists())
