"""The first pass of `sayo inspect`: the checks of every row that need no model.

No image is decoded here: its header is read and its bytes are hashed. A mistake becomes a ``Finding``, which is counted
and names the first rows, and the pass continues. Only a file that cannot be read stops it, as a ``SayoError``.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sayo_verl.data.check import asks_for_answer, check_joined, columns_of, open_rows
from sayo_verl.data.contract import PREPARE, Demands, Looked, RowContract
from sayo_verl.data.reading import image_digest, read_rows
from sayo_verl.errors import SayoError
from sayo_verl.inspection.files import Data, check_manifest
from sayo_verl.inspection.findings import Findings

FORMATS = ("JPEG", "PNG", "WEBP")
WHOLE = 0.99  # a box with at least this share of the image counts as the whole image
DEMANDS = Demands()
MANY = 0.05  # above this share of rows, boxes of the whole image are a warning


@dataclass
class Figures:
    """Counts over all rows.

    Attributes:
        rows: split -> rows.
        images, distinct_images: images of all rows, and how many of them differ in their bytes.
        boxes_per_row: number of boxes -> rows, without rows of malformed boxes.
        sources, kinds, box_sources: name -> rows.
        formats: format of an image -> images.
        whole_image_rows: rows with a box that is the whole image.
        train_rows_with_boxes: training rows with a box.
        rows_of_wrong_boxes: rows of malformed boxes.
    """

    rows: Counter[str] = field(default_factory=Counter)
    images: int = 0
    distinct_images: int = 0
    boxes_per_row: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    box_sources: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    whole_image_rows: int = 0
    train_rows_with_boxes: int = 0
    rows_of_wrong_boxes: int = 0


class Audit:
    """Goes over every row of a data set.

    Args:
        data: its files.
        demands: which checks apply.
        tick: called once for each row.
    """

    def __init__(self, data: Data, demands: Demands = DEMANDS, tick: Callable[[], None] = lambda: None) -> None:
        self.data, self.demands, self.tick = data, demands, tick
        self.findings, self.figures = Findings(), Figures()
        self._held_out: dict[tuple[str, Any], str] = {}  # ("name", key) or ("bytes", hash) of validation -> where
        self._seen: set[bytes] = set()

    def run(self) -> tuple[Findings, Figures]:
        """Check everything.

        Raises:
            SayoError: D02 for a file that cannot be read.
        """
        for folder in self.data.folders:
            check_manifest(folder, self.findings)
        for paths in (self.data.train, self.data.val):
            self.findings.attempt(check_joined, paths)
        for split, paths in (("val", self.data.val), ("train", self.data.train)):  # train is compared with validation
            contract, questions = RowContract(self.demands), dict[Any, str]()
            for path in paths:
                self._file(path, split, contract, questions)
        self.figures.distinct_images = len(self._seen)
        self._of_all_rows()
        return self.findings, self.figures

    def _file(self, path: Path, split: str, contract: RowContract, questions: dict[Any, str]) -> None:
        try:
            file = open_rows(path, self.demands)
        except SayoError as error:
            if error.code != "D03":
                raise
            self.findings.refused(error)
            return
        for row, values in enumerate(read_rows(file, path, columns_of(file, self.demands))):
            where = f"{path} row {row}"
            looked = contract.look(values, where)
            for fault in looked.faults:
                self.findings.refused(fault)
            self.figures.rows[split] += 1
            self.figures.sources[str(values["data_source"])] += 1
            if not asks_for_answer(values, self.demands):
                self.findings.add(
                    "D90",
                    "WARN",
                    "a prompt does not ask for <answer>, where sayo_verl.reward reads the answer",
                    where,
                    "prepare the rows with an instruction (`sayo prepare synthetic --prompt instruction`), or train a "
                    "model that answers in this form without being asked",
                )
            if looked.mistyped:
                self.figures.rows_of_wrong_boxes += 1
            else:
                self._row(values, looked, split, where, questions)
            self.tick()

    def _row(self, values: dict[str, Any], looked: Looked, split: str, where: str, questions: dict[Any, str]) -> None:
        figures, source = self.figures, repr(values["data_source"])
        images, info = values.get("images") or [], values.get("extra_info") or {}
        figures.kinds[str(info.get("kind") or "-")] += 1
        figures.box_sources[str(info.get("box_source") or "-")] += 1
        figures.train_rows_with_boxes += split == "train" and any(looked.boxes)
        if any(fault.code in ("D05", "V01", "V02", "V03") for fault in looked.faults):
            figures.rows_of_wrong_boxes += 1
        else:
            self._boxes(looked.boxes)
        keys = [("bytes", key) for key in self._images(images, looked, where)]
        image_keys = info.get("image_keys")
        names = [("name", (source, repr(name))) for name in image_keys] if isinstance(image_keys, list) else []
        self._compare_splits(names + keys, split, where)
        text = info["question"] if isinstance(info.get("question"), str) else looked.question
        question = (text, *(names or keys))
        if len(question) > 1 and question in questions:
            self.findings.add(
                "D65",
                "WARN",
                "two rows have the same question and the same images",
                f"{where} and {questions[question]}: {question[0][:60]!r}",
                "remove one of them",
            )
        questions.setdefault(question, where)

    def _boxes(self, boxes: list[list[list[float]]]) -> None:
        flat = [box for of_image in boxes for box in of_image]
        self.figures.boxes_per_row[len(flat)] += 1
        self.figures.whole_image_rows += any((x1 - x0) * (y1 - y0) >= WHOLE for x0, y0, x1, y1 in flat)

    def _images(self, images: list[Any], looked: Looked, where: str) -> list[bytes]:
        """Digests of the images that can be read, or of their web addresses."""
        hashes = []
        for i, (image, header) in enumerate(zip(images, looked.headers, strict=True)):
            try:
                hashes.append(image_digest(image, where))
            except SayoError:  # D06, D07 and D73 are among the faults of the row
                continue
            self.figures.images += 1
            self.figures.formats[header.format if header else "not read"] += 1
            if header and (header.format not in FORMATS or header.frames != 1):
                self.findings.add(
                    "D67",
                    "WARN",
                    "an image is not JPEG, PNG or WEBP, or is animated; verl takes the first picture",
                    f"{where}, images[{i}]: got {header.format}, {header.frames} frames",
                    PREPARE,
                )
        self._seen.update(hashes)
        return hashes

    def _compare_splits(self, images: list[tuple[str, Any]], split: str, where: str) -> None:
        if split == "val":
            for image in images:
                self._held_out.setdefault(image, where)
            return
        for kind in ("name", "bytes"):
            shared = next((image for image in images if image[0] == kind and image in self._held_out), None)
            if shared:
                self.findings.add(
                    "D65",
                    "FAIL",
                    f"training and validation share an image, by {kind}",
                    f"{where} and {self._held_out[shared]}",
                    "split by image, as `sayo prepare` does",
                )

    def _of_all_rows(self) -> None:
        figures, found = self.figures, self.findings
        rows = sum(figures.boxes_per_row.values())  # without those of malformed boxes
        with_box = sum(n for boxes, n in figures.boxes_per_row.items() if boxes)
        if figures.rows["train"] and not figures.train_rows_with_boxes + figures.rows_of_wrong_boxes:
            found.add(
                "D04",
                "WARN",
                "no training row has a box: methods that look at a region have nothing to reward",
                f"{figures.rows['train']} rows",
                "add boxes, or set algorithm.adv_estimator=grpo",
            )
        elif with_box < rows:
            found.add(
                "D69",
                "INFO",
                "rows without a box, neutral for methods that look at a region",
                f"{(rows - with_box) / rows:.1%} of the rows",
                "nothing, if that is intended",
                count=rows - with_box,
            )
        whole = figures.whole_image_rows
        if whole:
            found.add(
                "D69",
                "WARN" if whole > MANY * rows else "INFO",
                "a box is the whole image: a region reward is then the same for every answer",
                f"{whole / rows:.1%} of the rows",
                "leave such boxes out",
                count=whole,
            )
