"""Checkpoints as verl's FSDP workers leave them, with tiny archives for the states."""

import io
import json
import zipfile
from pathlib import Path

from sayo_verl.launch.checkpoints import FINGERPRINT, TRACKER

STATES = ("model", "optim", "extra_state")


def archive(text: str = "state") -> bytes:
    """A file as ``torch.save`` writes it: a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", text)
    return buffer.getvalue()


def save(
    folder: Path,
    *steps: int,
    tracker: object = None,
    world: int = 1,
    parts: tuple[str, ...] = ("actor",),
    fingerprint: dict | None = None,
) -> Path:
    """Write complete checkpoints into ``folder`` and return it; ``tracker`` and ``fingerprint`` only if given."""
    for step in steps:
        place = folder / f"global_step_{step}"
        for part in parts:
            (place / part / "huggingface").mkdir(parents=True)
            for rank in range(world):
                for state in STATES:
                    (place / part / f"{state}_world_size_{world}_rank_{rank}.pt").write_bytes(archive())
        (place / "data.pt").write_bytes(archive())
        if fingerprint is not None:
            (place / FINGERPRINT).write_text(json.dumps(fingerprint | {"step": step}))
    if tracker is not None:
        (folder / TRACKER).write_text(str(tracker))
    return folder
