"""A folder of prepared data while it is made, so that the work can be interrupted anywhere and goes on.

``progress.json`` stands for the manifest until the folder is finished. It is replaced as a whole whenever a shard is
full, and says how many records of the source were used and which of these have their rows in a shard that was still
open: whoever goes on makes those again. So what an interrupted and continued folder holds is what an uninterrupted one
holds, byte for byte.

Error code: D53 the folder is of something else.
"""

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import PIL
import pyarrow as pa

from sayo_verl import __version__
from sayo_verl.data.building.folder import FORMAT, KIND, LEFT_OUT, SHARD, check_folder, read_json
from sayo_verl.data.building.shards import (
    IMAGE_BYTES,
    PROGRESS,
    SPLITS,
    START_OVER,
    Layout,
    ShardWriter,
    check_shard,
    differences,
    file_sha256,
    path_in_errors,
    read_rows,
    replace_file,
)
from sayo_verl.data.prepared import MANIFEST
from sayo_verl.data.rows import REASONS, ROW_SCHEMA
from sayo_verl.errors import SayoError

LOCK = ".lock"
COUNTS = ("tally", "left_out", "boxes_left_out", "images")
_OURS = re.compile(rf"{SHARD.pattern}|{re.escape(LEFT_OUT)}|{MANIFEST}|{PROGRESS}|{re.escape(LOCK)}|[a-z0-9_.-]+\.tmp")


