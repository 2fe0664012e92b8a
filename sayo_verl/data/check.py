"""Checks of parquet files as wholes: columns that verl reads, and whether verl can join several files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sayo_verl.data.contract import Demands
from sayo_verl.data.reading import open_parquet
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.reward.walk import is_walk


def open_rows(path: Path, demands: Demands) -> pq.ParquetFile:
    """A file that has rows and the columns that verl reads; D02 if it cannot be read, D03 otherwise."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    wrong = [f"has no column {column!r}" for column in demands.columns() if column not in names]
    wrong += [f"has two columns {name!r}" for name in names if names.count(name) > 1]
    wrong += [] if file.metadata.num_rows else ["has no rows"]
    wanted = f"rows with the columns {', '.join(demands.columns())}"
    fix = "follow the row contract in docs/data.md; data.prompt_key names the prompts"
    what = f"the parquet {(wrong or ['can be read'])[0]}"
    raise_first([Rule("D03", bool(wrong), what, str(path), fix, sorted(names), wanted)])
    return file


def asks_for_answer(values: Mapping[str, Any], demands: Demands) -> bool:
    """Whether a prompt names the tag in which ``sayo_verl.reward`` reads the answer; True where it reads no tag."""
    untagged = demands.judge is None or is_walk(values.get("data_source"))
    return untagged or "<answer>" in str(values[demands.keys.prompt])


def columns_of(file: pq.ParquetFile, demands: Demands) -> list[str]:
    """What to read of a file: the columns of the contract that are there. Bytes of images only if they are read."""
    wanted = [*demands.keys, "data_source", "reward_model", "extra_info"]
    there = [name for name in dict.fromkeys(wanted) if name in file.schema_arrow.names]
    key = demands.keys.images
    paths = [c.path for c in file.schema if c.path.startswith(f"{key}.") and c.path.endswith(".path")]
    return there if demands.headers or len(paths) != 1 else [paths[0] if name == key else name for name in there]


def check_joined(paths: Sequence[Path]) -> None:
    """Refuse files that verl's data set cannot join: it concatenates them as `datasets` does. D02, D64.

    A column or a field of a struct may be missing in some files. What is in several must have one type.
    """
    from datasets import Dataset, Features, concatenate_datasets

    joined: list[Dataset] = []
    for path in paths:
        schema = open_parquet(path).schema_arrow
        try:
            features = Features.from_arrow_schema(schema)
            one = Dataset.from_dict({name: [None] for name in features}, features=features)  # empty ones are not joined
            joined = [concatenate_datasets([*joined, one])]
        except (ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
            wrong = _differing(open_parquet(paths[0]).schema_arrow, schema)
            fix = "write the column of both files with one type, or leave a file out"
            fix = "prepare all folders with --link, or none" if any(w.startswith("images:") for w in wrong) else fix
            raise SayoError(
                "D64",
                "verl's data set cannot join the files, or cannot read one of them",
                where=f"{path}, after {paths[0]}",
                got="; ".join(wrong) or " ".join(str(error).split())[:200],
                wanted="one type for each column and field",
                fix=fix,
            ) from error


def _differing(one: pa.Schema | pa.StructType, other: pa.Schema | pa.StructType, prefix: str = "") -> list[str]:
    """Columns and fields of structs that are in both with different types; names of list items do not count."""
    found = []
    for ours in one:
        theirs = other.field(ours.name) if ours.name in [field.name for field in other] else ours
        if pa.types.is_struct(ours.type) and pa.types.is_struct(theirs.type):
            found += _differing(ours.type, theirs.type, f"{prefix}{ours.name}.")
        elif not ours.type.equals(theirs.type) and not any(map(pa.types.is_null, (ours.type, theirs.type))):
            found.append(f"{prefix}{ours.name}: {theirs.type}, there {ours.type}")
    return found
