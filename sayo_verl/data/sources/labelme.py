"""Pictures annotated with labelme, with questions made from their labels or joined to them.

A folder of JSON files, one a picture: {imagePath, imageData, imageWidth, imageHeight, shapes[{label, points,
shape_type, group_id}]}. Points are [x, y] in pixels, as floats. Of the shapes,

    rectangle            its two corners, which may come in any order (four are read too, as other tools write them)
    polygon              its bounding box; so are those of an oriented rectangle and of a mask's corner points
    others               (circle, line, point, ...) have no box: questions about their label are left out here

Shapes of one label and one ``group_id`` are one object: their boxes are joined. ``box_source`` says which there are:
"labelme_rectangle", "labelme_polygon", "labelme_mixed". Labels that begin with "__ignore__" are skipped.

The picture is the file ``imagePath``, relative to the JSON file (with --images: the file of that name there; Windows'
backslashes are read as slashes); where there is no such file, the copy in ``imageData``. labelme turns a picture
upright by its EXIF orientation before it shows it, so points lie on the *upright* picture, and imageWidth and
imageHeight are its size. If the size does not show the orientation (a photo turned by 180 degrees), set --box-frame
upright.

labelme has no questions. ``ask`` makes counts and presence (``sayo_verl.data.sources.templates``); ``questions`` joins
lines of JSON {file, question, answer, labels: [...], id?, kind?}, file being the JSON file's path within the folder.
Licence: that of your data.
"""

import argparse
import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.rows import Drop, Example, ImageRef, LeftOut, check_text
from sayo_verl.data.sources import fields, inputs
from sayo_verl.data.sources import templates as tp
from sayo_verl.data.streams import json_items, json_lines

_BY_CORNERS = ("rectangle",)
_BY_OUTLINE = ("polygon", "oriented_rectangle", "mask")
_IGNORED = "__ignore__"


class Picture(NamedTuple):
    """What one JSON file says."""

    file: str
    image: ImageRef
    size: tuple[int, int] | None
    things: tuple[tp.Thing, ...]
    shapes: dict[str, set[str]]  # label -> kinds of its shapes


