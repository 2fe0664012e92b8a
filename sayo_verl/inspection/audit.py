"""The checks of `sayo inspect`: all rows without a model, and a sample of rows as the model will see them.

All rows: the row contract and hashes of images. A sample, at random: its images are decoded, and with a model the rows
go through its processor (``model_view``). A mistake is counted, and the checks continue.
"""

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sayo_verl.data.check import asks_for_answer, check_joined, columns_of, open_rows
from sayo_verl.data.contract import PREPARE, Demands, Looked, RowContract, check_stored
from sayo_verl.data.folder import MANIFEST, check_folder
from sayo_verl.data.images import MIN_SIDE
from sayo_verl.data.reading import image_digest, open_parquet, read_image, read_rows
from sayo_verl.errors import SayoError
from sayo_verl.inspection import positions
from sayo_verl.inspection.model_view import Model, Seen, too_long, unseen

LEVELS = ("FAIL", "WARN", "INFO")
FIRST, MOST = 3, 8  # rows that a finding names, names in a line of figures
WHOLE = 0.99  # a box with at least this share of the image is the whole image
MANY = 0.05  # boxes of the whole image in more than this share of the rows are a warning


@dataclass(frozen=True)
class Finding:
    """A kind of mistake (``code``, ``what``, ``fix`` as of ``SayoError``), how often it was found, and the first rows.

    Levels: FAIL: training on these rows crashes or trains the wrong thing. WARN: training works, but the data is
    probably not what the user intended. INFO: worth knowing.
    """

    code: str
    level: str
    what: str
    fix: str
    count: int = 0
    rows: tuple[str, ...] = ()


ASK = "use --prompt instruction; rows that verl reads already keep their prompts: write the form of answer into these"
NO_TAG = Finding("D90", "WARN", "a prompt does not ask for <answer>, which is rewarded", ASK)
OTHERS = "add boxes, or train with METHOD=dual, anchor, faithful, sensitivity or grpo, which need none"
NO_BOXES = Finding("D04", "WARN", "no training row has a box, so no region is rewarded", OTHERS)
NO_BOX = Finding("D69", "INFO", "a row has no box: neutral for methods that look at a region", "nothing, if intended")
WHOLE_BOX = Finding("D69", "INFO", "a box is the whole image: each answer gets the same reward for it", "leave it out")
SMALL = Finding("D69", "INFO", "a box is a small part of a visual token; its main token is used", "use larger images")
SHARED = Finding("D65", "FAIL", "training and validation share an image", "split by image, as `sayo prepare` does")
TWICE = Finding("D65", "WARN", "two rows have the same question and the same images", "remove one of them")
NAMES = Finding("D97", "WARN", "does a split by name leak? a picture has several image_keys", "give it one name")
DOUBT = Finding("D97", "WARN", "do the boxes show what the questions are about?", "look at --page, and at --box-format")
FORMAT = Finding("D67", "WARN", "an image is animated, or not JPEG, PNG or WEBP; verl takes the first picture", PREPARE)
SHORT = Finding("D67", "WARN", "a side of an image is shorter than a visual token, and is stretched", "leave it out")


