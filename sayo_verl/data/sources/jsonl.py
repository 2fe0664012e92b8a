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

Unknown keys are refused by name: a misspelt "boxs" would be a row without boxes. Licence: that of your data.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from sayo_verl.data.json_files import json_lines
from sayo_verl.data.rows import Example
from sayo_verl.data.sources import common
from sayo_verl.data.sources.common import Side, Text, parse
from sayo_verl.errors import Rule, raise_first

NAMED_BOXES = True


class _Line(BaseModel):
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
class JsonlSource(common.FileSource):
    """Lines of JSON."""

    name: str = "jsonl"

    def examples(self) -> Iterator[Example]:
        """Raises SayoError: D05, D09, D42, D58, D60, D61, D63, each with file and line."""
        folders = functools.cache(self.folder)
        for value, path, number, split in self.records(json_lines):
            where, folder = f"{path} line {number}", folders(path)
            line = parse(_Line, value, where)
            both, own, named = (line.image is None) == (not line.images), line.box_format, self.box_format
            what, fix = "the line and the command name different box formats", "correct --box-format or the line"
            rules = [
                Rule("D58", both, "a record needs either image or images", where, "write one of the two"),
                Rule("D61", None not in (own, named) and own != named, what, where, fix, own, named),
            ]
            raise_first(rules)
            images = tuple(folder.ref(name, where) for name in line.images or [str(line.image)])
            boxes = common.boxes_of_images(line.boxes, n := len(images), where)
            sizes = line.size if line.images or line.size is None else [line.size]
            yield Example(
                line.id or f"{'val/' * (split == 'val')}{path.name}:{number}",
                images,
                common.untagged(line.question, n, where),
                line.answer,
                boxes,
                common.names_of_boxes(line.box_names, boxes, where),
                named or own or "",
                self.name,
                f"sayo/{self.name}",
                () if sizes is None else parse(tuple[tuple[Side, Side] | None, ...], sizes, f"{where}, size"),
                line.kind,
                split,
            )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare jsonl``."""
    common.add_file_flags(parser, "jsonl")


def from_args(args: argparse.Namespace) -> JsonlSource:
    """The source from the flags of ``add_flags``."""
    return JsonlSource(args.file, args.box_format, args.images, args.val_file, args.name)
