"""Examples of a source to a folder of parquet files that verl reads.

Three steps, on tables of ``datasets`` that are mapped from disk, so that memory hardly grows with the rows:

1. The examples become a table, without their images. ``limit`` draws from it. The split is by picture: a hash of the
   seed and of the row's first image key in alphabetical order, unless the source names the split.
2. Worker processes read the images and place the boxes (``sayo_verl.data.make_row``).
3. Decisions over all rows: missing images, implausible boxes, rows that repeat an earlier one, training rows with a
   picture of the validation split. What is left is written.

Errors: D43 boxes of another format, D52 an id occurs twice, D53 the folder is not empty, D54 images are missing, D55
too much is lost, D56 a file cannot be written, D57 an option is out of range.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sayo_verl.data.boxes import FRAMES, check_format, doubt
from sayo_verl.data.contract import check_data_source
from sayo_verl.data.folder import LEFT_OUT, SPLITS, Built, new_folder, read_folder, write_manifest
from sayo_verl.data.make_row import EXAMPLE, FACTS, NO_BOX, features_of, make_row, to_table
from sayo_verl.data.rows import LOSSES, RESERVED, TEXTS, Drop, LeftOut, Source, check_text
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.reward.prompts import PROMPTS, QUESTION_FIELD

if TYPE_CHECKING:
    from datasets import Dataset

SHARD_ROWS = 2048
GROUP_ROWS = 64  # of a row group, and of the tables between the steps: bounds memory
MISSING, DUPLICATE, IN_OTHER_SPLIT = "image_missing", "duplicate", "image_in_other_split"
SHOWN = 5  # missing images that an error names


@dataclass(frozen=True)
class BuildOptions:
    """How rows are made.

    Attributes:
        limit: number of examples that are drawn from the source at random; below 1 their share; 0 takes all.
        val_share: share of the *images* whose rows are held out: at least one image if it is above 0 and there are
            two; 1 makes validation rows only. Not read where the source names the splits.
        seed: of the draw and of the split.
        prompt: "instruction", "released", "question", or a template with ``{question}`` (``reward.prompts``).
        keep_without_boxes: keep rows that have no usable region, as rows without boxes.
        link: store paths of images instead of their bytes.
        max_drop: share of the examples that may be lost (``rows.LOSSES``).
        skip_missing: count missing images as lost, instead of refusing them.
        overwrite: replace a folder of prepared data.
        box_frame, rescale: as ``boxes.place_boxes``.
        trust_boxes: the format of the boxes was checked: build although they are implausible (``boxes.doubt``).
    """

    limit: float = 0
    val_share: float = 0.01
    seed: int = 0
    prompt: str = PROMPTS[0]
    keep_without_boxes: bool = False
    link: bool = False
    max_drop: float = 0.01
    skip_missing: bool = False
    overwrite: bool = False
    box_frame: str = FRAMES[0]
    rescale: bool = False
    trust_boxes: bool = False

    def __post_init__(self) -> None:
        template = self.prompt in PROMPTS or QUESTION_FIELD in self.prompt
        reserved, share = RESERVED.search(self.prompt) is not None, 0 <= self.limit < 1
        raise_first(
            [
                self._rule(not (share or self.limit % 1 == 0 < self.limit), "limit", "0 (all), a share or a number"),
                self._rule(not 0 <= self.val_share <= 1, "val_share", "0 to 1"),
                self._rule(not 0 <= self.max_drop <= 1, "max_drop", "0 to 1"),
                self._rule(not template, "prompt", f"{', '.join(PROMPTS)}, or a text with {QUESTION_FIELD}"),
                self._rule(reserved, "prompt", "text without image tags and control tokens"),
                self._rule(self.box_frame not in FRAMES, "box_frame", ", ".join(FRAMES)),
            ]
        )

    def _rule(self, broken: bool, name: str, wanted: str) -> Rule:
        flag = f"--{name.replace('_', '-')}"
        return Rule("D57", broken, "an option is out of range", flag, f"correct {flag}", getattr(self, name), wanted)


def build(source: Source, out: Path, options: BuildOptions) -> Built:
    """Make a folder of rows.

    Args:
        source: where the examples come from.
        out: the folder; it must not exist, or be empty, or be replaced with ``options.overwrite``.
        options: how.

    Raises:
        SayoError: D43, D52-D57 (see the module), D42-D46 for boxes, D40, D41 for images, and what the source raises.
    """
    with new_folder(out, overwrite=options.overwrite) as folder:
        quiet_bars()
        tables = folder / "tables"
        examples = _examples(source, tables)
        left_out = [LeftOut(**row) for row in rows_of(examples, ["id", "reason", "detail"]) if row["reason"]]
        chosen, held_out = _draw(examples, options)
        _check_losses(source, left_out, len(chosen), options)
        features = features_of(source, link=options.link)
        make = functools.partial(
            make_row,
            columns=tuple(features),
            held_out=held_out,
            options=options,
            files=(folder / "images", out.resolve() / "images"),
        )
        _building.add(folder)
        try:
            made = examples.select(chosen).map(
                make,
                with_indices=True,
                remove_columns=examples.column_names,
                features=features,
                num_proc=_processes(len(chosen)),
                writer_batch_size=GROUP_ROWS,
                desc="reading images",
            )
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # the pool of ``datasets`` hides a Ctrl-C
                raise error.__context__ from None
            if not isinstance(error, RuntimeError) or isinstance(error, SayoError):
                raise
            what, fix = f"a process that reads images ended ({error})", "free memory, and call the command again"
            raise SayoError("D54", what, where=source.name, fix=fix) from error
        finally:
            _building.discard(folder)
        kept, counts = _decide(source, made, left_out, options)
        for split, rows in kept.items():
            write_split(made.select(rows), folder, split)
        with open(folder / LEFT_OUT, "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(dataclasses.asdict(thing), ensure_ascii=False) + "\n" for thing in left_out)
        del examples, made  # mapped from the files that go now
        shutil.rmtree(tables)
        write_manifest(
            folder,
            source={"name": source.name, **source.facts()},
            options=dataclasses.asdict(options),
            rows={split: len(rows) for split, rows in kept.items()},
            left_out=dict(Counter(thing.reason for thing in left_out).most_common()),
            **counts,
        )
    return read_folder(out)


def quiet_bars() -> None:
    """Leave the progress bars of ``datasets`` out of a log, which they would fill."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


