"""A backend that sends weights to rollouts on "other devices" of the CPU stack, through a file in shared memory.

``separate_async`` refuses verl's backend for shared devices, and all others of verl need an accelerator or its network.
Selected by ``rollout.checkpoint_engine.backend=cpu_file``, with this module as its ``custom_backend_module``. All
processes must be on one machine.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

SHARED_MEMORY = Path("/dev/shm")
POLL_SECONDS = 0.05


@CheckpointEngineRegistry.register("cpu_file")
class CPUFileEngine(CheckpointEngine):
    """The first trainer process writes one file per update of weights; each rollout process reads it."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.folder: Path | None = None

    def prepare(self) -> str | None:
        """A new folder, from the first trainer process."""
        if not self.is_master:
            return None
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        return tempfile.mkdtemp(prefix="sayo-weights-", dir=parent)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[str | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Every process gets the folder of the first."""
        return {"folder": [metadata[0]] * actor_wg_world_size}, {"folder": [metadata[0]] * rollout_world_size}

    def init_process_group(self, folder: str) -> None:
        self.folder = Path(folder)

    def finalize(self) -> None:
        if self.is_master and self.folder is not None:
            shutil.rmtree(self.folder)
        self.folder = None

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Write the weights. Every process of the trainer walks through them, because gathering each is collective."""
        assert self.folder is not None
        kept = {}
        for name, weight in weights:
            if self.is_master:
                kept[name] = weight.detach()
        if self.is_master:
            torch.save(kept, self.folder / "writing")
            os.replace(self.folder / "writing", self.folder / "weights")
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Wait for the file and yield (name, weight)."""
        assert self.folder is not None
        while not (self.folder / "weights").exists():
            await asyncio.sleep(POLL_SECONDS)
        for name, weight in torch.load(self.folder / "weights", mmap=True, weights_only=True).items():
            yield name, weight
