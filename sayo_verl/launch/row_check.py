"""Checks of the rows of a run: every row by the row contract, a sample of images decoded.

``sayo_verl.launch.data_check`` decides what a run demands of its files. `sayo inspect` uses the same contract.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sayo_verl.data.check import columns_of, open_rows
from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.reading import read_image, read_rows
from sayo_verl.launch.answer_forms import Asked, forms_in
from sayo_verl.launch.reward_result import ROWS, SOURCES, Sample

Kept = tuple[int, str, int, dict[str, Any]]  # size, path, number of the row, its values


@dataclass
class Counted:
    """What there is in some files, and a few of their rows.

    Attributes:
        rows: of them.
        with_boxes: rows with a box; None where boxes are not looked at.
        with_images: rows with an image.
        decoded: images that were decoded.
        undecoded: images of rows beyond the sample.
        remote: images of web addresses, which are not read.
        narrow: rows that verl's length filter drops for the shape of an image.
        asked: rows by data source and the forms of an answer that the prompt names.
        samples: the first rows of each of these, for the reward.
        spread: rows evenly spread over each file.
        largest, longest: the rows with the most pixels and with the longest questions.
    """

    rows: int = 0
    with_boxes: int | None = None
    with_images: int = 0
    decoded: int = 0
    undecoded: int = 0
    remote: int = 0
    narrow: int = 0
    asked: Counter[Asked] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    spread: list[Kept] = field(default_factory=list)
    largest: list[Kept] = field(default_factory=list)
    longest: list[Kept] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.rows} rows" + (f", {self.with_boxes} with boxes" if self.with_boxes is not None else "")
        text += f", {self.decoded} images decoded"
        text += f", {self.undecoded} NOT decoded (sayo.preflight_images)" if self.undecoded else ""
        text += f", {self.remote} images of web addresses not read" if self.remote else ""
        return text + (f", {self.narrow} rows too narrow for Qwen's resize" if self.narrow else "")

    def add(self, other: "Counted", keep: int) -> None:
        """Count another file as well; ``keep`` as in ``check_parquet``."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, value if mine is None else mine if value is None else mine + value)
        self.largest, self.longest = (heapq.nlargest(keep // 4, kept) for kept in (self.largest, self.longest))


def evenly(n_rows: int, n: int) -> set[int]:
    """``n`` row numbers, or all, evenly spread."""
    return {i * n_rows // n for i in range(n)} if n < n_rows else set(range(n_rows))


def check_parquet(
    path: Path,
    demands: Demands,
    *,
    max_images: int = 512,
    keep: int = 0,
    spread: int = 0,
    drops_narrow: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Counted:
    """Check all rows of one file.

    Args:
        path: an existing file.
        demands: which checks apply.
        max_images: decode the images of at most so many rows, evenly spread over the file; none if not positive.
        keep: remember a quarter of so many rows as the largest, and a quarter as the longest.
        spread: remember so many rows, evenly spread.
        drops_narrow: count rows with an image too narrow for Qwen's resize instead of refusing them.
        tick: called once a row.

    Raises:
        SayoError: of ``open_rows``, and the first fault of the first invalid row.
    """
    file = open_rows(path, demands)
    n_rows, key = file.metadata.num_rows, demands.keys.images
    sampled, spread_over = evenly(n_rows, max_images), evenly(n_rows, spread)
    contract, counted = RowContract(demands), Counted(rows=n_rows)
    for row, values in enumerate(read_rows(file, path, columns_of(file, demands))):
        looked = contract.look(values, f"{path} row {row}")
        narrow = [fault for fault in looked.faults if drops_narrow and fault.code == "D77"]
        for fault in looked.faults:
            if fault not in narrow:
                raise fault
        images = values.get(key) or []
        counted.narrow += bool(narrow)
        asked = (str(values.get("data_source")), forms_in(str(values[demands.keys.prompt])))
        counted.asked[asked] += 1
        if demands.rewarded and counted.asked[asked] <= ROWS and len(counted.samples) < ROWS * SOURCES:
            truth = (values["reward_model"] or {}).get("ground_truth")
            counted.samples.append(Sample(asked, f"{path} row {row}", truth, values.get("extra_info")))
        if demands.attention:
            counted.with_boxes = (counted.with_boxes or 0) + any(looked.boxes)
        counted.with_images += bool(images)
        counted.remote += looked.headers.count(None)
        counted.undecoded += 0 if row in sampled else len(images) - looked.headers.count(None)
        for i, image in enumerate(images if row in sampled else []):
            counted.decoded += read_image(image, f"{path} row {row}, images[{i}]") is not None
        if row in spread_over:
            counted.spread.append((0, str(path), row, values))
        pixels = sum(header.width * header.height for header in looked.headers if header)
        for kept, size in ((counted.largest, pixels), (counted.longest, len(looked.question))):
            heapq.heappush(kept, (size, str(path), row, values))
            if len(kept) > keep // 4:
                heapq.heappop(kept)
        tick()
    return counted