@dataclass(frozen=True)
class LabelmeSource:
    """labelme.

    Attributes:
        folder: holds the JSON files, at any depth.
        images: folder or zip file of the pictures; None: where imagePath says.
        ask: questions to make: "count", "presence".
        questions: lines of JSON to join instead.
        allow_outside: follow an imagePath out of its folder.
    """

    folder: Path
    images: Path | None = None
    ask: tuple[str, ...] = ()
    questions: Path | None = None
    allow_outside: bool = False
    name: str = "labelme"

    def __post_init__(self) -> None:
        tp.check_asks(self.ask, self.questions, "--ask and --questions")
        fields.check_name(self.name)
        if self.questions is not None:
            inputs.check_file(self.questions)
        if not self.folder.is_dir():
            raise inputs.unreadable(self.folder, "there is no such folder", "give the folder of the JSON files")

    def _files(self) -> list[str]:
        found = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.json"))
        if not found:
            raise inputs.unreadable(self.folder, "the folder has no JSON file", "give the folder labelme wrote into")
        return found

    def facts(self) -> dict[str, Any]:
        paths = [self.folder / name for name in self._files()]
        return {
            "source": "labelme",
            "name": self.name,
            "files": inputs.file_facts([*paths, *([self.questions] if self.questions else [])]),
            "images": str(self.images) if self.images else None,
            "ask": list(self.ask),
            "allow_outside": self.allow_outside,
        }

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises:
        SayoError: D58 a field is missing, D59 a point is no point, D60 an imagePath leads elsewhere, D62 an id twice,
            D63 a file is not there.
        """
        folder = inputs.ImageFolder(self.images) if self.images else None
        if self.questions is not None:
            yield from self._joined(self.questions, folder)
            return
        for file in self._files():
            picture = self._picture(file, folder)
            if isinstance(picture, LeftOut):
                yield picture
                continue
            for asked in tp.ask_about(picture.things, self.ask):
                id = f"{file}:{asked.ask}:{asked.name}"
                if asked.why_not:
                    yield LeftOut(id, "no_region", asked.why_not)
                    continue
                boxes = [(asked.name, b) for b in asked.boxes]
                yield self._example(id, picture, asked.question, asked.answer, boxes, asked.ask)

    def _joined(self, questions: Path, folder: inputs.ImageFolder | None) -> Iterator[Example | LeftOut]:
        seen, files = fields.Seen(), set(self._files())
        last: Picture | LeftOut | None = None
        last_file = ""
        for number, record in json_lines(questions):
            where = f"{questions} line {number}"
            record = fields.check_keys(record, ("file", "question", "answer", "labels"), ("id", "kind"), where)
            id = seen.add(fields.text(record.get("id")) or f"{questions.name}:{number}", where)
            file = fields.field_of(record, "file", str, where)
            labels = fields.strings(record["labels"], where, "labels")
            if file not in files:
                yield LeftOut(id, "image_missing", f"there is no {file} in the folder")
                continue
            if file != last_file or last is None:  # questions of one picture usually follow each other
                last, last_file = self._picture(file, folder), file
            if isinstance(last, LeftOut):
                yield LeftOut(id, last.reason, last.detail)
                continue
            here = [thing for thing in last.things if thing.name in labels]
            unknown = [label for label in labels if label not in {thing.name for thing in here}]
            boxless = [thing for thing in here if thing.box is None]
            if unknown or boxless:
                detail = f"{file} has no {unknown[0]!r}" if unknown else f"{boxless[0].name!r}: {boxless[0].why}"
                yield LeftOut(id, "unknown_object" if unknown else "no_region", detail)
                continue
            boxes = [(thing.name, thing.box) for thing in here if thing.box is not None]
            answer, kind = fields.text(record["answer"]), fields.text(record.get("kind"))
            try:
                question = fields.untagged(fields.text(record["question"]), 1, where)
            except Drop as drop:
                yield LeftOut(id, drop.reason, drop.detail)
                continue
            yield self._example(id, last, question, answer, boxes, kind)

    def _example(
        self,
        id: str,
        picture: Picture,
        question: str,
        answer: str,
        boxes: list[tuple[str, tuple[float, ...]]],
        kind: str,
    ) -> Example | LeftOut:
        try:
            check_text(question, answer)
        except Drop as drop:
            return LeftOut(id, drop.reason, drop.detail)
        kinds = {shape for name, _ in boxes for shape in picture.shapes[name]}
        what = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "none"
        return Example(
            id,
            (picture.image,),
            question,
            answer,
            (tuple(b for _, b in boxes),),
            (tuple(name for name, _ in boxes),),
            "xyxy",
            f"{self.name}_{what}",
            f"sayo/{self.name}",
            (picture.size,),
            kind,
        )

    # ----------------------------------------------------------------------------------------------------- reading

    def _picture(self, file: str, folder: inputs.ImageFolder | None) -> Picture | LeftOut:
        path = self.folder / file
        where = str(path)
        record = dict(json_items(path))
        shapes = fields.field_of(record, "shapes", list, where)
        try:
            image = self._image(record, path, folder, where)
        except Drop as drop:
            return LeftOut(file, drop.reason, drop.detail)
        width, height = record.get("imageWidth"), record.get("imageHeight")
        size = None if width is None or height is None else fields.picture_size(width, height, where)
        groups: dict[tuple[str, Any], list[tuple[tuple[float, ...] | None, str]]] = {}
        kinds: dict[str, set[str]] = {}
        for i, shape in enumerate(shapes):
            at = f"{where} shapes[{i}]"
            label = fields.field_of(shape, "label", str, at)
            if label.startswith(_IGNORED):
                continue
            kind = shape.get("shape_type") or "polygon"  # files of version 3 and before have polygons alone
            group = shape.get("group_id")
            key = (label, i if group is None else f"group {group}")
            groups.setdefault(key, []).append((_bounds(shape, kind, at), f"a {kind} has no box"))
            kinds.setdefault(label, set()).add("rectangle" if kind in _BY_CORNERS else "polygon")
        things = tuple(_joined_thing(label, parts) for (label, _), parts in groups.items())
        return Picture(file, image, size, things, kinds)

    def _image(self, record: dict[str, Any], path: Path, folder: inputs.ImageFolder | None, where: str) -> ImageRef:
        image_path = fields.field_of(record, "imagePath", str, where)
        name = PureWindowsPath(image_path).as_posix() if "\\" in image_path else image_path
        if folder is not None:
            image = folder.ref(PurePosixPath(name).name, where)
        else:
            image = inputs.ImageFolder(path.parent, self.allow_outside).ref(name, where)
            inside = PurePosixPath(path.parent.relative_to(self.folder).as_posix()) / image.key
            image = ImageRef(key=str(inside), path=image.path)
        data = record.get("imageData")
        there = image.member is not None or (image.path is not None and image.path.exists())
        if there or data is None:
            return image
        try:
            return ImageRef(key=image.key, data=base64.b64decode(data, validate=True))
        except (binascii.Error, TypeError, ValueError) as error:
            raise Drop("image_unreadable", f"imageData is no base64 ({error})") from error


def _bounds(shape: dict[str, Any], kind: str, where: str) -> tuple[float, ...] | None:
    """The box around the points of a shape; None for a shape that has none."""
    if kind not in _BY_CORNERS and kind not in _BY_OUTLINE:
        return None
    points = fields.field_of(shape, "points", list, where)
    fewest = 2 if kind in _BY_CORNERS or kind == "mask" else 3
    pairs = all(isinstance(point, list) and len(point) == 2 for point in points)
    if not pairs or len(points) < fewest or (kind in _BY_CORNERS and len(points) not in (2, 4)):
        wanted = "two corners [x, y]" if kind in _BY_CORNERS else f"{fewest} or more points [x, y]"
        raise fields.no_box(f"a {kind} has not the points of one", where, points, wanted)
    xs, ys = zip(*points, strict=True)
    for x, y in points:
        four_numbers([x, y, x, y], where)  # a point is a box without extent
    return float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))


def _joined_thing(label: str, parts: list[tuple[tuple[float, ...] | None, str]]) -> tp.Thing:
    boxes = [box for box, _ in parts if box is not None]
    if len(boxes) != len(parts):
        return tp.Thing(label, None, next(why for box, why in parts if box is None))
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return tp.Thing(label, (min(x0), min(y0), max(x1), max(y1)))


SHOWN = ("--images", "--ask", "--questions")  # on the page of --help, beside the required flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare labelme``."""
    parser.add_argument("--folder", type=Path, required=True, help="folder of labelme's JSON files")
    parser.add_argument("--images", type=Path, help="folder or zip file of the pictures (default: as imagePath says)")
    parser.add_argument(
        "--ask", nargs="+", choices=tp.ASKS, default=[], metavar="KIND", help=f"questions to make: {', '.join(tp.ASKS)}"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines with questions to join instead")
    parser.add_argument("--allow-outside", action="store_true", help="follow an imagePath out of its folder")
    parser.add_argument("--name", default="labelme", help="name of the data set in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> LabelmeSource:
    """The source from the flags of ``add_flags``."""
    return LabelmeSource(args.folder, args.images, tuple(args.ask), args.questions, args.allow_outside, args.name)
