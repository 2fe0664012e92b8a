"""Checks of parquet files before a run, for the launcher: every row by the row contract, a sample of images decoded.

``sayo_verl.launch.data_check`` decides what a run demands of its files. `sayo inspect` uses the same contract.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.reading import open_parquet, read_image, read_rows
from sayo_verl.errors import Rule, SayoError, raise_first

Kept = tuple[int, str, int, dict[str, Any]]  # size, path, number of the row, its values


@dataclass
class Counted:
    """What there is in some files, and a few of their rows.

    Attributes:
        rows: of them.
        with_boxes: rows with a box; None where boxes are not looked at.
        with_images: rows with an image.
        decoded: images that were decoded.
        remote: images of web addresses, which are not read.
        narrow: rows that verl's length filter drops for the shape of an image.
        silent: rows whose prompt does not name ``<answer>`` (``asks_for_answer``).
        spread: rows evenly spread over each file.
        largest, longest: the rows with the most pixels and with the longest questions.
    """

    rows: int = 0
    with_boxes: int | None = None
    with_images: int = 0
    decoded: int = 0
    remote: int = 0
    narrow: int = 0
    silent: int = 0
    spread: list[Kept] = field(default_factory=list)
    largest: list[Kept] = field(default_factory=list)
    longest: list[Kept] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.rows} rows" + (f", {self.with_boxes} with boxes" if self.with_boxes is not None else "")
        text += f", {self.decoded} images decoded"
        text += f", {self.remote} images of web addresses not read" if self.remote else ""
        return text + (f", {self.narrow} rows too narrow for Qwen's resize" if self.narrow else "")

    def add(self, other: "Counted", keep: int) -> None:
        """Count another file as well; ``keep`` as in ``check_parquet``."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, value if mine is None else mine if value is None else mine + value)
        self.largest, self.longest = (heapq.nlargest(keep // 4, kept) for kept in (self.largest, self.longest))


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
    """Whether a prompt names the tag in which ``sayo_verl.reward`` reads the answer; True for another reward."""
    return demands.judge is None or "<answer>" in str(values[demands.keys.prompt])


def evenly(n_rows: int, n: int) -> set[int]:
    """``n`` row numbers, or all, evenly spread."""
    return {i * n_rows // n for i in range(n)} if n < n_rows else set(range(n_rows))


def check_parquet(
    path: Path,
    demands: Demands,
    *,
    max_images: int = 512,
    keep: int = 0,
    spread: int = 0,
    drops_narrow: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Counted:
    """Check all rows of one file.

    Args:
        path: an existing file.
        demands: which checks apply.
        max_images: decode the images of at most so many rows, evenly spread over the file; none if not positive.
        keep: remember a quarter of so many rows as the largest, and a quarter as the longest.
        spread: remember so many rows, evenly spread.
        drops_narrow: count rows with an image too narrow for Qwen's resize instead of refusing them.
        tick: called once a row.

    Raises:
        SayoError: of ``open_rows``, and the first fault of the first invalid row.
    """
    file = open_rows(path, demands)
    n_rows, key = file.metadata.num_rows, demands.keys.images
    sampled, spread_over = evenly(n_rows, max_images), evenly(n_rows, spread)
    contract, counted = RowContract(demands), Counted(rows=n_rows)
    for row, values in enumerate(read_rows(file, path, columns_of(file, demands))):
        looked = contract.look(values, f"{path} row {row}")
        narrow = [fault for fault in looked.faults if drops_narrow and fault.code == "D77"]
        for fault in looked.faults:
            if fault not in narrow:
                raise fault
        images = values.get(key) or []
        counted.narrow += bool(narrow)
        counted.silent += not asks_for_answer(values, demands)
        if demands.attention:
            counted.with_boxes = (counted.with_boxes or 0) + any(looked.boxes)
        counted.with_images += bool(images)
        counted.remote += looked.headers.count(None)
        for i, image in enumerate(images if row in sampled else []):
            counted.decoded += read_image(image, f"{path} row {row}, images[{i}]") is not None
        if row in spread_over:
            counted.spread.append((0, str(path), row, values))
        pixels = sum(header.width * header.height for header in looked.headers if header)
        for kept, size in ((counted.largest, pixels), (counted.longest, len(looked.question))):
            heapq.heappush(kept, (size, str(path), row, values))
            if len(kept) > keep // 4:
                heapq.heappop(kept)
        tick()
    return counted


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
            raise SayoError(
                "D64",
                "verl's data set cannot join the files, or cannot read one of them",
                where=f"{path}, after {paths[0]}",
                got="; ".join(wrong) or " ".join(str(error).split())[:200],
                wanted="one type for each column and field",
                fix="write the column of both files with one type, or leave a file out",
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
