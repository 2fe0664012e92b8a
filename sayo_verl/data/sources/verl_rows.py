"""Parquet files that verl reads, as they are, with boxes of their own or from a side file.

Prompts, answers, names of data sources, other columns and other fields of ``extra_info`` pass through, so --prompt does
not apply, and answers may be of any form. Images are bytes, a path as text, or {image: path}; relative paths count from
the working directory, or from --images. The side file (--boxes) has one JSON object a line:

    id         text or number that a row has in the column --id (default: extra_info.id, else extra_info.index)
    boxes      boxes of four numbers, or one box; with several images: one list of boxes for each image
    box_names  optional; nested as boxes
    size       optional; [width, height] of the picture that the boxes were drawn on; several images: one for each

Boxes that rows have already (``extra_info.boxes``, shares of the image) stay. Licence: that of the data.
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
from sayo_verl.data.reading import read_rows
from sayo_verl.data.rows import EXTRA_INFO, Drop, Example, ImageRef, LeftOut, Source
from sayo_verl.data.sources import common
from sayo_verl.errors import Rule, raise_first

NAMED_BOXES = True  # the command adds --box-format and what belongs to it
NEEDED = Demands(attention=False, judge=None, headers=False)  # what verl itself needs of a row
WRITTEN = ("prompt", "images", "data_source", "extra_info")  # columns that the builder writes


class Side(BaseModel):
    """One line of the side file."""

    model_config = ConfigDict(extra="forbid")
    id: common.Text
    boxes: Any
    box_names: Any = None
    size: Any = None


@dataclass(frozen=True)
class VerlSource(Source):
    """verl's rows; the attributes are the flags of ``add_flags``."""

    file: Path
    val_file: Path | None = None
    boxes: Path | None = None
    id: str = ""
    images: Path = Path()
    box_format: str | None = None
    name: str = "verl"
    column_features: dict[str, Any] = field(default_factory=dict, init=False)
    extra_features: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        from datasets import Features

        for path in self._files:
            types = Features.from_arrow_schema(open_rows(common.check_input(path), NEEDED).schema_arrow)
            extra = types.get("extra_info")
            self.column_features.update({name: kind for name, kind in types.items() if name not in WRITTEN})
            self.extra_features.update(extra if isinstance(extra, dict) else {})
        for name in self.extra_features.keys() & EXTRA_INFO:
            del self.extra_features[name]
        check_joined(list(self._files))

    @property
    def _files(self) -> dict[Path, str]:
        return {self.file: "train", self.val_file: "val"} if self.val_file else {self.file: ""}

    def facts(self) -> dict[str, Any]:
        files = [*self._files, *([self.boxes] if self.boxes else [])]
        return {"files": common.file_facts(files), "id": self.id, "box_format": self.box_format}

    def examples(self) -> Iterator[Example | LeftOut]:
        """The rows; D05, D09, D42, D58, D60, D62, D72 for an invalid row, D95, D96 for boxes of no or two rows."""
        sides, used = dict[str, Side](), set[str]()
        folder, contract = common.ImageFolder(self.images), RowContract(NEEDED)
        for number, value in json_lines(common.check_input(self.boxes)) if self.boxes else ():
            side = common.parse(Side, value, where := f"{self.boxes} line {number}")
            twice = "two lines have one id"
            raise_first([Rule("D62", side.id in sides, twice, where, "write one line for each row", side.id)])
            sides[side.id] = side
        for path, split in self._files.items():
            file = open_rows(path, NEEDED)
            for i, row in enumerate(read_rows(file, path, file.schema_arrow.names)):
                looked = contract.look(row, where := f"{path} row {i}")
                if looked.faults:
                    raise looked.faults[0]
                info = row["extra_info"] = row.get("extra_info") or {}
                info["question"] = info.get("question") or looked.question.strip()
                key = self._key(row, where) if sides else ""
                again, fix = key in sides and (key in used or any(info.get("boxes") or [])), "join by a unique --id"
                raise_first([Rule("D96", again, "a row of the side file has boxes already", where, fix, key)])
                used.add(key)
                id = common.parse(common.Text, info.get("id"), where) or f"{path.name}:{i}"
                try:
                    yield self._example(id, row, sides.get(key), folder, split, where)
                except Drop as drop:
                    yield LeftOut(id, drop.reason, drop.detail)
        lost = [key for key in sides if key not in used]
        what, fix = "boxes of the side file match no row", "correct the ids, or name their column with --id"
        got = f"{len(lost)} of {len(sides)}, such as {', '.join(lost[:3])}"
        raise_first([Rule("D95", bool(lost), what, str(self.boxes), fix, got, wanted="ids of rows")])

    def _key(self, row: Any, where: str) -> str:
        """What the side file calls a row; D58."""
        column = self.id or f"extra_info.{'id' if row['extra_info'].get('id') is not None else 'index'}"
        value = row
        for name in column.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        what, fix = f"a row has no {column}, by which boxes are joined", "name the column of the ids with --id"
        raise_first([Rule("D58", value is None, what, where, fix, got=", ".join([*row, *row["extra_info"]]))])
        return common.parse(common.Text, value, where)

    def _example(
        self, id: str, row: dict[str, Any], side: Side | None, folder: common.ImageFolder, split: str, where: str
    ) -> Example:
        info, truth = row["extra_info"], row["reward_model"]["ground_truth"]
        images = tuple(_image(image, f"{where}, images", folder) for image in row.get("images") or [])
        boxes = common.boxes_of_images(side.boxes if side else info.get("boxes"), len(images), where)
        names = common.names_of_boxes(side.box_names if side else info.get("box_names"), boxes, where)
        sizes = [side.size] if side and len(images) == 1 else (side and side.size) or [None] * len(images)
        return Example(
            id=id,
            images=images,
            question=str(info["question"]),
            answer=str(truth),
            boxes=boxes,
            box_names=names,
            box_format=self.box_format or "" if side else "xyxy_unit",
            box_source=self.name if side else str(info.get("box_source") or ""),
            data_source=row["data_source"],
            sizes=common.parse(tuple[tuple[common.Side, common.Side] | None, ...], sizes, f"{where}, size"),
            kind=str(info.get("kind") or ""),
            split=split,
            prompt=tuple({"role": message["role"], "content": text_of(message)} for message in row["prompt"]),
            extra={name: info.get(name) for name in self.extra_features},
            columns={name: row.get(name) for name in self.column_features},
        )


def _image(image: Any, where: str, folder: common.ImageFolder) -> ImageRef:
    if isinstance(image, dict) and not image.get("bytes"):
        image = image.get("image") or image.get("image_url") or image.get("path")
    return common.stored_image(image.removeprefix("file://") if isinstance(image, str) else image, where, folder)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare verl``."""
    parser.add_argument("--file", type=Path, required=True, help="parquet file that verl reads")
    parser.add_argument("--val-file", type=Path, help="another one, whose rows are the validation split")
    parser.add_argument("--boxes", type=Path, help="side file of boxes, one JSON object a line")
    parser.add_argument("--id", default="", metavar="COLUMN", help="of the ids of the side file, such as extra_info.id")
    parser.add_argument("--images", type=Path, default=Path(), help="where relative paths begin (default: here)")


def from_args(args: argparse.Namespace) -> VerlSource:
    """The source from the flags of ``add_flags``."""
    return VerlSource(args.file, args.val_file, args.boxes, args.id, args.images, args.box_format)