_building: set[Path] = set()  # folders; while there is one, forks of this process are workers


def _begin_worker() -> None:
    """End with the builder, also if it is killed, and leave Ctrl-C to it."""
    if _building:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


os.register_at_fork(after_in_child=_begin_worker)


def _processes(rows: int) -> int | None:
    """Worker processes; None: the rows are too few to be worth a process."""
    cores = len(os.sched_getaffinity(0))
    return cores if cores > 1 and rows >= 4 * GROUP_ROWS else None


def rows_of(table: "Dataset", columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all rows."""
    for batch in table.select_columns(columns).iter(1000):
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*(batch[c] for c in columns), strict=True))


def _examples(source: Source, folder: Path) -> "Dataset":
    """The records of the source, each with the reason why it is no example, or with "".

    Raises:
        SayoError: D46, D52, D66 for a data source that verl must not get, and what the source raises.
    """
    from datasets import Dataset, Features
    from datasets.exceptions import DatasetGenerationError

    texts = {name: pa.string() for name in ("id", "reason", "detail", "split")}
    features = Features.from_arrow_schema(pa.schema({**texts, "keys": TEXTS, "example": EXAMPLE}))
    for name, types in (("extra", source.extra_features), ("columns", source.column_features)):
        if types:
            features["example"][name] = dict(types)
    try:
        return Dataset.from_generator(
            functools.partial(_records, source), features=features, cache_dir=str(folder), fingerprint="examples"
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, SayoError | OSError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, UnicodeError | RecursionError):
            what, fix = f"a record cannot be stored ({error.__cause__})", "correct its text, or remove it"
            raise SayoError("D98", what, where=source.name, fix=fix) from error
        raise


def _records(source: Source) -> Iterator[dict[str, Any]]:
    ids: set[tuple[str, str, str]] = set()
    thing = None
    for thing in source.examples():
        where = f"{source.name} {thing.id}"
        row: dict[str, Any] = {"id": thing.id, "reason": "", "detail": "", "split": "", "keys": [], "example": None}
        if isinstance(thing, LeftOut):
            yield row | {"reason": thing.reason, "detail": thing.detail}
            continue
        check_data_source(thing.data_source, where)
        if (thing.data_source, thing.split, thing.id) in ids:
            fix = "give every record another id; a file may have been named twice"
            raise SayoError("D52", "two records of the source have one id", where=where, fix=fix)
        ids.add((thing.data_source, thing.split, thing.id))
        if any(thing.boxes):
            check_format(thing.box_format, where)
        try:
            if not thing.prompt:  # else the row passes through, and the launcher checks it for the run's reward
                check_text(thing.question, thing.answer)
        except Drop as drop:
            yield row | {"reason": drop.reason, "detail": drop.detail}
            continue
        keys = [image.key for image in thing.images] or [thing.id]
        yield row | {"split": thing.split, "keys": keys, "example": to_table(thing)}
    if thing is None:
        raise SayoError("D55", "the source has no record", where=source.name, fix="correct the source")


def _draw(examples: "Dataset", options: BuildOptions) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to build, and bool [number of them]: whether each is held out."""
    usable = np.array([i for i, row in enumerate(rows_of(examples, ["reason"])) if not row["reason"]], dtype=int)
    named = np.array([row["split"] for row in rows_of(examples.select(usable), ["split"])], dtype="U5")
    drawable = np.flatnonzero(named != "val")  # a validation file of the user is taken as a whole
    limit = round(options.limit * len(drawable)) if options.limit < 1 else int(options.limit)
    if 0 < limit < len(drawable):
        drawn = np.random.default_rng(options.seed).choice(drawable, limit, replace=False)
        taken = np.union1d(drawn, np.flatnonzero(named == "val"))
        usable, named = usable[taken], named[taken]
    chosen = examples.select(usable)
    numbers = np.array([_number(options.seed, min(row["keys"])) for row in rows_of(chosen, ["keys"])])
    below, distinct = options.val_share, np.unique(numbers)
    if 0 < below < 1 and len(distinct) > 1 and distinct[0] >= below:
        below = distinct[1]  # hold out the picture with the smallest number
    return usable, np.where(named == "", numbers < below, named == "val").astype(bool)


def _number(seed: int, key: str) -> float:
    """In [0, 1), by the seed and the name of a picture."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "big") / 2**64


def _decide(
    source: Source, made: "Dataset", left_out: list[LeftOut], options: BuildOptions
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Numbers of the rows of each split, and counts for the manifest. Adds to ``left_out``.

    Raises:
        SayoError: D43, D54, D55.
    """
    _check_missing(source, made, options)
    _check_formats(source, made, options)
    kept: dict[str, list[int]] = {split: [] for split in SPLITS}
    asked, held_out = set[int](), set[int]()
    changed, total = Counter[str](), Counter[str]()
    columns = [name for name in FACTS if name not in ("sayo:drawn", "sayo:format")]
    for split in reversed(SPLITS):  # training rows give way to validation rows
        for number, row in enumerate(rows_of(made, columns)):
            if row["sayo:split"] != split:
                continue
            reason = row["sayo:reason"]
            if not reason and row["sayo:asked"] in asked:
                reason = DUPLICATE
            elif not reason and split == "train" and not held_out.isdisjoint(row["sayo:pictures"]):
                reason = IN_OTHER_SPLIT
            if reason:
                left_out.append(LeftOut(row["sayo:id"], reason, row["sayo:detail"]))
                continue
            kept[split].append(number)
            asked.add(row["sayo:asked"])
            held_out.update(row["sayo:pictures"] if split == "val" else ())
            changed.update(row["sayo:changed"])
            total.update(boxes=row["sayo:boxes"], rows_without_boxes=not row["sayo:boxes"])
    emptied = not kept["train"] and any(row["sayo:split"] == "train" for row in rows_of(made, ["sayo:split"]))
    _check_losses(source, left_out, 0 if emptied else sum(map(len, kept.values())), options)
    return kept, {**total, "images_changed": dict(changed)}


def _check_missing(source: Source, made: "Dataset", options: BuildOptions) -> None:
    missing = [row for row in rows_of(made, ["sayo:id", "sayo:reason", "sayo:detail"]) if row["sayo:reason"] == MISSING]
    if missing and not options.skip_missing:
        got = f"{len(missing)}: {'; '.join(row['sayo:detail'] for row in missing[:SHOWN])}"
        fix = "correct --images or add the files; or leave such rows out with --skip-missing"
        raise SayoError("D54", "images are missing", where=f"{source.name} {missing[0]['sayo:id']}", got=got, fix=fix)


def _check_formats(source: Source, made: "Dataset", options: BuildOptions) -> None:
    drawn: dict[str, list[Sequence[float]]] = {}
    for row in rows_of(made, ["sayo:format", "sayo:drawn"]):
        drawn.setdefault(row["sayo:format"], []).extend(row["sayo:drawn"])
    for box_format, boxes in drawn.items():
        reason = doubt(np.array(boxes, dtype=float).reshape(-1, 4), box_format) if boxes else None
        if reason and not options.trust_boxes:
            what, got = "the boxes are implausible in their format", f"{box_format}: {reason}"
            fix = "compare the format with the publisher's description. If it is right, add --trust-boxes, and look "
            fix += "at the boxes with `sayo inspect --page`"
            raise SayoError("D43", what, where=source.name, got=got, fix=fix)


def _check_losses(source: Source, left_out: list[LeftOut], rows: int, options: BuildOptions) -> None:
    reasons = Counter(thing.reason for thing in left_out)
    lost = sum(n for reason, n in reasons.items() if reason in LOSSES)
    got = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "no record"
    if lost > options.max_drop * (rows + lost):
        what, wanted = "too many examples are lost to unusable images or text", f"at most {options.max_drop:.2%}"
        fix = "correct the data, or allow more with --max-drop"
        raise SayoError("D55", what, where=source.name, got=got, wanted=f"{wanted} of {rows + lost}", fix=fix)
    if not rows:
        fix = "correct the data"
        if reasons[NO_BOX]:
            fix = "add boxes, or keep such rows with --keep-without-boxes, for methods that need none"
        raise SayoError("D55", "no training row is left", where=source.name, got=got, wanted="rows", fix=fix)


def write_split(rows: "Dataset", folder: Path, split: str) -> None:
    """Write the parquet files of a split; the builder's own columns are left out."""
    rows = rows.remove_columns([name for name in rows.column_names if name in FACTS])
    for shard, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        part = rows.select(range(first, min(first + SHARD_ROWS, len(rows))))
        part.to_parquet(folder / f"{split}-{shard:05d}.parquet", batch_size=GROUP_ROWS)
