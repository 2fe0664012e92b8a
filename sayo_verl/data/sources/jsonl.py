"""Lines of JSON: the format for your own data, and for all data that a few lines of Python can convert.

One object a line (plain, .gz, or in a .zip), UTF-8:

    image      file name; or images: list of file names. Relative to --images (default: the folder of the file)
    question   text; image tags around it are removed where there is one for each image
    answer     text or a number
    boxes      optional; list of boxes of four numbers in --box-format; with images: one such list for each image
    box_names  optional; nested as boxes
    box_format optional; must equal --box-format
    size       optional; [width, height] of the picture that the boxes were drawn on, checked against the file;
               with images: one for each image, or null
    id         optional, unique. Without it: name of the file and number of the line
    kind       optional; of question

An unknown key is refused by name: a misspelt "boxs" would be a row without boxes. Licence: that of your data.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sayo_verl.data.json_files import json_lines
from sayo_verl.data.rows import Example, Source
from sayo_verl.data.sources import common
from sayo_verl.data.sources.common import Side, Text, parse
from sayo_verl.errors import Rule, raise_first

NAMED_BOXES = True  # the command adds --box-format and what belongs to it


class Line(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="forbid")
    question: Text
    answer: Text
    image: str | None = None
    images: list[str] | None = None
    boxes: Any = None
    box_names: Any = None
    box_format: str | None = None
    size: Any = None
    id: Text = ""
    kind: Text = ""


@dataclass(frozen=True)
class JsonlSource(Source):
    """Lines of JSON; attributes as the flags of ``add_flags``. Rows of ``val_file`` are the validation split."""

    file: Path
    box_format: str | None = None
    images: Path | None = None
    name: str = "jsonl"
    val_file: Path | None = None

    def facts(self) -> dict[str, Any]:
        files = [path for path in (self.file, self.val_file) if path]
        return {"files": common.file_facts(files), "box_format": self.box_format, "images": str(self.images or "")}

    def examples(self) -> Iterator[Example]:
        """Raises SayoError: D05, D09, D40, D42, D46, D58-D63, each with file and line."""
        ids = common.Ids()
        for path, split in ((self.file, "train" if self.val_file else ""), (self.val_file, "val")):
            if path:
                folder = common.ImageFolder(self.images or path.parent)
                for number, value in json_lines(common.check_input(path)):
                    where = f"{path} line {number}"
                    line = parse(Line, value, where)
                    id = ids.add(line.id or f"{'val/' * (split == 'val')}{path.name}:{number}", where)
                    yield self._example(id, line, folder, split, where)

    def _example(self, id: str, line: Line, folder: common.ImageFolder, split: str, where: str) -> Example:
        both, own, named = (line.image is None) == (not line.images), line.box_format, self.box_format
        what, fix = "the line and the command name different box formats", "correct --box-format or the line"
        rules = [
            Rule("D58", both, "a record needs either image or images", where, "write one of the two"),
            Rule("D61", None not in (own, named) and own != named, what, where, fix, own, named),
        ]
        raise_first(rules)
        images = tuple(folder.ref(name, where) for name in line.images or [str(line.image)])
        boxes = common.boxes_of_images(line.boxes, n := len(images), where)
        names = common.names_of_boxes(line.box_names, boxes, where)
        box_format = common.format_of(named or own, boxes, where)
        question, source = common.untagged(line.question, n, where), common.data_source(self.name)
        sizes = line.size if line.images or line.size is None else [line.size]
        sizes = () if sizes is None else parse(tuple[tuple[Side, Side] | None, ...], sizes, f"{where}, size")
        return Example(
            id, images, question, line.answer, boxes, names, box_format, self.name, source, sizes, line.kind, split
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare jsonl``."""
    parser.add_argument("--file", type=Path, required=True, help="the .jsonl file (.gz and .zip are read too)")
    parser.add_argument("--images", type=Path, help="folder or zip file of the images (default: the file's folder)")
    parser.add_argument("--val-file", type=Path, help="a file of the same form, whose rows are the validation split")
    parser.add_argument("--name", default="jsonl", help="name of the data set in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> JsonlSource:
    """The source from the flags of ``add_flags``."""
    return JsonlSource(args.file, args.box_format, args.images, args.name, args.val_file)
