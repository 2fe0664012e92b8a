"""COCO annotations, detection and panoptic, with questions made from them or joined to them.

    detection  instances_*.json: images[{id, file_name, width, height}], categories[{id, name}],
               annotations[{id, image_id, category_id, bbox, iscrowd}]
    panoptic   panoptic_*.json: the same images, categories[{id, name, isthing}],
               annotations[{image_id, segments_info[{id, category_id, bbox, iscrowd}]}]

``bbox`` is [x, y, width, height] in pixels from the upper left corner, of a picture of the size that ``images`` states.
Masks are skipped. Annotations of COCO: CC BY 4.0; the photos: their Flickr licences, stated in the file.

COCO has no questions. ``ask`` makes counts and presence (``sayo_verl.data.sources.templates``); ``questions`` joins
lines of JSON:

    image_id or file_name     one of the two
    question, answer          text
    annotation_ids            boxes by id (panoptic: by the segment's id within the image), or
    categories                boxes of every annotation of these names; one that is not in the image adds none
    id, kind                  optional

A crowd (iscrowd 1) is one box around many objects, so it is no region of one object. Its name is not asked about in its
image. A join by category leaves its box out; a join by its id uses it. Stuff (isthing 0: sky, grass) has boxes that say
little, and is left out of ``ask``. A missing iscrowd is 0, as in most files made by other tools.

The file is read three times (images, categories, annotations), a record at a time.
"""

import argparse
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.rows import Drop, Example, LeftOut, check_text
from sayo_verl.data.sources import fields, inputs
from sayo_verl.data.sources import templates as tp
from sayo_verl.data.streams import json_array, json_lines

_CROWD = "a crowd is one box around many"
_JOIN_KEYS = ("id", "image_id", "file_name", "annotation_ids", "categories", "kind")


class Picture(NamedTuple):
    """An image of the file."""

    id: int
    file: str
    size: tuple[int, int]


class Category(NamedTuple):
    """A kind of object."""

    name: str
    thing: bool


class Marks:
    """The boxes of a file by image, in a few numbers each: COCO's training set has 860,000."""

    def __init__(self) -> None:
        self._numbers = array("q")  # image, annotation, category, crowd
        self._boxes = array("d")
        self._span: dict[int, tuple[int, int]] = {}

    def add(self, image: int, annotation: int, category: int, crowd: bool, box: tuple[float, ...]) -> None:
        self._numbers.extend((image, annotation, category, int(crowd)))
        self._boxes.extend(box)

    def close(self) -> None:
        """Sort by image, in the order of the file within each."""
        numbers = np.frombuffer(self._numbers, dtype=np.int64).reshape(-1, 4)
        order = np.argsort(numbers[:, 0], kind="stable")
        self.numbers = numbers[order]
        self.boxes = np.frombuffer(self._boxes, dtype=np.float64).reshape(-1, 4)[order]
        images, starts = np.unique(self.numbers[:, 0], return_index=True)
        ends = np.append(starts[1:], len(order)).tolist()[: len(starts)]  # a file may have no annotation
        self._span = dict(zip(images.tolist(), zip(starts.tolist(), ends, strict=True), strict=True))

    def of(self, image: int) -> list[tuple[int, int, bool, tuple[float, ...]]]:
        """(annotation, category, crowd, box) of one image."""
        start, end = self._span.get(image, (0, 0))
        numbers, boxes = self.numbers[start:end].tolist(), self.boxes[start:end].tolist()
        return [(a, c, bool(crowd), tuple(b)) for (_, a, c, crowd), b in zip(numbers, boxes, strict=True)]


