"""Pictures annotated with labelme, with questions made from their labels or joined to them.

A folder of JSON files, one a picture: {imagePath, imageData, imageWidth, imageHeight, shapes[{label, points,
shape_type, group_id}]}. Points are [x, y] in pixels, as floats. Of the shapes,

    rectangle            its two corners in any order (four are read too, as other tools write them)
    polygon              its bounding box; likewise an oriented rectangle and a mask
    others               (circle, line, point, ...) have no box: questions about their label are left out here

Shapes of one label and one ``group_id`` are one object. Labels that begin with "__ignore__" are skipped. The picture is
the file ``imagePath``, seen from the JSON file, or the file of that name beside it or in --images; else the copy in
``imageData``. labelme turns a picture upright by its EXIF orientation, so points are on the upright picture.

Questions: --ask, or --questions with lines {file, question, answer, labels, id?, kind?}: ``file`` is the path of the
JSON file within the folder, the region is every object of these labels; [] for none. Licence: that of your data.
"""

import argparse
import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from pydantic import BaseModel

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.json_files import json_items
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common, questions
from sayo_verl.data.sources.questions import AnnotatedSource, Picture, Thing
from sayo_verl.errors import SayoError

NAMED_BOXES = False
# Fewest points of the shapes that have a box.
_SHAPES = {"rectangle": 2, "mask": 2, "polygon": 3, "oriented_rectangle": 3, "rotation": 3}


class _Shape(BaseModel):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    group_id: Any = None


class _File(BaseModel):
    imagePath: str
    shapes: list[_Shape]
    imageData: str | None = None
    imageWidth: common.Side | None = None
    imageHeight: common.Side | None = None


@dataclass(frozen=True, kw_only=True)
class LabelmeSource(AnnotatedSource):
    """labelme; attributes as the flags of ``add_flags``."""

    box_format = "xyxy"
    folder: Path
    images: Path | None = None

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises SayoError: D40, D60 the name of an image, D58, D59 a file, D62 an id, D63 there are no files."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*.json"))}
        if not paths:
            raise SayoError("D63", "the folder has no JSON file", where=str(self.folder), fix="correct --folder")
        folder = common.ImageFolder(self.images or self.folder)

        def find(file: str | int) -> Picture | None:
            return self._picture(str(file), paths[str(file)], folder) if file in paths else None

        yield from self.rows(paths, find)

    def _picture(self, file: str, path: Path, folder: common.ImageFolder) -> Picture:
        record = common.parse(_File, dict(json_items(path)), str(path))
        objects: dict[tuple[str, str], list[Thing]] = {}
        for i, shape in enumerate(record.shapes):
            if not shape.label.startswith("__ignore__"):
                one = f"shape {i}" if shape.group_id is None else f"group {shape.group_id}"
                objects.setdefault((shape.label, one), []).append(_thing(shape, f"{path} shapes[{i}]"))
        size = (record.imageWidth, record.imageHeight) if record.imageWidth and record.imageHeight else None
        return Picture(file, self._image(record, path, folder), size, [_joined(parts) for parts in objects.values()])

    def _image(self, record: _File, path: Path, folder: common.ImageFolder) -> ImageRef:
        name, written = record.imagePath, PureWindowsPath(record.imagePath)
        if self.images or (written.anchor and not Path(name).is_file()):
            name = written.name
        if not self.images and not Path(name).is_absolute():
            name = f"{path.parent.relative_to(self.folder).as_posix()}/{name}"
        image = folder.ref(name, str(path))
        if record.imageData is None or image.member or (image.path and image.path.is_file()):
            return image
        try:
            return ImageRef(image.key, data=base64.b64decode(record.imageData))
        except ValueError:
            return ImageRef(image.key, data=b"")  # the builder leaves out what is no picture


def _thing(shape: _Shape, where: str) -> Thing:
    kind = shape.shape_type or "polygon"  # files of labelme 3 have polygons alone
    if kind not in _SHAPES:
        return Thing(shape.label, None, f"a {kind} has no box")
    n = len(shape.points)
    if n < _SHAPES[kind] or (kind == "rectangle" and n not in (2, 4)):
        raise SayoError("D59", f"a {kind} has {n} points", where=where, fix="correct or remove the shape")
    xs, ys = zip(*shape.points, strict=True)
    box = four_numbers((min(xs), min(ys), max(xs), max(ys)), where)
    return Thing(shape.label, box, "rectangle" if kind == "rectangle" else "polygon")


def _joined(parts: list[Thing]) -> Thing:
    """One object of the shapes of a group."""
    boxes = [part.box for part in parts if part.box]
    if len(parts) == 1 or len(boxes) < len(parts):
        return min(parts, key=lambda part: part.box is not None)
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return parts[0]._replace(box=(min(x0), min(y0), max(x1), max(y1)))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare labelme``."""
    parser.add_argument("--folder", type=Path, required=True, help="folder of labelme's JSON files")
    parser.add_argument("--images", type=Path, help="folder or zip file of the pictures (default: as imagePath says)")
    questions.add_flags(parser, "labelme", absent=False)


def from_args(args: argparse.Namespace) -> LabelmeSource:
    """The source from the flags of ``add_flags``."""
    return LabelmeSource(folder=args.folder, images=args.images, **questions.fields_of(args))
