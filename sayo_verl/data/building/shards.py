"""Shards of prepared data, and the small things that make writing them safe and repeatable.

A shard is written under another name, synced, read back (footer, number of rows, schema) and then renamed. Rows go
into shards and row groups by their order alone, so equal rows give equal files, byte for byte (with one version of
Arrow). Nothing here depends on the clock, on paths or on the number of processes. ``folder`` is about the folder that
shards are in.

Error code: D56 a shard cannot be written or is not what was written.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sayo_verl.data.rows import ROW_SCHEMA
from sayo_verl.errors import SayoError

PROGRESS = "progress.json"
SPLITS = ("train", "val")
START_OVER = "choose another --out, or start over with --overwrite"
IMAGE_BYTES = "images.list.element.bytes"


class Layout(NamedTuple):
    """Sizes of shards and row groups. A row group ends before it would pass ``row_group_bytes`` of images."""

    shard_rows: int = 2000
    row_group_rows: int = 64
    row_group_bytes: int = 64 * 2**20


def hash64(*parts: str) -> int:
    """64 bits that depend on ``parts`` alone."""
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def bytes64(data: bytes) -> int:
    """64 bits of the sha256 of ``data``."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


class Hashes:
    """A set of 64-bit numbers in 12 to 24 bytes each (a Python set takes about 80).

    Two of n different things share a number with a probability of about n^2 / 2^65: 3e-8 for a million.
    """

    def __init__(self) -> None:
        self._table, self._count = array("Q", bytes(8 * 1024)), 0

    def __len__(self) -> int:
        return self._count

    def _slot(self, value: int) -> int:
        mask = len(self._table) - 1
        slot = value & mask
        while self._table[slot] not in (0, value):
            slot = (slot + 1) & mask
        return slot

    def __contains__(self, value: int) -> bool:
        return self._table[self._slot(value or 1)] != 0

    def add(self, value: int) -> bool:
        """Put ``value`` in; False if it was there."""
        value = value or 1  # 0 marks an empty slot
        slot = self._slot(value)
        if self._table[slot]:
            return False
        self._table[slot] = value
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for number in filter(None, old):
                self._table[self._slot(number)] = number
        return True


