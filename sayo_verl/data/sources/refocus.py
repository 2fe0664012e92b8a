"""ReFocus-Chart: questions about bar charts, with the areas an annotator's edit focused on.

``ReFocus/ReFocus_Data`` on Hugging Face (arXiv 2501.05452); its card and its code state Apache-2.0. The charts are
ChartQA's, whose mirrors state GPL-3.0: download it yourself. Two forms are read:

    parquet   data/{train,val,test}-*.parquet with id, question, answer, image {bytes, path}, focus_areas_bbox,
              x_values, y_values, x_values_bbox, y_values_bbox, figure_bbox, source. Boxes are x1, y1, x2, y2 in
              *pixels*, stored column by column as ``datasets`` does, {x1: [...], y1: [...], ...}, or box by box.
    JSON      chartQA_{h,v}_bar_wbb.json, the test files: {id: {query, answer, figure_path, type, x_values, y_values,
              x_bboxes, y_bboxes, figure_bbox}}, boxes as *fractions* of width and height, without focus areas.

Which boxes. ``focus_areas_bbox`` (box_source "refocus_focus"). Where it is empty: those of the x and y labels that the
question names, as whole words in any case, longest label first ("refocus_labels"); else the figure's ("refocus_figure",
often too large); else none ("none"). ``--fall-back`` shortens that chain. SAYO's released code takes rows with focus
areas alone, and of those the first area alone: ``--fall-back none --first-box``.

Pitfall: the script that made label boxes sorts them by position, but leaves the labels in the annotation's order. If
they differ, a label has the box of another one. Look at the pictures before training on "refocus_labels".
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, FiniteFloat

from sayo_verl.data.json_files import json_items
from sayo_verl.data.reading import open_parquet, read_rows
from sayo_verl.data.rows import Drop, Example, LeftOut, Source
from sayo_verl.data.sources import common
from sayo_verl.errors import SayoError

NAMED_BOXES = False
FALL_BACKS = ("figure", "labels", "none")
_CORNERS = ("x1", "y1", "x2", "y2")


def _corners(value: Any) -> Any:
    """Boxes as (x1, y1, x2, y2), whichever way round they are stored; a struct of nulls is none."""
    if isinstance(value, dict) and isinstance(value.get("x1"), list):
        value = [dict(zip(value, box, strict=True)) for box in zip(*value.values(), strict=True)]
    boxes = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(box, dict) and box.keys() == set(_CORNERS) for box in boxes):
        raise ValueError("a box is not x1, y1, x2, y2")
    return [found for box in boxes if (found := tuple(map(box.get, _CORNERS))) != (None,) * 4]


_Boxes = Annotated[list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]], BeforeValidator(_corners)]


class _Record(BaseModel):
    id: common.Text = Field(min_length=1)
    question: common.Text = Field(validation_alias=AliasChoices("question", "query"))
    answer: common.Text
    image: Any = Field(validation_alias=AliasChoices("image", "figure_path"))
    kind: common.Text = Field("", validation_alias=AliasChoices("source", "type"))
    x_values: list[common.Text]
    y_values: list[common.Text]
    focus: _Boxes = Field([], validation_alias="focus_areas_bbox")
    x_boxes: _Boxes = Field(validation_alias=AliasChoices("x_values_bbox", "x_bboxes"))
    y_boxes: _Boxes = Field(validation_alias=AliasChoices("y_values_bbox", "y_bboxes"))
    figure: _Boxes = Field(validation_alias="figure_bbox")


@dataclass(frozen=True)
class RefocusSource(Source):
    """ReFocus-Chart; the attributes are flags."""

    data: Path
    split: str = "train"
    images: Path | None = None
    first_box: bool = False
    fall_back: str = FALL_BACKS[0]
    name: str = "refocus"

    def __post_init__(self) -> None:
        files, where = [common.check_input(path) for path in self._files()], str(self.data)
        if not files:
            raise SayoError("D63", f"there is no {self.split}-*.parquet", where=where, fix="correct --split")
        if self.images is None and files[0].suffix != ".parquet":
            raise SayoError("D58", "images are named as files", where=where, fix="name their folder with --images")

    def _files(self) -> list[Path]:
        return sorted(self.data.rglob(f"{self.split}-*.parquet")) if self.data.is_dir() else [self.data]

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "files": common.file_facts(self._files())}

    def examples(self) -> Iterator[Example | LeftOut]:
        """The rows in the order of the files. D02, D09, D40, D47, D48, D58 to D60."""
        folder = common.ImageFolder(self.images) if self.images else None
        for path in self._files():
            for where, value in _records(path):
                row = common.parse(_Record, value, where)
                try:
                    yield self._example(row, path.suffix == ".parquet", folder, where)
                except Drop as drop:
                    yield LeftOut(row.id, drop.reason, drop.detail)

    def _example(self, row: _Record, pixels: bool, folder: common.ImageFolder | None, where: str) -> Example:
        names, boxes = [*row.x_values, *row.y_values], [*row.x_boxes, *row.y_boxes]
        if (len(row.x_values), len(names)) != (len(row.x_boxes), len(boxes)):
            got = f"{len(names)} labels, {len(boxes)} boxes"
            raise SayoError("D59", "there is not one box for each label", where=where, got=got, fix="remove the row")
        question, source, found = common.untagged(row.question, 1, where), "none", []
        if row.focus:
            label_of, focus = dict(zip(boxes, names, strict=True)), row.focus[: 1 if self.first_box else None]
            source, found = "refocus_focus", [(box, label_of.get(box, "focus area")) for box in focus]
        elif self.fall_back != "none" and (named := named_labels(question, names)):
            source, found = "refocus_labels", [(boxes[i], names[i]) for i in named]
        elif row.figure and self.fall_back == "figure":
            source, found = "refocus_figure", [(row.figure[0], "figure")]
        image, texts = common.stored_image(row.image, where, folder), tuple(name for _, name in found)
        facts = ((tuple(box for box, _ in found),), (texts,), "xyxy" if pixels else "xyxy_unit", source)
        return Example(row.id, (image,), question, row.answer, *facts, "sayo/refocus", kind=row.kind)


def named_labels(question: str, labels: Sequence[str]) -> list[int]:
    """Numbers of the labels that a question names: whole words, any case; of labels within each other the longest.

    "18" is not named by "18-29" where that is a label too, nor by "18.5".
    """
    words, named = " ".join(question.split()), []
    for i in sorted(range(len(labels)), key=lambda i: -len(labels[i])):
        label = re.escape(" ".join(labels[i].split()))
        pattern = rf"(?<!\w)(?<!\d[.,]){label}(?!\w)(?![.,]\d)"
        rest = re.sub(pattern, lambda found: "\0" * len(found.group()), words, flags=re.IGNORECASE)
        if label and rest != words:
            named.append(i)
            words = rest
    return sorted(named)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        file = open_parquet(path)
        columns = [name for name in file.schema_arrow.names if name not in ("thoughts", "edited_image", "split")]
        yield from ((f"{path} row {i}", row) for i, row in enumerate(read_rows(file, path, columns)))
    else:
        for id, value in json_items(path):
            where = f"{path} record {id!r}"
            yield where, {**common.parse(dict[str, Any], value, where), "id": id}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare refocus``."""
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="parquet files or *_wbb.json")
    parser.add_argument("--split", default="train", help="split of the parquet files (default: %(default)s)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the pictures of *_wbb.json")
    parser.add_argument("--first-box", action="store_true", help="use the first of several areas, as SAYO's code does")
    parser.add_argument(
        "--fall-back",
        choices=FALL_BACKS,
        default=FALL_BACKS[0],
        metavar="BOXES",
        help=f"without an area: {', '.join(FALL_BACKS)}",
    )


def from_args(args: argparse.Namespace) -> RefocusSource:
    """The source of these flags."""
    return RefocusSource(args.data, args.split, args.images, args.first_box, args.fall_back)
