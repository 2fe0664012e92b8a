"""A folder of prepared data.

    train-00000.parquet ...   rows (``sayo_verl.data.rows``)
    val-00000.parquet ...
    images/                   with --link: pictures that are not files of their own, or were changed
    left_out.jsonl            {id, reason, detail} of every row that was left out
    manifest.json             source, options, counts, and the size of every file

A build writes into a hidden folder beside it, which gets its name when it is complete. So a folder with a manifest is
whole, or was damaged later. Imports the standard library only: scripts look at folders before they have an environment.
"""

import glob
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sayo_verl.errors import SayoError

KIND, FORMAT = "sayo rows", 2
MANIFEST, LEFT_OUT = "manifest.json", "left_out.jsonl"
SPLITS = ("train", "val")
OVERWRITE = "choose another --out, or replace the folder with --overwrite"
_PLAIN = re.compile(r"[\w/.@%+-]+")  # a path that Hydra's grammar takes without quotes


class Built(NamedTuple):
    """A finished folder."""

    folder: Path
    rows: dict[str, int]  # by split
    left_out: dict[str, int]  # by reason
    files: dict[str, list[Path]]  # by split


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into; it becomes ``out`` if the block ends without an exception, and is removed otherwise.

    What a killed build left is removed by the next one.

    Raises:
        SayoError: D53 if ``out`` holds files, unless it is a prepared folder and ``overwrite`` is set; D56 if it cannot
            be written.
    """
    out = out.resolve()
    _refuse_full(out, overwrite)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
            process = left.name.split(".")[-2]
            if process.isdigit() and not Path("/proc", process).exists():
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        yield partial
        _refuse_full(out, overwrite)  # another build may have finished meanwhile
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        if error.filename is None and error.strerror is None:  # no error of the file system
            raise
        what, fix = f"a file cannot be written ({error.strerror})", "make room or correct the folder, and call again"
        raise SayoError("D56", what, where=str(error.filename or out), fix=fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_full(out: Path, overwrite: bool) -> None:
    ours = _is_ours(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (ours and overwrite)):
        what = "the folder is prepared data already" if ours else "the folder holds other files"
        got = sorted(path.name for path in out.iterdir())[:5] if out.is_dir() else "a file"
        fix = OVERWRITE if ours else "choose another --out, or move the files away"
        raise SayoError("D53", what, where=str(out), got=got, wanted="a new or an empty folder", fix=fix)


def _is_ours(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text())["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def no_prepared_folder(folder: Path) -> SayoError:
    """D56: there is no such folder, or it has no manifest."""
    fix = (
        "name a folder that `sayo prepare` made (a build that was interrupted starts again); for parquet files of your "
        "own, data.train_files=FILE data.val_files=FILE"
    )
    return SayoError("D56", "there is no prepared folder", where=str(folder), wanted=MANIFEST, fix=fix)


def check_folder(folder: Path, kind: str = KIND) -> dict[str, Any]:
    """The manifest of a folder of this kind, after a comparison with the files that are there.

    Raises:
        SayoError: D56 for a folder without a manifest, of another format, or with other files than its manifest names.
    """
    if not (folder / MANIFEST).is_file():
        raise no_prepared_folder(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["kind"], manifest.get("format", 1)
        files: dict[str, dict[str, int]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / MANIFEST, f"{type(error).__name__}: {error}", "a manifest") from error
    if found != (kind, FORMAT):
        raise SayoError(
            "D56",
            "the folder is of another version or kind",
            where=str(folder / MANIFEST),
            got=f"{found[0]}, format {found[1]}",
            wanted=f"{kind}, format {FORMAT}",
            fix="prepare the data again with this version",
        )
    for name, facts in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else "no file"
        if size != facts["size"]:
            raise _damaged(folder / name, size, facts["size"])
    strange = sorted(path.name for path in folder.glob("*.parquet") if path.name not in files)
    if strange:
        raise _damaged(folder, strange[:5], "only the files that the manifest names")
    return manifest


def _damaged(path: Path, got: object, wanted: object) -> SayoError:
    what, fix = "a file of a prepared folder is not as its manifest says", "copy the folder again, or prepare it again"
    return SayoError("D56", what, where=str(path), got=got, wanted=wanted, fix=fix)


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write ``manifest.json`` for the files that are there."""
    files = {path.name: {"size": path.stat().st_size} for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = {"kind": KIND, "format": FORMAT, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> Built:
    """A finished folder; errors as ``check_folder``."""
    manifest = check_folder(folder)
    files = {
        split: [folder / name for name in sorted(manifest["files"]) if name.startswith(f"{split}-")] for split in SPLITS
    }
    return Built(folder, manifest["rows"], manifest["left_out"], files)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """split -> parquet files of a finished folder; errors as ``check_folder``."""
    return read_folder(folder).files


def verl_flags(files: Mapping[str, list[Path]]) -> str:
    """``data.train_files=[...] data.val_files=[...]``, to paste into a shell; a split without rows has no flag."""

    def listed(paths: list[Path]) -> str:
        # in Hydra's quotes a backslash stands for itself, except before a quote
        names = [str(path.absolute()) for path in paths]
        return ",".join(n if _PLAIN.fullmatch(n) else '"' + re.sub(r'(\\*)"', r'\1\1\\"', n) + '"' for n in names)

    return " ".join(shlex.quote(f"data.{split}_files=[{listed(files[split])}]") for split in SPLITS if files[split])