class Output:
    """A folder that is being made. At most one process works on a folder at a time.

    Args:
        folder: made where it is not there.
        source: what the rows are made of; with ``options`` and the version it decides whether work that was begun
            can go on.
        options: those that decide what is in the folder.
        layout: sizes of shards.
        overwrite: remove what was made of something else, or was damaged.

    Attributes:
        manifest: of a folder that was finished before, else None.
        consumed: records of the source that were used.
        pending: those of them whose rows were in an open shard when the work was interrupted, with their ids.
        shards: the finished ones, {name: {rows, sha256, size}}.
        counts: one counter for each of ``COUNTS``.

    Raises:
        SayoError: D53 the folder is of something else or another process works in it, D56 it is damaged.
    """

    def __init__(
        self, folder: Path, source: Mapping[str, Any], options: Mapping[str, Any], layout: Layout, *, overwrite: bool
    ) -> None:
        self.folder = folder
        facts = {"kind": KIND, "format": FORMAT, "version": __version__, "source": source, "options": options}
        self._facts: dict[str, Any] = json.loads(json.dumps(facts, default=str))  # as they come back from a file
        self.consumed, self.pending = 0, dict[int, str]()
        self.shards: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTS}
        self.left_out_bytes = 0
        self._lock: IO[str] | None = None
        self._log: IO[bytes] | None = None
        self._due = False
        self.manifest: dict[str, Any] | None = None
        with path_in_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        begun = self._begun(overwrite)
        if begun == MANIFEST:
            self.manifest = check_folder(folder)
            for name in (PROGRESS, LOCK):  # of a process that ended right after the manifest
                (folder / name).unlink(missing_ok=True)
            return
        self._take_lock()
        if begun == PROGRESS:
            self._go_on()
        else:
            self._remove(lambda name: True)
        self._remove(lambda name: name.endswith(".tmp") or (SHARD.fullmatch(name) and name not in self.shards))
        with path_in_errors(folder / LEFT_OUT):
            self._log = open(folder / LEFT_OUT, "ab")  # noqa: SIM115  (closed in close)
            self._log.truncate(self.left_out_bytes)
        ends = {split: sum(name.startswith(f"{split}-") for name in self.shards) for split in SPLITS}
        self.writers = {split: ShardWriter(folder, split, layout, ends[split]) for split in SPLITS}
        self._checkpoint()

    def _begun(self, overwrite: bool) -> str:
        """Which of manifest and progress is there and is of the same facts, or ""."""
        names = sorted(path.name for path in self.folder.iterdir())
        begun = next((name for name in (MANIFEST, PROGRESS) if name in names), "")
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        recorded = read_json(self.folder / begun) if begun and not overwrite else {}
        left_out = self.folder / LEFT_OUT  # empty where the work was interrupted before it began
        unknown = [
            n for n in names if not n.endswith(".tmp") and n != LOCK and (n != LEFT_OUT or left_out.stat().st_size)
        ]
        if foreign or (unknown and not begun):
            raise SayoError(
                "D53",
                "the folder holds other files",
                where=str(self.folder),
                got=(foreign or names)[:5],
                wanted="an empty folder, or one that the same command made",
                fix="choose another --out, or move them away",
            )
        lines = differences({name: recorded.get(name) for name in self._facts}, self._facts) if recorded else []
        if lines and begun == PROGRESS and recorded.get("kind") == KIND and not recorded["state"]["shards"]:
            return ""  # nothing is lost by starting over
        if lines:
            state = "was made" if begun == MANIFEST else "was begun"
            raise SayoError(
                "D53",
                f"the folder {state} of something else",
                where=str(self.folder / begun),
                got="; ".join(lines[:6]),
                wanted="the same source and options",
                fix=START_OVER,
            )
        return begun if recorded else ""

    def _take_lock(self) -> None:
        with path_in_errors(self.folder / LOCK):
            self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115  (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise SayoError(
                "D53",
                "another process is at work in this folder",
                where=str(self.folder),
                fix="wait for it, or choose another --out",
            ) from error

    def _remove(self, which: Callable[[str], Any]) -> None:
        # what says whose the folder is goes last: an interruption leaves no folder that is nobody's
        for path in sorted(self.folder.iterdir(), key=lambda path: (path.name in (MANIFEST, PROGRESS), path.name)):
            if _OURS.fullmatch(path.name) and path.name != LOCK and which(path.name):
                path.unlink()

    def _go_on(self) -> None:
        state = read_json(self.folder / PROGRESS)["state"]
        self.consumed, self.pending, self.shards = state["consumed"], dict(state["pending"]), state["shards"]
        self.counts = {name: Counter(state["counts"][name]) for name in COUNTS}
        self.left_out_bytes = state["left_out_bytes"]
        for name, facts in self.shards.items():
            check_shard(self.folder / name, facts["rows"]).close()
        log = self.folder / LEFT_OUT
        if self.left_out_bytes and (not log.is_file() or log.stat().st_size < self.left_out_bytes):
            raise SayoError(
                "D56",
                "a file of the folder is not complete",
                where=str(log),
                got=f"{log.stat().st_size} bytes" if log.is_file() else "no file",
                wanted=f"at least {self.left_out_bytes} bytes",
                fix=START_OVER,
            )

    def rows(self, split: str) -> int:
        """How many rows of a split were taken."""
        return self._closed_rows(split) + len(self.writers[split].open_rows)

    def _closed_rows(self, split: str) -> int:
        return sum(facts["rows"] for name, facts in self.shards.items() if name.startswith(f"{split}-"))

    def add(self, row: dict[str, Any], ordinal: int) -> None:
        """Take a row. Its split and its place in it are in ``extra_info``."""
        closed = self.writers[row["extra_info"]["split"]].add(row, ordinal)
        if closed:
            self.shards |= closed
            self._due = True

    def leave_out(self, id: str, reason: str, detail: str = "", **more: Any) -> None:
        """Count and note a row that is left out."""
        assert reason in REASONS
        assert self._log is not None
        self.counts["left_out"][reason] += 1
        line = json.dumps({"id": id, "reason": reason, "detail": detail, **more}) + "\n"
        with path_in_errors(self.folder / LEFT_OUT):
            self._log.write(line.encode())

    def used(self, ordinal: int) -> None:
        """All that comes of this record of the source was handed over."""
        self.consumed = ordinal + 1
        if self._due:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._due = False
        assert self._log is not None
        with path_in_errors(self.folder / LEFT_OUT):
            self._log.flush()
            os.fsync(self._log.fileno())
            self.left_out_bytes = self._log.tell()
        state = {
            "consumed": self.consumed,
            "pending": sorted(row for writer in self.writers.values() for row in writer.open_rows),
            "shards": self.shards,
            "counts": self.counts,
            "left_out_bytes": self.left_out_bytes,
        }
        self._write_json(PROGRESS, {**self._facts, "state": state})

    def _write_json(self, name: str, value: Any) -> None:
        replace_file(self.folder / name, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def close_shards(self) -> None:
        """No more rows will come."""
        for writer in self.writers.values():
            self.shards |= writer.close() or {}
        self._checkpoint()

    def finish(self, **more: Any) -> dict[str, Any]:
        """Write the manifest, with ``more`` in it, after ``close_shards``."""
        log = self.folder / LEFT_OUT
        files = {**self.shards, LEFT_OUT: {"sha256": file_sha256(log), "size": log.stat().st_size}}
        self.manifest = {
            **self._facts,
            "rows": {split: self._closed_rows(split) for split in SPLITS},
            **{name: dict(counter) for name, counter in self.counts.items()},
            "files": files,
            "schema": hashlib.sha256(str(ROW_SCHEMA).encode()).hexdigest(),
            "made_with": {"pyarrow": pa.__version__, "pillow": PIL.__version__},
            **more,
        }
        self._write_json(MANIFEST, self.manifest)
        (self.folder / PROGRESS).unlink()
        (self.folder / LOCK).unlink()
        return self.manifest

    def close(self) -> None:
        """Let go of files and of the lock, in whatever state."""
        if self._log is not None:
            self._log.close()
            for writer in self.writers.values():
                writer.abandon()
        if self._lock is not None:
            self._lock.close()


class Earlier:
    """What a folder that was begun holds, read in step with the source.

    Args:
        output: the folder, just opened.
    """

    def __init__(self, output: Output) -> None:
        self.folder = output.folder
        columns = [IMAGE_BYTES, "extra_info.id", "extra_info.image_size_wh"]
        self._rows = {
            split: read_rows(self.folder, [n for n in sorted(output.shards) if n.startswith(f"{split}-")], columns)
            for split in SPLITS
        }
        self._next = {split: next(self._rows[split], None) for split in SPLITS}
        with open(self.folder / LEFT_OUT, "rb") as log:
            head = log.read(output.left_out_bytes)
        self._lines = iter(head.splitlines())
        self._pending = dict(output.pending)

    def row(self, split: str, id: str) -> dict[str, Any] | None:
        """The next row of a split (image bytes and sizes, id) if it has this id."""
        row = self._next[split]
        if row is None or row["extra_info"]["id"] != id:
            return None
        self._next[split] = next(self._rows[split], None)
        return row

    def open_row(self, ordinal: int, id: str) -> None:
        """A record whose row was in an open shard must be the one that it was."""
        there = self._pending.pop(ordinal)
        if there != id:
            raise self._differs(f"record {id!r} of the source", f"{there!r} in {PROGRESS}")

    def left_out(self, id: str) -> dict[str, Any]:
        """The next line of what was left out, which must have this id."""
        line = next(self._lines, None)
        entry = json.loads(line) if line is not None else {}
        if entry.get("id") != id:
            raise self._differs(f"record {id!r} of the source", f"{entry.get('id', 'no record')!r} in {LEFT_OUT}")
        return entry

    def check_end(self) -> None:
        """The source has yielded as much as it had when the work was interrupted."""
        ids = [row["extra_info"]["id"] for row in self._next.values() if row is not None]
        ids += [json.loads(line)["id"] for line in self._lines]
        ids += self._pending.values()
        if ids:
            raise self._differs("other records", f"{ids[0]!r} in the folder")

    def _differs(self, now: str, there: str) -> SayoError:
        return SayoError(
            "D53",
            "the source yields other records than when the folder was begun",
            where=str(self.folder),
            got=f"{now}, {there}",
            wanted="the same records in the same order",
            fix=START_OVER,
        )
