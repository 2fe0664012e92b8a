"""``sayo.json`` beside every checkpoint, of estimators of verl's own too.

The launcher puts the record into ``sayo.fingerprint`` (``launch/fingerprint.py``). It is written before verl saves, so
that no tracker ever names a checkpoint without one.
"""

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from sayo_verl.launch.checkpoints import write_fingerprint


def save_beside_checkpoints(trainer_base: ModuleType) -> None:
    """Make verl's trainers write the record of their run into each checkpoint.

    Without ``sayo.fingerprint``, as in a run that verl's own launcher started, nothing is written.

    Args:
        trainer_base: ``verl.trainer.ppo.v1.trainer_base``, just imported.
    """
    cls: Any = trainer_base.PPOTrainer
    original = cls._save_checkpoint

    @functools.wraps(original)
    def _save_checkpoint(self: Any) -> Any:
        record = (self.config.get("sayo") or {}).get("fingerprint")
        if record:
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            write_fingerprint(folder, json.loads(record))
        return original(self)

    cls._save_checkpoint = _save_checkpoint
