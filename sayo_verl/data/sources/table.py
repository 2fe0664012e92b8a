"""A table with or without boxes: parquet, csv, JSON, or a data set of the hub.

``--map image=img,question=query,answer=label,boxes=objects.bbox`` names the column of each field; "." enters structs,
also those of a list. A field that is not in the map has the column of its own name. The fields:

    image      {bytes, path} as ``datasets`` stores it, bytes, or a file name; a list of these: several images
    question   text; image tags around it are removed where there is one for each image
    answer     text or a number; \\boxed{...} around it is removed. A list is refused: the choice decides the reward
    boxes      optional: boxes of four numbers, or one box; with several images: one list of boxes for each image
    id         optional, unique. Without it: split and number of the row
    box_names, kind, width, height    optional; width and height of the picture that the boxes were drawn on

File names count from the folder of the table, or from --images. In a folder, the files of a split have its name:
train-00000-of-00002.parquet, val.csv, test/a.json. csv is read as text, so that 1.50 and NA stay as they are; lists in
it are JSON. A data set of the hub is read at one commit, which the manifest names. Licence: that of the data.
"""

import argparse
import csv
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Json

from sayo_verl.data.json_files import json_records
from sayo_verl.data.rows import RUNS_CODE, Drop, Example, LeftOut, Source
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
    revision: str | None = None
    name: str = "table"

    def facts(self) -> dict[str, Any]:
        files = [file for split in self._splits for file in self._files(split)]
        commit = None if files else _commit(self.data, self.revision)
        return vars(self) | {"images": str(self.images or ""), "commit": commit, "files": common.file_facts(files)}

    def examples(self) -> Iterator[Example | LeftOut]:
        """The rows; D05, D09, D42, D58, D60 for an invalid row, D47, D48, D63 for data that cannot be read."""
        path = Path(self.data)
        base = self.images or (path if path.is_dir() else path.parent if path.exists() else None)
        folder = common.ImageFolder(base) if base else None
        for split, role in self._splits.items():
            chosen: dict[str, str] = {}
            for i, row in enumerate(self._rows(split)):
                where = f"{self.data} {split} row {i}"
                chosen = chosen or self._chosen(list(row), where)
                values = {name: _at(row, column, where) for name, column in chosen.items()}
                id = common.parse(common.Text, values.get("id"), where) or f"{split}:{i}"
                try:
                    yield self._example(id, values, folder, role, where)
                except Drop as drop:
                    yield LeftOut(id, drop.reason, drop.detail)

    @property
    def _splits(self) -> dict[str, str]:
        return {self.split: "train", self.val_split: "val"} if self.val_split else {self.split: ""}

    def _example(
        self, id: str, row: dict[str, Any], folder: common.ImageFolder | None, split: str, where: str
    ) -> Example:
        question, answer, kind = (
            common.parse(common.Text, row.get(n), f"{where}, {n}") for n in ("question", "answer", "kind")
        )
        pictures, placed, named = (_listed(row.get(name), where) for name in ("image", "boxes", "box_names"))
        each = pictures if isinstance(pictures, list) else [pictures]
        images = tuple(common.stored_image(picture, f"{where}, image", folder) for picture in each)
        boxes = common.boxes_of_images(placed, len(images), f"{where}, boxes")
        names = common.names_of_boxes(named, boxes, f"{where}, box_names")
        box_format, source = self.box_format or "", f"sayo/{self.name}"
        width, height = row.get("width"), row.get("height")
        known = width and height and len(images) == 1
        size = common.parse(tuple[common.Side, common.Side], (width, height), where) if known else None
        question = common.untagged(question, len(images), where)
        answer = re.sub(r"^\$?\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}\$?$", r"\1", answer).strip()
        sizes = (size,) * len(images)
        return Example(id, images, question, answer, boxes, names, box_format, self.name, source, sizes, kind, split)

    def _chosen(self, there: list[str], where: str) -> dict[str, str]:
        """Field -> column, for the fields that the table has; D58."""
        chosen = {name: name for name in FIELDS if name in there} | dict(self.columns)
        wrong = [column for column in chosen.values() if column.partition(".")[0] not in there]
        likely = {n: [c for c in columns if c in there] for n, columns in REQUIRED.items() if n not in chosen}
        if not likely and not wrong:
            return chosen
        ready = dict(self.columns) | {n: found[0] if len(found) == 1 else "COLUMN" for n, found in likely.items()}
        name = [*wrong, *likely][0]
        what, got = f"the table has no column {name!r}{did_you_mean(name, there)}", ", ".join(there)
        fix = "name the columns as the table does: --map " + ",".join(f"{n}={c}" for n, c in ready.items())
        raise SayoError("D58", what, where=where, got=got, fix=fix)

    def _rows(self, split: str) -> Iterator[Mapping[str, Any]]:
        files = self._files(split)
        if not files:
            commit = _commit(self.data, self.revision)
            yield from _streamed(self.data, self.data, self.config, split=split, revision=commit)
        for path in files:
            if path.suffix == ".parquet":
                yield from _streamed(str(path), "parquet", data_files=str(path), split="train", batch_size=64)
            elif path.suffix == ".csv":
                yield from _csv(path)
            else:
                yield from (common.parse(dict[str, Any], row, f"{path}, record {i}") for i, row in json_records(path))

    def _files(self, split: str) -> list[Path]:
        """One file, or the files of a split in a folder; none for a data set of the hub. D63."""
        path, files = Path(self.data), [Path(self.data)]
        if not path.exists() and path.suffix not in (*SUFFIXES, *RUNS_CODE):
            return []
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*.*")) if split in (f.parent.name, re.split("[-.]", f.name)[0])]
        files = [common.check_input(file) for file in files if file.suffix in (*SUFFIXES, *RUNS_CODE)]
        if not files or (self.val_split and not path.is_dir()):
            fix = f"name a folder with {', '.join(SUFFIXES)} files of this split, or one such file without --val-split"
            raise SayoError("D63", f"there is no table of the split {split!r}", where=self.data, fix=fix)
        return files


