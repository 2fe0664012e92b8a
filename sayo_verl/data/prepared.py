"""Folders that are built once from a configuration and reused afterwards.

A folder is named after a hash of what it was built from. It is built beside its final place and renamed into it, so a
folder under its final name is either complete or was damaged later; ``manifest.json`` (written last) lists every file
with its size, which tells the two apart.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sayo_verl.errors import SayoError

MANIFEST = "manifest.json"


class Prepared(NamedTuple):
    """A complete folder and whether it was there already."""

    path: Path
    reused: bool


def content_hash(*parts: Any) -> str:
    """Ten hexadecimal digits that depend on the values of ``parts`` alone (dataclasses, numbers, strings, tuples)."""
    plain = [asdict(part) if is_dataclass(part) and not isinstance(part, type) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def no_prepared_folder(folder: Path) -> SayoError:
    """D56: there is no such folder, or it has no manifest."""
    return SayoError(
        "D56",
        "there is no prepared folder",
        where=str(folder),
        wanted=MANIFEST,
        fix="name a folder that `sayo prepare` made",
    )


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` has a manifest and every file the manifest names, at its size."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError):  # cut short or not ours: as good as absent
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def prepare_folder(out_root: Path | str, name: str, build: Callable[[Path], dict[str, Any]]) -> Prepared:
    """Return ``out_root/name``, built by ``build`` unless a complete one is there.

    Args:
        out_root: parent folder; made when absent.
        name: final name, normally with a hash of the configuration in it.
        build: fills the (empty) folder it is given and returns what the manifest shall say.

    Returns:
        The folder and whether it was reused. An incomplete folder of that name is replaced.
    """
    root = Path(out_root)
    folder = root / name
    if is_complete(folder):
        return Prepared(folder, True)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
        fresh = Path(scratch) / name
        fresh.mkdir()
        facts = build(fresh)
        files = {str(p.relative_to(fresh)): p.stat().st_size for p in sorted(fresh.rglob("*")) if p.is_file()}
        (fresh / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2, sort_keys=True) + "\n")
        if is_complete(folder):  # another process was faster; its folder has the same content
            return Prepared(folder, True)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(fresh, folder)
    return Prepared(folder, False)
