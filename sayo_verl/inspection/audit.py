"""The checks of `sayo inspect`: all rows without a model, and a sample of rows as the model will see them.

All rows: the row contract, with the headers of images; their bytes are hashed. A sample: its images are decoded, and
with a model the rows go through its processor (``model_view``). A mistake becomes a ``Finding``: it is counted, the
first rows are named, and the checks continue. Only a file that cannot be read raises a ``SayoError``.
"""

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sayo_verl.data.check import asks_for_answer, check_joined, columns_of, open_rows
from sayo_verl.data.contract import PREPARE, Demands, Looked, RowContract, check_stored
from sayo_verl.data.folder import MANIFEST, check_folder
from sayo_verl.data.images import MIN_SIDE
from sayo_verl.data.reading import Header, image_digest, open_parquet, read_image, read_rows
from sayo_verl.errors import SayoError
from sayo_verl.inspection import positions
from sayo_verl.inspection.model_view import Model, Seen, too_long, unseen

FIRST = 5  # rows that a finding names
MOST = 8  # names in a line of figures
WHOLE = 0.99  # a box with at least this share of the image is the whole image
MANY = 0.05  # boxes of the whole image in more than this share of the rows are a warning
DEMANDS = Demands()
# FAIL: training on these rows crashes or trains the wrong thing. WARN: training works, but the data is probably not
# what the user intended. INFO: worth knowing.
LEVELS = ("FAIL", "WARN", "INFO")


class Kind(NamedTuple):
    """A kind of mistake; ``code`` and ``fix`` as of ``SayoError``, ``level`` of ``LEVELS``."""

    code: str
    level: str
    what: str
    fix: str


TAG = Kind(
    "D90", "WARN", "a prompt does not ask for <answer>, which sayo_verl.reward reads", "add an instruction to it"
)
ALL = Kind("D04", "WARN", "no training row has a box, so no region is rewarded", "add boxes, or train without regions")
NONE = Kind("D69", "INFO", "a row has no box: neutral for methods that look at a region", "nothing, if intended")
WIDE = Kind("D69", "INFO", "a box is the whole image, so every answer gets the same region reward", "leave it out")
THIN = Kind("D69", "INFO", "a box is a small part of a visual token; its main token is used", "use larger images")
SPLIT = Kind("D65", "FAIL", "training and validation share an image", "split by image, as `sayo prepare` does")
TWICE = Kind("D65", "WARN", "two rows have the same question and the same images", "remove one of them")
ALIAS = Kind("D97", "WARN", "does a split by name leak? a picture has several names", "give it one name")
DOUBT = Kind(
    "D97", "WARN", "do the boxes show what the questions are about?", "look at the page of --page; then correct them"
)
OTHER = Kind("D67", "WARN", "an image is not JPEG, PNG or WEBP, or is animated; verl takes the first picture", PREPARE)
SHORT = Kind("D67", "WARN", "a side of an image is shorter than a visual token, and is stretched", "leave it out")


@dataclass
class Finding:
    """A kind of mistake that was found: how often, and the first rows, with the value found and the value wanted."""

    kind: Kind
    count: int = 0
    rows: list[str] = field(default_factory=list)


def find_data(data: Sequence[Path], val: Sequence[Path] = ()) -> tuple[list[Path], list[Path]]:
    """The parquet files of the arguments of the command: of training, and of validation.

    Args:
        data: parquet files, or folders with ``train*.parquet`` and ``val*.parquet``. Files whose name begins with "val"
            are validation data.
        val: the same, but all files are validation data.

    Raises:
        SayoError: D64 for a path without parquet files.
    """
    train, held_out = dict[Path, None](), dict[Path, None]()
    for path, is_val in [*((p, False) for p in data), *((p, True) for p in val)]:
        inside = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        files = [p for p in inside if p.suffix == ".parquet" and (p == path or p.name.startswith(("train", "val")))]
        if not files:
            raise SayoError(
                "D64",
                "there are no rows to inspect at this path",
                where=str(path),
                got=[p.name for p in inside][:8] or ("an empty folder" if path.is_dir() else "no such file or folder"),
                wanted="a .parquet file, or a folder with train*.parquet or val*.parquet",
                fix="correct the path; make rows of other files with `sayo prepare`",
            )
        for file in files:
            (held_out if is_val or file.name.startswith("val") else train)[file] = None
    return list(train), list(held_out)


class Sampled(NamedTuple):
    """A row of the sample; ``areas`` are those of its boxes, as shares of an image."""

    path: Path
    number: int
    group: tuple[str, str]
    areas: list[float]