def _at(row: Any, dotted: str, where: str) -> Any:
    """A value by the name of its column; "." enters structs, and those of a list. None where a struct is null."""
    name, _, rest = dotted.partition(".")
    if row is None or isinstance(row, list):
        return row and [_at(one, dotted, where) for one in row]
    if not isinstance(row, Mapping) or name not in row:
        what, got = f"a column has no field {name!r}", f"{list(row) if isinstance(row, Mapping) else row!r:.80}"
        raise SayoError("D58", what, where=where, got=got, fix="correct --map")
    return _at(row[name], rest, where) if rest else row[name]


def _listed(value: Any, where: str) -> Any:
    """A list, which a csv holds as JSON."""
    listed = isinstance(value, str) and value.startswith("[")
    return common.parse(Json[list[Any]], value, where) if listed else value or None


def _csv(path: Path) -> Iterator[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, restkey="more")
    except (UnicodeDecodeError, csv.Error) as error:
        fix = "convert it to UTF-8, as in: iconv -f GB18030 -t UTF-8"
        raise SayoError("D47", f"the csv cannot be read ({error})", where=str(path), fix=fix) from error


@contextmanager
def _readable(label: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the errors of Arrow, of the hub's client and of the network have no common base
        what = f"the table cannot be read ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})"
        fix = "check the path; of the hub: name, --split, --config, the network, HF_HUB_OFFLINE, and `hf auth login`"
        raise SayoError("D63", what, where=label, fix=fix) from error


def _streamed(label: str, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of ``datasets``, images as {bytes, path}."""
    import datasets

    with _readable(label):
        yield from datasets.load_dataset(*args, streaming=True, **options).decode(False)


@functools.lru_cache(maxsize=8)
def _commit(dataset: str, revision: str | None) -> str:
    """The commit that a branch or tag is now; looked up once, so that facts and rows are of one."""
    from huggingface_hub import HfApi

    with _readable(dataset):
        return str(HfApi().dataset_info(dataset, revision=revision).sha)


def parse_map(text: str) -> dict[str, str]:
    """``"image=img,question=q"`` as a mapping; D58."""
    pairs = [(name.strip(), column.strip()) for name, _, column in (p.partition("=") for p in text.split(",") if p)]
    if not all(name in FIELDS and column for name, column in pairs) or len(dict(pairs)) != len(pairs):
        what, fix = "the map is not FIELD=COLUMN,FIELD=COLUMN", "write each field once: image=img,question=query"
        raise SayoError("D58", what, where="--map", got=text, wanted=", ".join(FIELDS), fix=fix)
    return dict(pairs)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare table``."""
    add = parser.add_argument
    add("--data", "--dataset", required=True, metavar="TABLE", help="parquet, csv or JSON, a folder, or a hub name")
    add("--split", default="train", help="of a folder or of the hub (default: %(default)s)")
    add("--val-split", metavar="SPLIT", help="its rows become the validation rows")
    add("--map", dest="columns", type=parse_map, default="", metavar="FIELD=COLUMN,...", help="such as image=img")
    add("--images", type=Path, metavar="FOLDER", help="of the images, or a zip file")
    add("--config", help="of the hub, where there are several")
    add("--revision", help="of the hub (default: the newest commit)")
    add("--name", default="table", help="name of the data set in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> TableSource:
    """The source from the flags of ``add_flags``."""
    return TableSource(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TableSource)})
