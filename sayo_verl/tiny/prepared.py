"""Folders that are built once from a configuration and reused afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sayo_verl.data.folder import MANIFEST, Prepared, new_folder, write_manifest


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` has a manifest and every file that it names, at its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == facts["size"] for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError):  # cut short, or of an older version: as good as absent
        return False


def prepare_folder(folder: Path, build: Callable[[Path], dict[str, Any]]) -> Prepared:
    """``folder``, filled by ``build`` unless a complete one is there; an incomplete one is replaced.

    Args:
        folder: its name has a hash of the configuration.
        build: fills the (empty) folder that it is given, and returns facts for the manifest.
    """
    if is_complete(folder):
        return Prepared(folder, True)
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder, overwrite=False) as fresh:
        write_manifest(fresh, **build(fresh))
    return Prepared(folder, False)
