"""Parquet files of rows, before any row is read. No model library is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sayo_verl.data.reading import open_parquet
from sayo_verl.errors import SayoError

NEEDED = {"prompt", "reward_model"}  # columns of a row


def columns_of(file: Path | str) -> set[str]:
    """Names of a parquet file's columns.

    Raises:
        SayoError: F20 for a missing file, D02 for an unreadable one, F10 for a file without the columns of a row.
    """
    if not Path(file).is_file():
        raise SayoError(
            "F20",
            "a file of rows is missing",
            where="--rows",
            got=str(file),
            fix="name parquet files, such as DATA/train-*.parquet of `sayo prepare`",
        )
    have = set(open_parquet(Path(file)).schema_arrow.names)
    if not have >= NEEDED:
        raise SayoError(
            "F10",
            "the file does not have the columns of a row",
            where=str(file),
            got=sorted(have),
            wanted=f"the columns {sorted(NEEDED)}",
            fix="see the row contract in docs/data.md",
        )
    return have


def check_boxes(files: Sequence[Path | str]) -> None:
    """Refuse files in which no row has a box: ``<Focus>`` would learn nothing, and a report would be empty.

    Raises:
        SayoError: F22, and what ``columns_of`` raises.
    """
    for file in files:
        rows = pq.read_table(file, columns=["extra_info"]).to_pylist() if "extra_info" in columns_of(file) else []
        if any(has_boxes(row) for row in rows):
            return
    raise SayoError(
        "F22",
        "no row has a box, so <Focus> has no target",
        where="--rows",
        got=", ".join(str(file) for file in files),
        wanted="extra_info.boxes in some rows",
        fix="name rows of `sayo prepare` (docs/data.md); `train --weight 0` imitates answers alone",
    )


def has_boxes(row: dict[str, Any]) -> bool:
    """Whether any image of the row has a box."""
    info = row["extra_info"]
    boxes = info.get("boxes") if isinstance(info, dict) else None
    return isinstance(boxes, list) and any(boxes)


def missing_files(files: Sequence[str]) -> list[str]:
    """The files that do not exist."""
    return [file for file in files if not Path(file).is_file()]


def count_rows(files: Sequence[str]) -> int | None:
    """Rows of all files, from their footers; None if a file is missing.

    Raises:
        SayoError: D02.
    """
    if missing_files(files):
        return None
    return sum(open_parquet(Path(file)).metadata.num_rows for file in files)
