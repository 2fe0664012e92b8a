"""Lines of JSON: the format for your own data, and for all data that a few lines of Python can convert.

One object a line (plain, .gz, or in a .zip), UTF-8:

    image      file name; or images: list of file names. Relative to the folder of this file, or to --images
    question   without image tags; tags around the text are removed where there is one for each image
    answer     text or a number
    boxes      list of boxes of four numbers; with images: one such list for each image. [] for no boxes
    id         optional; text or a whole number, unique. Without it: name of the file and number of the line
    box_names  optional; nested as boxes
    box_format optional; must equal --box-format, which is required because numbers do not show whether they are
               [x0, y0, x1, y1] or [x, y, width, height]
    size       optional; [width, height] of the picture that the boxes were drawn on, checked against the file;
               with images: one for each image, or null
    kind       optional; of question

Unknown keys are refused by name: a misspelt "boxs" would be a row without boxes. Licence: that of your data.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sayo_verl.data.rows import Drop, Example, LeftOut, check_text
from sayo_verl.data.sources import fields, inputs
from sayo_verl.data.streams import json_lines
from sayo_verl.errors import SayoError

_REQUIRED = ("question", "answer", "boxes")
_OPTIONAL = ("image", "images", "id", "box_names", "box_format", "size", "kind")


@dataclass(frozen=True)
class JsonlSource:
    """Lines of JSON.

    Attributes:
        file: .jsonl, .jsonl.gz or .zip.
        box_format: key of ``sayo_verl.data.boxes.BOX_FORMATS``.
        images: folder or zip file that file names are looked up in; None: the folder of ``file``.
        allow_outside: take file names that are absolute or go up.
        name: of the data set; data_source is "sayo/<name>".
    """

    file: Path
    box_format: str
    images: Path | None = None
    allow_outside: bool = False
    name: str = "jsonl"

    def __post_init__(self) -> None:
        inputs.check_file(self.file)
        fields.check_box_format(self.box_format)
        fields.check_name(self.name)

    def facts(self) -> dict[str, Any]:
        return {
            "source": "jsonl",
            "name": self.name,
            "files": inputs.file_facts([self.file]),
            "box_format": self.box_format,
            "images": str(self.images) if self.images else None,
            "allow_outside": self.allow_outside,
        }

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises:
        SayoError: D05, D09, D58-D63, each with file and line.
        """
        folder = inputs.ImageFolder(self.images or self.file.parent, self.allow_outside)
        seen = fields.Seen()
        for number, record in json_lines(self.file):
            where = f"{self.file} line {number}"
            record = fields.check_keys(record, _REQUIRED, _OPTIONAL, where)
            id = seen.add(self._id(record, number, where), where)
            try:
                yield self._example(id, record, folder, where)
            except Drop as drop:
                yield LeftOut(id, drop.reason, drop.detail)

    def _id(self, record: dict[str, Any], number: int, where: str) -> str:
        if record.get("id") is None:
            return f"{self.file.name}:{number}"
        id = fields.text(fields.field_of(record, "id", (str, int), where))
        if not id:
            raise fields.refuse("the id is empty", where, "write an id, or leave the key out")
        return id

    def _example(self, id: str, record: dict[str, Any], folder: inputs.ImageFolder, where: str) -> Example:
        if ("image" in record) == ("images" in record):
            raise fields.refuse(
                "a record needs either image or images", where, "write one of the two", got=sorted(record)
            )
        names = record["images"] if "images" in record else [record["image"]]
        if not isinstance(names, list) or not names:
            raise fields.refuse("images are not a list of file names", where, "write at least one name", got=names)
        images = tuple(folder.ref(name, where) for name in names)
        own_format = record.get("box_format", self.box_format)
        if own_format != self.box_format:
            raise SayoError(
                "D61",
                "a line and the command name different box formats",
                where=where,
                got=own_format,
                wanted=self.box_format,
                fix="correct --box-format or the line",
            )
        boxes = fields.boxes_of_images(record["boxes"], len(images), f"{where}, boxes")
        box_names = fields.names_of_boxes(record.get("box_names"), boxes, f"{where}, box_names")
        sizes = self._sizes(record, len(images), where)
        kind = "" if record.get("kind") is None else fields.field_of(record, "kind", str, where)
        question = fields.untagged(fields.text(record["question"]), len(images), where)
        answer = fields.text(record["answer"])
        check_text(question, answer)
        return Example(
            id, images, question, answer, boxes, box_names, self.box_format, self.name, f"sayo/{self.name}", sizes, kind
        )

    def _sizes(self, record: dict[str, Any], n_images: int, where: str) -> tuple[tuple[int, int] | None, ...]:
        value = record.get("size")
        if value is None:
            return ()
        each = value if "images" in record else [value]
        pairs = isinstance(each, list) and all(s is None or (isinstance(s, list) and len(s) == 2) for s in each)
        if not pairs or len(each) != n_images:
            raise fields.refuse(
                "size is not [width, height] for each image",
                where,
                "write [width, height], and with images a list of such",
                got=fields.shown(value),
            )
        return tuple(None if s is None else fields.picture_size(s[0], s[1], where) for s in each)


SHOWN = ("--images", "--name")  # on the page of --help, beside the required flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare jsonl``."""
    parser.add_argument("--file", type=Path, required=True, help="the .jsonl file (.gz and .zip are read too)")
    parser.add_argument("--box-format", required=True, metavar="FORMAT", help=fields.box_format_help())
    parser.add_argument("--images", type=Path, help="folder or zip file of the images (default: the file's folder)")
    parser.add_argument("--allow-outside", action="store_true", help="take images outside that folder")
    parser.add_argument("--name", default="jsonl", help="name of the data set in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> JsonlSource:
    """The source from the flags of ``add_flags``."""
    return JsonlSource(args.file, args.box_format, args.images, args.allow_outside, args.name)
