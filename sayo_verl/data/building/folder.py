"""A folder of prepared data, as it is when it is finished: what it holds, and whether that is still so.

    train-00000.parquet ...   rows of ``sayo_verl.data.rows.ROW_SCHEMA``
    val-00000.parquet ...
    left_out.jsonl            {id, reason, detail} of every row that was left out; "sizes" of its images where it had
                              got as far as its boxes
    manifest.json             what the folder was made of and what is in it, with sizes and sha256; written last

Error code: D56 the folder is damaged or of another kind.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sayo_verl.data.building.shards import PROGRESS, SPLITS, START_OVER, check_shard, file_sha256, read_rows
from sayo_verl.data.contract import check_data_source
from sayo_verl.data.prepared import MANIFEST, is_complete, no_prepared_folder
from sayo_verl.data.rows import RUNS_CODE
from sayo_verl.errors import SayoError

KIND, FORMAT = "sayo rows", 1
LEFT_OUT = "left_out.jsonl"
SHARD = re.compile(r"(train|val)-\d{5}\.parquet")
IN_OTHER_SPLIT = "image_in_other_split"
_PLAIN = re.compile(r"[\w/.@%+-]+")  # a path that Hydra's grammar takes without quotes


class Built(NamedTuple):
    """A finished folder.

    Attributes:
        folder: where.
        rows: split -> rows.
        left_out: reason -> rows.
        files: split -> shards.
        reused: it was there already.
    """

    folder: Path
    rows: dict[str, int]
    left_out: dict[str, int]
    files: dict[str, list[Path]]
    reused: bool


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder, not compared with its files.

    Raises:
        SayoError: D56.
    """
    if folder.suffix.lower() in RUNS_CODE:
        raise SayoError(
            "D56",
            "files of this format are not read: reading one can run code that it holds",
            where=str(folder),
            got=folder.suffix,
            wanted="a folder that `sayo prepare` made",
            fix="convert it to parquet or JSON lines with the program that wrote it",
        )
    if not (folder / MANIFEST).is_file():
        if not (folder / PROGRESS).is_file():
            raise no_prepared_folder(folder)
        raise SayoError(
            "D56",
            "the folder is not finished",
            where=str(folder),
            wanted=MANIFEST,
            fix="call the command that began it again; it resumes",
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
        raise SayoError(
            "D56",
            "the folder is of another kind",
            where=str(folder / MANIFEST),
            got=f"{manifest.get('kind')!r}, format {manifest.get('format')!r}",
            wanted=f"{KIND!r}, format {FORMAT}",
            fix="name a folder that `sayo prepare` made with this version",
        )
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """An object from a small file.

    Raises:
        SayoError: D56.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"{type(manifest).__name__} instead of an object")
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        raise SayoError(
            "D56",
            f"a file of the folder cannot be read ({error})",
            where=str(path),
            got=f"{path.stat().st_size} bytes" if path.exists() else "no file",
            fix="delete the folder and prepare it again",
        ) from error


def check_folder(folder: Path, *, hashes: bool = False) -> dict[str, Any]:
    """Compare a finished folder with its manifest: its files and their sizes, and the columns, rows and data sources
    of every shard.

    Args:
        folder: what ``sayo prepare`` made.
        hashes: compare the sha256 of every file as well, which reads all of them.

    Returns:
        The manifest.

    Raises:
        SayoError: D56; D52 for a data source that `sayo prepare` does not write.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    strange = [name for name in files if not SHARD.fullmatch(name) and name != LEFT_OUT]
    strange += [path.name for path in folder.glob("*.parquet") if path.name not in files]
    if strange:
        raise SayoError(
            "D56",
            "the files of a folder are not those of its manifest",
            where=str(folder),
            got=sorted(strange)[:5],
            wanted="the files that the manifest names",
            fix=f"move them away, or {START_OVER}",
        )
    for name, facts in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["size"]:
            raise SayoError(
                "D56",
                "a file of the folder is not complete",
                where=str(path),
                got="no file" if size is None else f"{size} bytes",
                wanted=f"{facts['size']} bytes",
                fix=f"copy it again, or {START_OVER}",
            )
        if hashes and file_sha256(path) != facts["sha256"]:
            raise SayoError(
                "D56",
                "a file of the folder was changed",
                where=str(path),
                got="another sha256",
                wanted=facts["sha256"],
                fix=f"copy it again, or {START_OVER}",
            )
        if name != LEFT_OUT:
            check_shard(path, facts["rows"]).close()
            for source in {row["data_source"] for row in read_rows(folder, [name], ["data_source"])}:
                check_data_source(source, str(path))
    return manifest


def built(folder: Path, manifest: Mapping[str, Any], *, reused: bool) -> Built:
    """What callers get to know of a finished folder."""
    files = {
        split: [folder / name for name in sorted(manifest["files"]) if name.startswith(f"{split}-")] for split in SPLITS
    }
    return Built(folder, dict(manifest["rows"]), dict(manifest["left_out"]), files, reused)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """split -> parquet files of a finished folder of ``sayo prepare``, drawn scenes included.

    Raises:
        SayoError: D56, D52.
    """
    scenes = (folder / MANIFEST).is_file() and "train.parquet" in read_json(folder / MANIFEST).get("files", {})
    if not scenes:
        return built(folder, check_folder(folder), reused=True).files
    if not is_complete(folder):
        raise SayoError(
            "D56",
            "a file of the folder is not complete",
            where=str(folder),
            wanted=f"the files of {MANIFEST} at their sizes",
            fix="prepare it again: `sayo prepare synthetic`",
        )
    return {split: [folder / f"{split}.parquet"] for split in SPLITS}


def verl_flags(files: Mapping[str, list[Path]]) -> str:
    """``data.train_files=[...] data.val_files=[...]``, to paste into a shell; a split without rows has no flag."""

    def listed(paths: list[Path]) -> str:
        # in Hydra's quotes a backslash stands for itself, except before a quote
        names = [str(path.absolute()) for path in paths]
        return ",".join(n if _PLAIN.fullmatch(n) else '"' + re.sub(r'(\\*)"', r'\1\1\\"', n) + '"' for n in names)

    return " ".join(shlex.quote(f"data.{split}_files=[{listed(files[split])}]") for split in SPLITS if files[split])
