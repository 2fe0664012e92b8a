"""Pictures annotated with labelme, and questions about their labels.

A folder of JSON files, one a picture: {imagePath, imageData, imageWidth, imageHeight, shapes[{label, points,
shape_type, group_id}]}. Points are [x, y] in pixels, as floats. Of the shapes,

    rectangle            its two corners in any order (four are read too, as other tools write them)
    polygon              its bounding box; likewise an oriented rectangle and a mask
    others               (circle, line, point, ...) have no box: questions about their label are left out here

Several shapes of one label and ``group_id`` are parts of an object, which has no box here. "__ignore__..." is skipped.
The picture is the file ``imagePath``, seen from the JSON file, or the file of that name beside it or in --images; else
the copy in ``imageData``. labelme turns pictures upright by their EXIF orientation; points are on the upright picture.

Questions: --ask, or --questions with lines {file, question, answer, labels, id?, kind?}: ``file`` is the path of the
JSON file within the folder, the region is every object of these labels; [] for none. Licence: that of your data.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from pydantic import Base64Bytes, BaseModel, Field

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.json_files import json_items
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common, questions
from sayo_verl.data.sources.questions import AnnotatedSource, Picture, Thing
from sayo_verl.errors import SayoError

NAMED_BOXES = False
_SHAPES = ("rectangle", "polygon", "oriented_rectangle", "rotation", "mask")  # those that have a box


class _Shape(BaseModel):
    label: str
    points: list[tuple[float, float]] = Field(min_length=1)
    shape_type: str | None = None
    group_id: int | str | None = None


class _File(BaseModel):
    imagePath: str
    shapes: list[_Shape]
    imageData: Base64Bytes | None = None
    imageWidth: common.Side | None = None
    imageHeight: common.Side | None = None


@dataclass(frozen=True, kw_only=True)
class LabelmeSource(AnnotatedSource):
    """labelme; attributes as the flags of ``add_flags``."""

    box_format = "xyxy"
    folder: Path
    images: Path | None = None

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises SayoError: D42, D58 a file, D60 the name of an image, D63 there are no files."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*.json"))}
        if not paths:
            raise SayoError("D63", "the folder has no JSON file", where=str(self.folder), fix="correct --folder")
        folder = common.ImageFolder(self.images or self.folder)

        def find(file: str | int) -> Picture | None:
            return self._picture(str(file), paths[str(file)], folder) if file in paths else None

        yield from self.rows(paths, find)

    def _picture(self, file: str, path: Path, folder: common.ImageFolder) -> Picture:
        record = common.parse(_File, dict(json_items(path)), str(path))
        groups = Counter((shape.label, shape.group_id) for shape in record.shapes)
        things = []
        for i, shape in enumerate(record.shapes):
            whole = shape.group_id is None or groups[shape.label, shape.group_id] == 1
            if not shape.label.startswith("__ignore__"):
                things.append(Thing(shape.label, _box(shape, f"{path} shapes[{i}]") if whole else None))
        size = (record.imageWidth, record.imageHeight) if record.imageWidth and record.imageHeight else None
        return Picture(file, self._image(record, path, folder), size, dict.fromkeys(things))

    def _image(self, record: _File, path: Path, folder: common.ImageFolder) -> ImageRef:
        name, written = record.imagePath, PureWindowsPath(record.imagePath)
        if self.images:
            name = written.name
        elif not Path(name).is_absolute() or not Path(name).is_file():
            beside = path.parent.relative_to(self.folder).as_posix()
            name = f"{beside}/{written.name if written.anchor else name}"
        image = folder.ref(name, str(path))
        if record.imageData is None or image.member or (image.path and image.path.is_file()):
            return image
        return ImageRef(image.key, data=record.imageData)


def _box(shape: _Shape, where: str) -> tuple[float, ...] | None:
    if (shape.shape_type or "polygon") not in _SHAPES:  # files of labelme 3 have polygons alone
        return None
    xs, ys = zip(*shape.points, strict=True)
    return four_numbers((min(xs), min(ys), max(xs), max(ys)), where)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare labelme``."""
    parser.add_argument("--folder", type=Path, required=True, help="folder of labelme's JSON files")
    parser.add_argument("--images", type=Path, help="folder or zip file of images (default: as imagePath says)")
    questions.add_flags(parser, "labelme")


def from_args(args: argparse.Namespace) -> LabelmeSource:
    """The source from the flags of ``add_flags``."""
    return LabelmeSource(folder=args.folder, images=args.images, **questions.fields_of(args))
