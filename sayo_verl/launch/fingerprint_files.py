"""The files of a run in its fingerprint (``fingerprint.py``): code, training data and models, by what is in them.

So a file may move, and a file that changed is noticed.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sayo_verl.launch.model_check import HDFS
from sayo_verl.launch.reward_function import file_of
from sayo_verl.models.location import is_hub_name, model_folder

# Files of a model's folder that decide what the model sees.
SMALL = (
    "config.json",
    "adapter_config.json",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
    "chat_template*",
    "*.py",
)
LARGE = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # weights
BLOCK, BLOCKS = 1 << 20, 16  # bytes; of a file of weights these many are read
NOT_FOUND = "not on this machine"
REVISION, WEIGHTS = "revision", "weights"
_COMMIT = re.compile(r"[0-9a-f]{40}")  # how the hub's cache names the folder of a snapshot


def of_code(path: str) -> str:
    """The digest of a file with code, or the name of its package."""
    file = file_of(path)
    if file is None:
        return path
    return f"sha256 {digest(file.read_bytes())}" if file.is_file() else NOT_FOUND


def of_data(named: Any) -> dict[str, str]:
    """The training files in their order: rows, bytes and the digest of all bytes."""
    files = [named] if isinstance(named, str) else list(named or [])
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter
        found = list(pool.map(_data_file, map(str, files)))
    return {f"data.train_files[{n}]": value for n, value in enumerate(found)}


def _data_file(name: str) -> str:
    file = Path(name).expanduser()
    if not file.is_file():
        return NOT_FOUND
    state = file.stat()
    rows = ""
    try:
        rows = f"{pq.read_metadata(file).num_rows} rows, "
    except (pa.ArrowException, OSError):  # JSON, or a file that check_data has refused
        rows = ""
    return f"{rows}{state.st_size} bytes, sha256 {_whole(str(file), state.st_size, state.st_mtime_ns)}"


@functools.lru_cache
def _whole(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def of_model(key: str, path: str) -> dict[str, str]:
    """What of a model is compared. Its key begins with ``key``, followed by ``": "`` and what it is of the model.

    Args:
        key: the setting.
        path: its value: a folder, a hub name, or a path on HDFS, which is compared as it is.

    Returns:
        The small files of the folder by digest. Of a folder also the weights, by size and sampled blocks; of a hub
        name and of a snapshot in the hub's cache the revision.
    """
    if path.startswith(HDFS):
        return {key: path}
    folder, hub = model_folder(path, where=key, dry_run=True), is_hub_name(path)
    if folder is None:
        return {f"{key}: {REVISION if hub else WEIGHTS}": NOT_FOUND}
    small = sorted({file for pattern in SMALL for file in folder.glob(pattern) if file.is_file()})
    found = {f"{key}: {file.name}": f"sha256 {digest(file.read_bytes())}" for file in small}
    if hub or _COMMIT.fullmatch(folder.name):
        found[f"{key}: {REVISION}"] = folder.name
    if hub:  # verl downloads the weights later
        return found
    files = sorted({file for pattern in LARGE for file in folder.glob(pattern) if file.is_file()})
    if files:
        total, samples = sum(file.stat().st_size for file in files), digest(b"".join(_sampled(file) for file in files))
        found[f"{key}: {WEIGHTS}"] = f"{total} bytes in {len(files)} files, sha256 of samples {samples}"
    return found


def comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys of either side that can be compared.

    Of a file or model that one side did not find, nothing can. A hub name and its snapshot have the revision in common,
    a folder and its copy the weights.
    """
    keys = old.keys() | new.keys()
    lost = {_of(key) for side in (old, new) for key, value in side.items() if value == NOT_FOUND}

    def both(key: str, part: str) -> bool:
        return all(f"{_of(key)}: {part}" in side for side in (old, new))

    def same_revision(key: str) -> bool:
        name = f"{_of(key)}: {REVISION}"
        return name in old and old[name] == new.get(name)

    def useless(key: str) -> bool:
        one_side = (key in old) != (key in new)
        moved = key.endswith(f": {REVISION}") and both(key, WEIGHTS)
        return _of(key) in lost or (": " in key and one_side and (moved or same_revision(key)))

    return [key for key in keys if not useless(key)]


def _of(key: str) -> str:
    """The setting of a key of ``of_model``."""
    return key.partition(": ")[0]


def _sampled(file: Path) -> bytes:
    """The digest of evenly spread blocks of a file, the first and the last included; of all bytes if it is small."""
    size, hashed = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        if size <= BLOCK * BLOCKS:
            hashed.update(opened.read())
        else:
            for n in range(BLOCKS):
                opened.seek(n * (size - BLOCK) // (BLOCKS - 1))
                hashed.update(opened.read(BLOCK))
    return hashed.digest()


def digest(data: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]
