"""ReFocus-Chart: questions about bar charts, with the areas an annotator's edit focused on.

Data: ``ReFocus/ReFocus_Data`` on Hugging Face (arXiv 2501.05452); its card and its code state Apache-2.0. The charts
are ChartQA's, whose mirrors state GPL-3.0: download it yourself, and check both licences before you pass rows on.

Two forms are read:

    parquet   data/{train,val,test}-*.parquet with id, question, answer, image {bytes, path}, focus_areas_bbox,
              x_values, y_values, x_values_bbox, y_values_bbox, figure_bbox, source. Boxes are x1, y1, x2, y2 in
              *pixels* (int32). A list of boxes is stored column by column, {x1: [...], y1: [...], ...}: that is how
              ``datasets`` writes a sequence of structs; a list of structs is read as well.
    JSON      chartQA_{h,v}_bar_wbb.json, the test files: {id: {query, answer, figure_path, type, x_values, y_values,
              x_bboxes, y_bboxes, figure_bbox}}, x1, y1, x2, y2 as *fractions* of width and height, without focus areas.

The column types decide which form a file has, and every value is checked: whole numbers are pixels, others are
fractions in [0, 1]. A value up to a tenth outside is clipped, for plots that cross the border. A mixture stops the
work, and so do fractions that were cut to whole numbers.

Which boxes. ``focus_areas_bbox`` (box_source "refocus_focus"). Where it is empty: those of the x and y labels that the
question names, as whole words in any case, longest label first ("refocus_labels"); else the figure's ("refocus_figure",
often too large to say anything); else none ("none"). ``fall_back`` shortens that chain. SAYO's released code takes rows
with focus areas alone, and of those the first area alone: fall_back="none", first_box=True.

Pitfall: the script that made label boxes sorts them by position, but leaves the labels in the annotation's order. If
the two orders differ, a label has the box of another one, and nothing in the file shows it. Look at the pictures before
training on "refocus_labels".
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sayo_verl.data.boxes import four_numbers
from sayo_verl.data.rows import Drop, Example, ImageRef, LeftOut, check_text
from sayo_verl.data.sources import fields, inputs
from sayo_verl.data.streams import json_items
from sayo_verl.errors import SayoError

_CORNERS = ("x1", "y1", "x2", "y2")
_COLUMNS = ("id", "question", "answer", "image", "source", "x_values", "y_values")
_BOX_COLUMNS = ("focus_areas_bbox", "x_values_bbox", "y_values_bbox", "figure_bbox")
_BEYOND = 0.1  # of the picture: fractions of a plot that reaches over its border
FALL_BACKS = ("figure", "labels", "none")

Box = tuple[float, float, float, float]
_Record = tuple[str, Callable[[str], Example], str]  # id, what makes the example of an id, where it is


@dataclass(frozen=True)
class RefocusSource:
    """ReFocus-Chart.

    Attributes:
        data: folder with the parquet files, one parquet file, or a *_wbb.json file.
        split: which parquet files of a folder; "test" is the benchmark, not for training.
        images: JSON form: folder or zip file that ``figure_path`` is looked up in.
        first_box: of several focus areas, take the first alone.
        fall_back: how far to look where there is no focus area: "figure", "labels", "none".
    """

    data: Path
    split: str = "train"
    images: Path | None = None
    first_box: bool = False
    fall_back: str = "figure"
    name: str = "refocus"

    def __post_init__(self) -> None:
        if self.fall_back not in FALL_BACKS:
            raise fields.refuse(
                "there is no such fall-back",
                "--fall-back",
                "name one of them",
                got=self.fall_back,
                wanted=", ".join(FALL_BACKS),
            )
        for path in self._files():
            inputs.check_file(path)
        if self._is_json and self.images is None:
            raise fields.refuse(
                "the JSON form names its images as files",
                str(self.data),
                "name the folder or zip file of the charts with --images",
            )

    @property
    def _is_json(self) -> bool:
        return not self.data.is_dir() and self.data.suffix.lower() != ".parquet"

    def _files(self) -> tuple[Path, ...]:
        return (self.data,) if self._is_json else inputs.parquet_files(self.data, self.split)

    def facts(self) -> dict[str, Any]:
        return {
            "source": "refocus",
            "files": inputs.file_facts(self._files()),
            "split": self.split,
            "images": str(self.images) if self.images else None,
            "first_box": self.first_box,
            "fall_back": self.fall_back,
        }

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises:
        SayoError: D58 a field is missing, D59 boxes and labels do not belong together, D60 an image without bytes,
            D61 pixels and fractions mixed, D62 an id twice, D63 a damaged file.
        """
        seen = fields.Seen()
        for id, make, where in self._records():
            try:
                yield make(seen.add(id, where))
            except Drop as drop:
                yield LeftOut(id, drop.reason, drop.detail)

    def _records(self) -> Iterator[_Record]:
        if not self._is_json:
            for path in self._files():
                yield from self._of_parquet(path)
            return
        assert self.images is not None
        folder = inputs.ImageFolder(self.images)
        for id, record in json_items(self.data):
            where = f"{self.data} record {fields.shown(id)}"

            def make(id: str, record: Any = record, where: str = where) -> Example:
                return self._of_json(id, record, folder, where)

            yield id, make, where

    def _of_parquet(self, path: Path) -> Iterator[_Record]:
        pixels = _in_pixels(path)
        for i, row in enumerate(inputs.parquet_rows(path, (*_COLUMNS, *_BOX_COLUMNS))):
            where = f"{path} row {i}"
            id = fields.text(row["id"])
            if not id:
                raise fields.refuse("a row has no id", where, "download the file again", got=fields.shown(row["id"]))

            def make(id: str, row: dict[str, Any] = row, where: str = where) -> Example:
                boxes = {column: _boxes(row[column], pixels, f"{where}, {column}") for column in _BOX_COLUMNS}
                image = inputs.stored_image(row["image"], where)
                return self._example(id, image, row, row["question"], boxes, pixels, row["source"], where)

            yield id, make, where

    def _of_json(self, id: str, record: Any, folder: inputs.ImageFolder, where: str) -> Example:
        for key in ("query", "answer", "figure_path", "x_values", "y_values", "x_bboxes", "y_bboxes", "figure_bbox"):
            fields.field_of(record, key, object, where)
        names = dict(zip(_BOX_COLUMNS, ("focus_areas_bbox", "x_bboxes", "y_bboxes", "figure_bbox"), strict=True))
        boxes = {column: _boxes(record.get(key), False, f"{where}, {key}") for column, key in names.items()}
        image = folder.ref(record["figure_path"], where)
        return self._example(id, image, record, record["query"], boxes, False, record.get("type"), where)

    def _example(
        self,
        id: str,
        image: ImageRef,
        row: Any,
        question: Any,
        boxes: dict[str, list[Box]],
        pixels: bool,
        kind: Any,
        where: str,
    ) -> Example:
        question, answer = fields.untagged(fields.text(question), 1, where), fields.text(row["answer"])
        check_text(question, answer)
        labels: list[tuple[str, Box]] = []
        for axis in ("x", "y"):
            listed = row[f"{axis}_values"] or []
            if not isinstance(listed, list):
                raise fields.refuse(f"the {axis} labels are no list", where, "remove the row", got=fields.shown(listed))
            values = [fields.text(value) for value in listed]
            of_values = boxes[f"{axis}_values_bbox"]
            if len(values) != len(of_values):
                raise SayoError(
                    "D59",
                    f"there are not as many {axis} labels as boxes of them",
                    where=where,
                    got=f"{len(values)} labels, {len(of_values)} boxes",
                    wanted="one box for each label",
                    fix="remove the row, or download the file again",
                )
            labels += zip(values, of_values, strict=True)
        chosen, box_source = self._choose(question, boxes, labels)
        return Example(
            id,
            (image,),
            question,
            answer,
            (tuple(b for _, b in chosen),),
            (tuple(name for name, _ in chosen),),
            "xyxy" if pixels else "xyxy_unit",
            box_source,
            "sayo/refocus",
            kind=fields.text(kind),
        )

    def _choose(
        self, question: str, boxes: dict[str, list[Box]], labels: list[tuple[str, Box]]
    ) -> tuple[list[tuple[str, Box]], str]:
        focus = boxes["focus_areas_bbox"][: 1 if self.first_box else None]
        if focus:
            label_of = {b: label for label, b in labels}
            return [(label_of.get(b, "focus area"), b) for b in focus], "refocus_focus"
        if self.fall_back != "none":
            named = named_labels(question, [label for label, _ in labels])
            if named:
                return [labels[i] for i in named], "refocus_labels"
        if self.fall_back == "figure" and boxes["figure_bbox"]:
            return [("figure", boxes["figure_bbox"][0])], "refocus_figure"
        return [], "none"


