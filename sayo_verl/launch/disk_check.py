"""Can the folders of a run be written, and has their disk room for its checkpoints?

A checkpoint of verl's FSDP engine has, for the actor and for a critic, the weights in the engine's ``model_dtype``, two
numbers of that type for each trained weight (Adam), with ``hf_model`` the weights once more, and the files of the
tokenizer. With LoRA only the adapter is trained. Without it all weights are: no code of verl 0.9.1's FSDP engine reads
``freeze_vision_tower``. verl writes a new checkpoint before it removes an old one, and the next begins while the last
is being read; so room for 2.2 is wanted.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from sayo_verl.errors import SayoError
from sayo_verl.launch.memory import GIB, shapes_of
from sayo_verl.launch.memory_check import plain
from sayo_verl.launch.model_check import load_config, model_folder
from sayo_verl.launch.resources import elsewhere
from sayo_verl.launch.resume import metrics_file, parts_of
from sayo_verl.models.families import FAMILIES
from sayo_verl.report.causes import one_line

WANTED = 2.2  # checkpoints
BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
CHECKPOINTS = "trainer.default_local_dir"


def check_disk(config: DictConfig, *, dry_run: bool) -> list[tuple[str, str]]:
    """Refuse folders that cannot be written, and a disk without room for 2.2 checkpoints.

    Args:
        config: the full configuration.
        dry_run: no file is written, and the lack of room is a warning of the plan.

    Returns:
        A line of the plan if checkpoints are saved.

    Raises:
        SayoError: L98.
    """
    saves = int(config.trainer.save_freq) > 0
    if elsewhere(config, dry_run=False):
        return [("disk", "not checked: the run uses other machines")] if saves else []
    metrics = metrics_file(config)
    folders = {"the metrics file": metrics.parent} if metrics else {}
    if saves:
        folders[CHECKPOINTS] = Path(str(config.trainer.default_local_dir))
    for where, folder in folders.items():
        check_writable(folder, where, try_it=not dry_run)
    return [("disk", _room(config, folders[CHECKPOINTS], dry_run=dry_run))] if saves else []


def check_writable(folder: Path, where: str, *, try_it: bool) -> None:
    """Refuse a folder that this user cannot write or make.

    Args:
        folder: may not exist yet; its nearest existing parent counts.
        where: what names it.
        try_it: write and remove a small file. root passes the permissions of a read-only file system.

    Raises:
        SayoError: L98.
    """
    parent, problem = nearest(folder), None
    if not parent.is_dir():
        problem = "it is a file"
    elif not os.access(parent, os.W_OK | os.X_OK):
        problem = "this user may not write there"
    elif try_it:
        try:
            with tempfile.TemporaryFile(dir=parent) as file:
                file.write(b"sayo")
        except OSError as error:
            problem = one_line(error)
    if problem:
        raise SayoError(
            "L98",
            "the folder of the run cannot be written",
            where=f"{where} ({folder})",
            got=f"{parent}: {problem}",
            fix="choose another folder (OUT=... or sayo.out=...), or make this one writable",
        )


def nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def checkpoint_bytes(config: DictConfig) -> dict[str, float] | None:
    """Part of a checkpoint -> its bytes; those of a critic are named ``critic ...``.

    An adapter counts only for model families whose shapes are known; elsewhere it is left out, as it is small. A critic
    counts with the head of the language model, which some of verl's value models replace by one row.

    Returns:
        None if a model is not on this machine, or not saved by the FSDP engine.
    """
    found: dict[str, float] = {}
    for part in parts_of(config):
        critic = part == "critic"
        sizes = _part_bytes(config.critic if critic else config.actor_rollout_ref, critic=critic)
        if sizes is None:
            return None
        found |= {f"critic {name}" if critic else name: size for name, size in sizes.items()}
    return found


def _part_bytes(config: DictConfig, *, critic: bool) -> dict[str, float] | None:
    """Of the actor (``config`` is ``actor_rollout_ref``) or of the critic (``critic``)."""
    engine, model = config if critic else config.actor, config.model
    folder = model_folder(str(model.path), dry_run=True)
    if folder is None or engine.strategy not in ("fsdp", "fsdp2"):
        return None
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        return None
    numbers, rank = sum(map(_numbers, weights)), int(model.get("lora_rank") or 0)
    of_one = BYTES.get(str(OmegaConf.select(engine, f"{'fsdp' if critic else 'fsdp_config'}.model_dtype")), 4)
    adapter = _adapter(model, rank) if rank > 0 else 0
    contents = OmegaConf.select(engine, "checkpoint.save_contents")
    contents = ["model", "optimizer", "extra"] if contents is None else list(contents)
    only_adapter = rank > 0 and bool(OmegaConf.select(engine, "checkpoint.save_lora_only"))
    parts = {
        "model": (adapter if only_adapter else numbers + adapter) * of_one,
        "optimizer": 2 * (adapter if rank > 0 else numbers) * of_one,
        "hf_model": (numbers + adapter) * of_one,
    }
    files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file not in weights)
    return {name: float(size) for name, size in parts.items() if name in contents} | {"tokenizer": float(files)}


def _numbers(file: Path) -> int:
    """Numbers in a file of weights, by its header."""
    with safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def _adapter(model: DictConfig, rank: int) -> int:
    """Numbers of a LoRA adapter; 0 for a family whose shapes are unknown."""
    hf_config = load_config(str(model.path), dry_run=True)
    if hf_config is None or hf_config.model_type not in FAMILIES:
        return 0
    modules = {key: plain(model.get(key)) for key in ("target_modules", "exclude_modules")}
    return shapes_of(hf_config, lora_rank=rank, **modules).trained


def _room(config: DictConfig, folder: Path, *, dry_run: bool) -> str:
    """The line of the plan.

    Raises:
        SayoError: L98 without room for ``WANTED`` checkpoints.
    """
    free = shutil.disk_usage(nearest(folder)).free
    sizes = checkpoint_bytes(config)
    if sizes is None:
        return f"{_size(free)} free at {nearest(folder)}; the size of a checkpoint is unknown"
    one = sum(sizes.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items() if not name.endswith("tokenizer"))
    listed = f"{_size(one)} ({parts})"
    line = f"a checkpoint takes about {listed}; {_size(free)} free at {nearest(folder)}"
    if free < WANTED * one:
        if dry_run:
            return f"{line}. WARNING: a run is refused, it wants {_size(WANTED * one)}"
        raise SayoError(
            "L98",
            f"the disk has no room for {WANTED} checkpoints",
            where=f"{CHECKPOINTS} ({folder})",
            got=f"{_size(free)} free, a checkpoint takes about {listed}",
            wanted=_size(WANTED * one),
            fix="free space, name a folder on another disk (OUT=... or sayo.out=...), or save none with "
            "trainer.save_freq=-1",
        )
    steps, kept = config.trainer.total_training_steps, config.trainer.get("max_actor_ckpt_to_keep")
    saved = -(-int(steps) // int(config.trainer.save_freq)) if steps is not None else None
    if kept is None and saved is not None and saved * one > free:
        line += f". WARNING: all {saved} are kept, {_size(saved * one)}: set trainer.max_actor_ckpt_to_keep=2"
    return line


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