def find_data(data: Sequence[Path], val: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """Split -> parquet files of the arguments: files, or folders with ``train*.parquet`` and ``val*.parquet``.

    Files of ``val``, and files whose name begins with "val", are validation data. D64 for a path without such files.
    """
    found: dict[str, list[Path]] = {"val": [], "train": []}
    for path, is_val in [*((p, False) for p in data), *((p, True) for p in val)]:
        inside = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        files = [p for p in inside if p.suffix == ".parquet" and (p == path or p.name.startswith(("train", "val")))]
        if not files:
            there = [p.name for p in inside][:8] or ("an empty folder" if path.is_dir() else "no such file or folder")
            what = "there are no rows to inspect at this path"
            wanted = "a .parquet file, or a folder with train*.parquet or val*.parquet"
            fix = "correct the path; make rows of other files with `sayo prepare`"
            fix = next((f"did you mean {made.parent}?" for made in sorted(path.glob(f"*/{MANIFEST}"))), fix)
            raise SayoError("D64", what, where=str(path), got=there, wanted=wanted, fix=fix)
        for file in files:
            split = "val" if is_val or file.name.startswith("val") else "train"
            found[split] += [] if file in found[split] else [file]
    return found


@dataclass
class Audit:
    """Goes over all rows of a data set.

    Attributes:
        files: split -> parquet files.
        model: sees the rows of the sample; None: their images are decoded only.
        n_sample, n_shown: rows of the sample, and of the page.
        limit: ``data.max_prompt_length``.
        counted: name of a figure -> what was counted -> rows or images.
        measured: name of a figure -> values of the sample, for rows, images or boxes.
        boxes_N4: boxes of all rows, float64 [N, 4].
        shown: rows of the sample for the page: the smallest box, the largest box, one of each kind, others at random.
    """

    files: Mapping[str, Sequence[Path]]
    demands: Demands = field(default_factory=Demands)
    model: Model | None = None
    n_sample: int = 0
    n_shown: int = 0
    limit: int = 2048

    def __post_init__(self) -> None:
        self.total = sum(open_parquet(path).metadata.num_rows for paths in self.files.values() for path in paths)
        self.counted: dict[str, Counter[Any]] = defaultdict(Counter)
        self.measured: dict[str, list[float]] = defaultdict(list)
        self.boxes_N4, self.shown = np.zeros((0, 4)), list[Seen]()
        self._boxes, self._found, self._boxless = array("d"), dict[Any, Finding](), False  # on purpose, by a manifest
        self._kept: dict[Any, tuple[float, Seen]] = {}  # why a row is shown -> the area of its box, the row
        self._prompts: dict[str, int] = {}  # row of the sample -> tokens of its prompt
        self._held_out: dict[Any, str] = {}  # name or digest of an image in validation -> row
        self._names: dict[bytes, str] = {}  # digest of an image -> its first name

    def run(self, tick: Callable[[], None] = lambda: None) -> list[Finding]:
        """Check everything; ``tick`` is called for each row. The findings, by level. Raises D02 for a damaged file."""
        for folder in {path.parent for paths in self.files.values() for path in paths}:
            if (folder / MANIFEST).is_file():
                options = (self._attempt(check_folder, folder) or {}).get("options", {})
                self._boxless |= bool(options.get("keep_without_boxes"))
        chosen = random.Random(0).sample(range(self.total), min(self.n_sample, self.total))
        sample, drawn, passed = set(chosen), set(chosen[: self.n_shown]), 0
        for split in ("val", "train"):  # training is compared with validation
            self._attempt(check_joined, self.files[split])
            contract, questions = RowContract(self.demands), dict[Any, str]()
            for path in self.files[split]:
                file = self._attempt(open_rows, path, self.demands)
                for number, row in enumerate(read_rows(file, path, columns_of(file, self.demands)) if file else ()):
                    where = f"{path} row {number}"
                    looked = contract.look(row, where)
                    self._row(row, looked, split, where, questions)
                    if passed + number in sample and not looked.faults and None not in looked.headers:
                        self._sampled_row(row, looked, where, passed + number in drawn)
                    tick()
                passed += open_parquet(path).metadata.num_rows
        self.boxes_N4 = np.array(self._boxes).reshape(-1, 4)
        kept = {self._kept[reason][1].where: self._kept[reason][1] for reason in sorted(self._kept)}
        self.shown = list(kept.values())[: self.n_shown]
        self._all_rows()
        return sorted(self._found.values(), key=lambda finding: LEVELS.index(finding.level))

    def figures(self) -> dict[str, str]:
        """What was counted and measured: name -> value, to print."""

        def names(of: Counter[Any]) -> str:
            listed = ", ".join(f"{name} {n}" for name, n in of.most_common(MOST)) or "-"
            return listed + (f" and {len(of) - MOST} more" if len(of) > MOST else "")

        shown = {name: names(self.counted[name]) for name in ("rows", "images", "data sources", "kinds", "box sources")}
        shown["images"] += f"; {len(self._names)} different"
        shown["boxes of a row"] = positions.quantiles(sorted(self.counted["boxes of a row"].elements()))
        shown |= positions.figures(self.boxes_N4)
        shown["sample"] = f"{self.counted['sample'].total()} rows with images decoded"
        if self.model is None:
            return shown | {"not checked": "visual tokens, prompt lengths, the model's processor (name a --model)"}
        shown |= {name: positions.quantiles(values) for name, values in self.measured.items()}
        return shown | {"tokens of a prompt": f"{positions.quantiles([*self._prompts.values()])}; limit {self.limit}"}

    def _add(self, kind: Finding, row: str, count: int = 1) -> None:
        """Count a mistake; ``row`` names the row, with the value found."""
        key = kind.code, kind.level, kind.what
        found = self._found.get(key, kind)
        self._found[key] = replace(found, count=found.count + count, rows=(*found.rows, row)[:FIRST])

    def _refused(self, error: SayoError, count: int = 1) -> None:
        what, _, detail = error.what.partition(" (")  # the message of a library, which differs from row to row
        facts = {"got ": error.got, "wanted ": error.wanted, "": detail.removesuffix(")") or None}
        found = ", ".join(f"{name}{fact}" for name, fact in facts.items() if fact is not None)
        self._add(Finding(error.code, "FAIL", what, error.fix), error.where + (found and f": {found}"), count)

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
        counted, source = self.counted, repr(row["data_source"])
        counted["rows"][split] += 1
        counted["data sources"][str(row["data_source"])] += 1
        if not asks_for_answer(row, self.demands):
            self._add(NO_TAG, where)
        if looked.mistyped:
            return
        info, images = row.get("extra_info") or {}, row.get("images") or []
        counted["kinds"][str(info.get("kind") or "-")] += 1
        counted["box sources"][str(info.get("box_source") or "-")] += 1
        if not any(fault.code in ("D05", "V01", "V02", "V03") for fault in looked.faults):
            boxes = [box for of_image in looked.boxes for box in of_image]
            counted["boxes of a row"][len(boxes)] += 1
            counted["with boxes"][split] += bool(boxes)
            counted["whole image"][any((x1 - x0) * (y1 - y0) >= WHOLE for x0, y0, x1, y1 in boxes)] += 1
            self._boxes.extend(float(value) for box in boxes for value in box)
        keys, digests = info.get("image_keys"), list[bytes]()
        names = list(map(repr, keys)) if isinstance(keys, list) and len(keys) == len(images) else []
        for i, (image, header) in enumerate(zip(images, looked.headers, strict=True)):
            try:
                digest = image_digest(image, where)
            except SayoError:  # D06, D07 and D73 are among the faults of the row
                continue
            digests.append(digest)
            before = self._names.setdefault(digest, names[i] if names else "")
            if names and before not in ("", names[i]):
                self._add(NAMES, f"{where}, images[{i}]: {names[i]}, before {before}")
            counted["images"][header.format if header else "not read"] += 1
            if header and (header.format not in ("JPEG", "PNG", "WEBP") or header.frames != 1):
                self._add(FORMAT, f"{where}, images[{i}]: got {header.format}, {header.frames} frames")
            if header and min(header.width, header.height) < MIN_SIDE:
                self._add(SHORT, f"{where}, images[{i}]: got {header.width} x {header.height}, wanted {MIN_SIDE}")
        for by, pictures in (("name", [(source, name) for name in names]), ("bytes", digests)):
            shared = [self._held_out[by, picture] for picture in pictures if (by, picture) in self._held_out]
            if split == "val":
                self._held_out |= {(by, picture): where for picture in pictures}
            elif shared:
                self._add(SHARED, f"by {by}: {where} and {shared[0]}")
        text = info["question"] if isinstance(info.get("question"), str) else looked.question
        question = (text, source if names else "", *(names or digests))
        if images and questions.setdefault(question, where) != where:
            self._add(TWICE, f"{where} and {questions[question]}: {text[:60]!r}")

    def _sampled_row(self, row: Mapping[str, Any], looked: Looked, where: str, drawn: bool) -> None:
        """Decode the images of a valid row, and send it through the processor."""
        for i, (image, before) in enumerate(zip(row.get("images") or [], looked.headers, strict=True)):
            header = self._attempt(read_image, image, f"{where}, images[{i}]")
            if header is None:
                return
            if header != before:  # the orientation of a PNG can be behind its pixels
                self._attempt(check_stored, header, None, where)
        seen: Seen | None = self._attempt(self.model.see, row, where) if self.model else unseen(row, where)
        if seen is None:
            return
        areas = [(x1 - x0) * (y1 - y0) for of_image in seen.boxes for x0, y0, x1, y1 in of_image]
        kind = str(row["data_source"]), str((row.get("extra_info") or {}).get("kind"))
        self.counted["sample"][kind] += 1
        reasons: dict[tuple[Any, ...], float] = {(2, *kind): 0} | ({(3, where): 0} if drawn else {})
        reasons |= {(0,): min(areas), (1,): -max(areas)} if areas else {}
        for reason, area in reasons.items() if self.n_shown else ():
            if area < self._kept.get(reason, (2.0, seen))[0]:
                self._kept[reason] = area, seen
        if self.model is None:
            return
        self._prompts[where] = seen.prompt_tokens
        for tiles, boxes, mask_NV in zip(seen.tiles, seen.boxes, seen.masks, strict=True):
            self.measured["visual tokens of an image"].append(mask_NV.shape[1])
            self.measured["visual tokens of a box"] += mask_NV.sum(axis=1).tolist()
            self.measured["visual tokens in boxes, in %"] += [100 * mask_NV.any(axis=0).mean()] * bool(len(boxes))
            token = self.model.coverage * (tiles[0].x1 - tiles[0].x0) * (tiles[0].y1 - tiles[0].y0) / tiles[0].tokens
            small = sum((x1 - x0) * (y1 - y0) < token for x0, y0, x1, y1 in boxes)
            if small:
                self._add(SMALL, f"{where}: wanted at least {token:.2%} of the image, by --coverage", small)

    def _all_rows(self) -> None:
        counted, over, doubt = self.counted, too_long(self._prompts, self.limit), positions.doubt(self.boxes_N4)
        rows, without = counted["boxes of a row"].total(), counted["boxes of a row"][0]
        whole, invalid = counted["whole image"][True], counted["rows"].total() - rows
        if over:
            self._refused(over, sum(n > self.limit for n in self._prompts.values()))
        n_train, meant = counted["rows"]["train"], self._boxless and not len(self.boxes_N4)
        if n_train and not counted["with boxes"]["train"] + invalid:
            self._add(replace(NO_BOXES, level="INFO" if meant else "WARN"), f"all {n_train} training rows", n_train)
        elif without:
            self._add(NO_BOX, f"{without / rows:.1%} of the rows", without)
        if whole:
            level = "WARN" if whole > MANY * rows else WHOLE_BOX.level
            self._add(replace(WHOLE_BOX, level=level), f"{whole / rows:.1%} of the rows", whole)
        if doubt:
            self._add(DOUBT, doubt)