def named_labels(question: str, labels: Sequence[str]) -> list[int]:
    """Which labels a question names: whole words, any case; of labels within each other the longest.

    "18" is not named by "18-29" where that is a label too, nor by "18.5".

    Returns:
        Indices into ``labels``, ascending.
    """
    words = " ".join(question.split())
    taken = [False] * len(words)
    named = []
    for i in sorted(range(len(labels)), key=lambda i: (-len(labels[i]), i)):
        label = " ".join(labels[i].split())
        if not label:
            continue
        pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(label)}(?!\w)(?![.,]\d)"
        free = [m.span() for m in re.finditer(pattern, words, re.IGNORECASE) if not any(taken[m.start() : m.end()])]
        for start, end in free:
            taken[start:end] = [True] * (end - start)
        if free:
            named.append(i)
    return sorted(named)


def _in_pixels(path: Path) -> bool:
    """Whether the boxes of a parquet file are whole numbers, hence pixels."""
    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise inputs.damaged(path, error) from error
    inputs.need_columns(_BOX_COLUMNS, schema.names, str(path))
    leaves = {column: set(_leaves(schema.field(column).type)) for column in _BOX_COLUMNS}
    if all(pa.types.is_integer(leaf) for found in leaves.values() for leaf in found):
        return True
    if all(pa.types.is_floating(leaf) for found in leaves.values() for leaf in found):
        return False
    columns = {column: sorted(map(str, found)) for column, found in leaves.items()}
    raise _mixture(str(path), columns, "all columns of whole numbers (pixels), or all of fractions")


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(field.type)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(kind.value_type)
    elif not pa.types.is_null(kind):  # a column that is empty in every row says nothing
        yield kind


