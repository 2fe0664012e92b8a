"""Tables: parquet, csv or JSON files, or a data set of the Hugging Face hub.

``--map image=img,question=query,answer=label,boxes=objects.bbox`` names the columns that have other names than these
fields. A dot leads into a struct, or into each struct of a list.

    image      {bytes, path} as ``datasets`` stores it, bytes, or a file name; a list of these: several images
    question   text; image tags around it are removed where there is one for each image
    answer     text or a number; \\boxed{...} around it is removed. A list is refused: one entry must be chosen
    boxes      optional: boxes of four numbers, or one box; with several images: one list of boxes for each image
    id         optional, unique; read only if --map names it. Default: split and number of the row
    box_names, kind, width, height    optional; width and height of the picture that the boxes were drawn on

File names are relative to the folder of the table, or to --images. In a folder, the files of a split have its name:
train-00000-of-00002.parquet, val.csv, test/a.json. csv is read as text, so 1.50 and NA stay as they are; lists in it
are JSON. A data set of the hub is read at its newest commit, which the manifest names. Licence: that of the data.
"""

import argparse
import csv
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Json

from sayo_verl.data.json_files import json_records
from sayo_verl.data.rows import Drop, Example, LeftOut, Source
from sayo_verl.data.sources import common
from sayo_verl.errors import SayoError, did_you_mean

