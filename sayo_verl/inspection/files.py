"""The files of a data set: how they are found and compared with their manifest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sayo_verl.data.building.shards import PROGRESS, file_sha256
from sayo_verl.data.contract import PREPARE
from sayo_verl.data.prepared import MANIFEST
from sayo_verl.data.rows import RUNS_CODE
from sayo_verl.errors import SayoError
from sayo_verl.inspection.findings import Findings


@dataclass(frozen=True)
class Data:
    """Files of one data set; ``folders`` holds the folders that `sayo prepare` made."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    folders: tuple[Path, ...]


def find_data(data: Sequence[Path], val: Sequence[Path] = ()) -> Data:
    """The parquet files behind the arguments of the command.

    Args:
        data: parquet files, or folders with ``train*.parquet`` and ``val*.parquet``. Files whose name begins with "val"
            are validation data.
        val: the same, but all files are validation data.

    Raises:
        SayoError: D64 for a path that does not exist, a file that is not parquet, and one that can run code when it is
            loaded.
    """
    train: list[Path] = []
    held_out: list[Path] = []
    folders = []
    for path, is_val in [*((p, False) for p in data), *((p, True) for p in val)]:
        if not path.is_dir():
            _refuse_file(path)
            (held_out if is_val or path.name.startswith("val") else train).append(path)
            continue
        ours, theirs = sorted(path.glob("train*.parquet")), sorted(path.glob("val*.parquet"))
        if not ours and not theirs:
            raise SayoError(
                "D64",
                "the folder holds no prepared data",
                where=str(path),
                got=sorted(p.name for p in path.iterdir())[:8],
                wanted="train*.parquet or val*.parquet",
                fix="name the folder that `sayo prepare` printed, or the parquet files",
            )
        (held_out if is_val else train).extend(ours)
        held_out.extend(theirs)
        if (path / MANIFEST).is_file() or (path / PROGRESS).is_file():
            folders.append(path)
    return Data(tuple(dict.fromkeys(train)), tuple(dict.fromkeys(held_out)), tuple(folders))


def _refuse_file(path: Path) -> None:
    if path.suffix.lower() in RUNS_CODE:
        raise SayoError(
            "D64",
            "loading this kind of file can run code, so it is not read",
            where=str(path),
            got=path.suffix,
            wanted="parquet",
            fix="convert it with the program that wrote it",
        )
    if not path.is_file():
        raise SayoError("D64", "there is no such file or folder", where=str(path), fix="correct the path")
    if path.suffix != ".parquet":
        raise SayoError(
            "D64",
            "this is not a parquet file",
            where=str(path),
            got=path.suffix or "no suffix",
            wanted=".parquet; verl reads a file by its suffix",
            fix=PREPARE,
        )


def check_manifest(folder: Path, findings: Findings) -> None:
    """Compare a folder with its manifest; a difference is a finding, D64."""
    if not (folder / MANIFEST).is_file():
        findings.add("D64", "FAIL", "a folder is not finished", str(folder), "call `sayo prepare` again; it resumes")
        return
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        facts = {name: {"size": fact} if isinstance(fact, int) else dict(fact) for name, fact in files.items()}
        sizes = {name: fact["size"] for name, fact in facts.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        findings.add("D64", "FAIL", "a manifest cannot be read", f"{folder / MANIFEST}: {error!r}", PREPARE)
        return
    for name, size in sizes.items():
        file = folder / name
        got = file.stat().st_size if file.is_file() else "no file"
        if got != size:
            findings.add(
                "D64",
                "FAIL",
                "a file differs from its entry in the manifest",
                f"{file}: got {got}, wanted {size} bytes",
                PREPARE,
            )
        elif "sha256" in facts[name] and file_sha256(file) != facts[name]["sha256"]:
            findings.add(
                "D64",
                "FAIL",
                "a file differs from its entry in the manifest",
                f"{file}: got another sha256, wanted {facts[name]['sha256']}",
                PREPARE,
            )
    for file in sorted(folder.glob("*.parquet")):
        if file.name not in sizes:
            findings.add("D64", "WARN", "a parquet file that the manifest does not name", str(file), PREPARE)