def _boxes(value: Any, pixels: bool, where: str) -> list[Box]:
    """Boxes of one column, whichever way round they are stored, held against what they are said to be."""
    if value is None or value == []:
        return []
    if isinstance(value, dict) and set(value) == set(_CORNERS) and all(isinstance(v, list) for v in value.values()):
        columns = [value[corner] for corner in _CORNERS]
        if len({len(column) for column in columns}) != 1:
            raise SayoError(
                "D59",
                "the corners of boxes are not equally many",
                where=where,
                got=[len(column) for column in columns],
                wanted="four lists of one length",
                fix="remove the row, or download the file again",
            )
        rows = [list(corners) for corners in zip(*columns, strict=True)]
    else:
        each = value if isinstance(value, list) else [value]
        if not all(isinstance(b, dict) and set(b) == set(_CORNERS) for b in each):
            raise SayoError(
                "D59",
                "a box is not x1, y1, x2, y2",
                where=where,
                got=fields.shown(value),
                wanted="{x1, y1, x2, y2}",
                fix="check that the file is ReFocus-Chart's",
            )
        rows = [[b[corner] for corner in _CORNERS] for b in each]
    if rows and all(v is None for b in rows for v in b):  # a struct of nulls is a missing struct
        return []
    found = [four_numbers(b, f"{where} {i}") for i, b in enumerate(rows)]
    for b in found:
        if pixels and b[2] > b[0] and b[3] > b[1] and max(b) <= 1:
            raise _mixture(where, b, "pixels; these are fractions that were cut to whole numbers")
        if not pixels and (min(b) < -_BEYOND or max(b) > 1 + _BEYOND):
            raise _mixture(where, b, "fractions in [0, 1], as the others of this file are said to be")
    return found if pixels else [(_clipped(a), _clipped(b), _clipped(c), _clipped(d)) for a, b, c, d in found]


def _clipped(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def _mixture(where: str, got: Any, wanted: str) -> SayoError:
    return SayoError(
        "D61",
        "boxes in pixels and boxes as fractions are mixed",
        where=where,
        got=got,
        wanted=wanted,
        fix="prepare a file of one kind, or write it as lines of JSON with --box-format",
    )


SHOWN = ("--images", "--first-box")  # on the page of --help, beside the required flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare refocus``."""
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files, one of them, or *_wbb.json")
    parser.add_argument("--split", default="train", help="which parquet files of a folder (default: %(default)s)")
    parser.add_argument("--images", type=Path, help="for *_wbb.json: folder or zip file that holds its figure_path")
    parser.add_argument(
        "--first-box", action="store_true", help="of several focus areas the first, as SAYO's code does"
    )
    parser.add_argument(
        "--fall-back",
        choices=FALL_BACKS,
        default="figure",
        help="without a focus area: boxes of the labels named, then the figure's (figure), the labels "
        "alone (labels), or nothing (none); default: %(default)s",
    )


def from_args(args: argparse.Namespace) -> RefocusSource:
    """The source from the flags of ``add_flags``."""
    return RefocusSource(args.data, args.split, args.images, args.first_box, args.fall_back)