NAMED_BOXES = True  # the command adds --box-format and what belongs to it
# Required field -> other names that published tables give it.
REQUIRED = {
    "image": ("images", "img", "picture", "image_path", "file_name"),
    "question": ("problem", "query", "prompt"),
    "answer": ("solution", "label", "ground_truth", "answers"),
}
FIELDS = (*REQUIRED, "boxes", "id", "box_names", "kind", "width", "height")
SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class TableSource(Source):
    """A table; the attributes are the flags of ``add_flags``, ``columns`` is --map."""

    data: str
    box_format: str | None = None
    split: str = "train"
    val_split: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Path | None = None
    config: str | None = None
    name: str = "table"

    def facts(self) -> dict[str, Any]:
        files = [file for split in (self.split, self.val_split) if split for file in self._files(split)]
        commit = None if files else self._commit
        return dataclasses.asdict(self) | {"commit": commit, "files": common.file_facts(files)}

    def examples(self) -> Iterator[Example | LeftOut]:
        """The rows; D05, D09, D42, D46, D58-D62 for an invalid row, D47, D48, D63 for data that cannot be read."""
        path = Path(self.data)
        base = self.images or (path.parent if path.is_file() else path)
        folder = common.ImageFolder(base) if self.images or path.exists() else None
        splits = {self.split: "train", self.val_split: "val"} if self.val_split else {self.split: ""}
        for name, split in splits.items():
            for number, row in enumerate(self._rows(name)):
                where = f"{self.data} {name} row {number}"
                values = self._values(common.parse(dict[str, Any], row, where), where)
                id = common.parse(common.Text, values.get("id"), where) or f"{name}:{number}"
                try:
                    yield self._example(id, values, folder, split, where)
                except Drop as drop:
                    yield LeftOut(id, drop.reason, drop.detail)

    def _values(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The value of each field; D58, with a --map to copy, where the table has no column for it."""
        columns = {name: name for name in FIELDS if name in REQUIRED or (name in row and name != "id")}
        columns |= self.columns
        missing = [field for field, column in columns.items() if column.split(".")[0] not in row]
        if not missing:
            return {field: _value(row, column, where) for field, column in columns.items()}
        what = f"the table has no column {columns[missing[0]]!r}{did_you_mean(columns[missing[0]], row)}"
        for field in missing:
            likely = [column for column in REQUIRED.get(field, ()) if column in row]
            columns[field] = likely[0] if len(likely) == 1 else "COLUMN"
        fix = "--map " + ",".join(f"{field}={column}" for field, column in columns.items() if field != column)
        raise SayoError("D58", what, where=where, got=", ".join(row), fix=f"name the columns as the table does: {fix}")

    def _example(
        self, id: str, values: dict[str, Any], folder: common.ImageFolder | None, split: str, where: str
    ) -> Example:
        question, answer, kind = (
            common.parse(common.Text, values.get(n), f"{where}, {n}") for n in ("question", "answer", "kind")
        )
        pictures, regions, named = (_parsed(values.get(n), where) for n in ("image", "boxes", "box_names"))
        if isinstance(regions, str) or isinstance(named, str):
            what, fix = "boxes or box_names are text", "write lists as JSON: [[10, 20, 100, 120]]"
            raise SayoError("D58", what, where=where, got=f"{regions!r:.60}, {named!r:.60}", fix=fix)
        pictures = pictures if isinstance(pictures, list) else [pictures]
        images = tuple(common.stored_image(picture, f"{where}, image", folder) for picture in pictures)
        boxes = common.boxes_of_images(regions, len(images), f"{where}, boxes")
        names = common.names_of_boxes(named, boxes, f"{where}, box_names")
        box_format, source = self.box_format or "", f"sayo/{self.name}"
        question = common.untagged(question, len(images), where)
        answer = re.sub(r"^\$?\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}\$?$", r"\1", answer).strip()
        width, height = values.get("width"), values.get("height")
        sized = width and height and len(images) == 1
        sizes = (common.parse(tuple[common.Side, common.Side], (width, height), where),) if sized else ()
        return Example(id, images, question, answer, boxes, names, box_format, self.name, source, sizes, kind, split)

    def _rows(self, split: str) -> Iterator[Mapping[str, Any]]:
        """The rows of the files, or of the hub; images stay {bytes, path}. D63 for what cannot be read."""
        from datasets import load_dataset

        files, where = self._files(split), self.data
        try:
            if not files:
                hub = load_dataset(self.data, self.config, split=split, revision=self._commit, streaming=True)
                yield from hub.decode(False)
            for where in map(str, files):
                if where.endswith(".parquet"):
                    table = load_dataset("parquet", data_files=where, split="train", batch_size=64, streaming=True)
                    yield from table.decode(False)
                elif where.endswith(".csv"):
                    with open(where, encoding="utf-8-sig", newline="") as file:
                        yield from csv.DictReader(file, restkey="more")
                else:  # not by ``datasets``, which turns texts into dates, and text beside numbers into JSON
                    yield from (record for _, record in json_records(Path(where)))
        except SayoError:
            raise
        except Exception as error:  # the errors of Arrow, of the hub's client and of the network have no common base
            what = f"the table cannot be read ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})"
            fix = f"check the path (a folder, or a file {', '.join(SUFFIXES)}; csv is UTF-8); "
            fix += "of the hub: name, --split, --config, the network, HF_HUB_OFFLINE, and `hf auth login`"
            raise SayoError("D63", what, where=where, fix=fix) from error

    @cached_property
    def _commit(self) -> str:
        """The newest commit on the hub: looked up once, so that the facts name what was read."""
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self.data).sha)

    def _files(self, split: str) -> list[Path]:
        """The file, or the files of a split in a folder; none for a data set of the hub. D63."""
        path = Path(self.data)
        if not path.is_dir() and path.suffix not in SUFFIXES:
            return []
        names = (f"{split}.*", f"{split}-*", f"{split}/*")
        files = sorted({file for name in names for file in path.rglob(name) if file.suffix in SUFFIXES})
        if not path.is_dir() and not self.val_split:
            files = [common.check_input(path)]
        if not files:
            fix = f"name a folder with {', '.join(SUFFIXES)} files of this split, or one such file without --val-split"
            raise SayoError("D63", f"there is no table of the split {split!r}", where=self.data, fix=fix)
        return files


def _value(row: Any, column: str, where: str) -> Any:
    """The value of a column; a dot leads into a struct, and into those of a list. None where a struct is null."""
    if row is None or isinstance(row, list):
        return row and [_value(one, column, where) for one in row]
    name, _, rest = column.partition(".")
    if not isinstance(row, Mapping) or name not in row:
        got = f"{list(row) if isinstance(row, Mapping) else row!r:.80}"
        raise SayoError("D58", f"a column has no field {name!r}", where=where, got=got, fix="correct --map")
    return _value(row[name], rest, where) if rest else row[name]


def _parsed(value: Any, where: str) -> Any:
    """A list, which a csv has as JSON; None for an empty cell."""
    is_json = isinstance(value, str) and value.startswith("[") and value.endswith("]")  # not [a].jpg
    return common.parse(Json[list[Any]], value, where) if is_json else value or None


def parse_map(text: str) -> dict[str, str]:
    """``"image=img,question=q"`` as a mapping; D58."""
    columns: dict[str, str] = {}
    for pair in text.split(",") if text else ():
        field, _, column = (part.strip() for part in pair.partition("="))
        if field not in FIELDS or not column or field in columns:
            what, fix = "the map is not FIELD=COLUMN,FIELD=COLUMN", "write each field once: image=img,question=query"
            raise SayoError("D58", what, where="--map", got=text, wanted=", ".join(FIELDS), fix=fix)
        columns[field] = column
    return columns


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare table``."""
    add = parser.add_argument
    add("--data", "--dataset", required=True, metavar="TABLE", help="file (parquet, csv, JSON), folder or hub name")
    add("--split", default="train", help="split to read (default: %(default)s)")
    add("--val-split", metavar="SPLIT", help="split whose rows are the validation rows")
    add("--map", dest="columns", type=parse_map, default="", metavar="FIELD=COLUMN", help="such as image=img,id=qid")
    add("--images", type=Path, metavar="PATH", help="folder or zip of images (default: that of --data)")
    add("--config", help="configuration of a data set of the hub, if it has several")
    add("--name", default="table", help="name of the data in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> TableSource:
    """The source from the flags of ``add_flags``."""
    return TableSource(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TableSource)})
