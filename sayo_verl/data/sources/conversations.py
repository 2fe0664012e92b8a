"""Conversations as LLaVA and Visual-CoT publish them: a JSON array, or one record a line.

    {id?, image: name or list of names, conversations: [{from: human, value}, {from: gpt, value}, ...], boxes? | bbox?}

The human turn is the question, the gpt turn behind it the answer. A record with several questions is refused until
--turn names the first or the last; what was said before the last is not in its prompt. ``boxes`` (or ``bbox``) are read
as by ``sayo prepare jsonl``, in --box-format; boxes within the text stay text. The id begins with the place in the
file, because ids of LLaVA repeat. A record without an image is a row without boxes. Other keys are not read.

Visual-CoT (viscot_363k.json) is read in its own form alone, whose boxes are xyxy: ``image`` is ["a.jpg",
"a.jpg###[x0, y0, x1, y1]"], in pixels of the picture; the turns are the question and "Please provide the bounding box
coordinate of the region ...", a box, "<image>", the answer. The box in the text is not used: it is in shares of the
picture padded to a square (xyxy_unit_square), with three decimals. Several boxes of a question were joined to one.

Read for this: tools/convert_data_to_llava_format.py and llava/train/train.py of github.com/deepcs233/Visual-CoT at
83212ae. The published file itself was not read. Licences: those of the data sets that it was made from.
"""

import argparse
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sayo_verl.data.json_files import json_records
from sayo_verl.data.rows import Example
from sayo_verl.data.sources import common
from sayo_verl.errors import Rule, raise_first

NAMED_BOXES = True
TURNS = ("first", "last")
_ASKS_BOX = re.compile(
    r"\s*Please (think step by step and )?provide the bounding box coordinate of the region that .*", re.S
)
_BOX_OF = re.compile(r"(.+)###\[(-?\d+), ?(-?\d+), ?(-?\d+), ?(-?\d+)\]")
_FORM = "four turns, the first asks for a box; images [name, name###[x0, y0, x1, y1]] in whole pixels"
_TURNS = "the turns are not of human and gpt, one behind the other"
_PIXELS = "boxes of Visual-CoT are xyxy"


class _Turn(BaseModel):
    speaker: str = Field(alias="from")
    value: common.Text


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow")
    conversations: list[_Turn]
    image: str | list[str] | None = None
    id: common.Text = ""
    boxes: Any = None
    bbox: Any = None


@dataclass(frozen=True)
class ConversationsSource(common.FileSource):
    """Conversations; ``turn`` is one of ``TURNS``, or None where no record has several questions."""

    name: str = "conversations"
    turn: str | None = None

    def examples(self) -> Iterator[Example]:
        """Raises SayoError: D05, D09, D42, D58, D60, D61, D63 and D92, each with file and record."""
        folders = functools.cache(self.folder)
        for value, path, number, split in self.records(json_records):
            where = f"{path} record {number}"
            record = common.parse(_Record, value, where)
            id = f"{'val/' * (split == 'val')}{path.name}:{number} {record.id}".strip()
            yield self._example(id, record, folders(path), split, where)

    def _example(self, id: str, record: _Record, folder: common.ImageFolder, split: str, where: str) -> Example:
        named = [record.image] if isinstance(record.image, str) else record.image or []
        said = [turn.value for turn in record.conversations]
        speakers = [{"user": "human", "assistant": "gpt"}.get(t.speaker, t.speaker) for t in record.conversations]
        pairs, cot, several = len(said) // 2, any("###" in name for name in named), "a record has several questions"
        unread = [key for key in record.model_extra or {} if re.match(r"b?box", key)]
        form = _BOX_OF.fullmatch(named[-1]) if len(named) == 2 and pairs == 2 and _ASKS_BOX.search(said[0]) else None
        other = cot and not (form and form[1] == named[0])
        rules = [
            Rule("D92", bool(unread), "boxes have an unknown key", where, "rename the key to boxes", unread),
            Rule("D92", not said or speakers != ["human", "gpt"] * pairs, _TURNS, where, "correct it", speakers),
            Rule("D92", other, "the form is not that of Visual-CoT", where, "use sayo prepare jsonl", named, _FORM),
            Rule("D61", cot and self.box_format not in (None, "xyxy"), _PIXELS, where, "leave --box-format out"),
            Rule(
                "D92", not cot and pairs > 1 and not self.turn, several, where, "set --turn first or --turn last", pairs
            ),
        ]
        raise_first(rules)
        question, answer = said[-2:] if self.turn == "last" else said[:2]
        given, box_format = record.bbox if record.boxes is None else record.boxes, self.box_format
        if form:
            named, given, box_format = named[:1], [[int(side) for side in form.groups()[1:]]], "xyxy"
            question, answer = _ASKS_BOX.sub("", said[0]), said[3]
        images = tuple(folder.ref(name, where) for name in named)
        boxes = common.boxes_of_images(given, n := len(images), where)
        names, question = common.names_of_boxes(None, boxes, where), common.untagged(question, n, where)
        source = f"sayo/{self.name}"
        return Example(id, images, question, answer, boxes, names, box_format or "", self.name, source, split=split)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare conversations``."""
    common.add_file_flags(parser, "conversations")
    parser.add_argument("--turn", choices=TURNS, help="question to ask where a record has several")


def from_args(args: argparse.Namespace) -> ConversationsSource:
    """The source from the flags of ``add_flags``."""
    return ConversationsSource(args.file, args.box_format, args.images, args.val_file, args.name, args.turn)