class Audit:
    """Goes over all rows of a data set.

    Args:
        train, val: its files.
        demands: which checks apply.
        model: sees the rows of the sample; None: their images are decoded only.
        sample: rows of the sample.
        limit: ``data.max_prompt_length``.
        seed: of the sample.

    Attributes:
        total: rows of all files.
        counted: name of a figure -> what was counted -> rows or images.
        measured: name of a figure -> values of the sample, for rows, images or boxes.
        sampled: rows of the sample without a fault.
    """

    def __init__(
        self,
        train: Sequence[Path],
        val: Sequence[Path] = (),
        demands: Demands = DEMANDS,
        model: Model | None = None,
        *,
        sample: int = 0,
        limit: int = 2048,
        seed: int = 0,
    ) -> None:
        self.files = {"val": val, "train": train}  # training is compared with validation
        self.demands, self.model, self.limit = demands, model, limit
        self.total = sum(open_parquet(path).metadata.num_rows for path in (*val, *train))
        self.counted: defaultdict[str, Counter[Any]] = defaultdict(Counter)
        self.measured: defaultdict[str, list[float]] = defaultdict(list)
        self.sampled: list[Sampled] = []
        self._sample = set(random.Random(seed).sample(range(self.total), min(sample, self.total)))
        self._found: dict[tuple[str, ...], Finding] = {}
        self._boxes = array("d")
        self._prompts: dict[str, int] = {}  # row of the sample -> tokens of its prompt
        self._held_out: dict[tuple[str, Any], str] = {}  # ("name", key) or ("bytes", digest) of validation -> row
        self._names: dict[bytes, str] = {}  # digest of an image -> its first name

    @property
    def boxes_N4(self) -> np.ndarray:
        """Boxes of all rows, float64 [N, 4]."""
        return np.array(self._boxes).reshape(-1, 4)

    def run(self, tick: Callable[[], None] = lambda: None) -> list[Finding]:
        """Check everything; the findings, by level.

        Args:
            tick: called for each row.

        Raises:
            SayoError: D02 for a file that cannot be read.
        """
        for folder in {path.parent for paths in self.files.values() for path in paths}:
            if (folder / MANIFEST).is_file():
                self._attempt(check_folder, folder)
        passed = 0
        for split, paths in self.files.items():
            self._attempt(check_joined, paths)
            contract, questions = RowContract(self.demands), dict[Any, str]()
            for path in paths:
                file = self._attempt(open_rows, path, self.demands)
                for number, row in enumerate(read_rows(file, path, columns_of(file, self.demands)) if file else ()):
                    looked = contract.look(row, f"{path} row {number}")
                    self._row(row, looked, split, f"{path} row {number}", questions)
                    if passed + number in self._sample and not looked.faults and None not in looked.headers:
                        self._sampled_row(row, looked, path, number)
                    tick()
                passed += open_parquet(path).metadata.num_rows
        self._all_rows()
        return sorted(self._found.values(), key=lambda finding: LEVELS.index(finding.kind.level))

    def figures(self) -> dict[str, str]:
        """What was counted and measured: name -> value, to print."""

        def names(of: Counter[Any]) -> str:
            listed = ", ".join(f"{name} {n}" for name, n in of.most_common(MOST)) or "-"
            return listed + (f" and {len(of) - MOST} more" if len(of) > MOST else "")

        shown = {name: names(self.counted[name]) for name in ("rows", "images", "data sources", "kinds", "box sources")}
        shown["images"] += f"; {len(self._names)} different"
        shown["boxes of a row"] = positions.quantiles(sorted(self.counted["boxes of a row"].elements()))
        shown |= positions.figures(self.boxes_N4)
        if self.model is None:
            not_checked = "visual tokens, prompt lengths, the model's processor (name a --model)"
            return shown | {"rows with images decoded": str(len(self.sampled)), "not checked": not_checked}
        shown["rows through the processor"] = str(len(self._prompts))
        shown |= {name: positions.quantiles(values) for name, values in self.measured.items()}
        shown["tokens of a prompt"] = f"{positions.quantiles([*self._prompts.values()])}; limit {self.limit}"
        return shown

    def _add(self, kind: Kind, row: str, count: int = 1) -> None:
        """Count a mistake; ``row`` names the row, with the value found."""
        finding = self._found.setdefault(kind[:3], Finding(kind))
        finding.count += count
        finding.rows += [row] if len(finding.rows) < FIRST else []

    def _refused(self, error: SayoError, count: int = 1) -> None:
        # the message of a library, in brackets, differs from row to row
        what, _, detail = error.what.partition(" (")
        facts = {"got ": error.got, "wanted ": error.wanted, "": detail.removesuffix(")") or None}
        found = ", ".join(f"{name}{fact}" for name, fact in facts.items() if fact is not None)
        self._add(Kind(error.code, "FAIL", what, error.fix), error.where + (found and f": {found}"), count)

    def _attempt(self, check: Callable[..., Any], *args: Any) -> Any:
        """The value of a check, or None if it raises a ``SayoError``, which is counted."""
        try:
            return check(*args)
        except SayoError as error:
            self._refused(error)
            return None

    def _row(self, row: Mapping[str, Any], looked: Looked, split: str, where: str, questions: dict[Any, str]) -> None:
        for fault in looked.faults:
            self._refused(fault)
        counted = self.counted
        counted["rows"][split] += 1
        counted["data sources"][row["data_source"]] += 1
        if not asks_for_answer(row, self.demands):
            self._add(TAG, where)
        if looked.mistyped:
            return
        info, images = row.get("extra_info") or {}, row.get("images") or []
        counted["kinds"][info.get("kind") or "-"] += 1
        counted["box sources"][info.get("box_source") or "-"] += 1
        if not any(fault.code in ("D05", "V01", "V02", "V03") for fault in looked.faults):
            boxes = [box for of_image in looked.boxes for box in of_image]
            counted["boxes of a row"][len(boxes)] += 1
            counted["with boxes"][split] += bool(boxes)
            counted["whole image"][any((x1 - x0) * (y1 - y0) >= WHOLE for x0, y0, x1, y1 in boxes)] += 1
            self._boxes.extend(float(value) for box in boxes for value in box)
        keys = info.get("image_keys")
        names = list(map(repr, keys)) if isinstance(keys, list) and len(keys) == len(images) else []
        digests = []
        for i, (image, header) in enumerate(zip(images, looked.headers, strict=True)):
            try:
                digests.append(image_digest(image, where))
            except SayoError:  # D06, D07 and D73 are among the faults of the row
                continue
            self._image(digests[-1], header, names[i] if names else "", f"{where}, images[{i}]")
        source = repr(row["data_source"])
        for by, pictures in (("name", [(source, name) for name in names]), ("bytes", digests)):
            shared = [self._held_out[by, picture] for picture in pictures if (by, picture) in self._held_out]
            if split == "val":
                for picture in pictures:
                    self._held_out.setdefault((by, picture), where)
            elif shared:
                self._add(SPLIT, f"by {by}: {where} and {shared[0]}")
        text = info["question"] if isinstance(info.get("question"), str) else looked.question
        question = (text, source if names else "", *(names or digests))
        if images and questions.setdefault(question, where) != where:
            self._add(TWICE, f"{where} and {questions[question]}: {text[:60]!r}")

    def _image(self, digest: bytes, header: Header | None, name: str, where: str) -> None:
        self.counted["images"][header.format if header else "not read"] += 1
        before = self._names.setdefault(digest, name)
        if name and before and name != before:
            self._add(ALIAS, f"{where}: {name}, before {before}")
        if header and (header.format not in ("JPEG", "PNG", "WEBP") or header.frames != 1):
            self._add(OTHER, f"{where}: got {header.format}, {header.frames} frames")
        if header and min(header.width, header.height) < MIN_SIDE:
            self._add(SHORT, f"{where}: got {header.width} x {header.height}, wanted at least {MIN_SIDE} pixels")

    def _sampled_row(self, row: Mapping[str, Any], looked: Looked, path: Path, number: int) -> None:
        """Decode the images of a valid row, and send it through the processor."""
        where = f"{path} row {number}"
        for i, (image, before) in enumerate(zip(row.get("images") or [], looked.headers, strict=True)):
            header = self._attempt(read_image, image, f"{where}, images[{i}]")
            if header is None:
                return
            if header != before:  # the orientation of a PNG can be behind its pixels
                self._attempt(check_stored, header, None, where)
        seen = self._attempt(self.model.see, row, where) if self.model else unseen(row)
        if seen is None:
            return
        if self.model:
            self._measure(seen, self.model.coverage, where)
        areas = [(x1 - x0) * (y1 - y0) for of_image in seen.boxes for x0, y0, x1, y1 in of_image]
        group = str(row["data_source"]), str((row.get("extra_info") or {}).get("kind"))
        self.sampled.append(Sampled(path, number, group, areas))

    def _measure(self, seen: Seen, coverage: float, where: str) -> None:
        self._prompts[where] = seen.prompt_tokens
        self.measured["visual tokens of a box"] += seen.tokens_per_box
        for tiles, boxes, mask_NV in zip(seen.tiles, seen.boxes, seen.masks, strict=True):
            self.measured["visual tokens of an image"].append(mask_NV.shape[1])
            if len(boxes):
                self.measured["of these in boxes, in %"].append(100 * float(mask_NV.any(axis=0).mean()))
            token = (tiles[0].x1 - tiles[0].x0) * (tiles[0].y1 - tiles[0].y0) / tiles[0].tokens
            small = sum((x1 - x0) * (y1 - y0) < coverage * token for x0, y0, x1, y1 in boxes)
            if small:
                self._add(THIN, f"{where}: a token is {token:.2%} of the image, coverage {coverage:g}", small)

    def _all_rows(self) -> None:
        counted, over = self.counted, too_long(self._prompts, self.limit)
        if over:
            self._refused(over, sum(n > self.limit for n in self._prompts.values()))
        rows, without = counted["boxes of a row"].total(), counted["boxes of a row"][0]
        whole, invalid = counted["whole image"][True], counted["rows"].total() - rows
        if counted["rows"]["train"] and not counted["with boxes"]["train"] + invalid:
            self._add(ALL, f"{counted['rows']['train']} rows")
        elif without:
            self._add(NONE, f"{without / rows:.1%} of the rows", without)
        if whole:
            level = "WARN" if whole > MANY * rows else WIDE.level
            self._add(WIDE._replace(level=level), f"{whole / rows:.1%} of the rows", whole)
        found = positions.doubt(self.boxes_N4)
        if found:
            self._add(DOUBT, found)
