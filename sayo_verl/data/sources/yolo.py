"""A YOLO data set (Ultralytics' layout), with questions made from its labels or joined to them.

data.yaml in the folder has ``names`` of classes (a list, or {number: name}), and ``train`` and ``val``: a folder, a
text file with one picture a line, or a list of these, relative to ``path`` if that is there, else to the folder.
Without it, --names names the classes, and images/train and images/val, or images, are read. ``val`` becomes the
validation split.

The labels of images/a/b.jpg are in labels/a/b.txt, one object a line: the class and four shares of the picture (centre
x, centre y, width, height), or the class and the corners of a polygon, whose bounding box is taken. A picture without
such a file has no object. Pose labels (``kpt_shape``) are not read.

Questions: --ask, or --questions with lines {file, question, answer, categories, id?, kind?}: ``file`` is the path of
the picture within the folder, the region is every object of these classes; [] for none. Read for this: the pages on
detection and segmentation data sets at docs.ultralytics.com. Licence: that of your data.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel

from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.sources import common, questions
from sayo_verl.data.sources.common import parse
from sayo_verl.data.sources.questions import AnnotatedSource, Picture, Thing
from sayo_verl.errors import Rule, SayoError, raise_first

NAMED_BOXES = False
_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class _Settings(BaseModel):  # data.yaml
    path: str = ""
    train: str | list[str] | None = None
    val: str | list[str] | None = None
    names: list[common.Text] | dict[int, common.Text] = []
    kpt_shape: Any = None


@dataclass(frozen=True, kw_only=True)
class YoloSource(AnnotatedSource):
    """YOLO; attributes as the flags of ``add_flags``."""

    box_format = "cxcywh_unit"
    folder: Path
    names: Sequence[str] = ()

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises SayoError: D58, D62 data.yaml or a line of --questions, D93 the folder or a label."""
        file = self.folder / "data.yaml"
        where, pose = str(file), "pose labels are not read"
        try:
            settings = parse(_Settings, yaml.safe_load(file.read_text("utf-8-sig")) if file.is_file() else {}, where)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            got, fix = common.shown(error), "write it as YAML in UTF-8"
            raise SayoError("D93", "data.yaml cannot be read", where=where, got=got, fix=fix) from error
        listed = self.names or settings.names
        names = listed if isinstance(listed, dict) else dict(enumerate(listed))
        pictures = self._pictures(settings)
        labelled = any(_labels(path).is_file() for path, _ in pictures.values())
        rules = [
            Rule("D93", settings.kpt_shape is not None, pose, where, "name a data set for detection or segmentation"),
            Rule("D93", not names, "the classes have no names", where, "add names to data.yaml, or set --names"),
            Rule("D93", not labelled, "no picture has labels", where, "put those of images/a.jpg into labels/a.txt"),
        ]
        raise_first(rules)

        def find(key: str | int) -> Picture | None:
            if key not in pictures:
                return None
            path, split = pictures[str(key)]
            return Picture(str(key), ImageRef(str(key), path), None, _things(_labels(path), names), split)

        yield from self.rows(pictures, find, [*names.values()])

    def _pictures(self, settings: _Settings) -> dict[str, tuple[Path, str]]:
        """Path and split of each picture, by its name within the folder."""
        root = self.folder / settings.path
        root = root if root.is_dir() else self.folder
        usual = {split: f"images/{split}" for split in ("train", "val") if (root / "images" / split).is_dir()}
        listed = {"train": settings.train, "val": settings.val} if settings.train else usual or {"train": "images"}
        found: dict[str, tuple[Path, str]] = {}
        for split, entries in listed.items():
            for entry in [entries] if isinstance(entries, str) else entries or []:
                for path in _images(root, entry.replace("\\", "/")):
                    key = path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)
                    found.setdefault(key, (path, split))
        held_out = any(split == "val" for _, split in found.values())
        return found if held_out else {key: (path, "") for key, (path, _) in found.items()}


def _images(root: Path, entry: str) -> list[Path]:
    """The pictures of a folder or a list. Paths of another machine and Roboflow's "../" are looked up in the root."""
    places = [root / entry, root / entry.removeprefix("../"), root.joinpath(*Path(entry).parts[-2:])]
    place = next((path for path in places if path.exists()), None)
    if place is None:
        fix = "correct data.yaml, or put the pictures there"
        raise SayoError("D93", "a folder or list of pictures is missing", where=str(root), got=entry, fix=fix)
    if place.is_file():
        return [place.parent / line.strip() for line in _lines(place) if line.strip()]
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in _IMAGES)


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8-sig", "replace").splitlines()


def _labels(path: Path) -> Path:
    """labels/a/b.txt of images/a/b.jpg: the last part "images" counts."""
    parts = list(path.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _things(path: Path, names: dict[int, str]) -> list[Thing]:
    """The objects of a file of labels."""
    things = []
    for number, line in enumerate(_lines(path) if path.is_file() else [], 1):
        words = line.split()
        if not words:
            continue
        try:
            name, values = names[int(words[0])], [float(word) for word in words[1:]]
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                raise ValueError(f"{len(values)} numbers")
        except (ValueError, KeyError) as error:
            wanted, fix = f"class (0 to {max(names)}) x y width height, or class x y x y x y ...", "correct the line"
            where, what = f"{path} line {number}", f"a label is invalid ({error!r})"
            raise SayoError("D93", what, where=where, got=common.shown(line), wanted=wanted, fix=fix) from error
        xs, ys = values[::2], values[1::2]
        x0, y0, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
        polygon = Thing(name, (x0 + w / 2, y0 + h / 2, w, h), "polygon")
        things.append(polygon if len(values) > 4 else Thing(name, tuple(values)))
    return things


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare yolo``."""
    parser.add_argument("--folder", type=Path, required=True, help="folder with images, labels and data.yaml")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="of the classes (default: data.yaml)")
    questions.add_flags(parser, "yolo")


def from_args(args: argparse.Namespace) -> YoloSource:
    """The source from the flags of ``add_flags``."""
    return YoloSource(folder=args.folder, names=args.names, **questions.fields_of(args))
