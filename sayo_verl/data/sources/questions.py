"""Questions about annotated objects: made from their names with --ask, or your own from a file.

--questions: lines {file | file_name | image_id | image, question, answer, categories | labels, id?, kind?} of JSON. The
region is every object of these names in the picture. [] is a question without a region, and its row is kept. A question
about an object without a box (a crowd, a point) is left out.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from sayo_verl.data.json_files import json_lines
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common

COUNT = "How many objects of the class '{}' are in the image?"
PRESENCE = "Is there an object of the class '{}' in the image?"


class Thing(NamedTuple):  # an object, and its box if it has one
    name: str
    box: tuple[float, ...] | None


class Picture(NamedTuple):
    id: str
    image: ImageRef
    size: tuple[int, int] | None  # width and height that the annotations state
    things: Collection[Thing]  # each once
    split: str = ""


class Question(BaseModel):  # a line of --questions
    model_config = ConfigDict(extra="forbid")
    file: str | int = Field(validation_alias=AliasChoices("file", "file_name", "image_id", "image"))
    question: common.Text
    answer: common.Text
    categories: list[str] = Field(validation_alias=AliasChoices("categories", "labels"))
    id: common.Text = ""
    kind: common.Text = ""


@dataclass(frozen=True, kw_only=True)
class AnnotatedSource(common.FieldSource):
    """A source that has annotations and no questions; fields as the flags of ``add_flags``."""

    box_format: ClassVar[str]
    name: str
    ask: Sequence[str] = ()
    absent: bool = False
    questions: Path | None = None

    def rows(
        self, keys: Iterable[Any], find: Callable[[Any], Picture | None], names: Iterable[str] = ()
    ) -> Iterator[Example | LeftOut]:
        """Rows of --questions, or of the pictures of ``keys``. ``find``: picture by key; ``names``: for --absent."""
        for number, value in json_lines(common.check_input(self.questions)) if self.questions else ():
            where = f"{self.questions} line {number}"
            asked = common.parse(Question, value, where)
            asked.id = asked.id or f"question:{number}"
            asked.question = common.untagged(asked.question, 1, where)
            picture, missing = find(asked.file), LeftOut(asked.id, "image_missing", f"{asked.file} is not annotated")
            yield self._row(picture, asked) if picture else missing
        for picture in filter(None, map(find, keys if self.ask else ())):
            yield from (self._row(picture, asked) for asked in self._made(picture, names))

    def _made(self, picture: Picture, names: Iterable[str]) -> Iterator[Question]:
        counts = Counter(thing.name for thing in picture.things)
        absent = [name for name in names if name not in counts] if self.absent else []
        random.Random(picture.id).shuffle(absent)
        asked = [(kind, name) for name in counts for kind in self.ask]
        for kind, name in asked + [("absence", name) for name in absent[: len(counts)]]:
            id, question = f"{picture.id}:{kind}:{name}", (COUNT if kind == "count" else PRESENCE).format(name)
            answer = {"count": str(counts[name]), "presence": "yes", "absence": "no"}[kind]
            region = [name] if name in counts else []
            yield Question(file=picture.id, question=question, answer=answer, categories=region, id=id, kind=kind)

    def _row(self, picture: Picture, asked: Question) -> Example | LeftOut:
        things = [thing for thing in picture.things if thing.name in asked.categories]
        names, boxes = tuple(thing.name for thing in things), tuple(thing.box for thing in things if thing.box)
        unknown, lost = sorted(set(asked.categories) - set(names)), len(things) - len(boxes)
        if unknown:
            return LeftOut(asked.id, "unknown_object", f"{picture.id} has no {unknown[0]!r}")
        if lost:
            return LeftOut(asked.id, "no_region", f"{lost} of {len(things)} objects have no box")
        images, source = (picture.image,), f"sayo/{self.name}"
        row = Example(
            asked.id, images, asked.question, asked.answer, (boxes,), (names,), self.box_format, self.name, source
        )
        return replace(row, sizes=(picture.size,), kind=asked.kind, split=picture.split, neutral=not asked.categories)


def add_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Flags of the sources that have annotations and no questions."""
    one, kinds = parser.add_mutually_exclusive_group(required=True), ("count", "presence")
    one.add_argument("--ask", nargs="+", choices=kinds, default=[], metavar="KIND", help="count, presence, or both")
    one.add_argument("--questions", type=Path, metavar="FILE", help="your own questions, one JSON object a line")
    parser.add_argument("--name", default=name, help="name of the data in metrics (default: %(default)s)")


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of an ``AnnotatedSource`` from the flags of ``add_flags``."""
    return {name: value for name, value in vars(args).items() if name in ("name", "ask", "absent", "questions")}