@dataclass(frozen=True)
class CocoSource:
    """COCO.

    Attributes:
        annotations: instances_*.json or panoptic_*.json (.gz and .zip are read too).
        images: folder or zip file of the photos.
        ask: questions to make: "count", "presence".
        absent: with "presence", add a question with the answer no for each with yes.
        questions: lines of JSON to join instead.
        categories: names to ask about; () for all things.
    """

    annotations: Path
    images: Path
    ask: tuple[str, ...] = ()
    absent: bool = False
    questions: Path | None = None
    categories: tuple[str, ...] = ()
    name: str = "coco"

    def __post_init__(self) -> None:
        tp.check_asks(self.ask, self.questions, "--ask and --questions")
        if (self.absent and "presence" not in self.ask) or (self.categories and not self.ask):
            raise fields.refuse(
                "an option has nothing to act on",
                "--absent, --categories",
                "set --ask presence for --absent, and --ask for --categories",
            )
        for path in (self.annotations, self.questions):
            if path is not None:
                inputs.check_file(path)
        fields.check_name(self.name)

    def facts(self) -> dict[str, Any]:
        return {
            "source": "coco",
            "name": self.name,
            "files": inputs.file_facts([self.annotations, *([self.questions] if self.questions else [])]),
            "images": str(self.images),
            "ask": list(self.ask),
            "absent": self.absent,
            "categories": list(self.categories),
        }

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises:
        SayoError: D58 a field is missing, D59 a box is no box, D60 a file name leads elsewhere, D62 an id twice or a
            name that is not in the file, D63 a file is not there.
        """
        folder = inputs.ImageFolder(self.images)
        pictures = {picture.id: picture for picture in self._pictures()}
        categories = self._categories()
        marks = self._marks(pictures, categories)
        if self.questions is not None:
            yield from self._joined(self.questions, folder, pictures, categories, marks)
            return
        tp.join_names(self.categories, [c.name for c in categories.values()], "--categories")
        asked = self.categories or tuple(c.name for c in categories.values() if c.thing)
        for picture in pictures.values():
            yield from self._asked(picture, asked, folder, categories, marks)

    # ----------------------------------------------------------------------------------------------------- reading

    def _pictures(self) -> Iterator[Picture]:
        seen = fields.Seen()
        for i, record in enumerate(json_array(self.annotations, "images.item")):
            where = f"{self.annotations} images[{i}]"
            id = fields.field_of(record, "id", int, where)
            seen.add(str(id), where)
            width, height = (fields.field_of(record, side, object, where) for side in ("width", "height"))
            name = inputs.image_name(fields.field_of(record, "file_name", str, where), where)
            yield Picture(id, name, fields.picture_size(width, height, where))
        if not seen.ids:
            raise fields.refuse(
                "the file has no images",
                str(self.annotations),
                "give a whole annotation file: {images, annotations, categories}",
            )

    def _categories(self) -> dict[int, Category]:
        found = {}
        for i, record in enumerate(json_array(self.annotations, "categories.item")):
            where = f"{self.annotations} categories[{i}]"
            thing = record.get("isthing", 1) if isinstance(record, dict) else 1
            name = fields.field_of(record, "name", str, where)
            found[fields.field_of(record, "id", int, where)] = Category(name, bool(thing))
        if not found:
            raise fields.refuse(
                "the file has no categories",
                str(self.annotations),
                "give a whole annotation file: {images, annotations, categories}",
            )
        return found

    def _marks(self, pictures: dict[int, Picture], categories: dict[int, Category]) -> Marks:
        marks = Marks()
        for i, record in enumerate(json_array(self.annotations, "annotations.item")):
            where = f"{self.annotations} annotations[{i}]"
            image = fields.field_of(record, "image_id", int, where)
            if image not in pictures:
                raise fields.refuse(
                    "an annotation is of an image that is not in images",
                    where,
                    "give images and annotations of one file",
                    got=image,
                )
            segments = record.get("segments_info")
            each = [record] if segments is None else fields.field_of(record, "segments_info", list, where)
            for j, mark in enumerate(each):
                at = where if segments is None else f"{where} segments_info[{j}]"
                category = fields.field_of(mark, "category_id", int, at)
                if category not in categories:
                    raise fields.refuse(
                        "an annotation is of a category that is not in categories",
                        at,
                        "give categories and annotations of one file",
                        got=category,
                    )
                box = four_numbers(fields.field_of(mark, "bbox", list, at), at)
                marks.add(image, fields.field_of(mark, "id", int, at), category, bool(mark.get("iscrowd", 0)), box)
        marks.close()
        return marks

    # ----------------------------------------------------------------------------------------------------- questions

    def _example(
        self,
        id: str,
        folder: inputs.ImageFolder,
        picture: Picture,
        question: str,
        answer: str,
        boxes: list[tuple[str, tuple[float, ...]]],
        kind: str,
        what: str,
    ) -> Example | LeftOut:
        try:
            check_text(question, answer)
        except Drop as drop:
            return LeftOut(id, drop.reason, drop.detail)
        return Example(
            id,
            (folder.ref(picture.file, id),),
            question,
            answer,
            (tuple(b for _, b in boxes),),
            (tuple(name for name, _ in boxes),),
            "xywh",
            f"{self.name}_{what}",
            f"sayo/{self.name}",
            (picture.size,),
            kind,
        )

    def _asked(
        self,
        picture: Picture,
        names: tuple[str, ...],
        folder: inputs.ImageFolder,
        categories: dict[int, Category],
        marks: Marks,
    ) -> Iterator[Example | LeftOut]:
        here = [(categories[c].name, crowd, b) for _, c, crowd, b in marks.of(picture.id)]
        things = [tp.Thing(name, None if crowd else b, _CROWD) for name, crowd, b in here if name in names]
        n_yes = 0
        for asked in tp.ask_about(things, self.ask):
            id = f"{picture.id}:{asked.ask}:{asked.name}"
            if asked.why_not:
                yield LeftOut(id, "no_region", asked.why_not)
                continue
            n_yes += asked.ask == "presence"
            boxes = [(asked.name, b) for b in asked.boxes]
            yield self._example(id, folder, picture, asked.question, asked.answer, boxes, asked.ask, asked.ask)
        if self.absent:
            for name in tp.absent_names([name for name, _, _ in here], names, n_yes, str(picture.id)):
                id = f"{picture.id}:absent:{name}"
                yield self._example(id, folder, picture, tp.is_there(name), "no", [], "absence", "presence")

    def _joined(
        self,
        questions: Path,
        folder: inputs.ImageFolder,
        pictures: dict[int, Picture],
        categories: dict[int, Category],
        marks: Marks,
    ) -> Iterator[Example | LeftOut]:
        by_file = {picture.file: picture for picture in pictures.values()}
        names = {category.name for category in categories.values()}
        seen = fields.Seen()
        for number, record in json_lines(questions):
            where = f"{questions} line {number}"
            record = fields.check_keys(record, ("question", "answer"), _JOIN_KEYS, where)
            id = fields.text(record.get("id")) or f"{questions.name}:{number}"
            seen.add(id, where)
            if ("image_id" in record) == ("file_name" in record):
                raise fields.refuse(
                    "a question needs either image_id or file_name", where, "write one of the two", got=sorted(record)
                )
            if ("annotation_ids" in record) == ("categories" in record):
                raise fields.refuse(
                    "a question needs either annotation_ids or categories",
                    where,
                    "write one of the two; [] for no region",
                    got=sorted(record),
                )
            if "image_id" in record:
                picture = pictures.get(fields.field_of(record, "image_id", int, where))
            else:
                picture = by_file.get(fields.field_of(record, "file_name", str, where))
            if picture is None:
                named = record.get("image_id", record.get("file_name"))
                yield LeftOut(id, "image_missing", f"{named} is not in {self.annotations.name}")
                continue
            here = marks.of(picture.id)
            if "annotation_ids" in record:
                by_id = {a: (categories[c].name, b) for a, c, _, b in here}
                wanted = fields.field_of(record, "annotation_ids", list, where)
                unknown = [a for a in wanted if isinstance(a, bool) or a not in by_id]
                if unknown:
                    yield LeftOut(id, "unknown_object", f"image {picture.id} has no annotation {unknown[0]!r}")
                    continue
                boxes = [by_id[a] for a in wanted]
            else:
                wanted = fields.strings(record["categories"], where, "categories")
                tp.join_names(wanted, sorted(names), where)
                boxes = [
                    (categories[c].name, b) for _, c, crowd, b in here if categories[c].name in wanted and not crowd
                ]
            kind = fields.text(record.get("kind"))
            question, answer = fields.text(record["question"]), fields.text(record["answer"])
            try:
                question = fields.untagged(question, 1, where)
            except Drop as drop:
                yield LeftOut(id, drop.reason, drop.detail)
                continue
            yield self._example(id, folder, picture, question, answer, boxes, kind, "questions")


SHOWN = ("--ask", "--absent", "--questions")  # on the page of --help, beside the required flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare coco``."""
    parser.add_argument("--annotations", type=Path, required=True, help="instances_*.json or panoptic_*.json")
    parser.add_argument("--images", type=Path, required=True, help="folder or zip file of the photos")
    parser.add_argument(
        "--ask", nargs="+", choices=tp.ASKS, default=[], metavar="KIND", help=f"questions to make: {', '.join(tp.ASKS)}"
    )
    parser.add_argument("--absent", action="store_true", help="with presence: as many questions with the answer no")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines with questions to join instead")
    parser.add_argument("--categories", nargs="+", default=[], metavar="NAME", help="ask about these (default: things)")
    parser.add_argument("--name", default="coco", help="name of the data set in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> CocoSource:
    """The source from the flags of ``add_flags``."""
    return CocoSource(
        args.annotations, args.images, tuple(args.ask), args.absent, args.questions, tuple(args.categories), args.name
    )
