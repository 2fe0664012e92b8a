"""A YOLO data set (Ultralytics' layout), and questions about its labels.

data.yaml in the folder has ``names`` of classes (a list, or {number: name}) and the folders ``train`` (default: images)
and ``val`` (each one or a list), relative to ``path`` or to the folder. ``val`` becomes the validation split.

The labels of images/a/b.jpg are in labels/a/b.txt, one object a line: the class and four shares of the picture (centre
x, centre y, width, height), or the class and the corners of a polygon, whose bounding box is taken. A picture without
such a file has no object. Pose labels (``kpt_shape``) are not read.

Lines of --questions: {file, question, answer, categories, id?, kind?}; ``file`` is a path within the folder. Read for
this: detection and segmentation data sets at docs.ultralytics.com.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, BeforeValidator

from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common, questions
from sayo_verl.data.sources.questions import AnnotatedSource, Picture, Thing
from sayo_verl.errors import SayoError

NAMED_BOXES = False
_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def _as_list(value: str | list[str]) -> list[str]:
    """One folder, several, or an empty value for none."""
    if isinstance(value, list):
        return value
    return [] if value in ("", "null", "~") else [value]


_Folders = Annotated[list[str], BeforeValidator(_as_list)]


class _Settings(BaseModel):  # data.yaml
    path: str = ""
    train: _Folders = ["images"]
    val: _Folders = []
    names: list[common.Text] | dict[int, common.Text]
    kpt_shape: Literal["", "null", "~"] = ""


@dataclass(frozen=True, kw_only=True)
class YoloSource(AnnotatedSource):
    """YOLO; attributes as the flags of ``add_flags``."""

    box_format = "cxcywh_unit"
    folder: Path

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises SayoError: D58, D63 data.yaml or --questions, D93 the folder or a label."""
        file = self.folder / "data.yaml"
        try:
            written = yaml.BaseLoader(common.check_input(file).read_bytes()).get_single_data()  # "no" stays a text
        except yaml.YAMLError as error:
            raise SayoError("D93", f"data.yaml is no YAML: {error!r:.99}", where=str(file), fix="correct it") from error
        settings = common.parse(_Settings, written, str(file))
        names = settings.names if isinstance(settings.names, dict) else dict(enumerate(settings.names))
        pictures = self._pictures(settings)

        def find(key: str | int) -> Picture | None:
            path, split = pictures.get(str(key), (None, ""))
            return Picture(str(key), ImageRef(str(key), path), None, _things(path, names), split) if path else None

        yield from self.rows(pictures, find, names.values())

    def _pictures(self, settings: _Settings) -> dict[str, tuple[Path, str]]:
        """Path and split of each picture, by its name within the folder."""
        found: dict[str, tuple[Path, str]] = {}
        train, val = settings.train or ["images"], [name for name in settings.val if name not in settings.train]
        for name, split in [(name, "train" if val else "") for name in train] + [(name, "val") for name in val]:
            path = Path(name.replace("\\", "/"))  # perhaps of another machine: its last two parts count
            places = [self.folder / settings.path / path, self.folder / path, self.folder.joinpath(*path.parts[-2:])]
            place = next((place for place in places if place.is_dir()), None)
            if place is None:
                raise SayoError("D93", "a folder of pictures is missing", where=str(places[0]), fix="correct data.yaml")
            images = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in _IMAGES]
            found |= {Path(os.path.relpath(path, self.folder)).as_posix(): (path, split) for path in images}
        return found


def _things(image: Path, names: dict[int, str]) -> dict[Thing, None]:
    """The objects of a picture, each once, from labels/a/b.txt for images/a/b.jpg."""
    path = Path("/labels/".join(str(image.absolute()).rsplit("/images/", 1))).with_suffix(".txt")
    if not path.parent.is_dir():
        fix = "put the labels of images/a.jpg into labels/a.txt"
        raise SayoError("D93", "a folder of labels is missing", where=str(path.parent), fix=fix)
    things: dict[Thing, None] = {}
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines() if path.is_file() else (), 1):
        words = line.split()
        try:
            if words:
                things[Thing(names[int(words[0])], _box([float(word) for word in words[1:]]))] = None
        except (ValueError, KeyError) as error:
            wanted, fix = "a class of data.yaml and x y width height, or x y x y x y ...", "correct the line"
            where, what = f"{path} line {number}", f"a label is invalid ({error!r})"
            raise SayoError("D93", what, where=where, got=f"{line!r:.80}", wanted=wanted, fix=fix) from error
    return things


def _box(values: list[float]) -> tuple[float, ...]:
    """Centre, width and height; of a polygon, those of its bounding box."""
    if len(values) == 4:
        return tuple(values)
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers")
    left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare yolo``."""
    parser.add_argument("--folder", type=Path, required=True, help="folder with images, labels and data.yaml")
    questions.add_flags(parser, "yolo")
    parser.add_argument("--absent", action="store_true", help="also ask about classes that are not in the picture")


def from_args(args: argparse.Namespace) -> YoloSource:
    """The source from the flags of ``add_flags``."""
    return YoloSource(folder=args.folder, **questions.fields_of(args))
