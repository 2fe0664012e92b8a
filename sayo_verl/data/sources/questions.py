"""Questions about annotated objects: made from their names with --ask, or your own from a file.

``count`` asks "How many dogs are in the image?", ``presence`` "Is there a dog in the image?". With --absent, questions
about objects that are not there are added; such a row is kept without boxes.

--questions names lines of JSON {file | file_name | image_id, question, answer, categories | labels, id?, kind?}. The
region is every object of these names in the picture. [] is a question without a region, and its row is kept. A question
about an object without a box (a crowd, a point) is left out.
"""

import argparse
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from sayo_verl.data.json_files import json_lines
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common
from sayo_verl.errors import SayoError, did_you_mean

ASKS = ("count", "presence")
_MANY = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "sheep": "sheep"}
_PLAIN = re.compile(r"[a-z]+(?:[ -][a-z]+)*")
_PLURAL = re.compile(r"[^siu]s$")  # scissors, but not bus, glass, tennis


class Thing(NamedTuple):
    """An object: name, box if it has one, and what the box was made of or why there is none."""

    name: str
    box: tuple[float, ...] | None
    what: str = "box"


class Picture(NamedTuple):
    """A picture, the (width, height) that the annotations state, and its objects."""

    id: str
    image: ImageRef
    size: tuple[int, int] | None
    things: Sequence[Thing]
    split: str = ""


class _Own(BaseModel):
    model_config = ConfigDict(extra="forbid")
    file: str | int = Field(validation_alias=AliasChoices("file", "file_name", "image_id"))
    question: common.Text
    answer: common.Text
    categories: list[str] = Field(validation_alias=AliasChoices("categories", "labels"))
    id: common.Text = ""
    kind: common.Text = ""


@dataclass(frozen=True, kw_only=True)
class AnnotatedSource(common.FieldSource):
    """A source that has annotations and no questions; fields as the flags of ``add_flags``.

    Raises D58 for anything but one of ``ask`` and ``questions``.
    """

    box_format: ClassVar[str]
    name: str
    ask: Sequence[str] = ()
    absent: bool = False
    questions: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.ask) == bool(self.questions) or (self.absent and "presence" not in self.ask):
            got = f"--ask {' '.join(self.ask)}, --absent {self.absent}, --questions {self.questions}"
            fix = "set --ask count, --ask presence (which may have --absent), or --questions FILE"
            raise SayoError("D58", "it is not clear what to ask", where="--ask, --questions", got=got, fix=fix)

    def rows(
        self, keys: Iterable[Any], find: Callable[[Any], Picture | None], names: Collection[str] = ()
    ) -> Iterator[Example | LeftOut]:
        """Rows of the pictures of ``keys``, or of the file, which names them; ``find`` gives the picture of a key.

        ``names``: of all objects, for ``absent`` and against misspelt names; empty if not known. Raises D58, D62.
        """
        ids = common.Ids()
        for number, value in json_lines(common.check_input(self.questions)) if self.questions else ():
            where = f"{self.questions} line {number}"
            own = common.parse(_Own, value, where)
            id, picture = ids.add(own.id or f"question:{number}", where), find(own.file)
            for name in own.categories:
                if names and name not in names:
                    what, wanted = f"there is no category {name!r}{did_you_mean(name, names)}", ", ".join([*names][:20])
                    raise SayoError("D62", what, where=where, wanted=wanted, fix="use the names of the annotations")
            if picture is None:
                yield LeftOut(id, "image_missing", f"{own.file} is not annotated")
            else:
                question = common.untagged(own.question, 1, where)
                yield self._row(id, picture, question, own.answer, own.categories, own.kind)
        for picture in map(find, keys) if self.ask else ():
            assert picture is not None
            there = Counter(thing.name for thing in dict.fromkeys(picture.things))
            for name, ask in itertools.product(there, self.ask):
                question, answer = (how_many(name), str(there[name])) if ask == "count" else (is_there(name), "yes")
                yield self._row(f"{picture.id}:{ask}:{name}", picture, question, answer, [name], ask)
            others = [name for name in names if name not in there] if self.absent else []
            random.Random(picture.id).shuffle(others)
            for name in others[: len(there)]:
                yield self._row(f"{picture.id}:absent:{name}", picture, is_there(name), "no", [], "absence")

    def _row(
        self, id: str, picture: Picture, question: str, answer: str, names: Sequence[str], kind: str
    ) -> Example | LeftOut:
        things = [thing for thing in dict.fromkeys(picture.things) if thing.name in names]
        unknown, lost = set(names) - {t.name for t in things}, [t for t in things if t.box is None]
        if unknown:
            return LeftOut(id, "unknown_object", f"{picture.id} has no {min(unknown)!r}")
        if lost:
            return LeftOut(id, "no_region", f"{len(lost)} of {len(things)} {lost[0].name!r}: {lost[0].what}")
        boxes, labels = (tuple(t.box for t in things if t.box),), (tuple(t.name for t in things),)
        what, source = "+".join(sorted({t.what for t in things})) or "none", common.data_source(self.name)
        images, sizes, what = (picture.image,), (picture.size,), f"{self.name}_{what}"
        row = Example(id, images, question, answer, boxes, labels, self.box_format, what, source, sizes, kind)
        return replace(row, split=picture.split, neutral=not names)


def how_many(name: str) -> str:
    """The question for a count. A name that is no plain words is quoted, and a plural stays as it is."""
    last = name.split(" ")[-1]
    many = re.sub(r"(?<=[^aeiou])y$", "ie", last) + ("es" if re.search(r"(s|x|z|ch|sh)$", last) else "s")
    if _PLAIN.fullmatch(name):
        many = name if _PLURAL.search(name) else name.removesuffix(last) + _MANY.get(last, many)
    return f"How many {many if _PLAIN.fullmatch(name) else repr(name)} are in the image?"


def is_there(name: str) -> str:
    """The question for presence."""
    if not _PLAIN.fullmatch(name) or not _PLURAL.search(name):
        name = f"{'an' if name[:1] in 'aeiou' else 'a'} {name if _PLAIN.fullmatch(name) else repr(name)}"
        return f"Is there {name} in the image?"
    return f"Are there {name} in the image?"


def add_flags(parser: argparse.ArgumentParser, name: str, *, absent: bool = True) -> None:
    """Flags of the sources that have annotations and no questions."""
    ask = f"make questions: {', '.join(ASKS)}"
    parser.add_argument("--ask", nargs="+", choices=ASKS, default=[], metavar="KIND", help=ask)
    if absent:
        parser.add_argument("--absent", action="store_true", help="with presence: ask about absent objects, too")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="lines of JSON with your own questions instead")
    parser.add_argument("--name", default=name, help="name of the data set in metrics (default: %(default)s)")
    common.add_box_flags(parser)


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of an ``AnnotatedSource`` from the flags of ``add_flags``."""
    return {name: value for name, value in vars(args).items() if name in ("name", "ask", "absent", "questions")}
