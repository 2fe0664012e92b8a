"""Checks of the splits of a run as wholes: boxes in training rows, and no image in both splits."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sayo_verl.data.reading import image_digest, open_parquet, read_rows
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.launch.row_check import Counted, evenly


def check_boxes_of_run(counted: Counted, where: str, *, boxes: bool = True) -> None:
    """Refuse training files of which no row has an image, or, with ``boxes``, a box; D04. Validation rows need none."""
    got, grpo = f"{counted.rows} rows in all training files together", "or set algorithm.adv_estimator=grpo"
    others = "or use a method that needs none: METHOD=dual, anchor, faithful, sensitivity (recipe/README.md) or grpo"
    image = "no training row has an image, so every row would train as with grpo"
    box, wanted = "no training row has a target box", "extra_info.boxes[image][box] = [x0, y0, x1, y1] in [0, 1]"
    raise_first(
        [
            Rule("D04", not counted.with_images, image, where, f"correct data.image_key, add images, {grpo}", got),
            Rule("D04", boxes and not counted.with_boxes, box, where, f"add boxes, {others}", got, wanted),
        ]
    )


def check_leakage(train: Sequence[Path], val: Sequence[Path], *, image_key: str, max_images: int) -> str:
    """Look for images of the validation files among the training files, and say what was compared.

    Names (``extra_info.image_keys``, within a data source) are compared in all rows, encoded bytes in at most
    ``max_images`` rows of each side. Of a few shared images the sample may see none; `sayo inspect` compares all.

    Raises:
        SayoError: D65 for an image of both, D02 for a file that cannot be read.
    """
    trained, held = (_pictures(paths, image_key, max_images) for paths in (train, val))
    for what in trained:
        shared = trained[what].keys() & held[what].keys()
        if shared:
            first = min(shared, key=lambda key: trained[what][key])
            raise SayoError(
                "D65",
                f"training and validation share images, by {what}",
                where=f"{trained[what][first]} and {held[what][first]}",
                got=f"{len(shared)} shared of {len(held[what])} compared",
                wanted="no image in both",
                fix="split by image, as `sayo prepare` does; or set sayo.held_out=false",
            )
    return (
        f"{len(held['name'])} names and {len(held['bytes'])} images of validation are not among "
        f"{len(trained['name'])} and {len(trained['bytes'])} of training"
    )


def _pictures(paths: Sequence[Path], image_key: str, max_images: int) -> dict[str, dict[Any, str]]:
    """Where the names of all pictures, and the bytes of a sample, are first found."""
    found: dict[str, dict[Any, str]] = {"name": {}, "bytes": {}}
    for path in paths:
        file = open_parquet(path)
        columns = file.schema_arrow.names
        if image_key not in columns:
            continue  # rows without images
        if any(column.path.startswith("extra_info.image_keys.") for column in file.schema):
            wanted = [*({"data_source"} & set(columns)), "extra_info.image_keys"]
            for row, values in enumerate(read_rows(file, path, wanted)):
                for key in (values["extra_info"] or {}).get("image_keys") or []:
                    found["name"].setdefault((repr(values.get("data_source")), repr(key)), f"{path} row {row}")
        sampled = evenly(file.metadata.num_rows, min(max_images, max(1, max_images // len(paths))))
        for row, values in _rows_at(file, path, [image_key], sampled):
            for image in values[image_key] or []:
                found["bytes"].setdefault(image_digest(image, f"{path} row {row}"), f"{path} row {row}")
    return found


def _rows_at(file: pq.ParquetFile, path: Path, columns: list[str], chosen: set[int]) -> Iterator[tuple[int, dict]]:
    """``(number, row)`` of some rows; only the row groups that hold one are read. Errors as of ``read_rows``."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        numbers = range(start, start + file.metadata.row_group(group).num_rows)
        start = numbers.stop
        if chosen.isdisjoint(numbers):
            continue
        for number, row in zip(numbers, read_rows(file, path, columns, [group]), strict=True):
            if number in chosen:
                yield number, row
