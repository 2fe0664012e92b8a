"""Parquet files that verl reads, with boxes that their rows have already or that a side file adds.

Prompts, answers, names of data sources, other columns and other fields of ``extra_info`` are kept. There
is no --prompt, and answers may have any form. Images are read as verl opens them: relative paths start at the working
directory. The side file (--boxes) has one JSON object a line:

    id         text or number that a row has in the column, or field of extra_info, --id (default: id, else index)
    boxes      boxes of four numbers, or one box; with several images: one list of boxes for each image
    box_names  optional; nested as boxes

Boxes that rows have already (``extra_info.boxes``, shares of the image) are kept. Licence: that of the data.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sayo_verl.data.check import check_joined, open_rows
from sayo_verl.data.contract import Demands, RowContract, text_of
from sayo_verl.data.json_files import json_lines
from sayo_verl.data.reading import image_source, read_rows
from sayo_verl.data.rows import EXTRA_INFO, Example, ImageRef
from sayo_verl.data.sources import common
from sayo_verl.errors import Rule, raise_first

NAMED_BOXES = True  # the command adds --box-format
NO_EFFECT = ("--prompt", "--skip-missing")  # the command leaves them out
NEEDED = Demands(attention=False, judge=None, headers=False)  # what verl itself needs of a row
WRITTEN = ("prompt", "images", "data_source", "extra_info")  # columns that the builder writes


class _Region(BaseModel):
    """The boxes of a row: one line of the side file."""

    model_config = ConfigDict(extra="forbid")
    id: common.Text
    boxes: Any
    box_names: Any = None


@dataclass(frozen=True)
class VerlSource(common.FileSource):
    """verl's rows; ``boxes``: the side file, ``id``: the column of its ids."""

    name: str = "verl"
    boxes: Path | None = None
    id: str = ""
    column_features: dict[str, Any] = field(default_factory=dict, init=False)
    extra_features: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        from datasets import Features

        files = [common.check_input(file) for file in (self.file, self.val_file) if file]
        schemas = [open_rows(file, NEEDED).schema_arrow for file in files]
        check_joined(files)
        for schema in schemas:
            types = _small(dict(Features.from_arrow_schema(schema)))
            self.column_features.update((name, types[name]) for name in types if name not in WRITTEN)
            info = types.get("extra_info")
            fields = info if isinstance(info, dict) else {}  # D72 refuses another type later
            written = EXTRA_INFO if "int" not in str(fields.get("index")) else {*EXTRA_INFO} - {"index"}
            self.extra_features.update((name, fields[name]) for name in fields if name not in written)

    def examples(self) -> Iterator[Example]:
        """The rows; D06, D09, D62, D72, D73 for an invalid row, D05, D42, D46, D58, D59, D95, D96 for its boxes."""
        regions, used = self._regions(), set[tuple[str, str]]()
        contract = RowContract(NEEDED)
        for row, path, number, split in self.records(_rows):
            where = f"{path} row {number}"
            looked = contract.look(row, where)
            if looked.faults:
                raise looked.faults[0]
            info = row["extra_info"] = row.get("extra_info") or {}
            info["question"] = info.get("question") or looked.question.strip()
            id = common.parse(common.Text, info.get("id"), where) or f"{split or 'train'}:{number}"
            key = self._key(row, where) if regions else ""
            twice = key in regions and ((split, key) in used or any(info.get("boxes") or []))
            what, fix = "a row of the side file has boxes already", "join by a unique --id"
            raise_first([Rule("D96", twice, what, where, fix, key)])
            used.add((split, key))
            yield self._example(id, row, regions.get(key), split, where)
        lost = sorted(set(regions) - {key for _, key in used})
        got = f"{len(lost)} of {len(regions)}, such as {', '.join(lost[:3])}"
        what, fix = "boxes of the side file match no row", "correct the ids, or name their column with --id"
        raise_first([Rule("D95", bool(lost), what, str(self.boxes), fix, got, "ids of rows")])

    def _regions(self) -> dict[str, _Region]:
        """The lines of the side file by their ids."""
        regions = dict[str, _Region]()
        for number, line in json_lines(common.check_input(self.boxes)) if self.boxes else ():
            where = f"{self.boxes} line {number}"
            region = common.parse(_Region, line, where)
            what, fix = "two lines of the side file have one id", "leave one of them out"
            raise_first([Rule("D62", region.id in regions, what, where, fix, region.id)])
            regions[region.id] = region
        return regions

    def _key(self, row: dict[str, Any], where: str) -> str:
        """The id by which the side file names a row; D58."""
        fields = row | row["extra_info"]
        names = [self.id.removeprefix("extra_info.")] if self.id else ["id", "index"]
        found = [fields[name] for name in names if fields.get(name) is not None]
        what, fix = f"a row has no {' or '.join(names)}, by which boxes are joined", "name the column with --id"
        raise_first([Rule("D58", not found, what, where, fix, got=", ".join(fields))])
        return common.parse(common.Text, found[0], where)

    def _example(self, id: str, row: dict[str, Any], added: _Region | None, split: str, where: str) -> Example:
        info, answer = row["extra_info"], row["extra_info"].get("answer")
        region = added or _Region(id=id, boxes=info.get("boxes"), box_names=info.get("box_names"))
        images = tuple(_image(image, f"{where}, images") for image in row.get("images") or [])
        boxes = common.boxes_of_images(region.boxes, len(images), where)
        return Example(
            id,
            images,
            question=str(info["question"]),
            answer=answer if answer and isinstance(answer, str) else str(row["reward_model"]["ground_truth"]),
            boxes=boxes,
            box_names=common.names_of_boxes(region.box_names, boxes, where),
            box_format=(self.box_format or "") if added else "xyxy_unit",
            box_source=self.name if added else str(info.get("box_source") or ""),
            data_source=row["data_source"],
            kind=str(info.get("kind") or ""),
            split=split,
            prompt=tuple({"role": message["role"], "content": text_of(message)} for message in row["prompt"]),
            extra={name: info.get(name) for name in self.extra_features},
            columns={name: row.get(name) for name in self.column_features},
        )


def _small(feature: Any) -> Any:
    """The types of `datasets` without the large ones of pandas, with which other files cannot be joined."""
    from datasets import LargeList, List, Value

    if isinstance(feature, dict):  # a struct
        return {name: _small(inner) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return List(_small(feature.feature), getattr(feature, "length", -1))
    return Value(feature.dtype.removeprefix("large_")) if isinstance(feature, Value) else feature


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    file = open_rows(path, NEEDED)
    return enumerate(read_rows(file, path, file.schema_arrow.names))


def _image(image: Any, where: str) -> ImageRef:
    source = image_source(image, where)
    name = str(source.absolute()) if isinstance(source, Path) else source
    return common.stored_image(name, where, common.ImageFolder(Path()))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare verl``."""
    parser.add_argument("--file", type=Path, required=True, help="parquet file that verl reads")
    parser.add_argument("--val-file", type=Path, metavar="FILE", help="file of the validation rows")
    parser.add_argument("--boxes", type=Path, metavar="FILE", help="side file of boxes, one JSON object a line")
    parser.add_argument("--id", default="", metavar="COLUMN", help="column of the ids to join (default: id, index)")


def from_args(args: argparse.Namespace) -> VerlSource:
    """The source from the flags of ``add_flags``."""
    return VerlSource(args.file, args.box_format, val_file=args.val_file, boxes=args.boxes, id=args.id)