def differences(there: Any, now: Any, name: str = "") -> list[str]:
    """Lines that name what differs between two JSON values."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = sorted({*there, *now})
        return [line for k in keys for line in differences(there.get(k), now.get(k), f"{name}.{k}" if name else k)]
    return [] if there == now else [f"{name}: {there!r} there, {now!r} now"]


def replace_file(path: Path, text: str) -> None:
    """Write a small file as a whole or not at all."""
    fresh = path.with_name(path.name + ".tmp")
    with path_in_errors(fresh):
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        _sync_folder(path.parent)


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """D56 for what the disk says no to."""
    try:
        yield
    except OSError as error:
        raise SayoError(
            "D56",
            f"a file cannot be written ({error})",
            where=str(path),
            fix="make room or correct the folder, and call again: it goes on",
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: IO[bytes]) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Rows of one split into shards.

    Args:
        folder: where the shards go.
        split: "train" or "val".
        layout: sizes.
        shards: how many are there already.
    """

    def __init__(self, folder: Path, split: str, layout: Layout, shards: int) -> None:
        self.folder, self.split, self.layout, self.shards = folder, split, layout, shards
        self.open_rows: list[tuple[int, str]] = []  # of the open shard: the records behind them, and their ids
        self._buffer: list[dict[str, Any]] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._writer: pq.ParquetWriter | None = None

    @property
    def name(self) -> str:
        return f"{self.split}-{self.shards:05d}.parquet"

    def add(self, row: dict[str, Any], ordinal: int) -> dict[str, Any] | None:
        """Take a row of ``ROW_SCHEMA``. Returns ``{name: facts}`` of the shard that is full by it, or None."""
        size = sum(len(image["bytes"]) for image in row["images"])
        if self._buffer and self._bytes + size > self.layout.row_group_bytes:
            self._flush()
        self._buffer.append(row)
        self._bytes += size
        self.open_rows.append((ordinal, row["extra_info"]["id"]))
        if len(self._buffer) >= self.layout.row_group_rows:
            self._flush()
        return self.close() if len(self.open_rows) >= self.layout.shard_rows else None

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._buffer, schema=ROW_SCHEMA)
        path = self.folder / f"{self.name}.tmp"
        with path_in_errors(path):
            if self._writer is None:
                self._file = open(path, "wb")  # noqa: SIM115  (closed in close and abandon)
                # images are compressed already; statistics of binary columns would put images into the footer
                columns = dict.fromkeys(_leaves(ROW_SCHEMA), "zstd") | {IMAGE_BYTES: "none"}
                self._writer = pq.ParquetWriter(
                    self._file,
                    ROW_SCHEMA,
                    compression=columns,
                    write_statistics=False,
                    use_dictionary=[column for column in columns if column != IMAGE_BYTES],
                )
            self._writer.write_table(table, row_group_size=len(self._buffer))
        self._buffer, self._bytes = [], 0

    def close(self) -> dict[str, Any] | None:
        """Finish the open shard; None if there is none."""
        if not self.open_rows:
            return None
        if self._buffer:
            self._flush()
        assert self._writer is not None
        assert self._file is not None
        fresh, final, rows = self.folder / f"{self.name}.tmp", self.folder / self.name, len(self.open_rows)
        with path_in_errors(fresh):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._writer = self._file = None
        check_shard(fresh, rows).close()
        facts = {"rows": rows, "sha256": file_sha256(fresh), "size": fresh.stat().st_size}
        with path_in_errors(final):
            os.replace(fresh, final)
            _sync_folder(self.folder)
        self.shards, self.open_rows = self.shards + 1, []
        return {final.name: facts}

    def abandon(self) -> None:
        """Leave the open shard unfinished."""
        with suppress(OSError):  # whatever there was to say was said when it was written
            if self._writer is not None:
                self._writer.close()
            if self._file is not None:
                self._file.close()


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of the columns of a parquet file of this schema."""

    def below(kind: pa.DataType, name: str) -> Iterator[str]:
        if pa.types.is_struct(kind):
            for part in kind:
                yield from below(part.type, f"{name}.{part.name}")
        elif pa.types.is_list(kind):
            yield from below(kind.value_type, f"{name}.list.element")
        else:
            yield name

    return [leaf for column in schema for leaf in below(column.type, column.name)]


def _kinds(fields: Sequence[pa.Field], name: str = "") -> dict[str, str]:
    """Field -> type, with the fields of structs one by one."""
    kinds: dict[str, str] = {}
    for part in fields:
        if pa.types.is_struct(part.type):
            kinds |= _kinds(list(part.type), f"{name}{part.name}.")
        else:
            kinds[name + part.name] = str(part.type)
    return kinds


def check_shard(path: Path, rows: int) -> pq.ParquetFile:
    """Read the footer of a shard.

    Raises:
        SayoError: D56 for a file that cannot be read, has another number of rows or another schema.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not file.schema_arrow.equals(ROW_SCHEMA):
        lines = differences(_kinds(list(file.schema_arrow)), _kinds(list(ROW_SCHEMA)))
        raise SayoError(
            "D56",
            "the columns of a shard are not those of this version",
            where=str(path),
            got="; ".join(lines).replace(" now", " wanted") or "the same fields in another order",
            wanted="sayo_verl.data.rows.ROW_SCHEMA in every shard",
            fix=START_OVER,
        )
    if file.metadata.num_rows != rows:
        raise SayoError(
            "D56",
            "a shard has another number of rows than was written",
            where=str(path),
            got=file.metadata.num_rows,
            wanted=rows,
            fix=START_OVER,
        )
    return file


def read_rows(folder: Path, names: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of shards in order, one row group at a time.

    Args:
        folder: of the shards.
        names: of the shards.
        columns: names, or dotted paths such as "extra_info.id"; all by default.

    Raises:
        SayoError: D56 for a damaged file.
    """
    for name in names:
        try:
            with pq.ParquetFile(folder / name) as file:
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, columns=columns).to_pylist()
        except (OSError, ValueError) as error:  # Arrow's own errors are among these
            raise _unreadable(folder / name, error) from error


def _unreadable(path: Path, error: Exception) -> SayoError:
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
    return SayoError(
        "D56",
        f"the parquet file cannot be read ({' '.join(str(error).split())})",
        where=str(path),
        got=found,
        wanted="the shard as it was written",
        fix=START_OVER,
    )
