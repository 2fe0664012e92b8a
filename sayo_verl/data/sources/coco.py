"""COCO annotations of objects, and questions about them.

A file (instances_*.json; .gz and .zip are read too) is {images[{id, file_name, width, height}], categories[{id, name}],
annotations[{image_id, category_id, bbox, iscrowd}]}. ``bbox`` is [x, y, width, height] in pixels from the upper left
corner, of a picture of the stated size. Questions: --ask, or --questions with lines {image_id | file_name, question,
answer, categories, id?, kind?}, whose region is every object of these categories; [] for none.

A crowd (iscrowd 1) is one box around many objects, so it is not the box of an object: a question about its name is left
out in that picture. A missing iscrowd is 0, as in most files of other tools. Masks and panoptic files are not read.
Annotations of COCO: CC BY 4.0; the photos: their Flickr licences. The file is read three times, a record at a time.
"""

import argparse
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.json_files import json_items
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common, questions
from sayo_verl.data.sources.questions import AnnotatedSource, Picture, Thing
from sayo_verl.errors import SayoError

NAMED_BOXES = False


class _Image(BaseModel):
    id: int
    file_name: str
    width: common.Side
    height: common.Side


class _Category(BaseModel):
    id: int
    name: str


class _Mark(BaseModel):
    image_id: int
    category_id: int
    bbox: list[Any]
    iscrowd: bool = False


@dataclass(frozen=True, kw_only=True)
class CocoSource(AnnotatedSource):
    """COCO; attributes as the flags of ``add_flags``."""

    box_format = "xywh"
    annotations: Path
    images: Path

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises SayoError: D42 a box, D58 a field, D60 the name of an image, D62 an id, D63 a file."""
        common.check_input(self.annotations)
        folder = common.ImageFolder(self.images)
        pictures: dict[Any, tuple[str, ImageRef, tuple[int, int]]] = {}
        for image, where in self._records("images", _Image):
            if image.id in pictures:
                raise SayoError("D62", "two images have one id", where=where, got=image.id, fix="number them anew")
            pictures[image.id] = (image.file_name, folder.ref(image.file_name, where), (image.width, image.height))
        names = {category.id: category.name for category, _ in self._records("categories", _Category)}
        marks: dict[int, array[float]] = {}  # image -> category, crowd and box of each: COCO has 860,000
        for mark, where in self._records("annotations", _Mark):
            if mark.image_id not in pictures or mark.category_id not in names:
                what, fix = "an annotation has an unknown image or category", "name a file with all three lists"
                got = f"image_id {mark.image_id}, category_id {mark.category_id}"
                raise SayoError("D58", what, where=where, got=got, fix=fix)
            here = marks.setdefault(mark.image_id, array("d"))
            here.extend((mark.category_id, mark.iscrowd, *four_numbers(mark.bbox, where)))

        ids_of = {name: id for id, (name, _, _) in pictures.items()}

        def find(key: str | int) -> Picture | None:
            id = ids_of.get(str(key), key)
            if id not in pictures:
                return None
            things = []
            for category, crowd, *box in zip(*[iter(marks.get(id, ()))] * 6, strict=True):
                things.append(Thing(names[int(category)], None if crowd else tuple(box)))
            _, image, size = pictures[id]
            return Picture(str(id), image, size, dict.fromkeys(things))

        yield from self.rows(pictures, find, dict.fromkeys(names.values()))

    def _records(self, key: str, model: type[Any]) -> Iterator[tuple[Any, str]]:
        found = False
        for i, value in json_items(self.annotations, f"{key}.item"):
            where, found = f"{self.annotations} {key}[{i}]", True
            yield common.parse(model, value, where), where
        if not found:
            what, fix = f"the file has no {key}", "name a file with images, categories and annotations"
            raise SayoError("D58", what, where=str(self.annotations), fix=fix)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare coco``."""
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="such as instances_*.json")
    parser.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder or zip file of the photos")
    questions.add_flags(parser, "coco")
    parser.add_argument("--absent", action="store_true", help="also ask about classes that are not in the picture")


def from_args(args: argparse.Namespace) -> CocoSource:
    """The source from the flags of ``add_flags``."""
    return CocoSource(annotations=args.annotations, images=args.images, **questions.fields_of(args))
