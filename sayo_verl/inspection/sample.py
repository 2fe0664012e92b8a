"""The second pass of `sayo inspect`: a sample of rows, evenly spread, as the model will see them.

Each row goes through the model's own processor (``model_view``) by the calls that verl's data set makes: chat template,
images, placeholders. Its boxes are marked on the processor's grid of visual tokens by the rule that training uses
(``sayo_verl.vision.masks``). Without a model the images are decoded, and nothing is known of visual tokens and prompt
lengths.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sayo_verl.data.check import columns_of, open_rows
from sayo_verl.data.contract import PREPARE, Demands, RowContract, check_stored
from sayo_verl.data.reading import decoded, open_parquet, read_image, rows_at
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import DEMANDS
from sayo_verl.inspection.files import Data
from sayo_verl.inspection.findings import Findings
from sayo_verl.inspection.model_view import Model, Seen, boxes_of, too_long, unseen
from sayo_verl.inspection.page import Picture, Sample


@dataclass
class Measured:
    """Measurements of the second pass: lists over rows, images or boxes.

    Attributes:
        prompts: tokens of each prompt.
        visual: visual tokens of each image.
        per_box: visual tokens of each box.
        shares: of each image with a box, the share of its visual tokens that a box covers.
        small: boxes whose area is less than ``coverage`` of a visual token.
        rows: of each row: path, number, data source, kind, fewest and most tokens of its boxes (0 without a model).
    """

    prompts: list[int] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)
    per_box: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    small: int = 0
    rows: list[tuple[Path, int, str, str, int, int]] = field(default_factory=list)


def spread(n: int, k: int, seed: int) -> list[int]:
    """``k`` of ``range(n)``, one at random out of each of ``k`` equal parts; all if there are no more."""
    if k >= n:
        return list(range(n))
    rng = random.Random(seed)
    return [rng.randrange(i * n // k, (i + 1) * n // k) for i in range(k)]


def _locate(
    paths: Sequence[Path], chosen: Sequence[int], demands: Demands
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Rows by their number in all files together; files that the first pass refused are skipped."""
    first, wanted = 0, set(chosen)
    for path in paths:
        n = open_parquet(path).metadata.num_rows
        here = {row - first for row in wanted if first <= row < first + n}
        first += n
        try:
            file = open_rows(path, demands)
        except SayoError:  # counted by the first pass
            continue
        for row, values in rows_at(file, path, columns_of(file, demands), here):
            yield path, row, values


def measure(
    data: Data,
    model: Model | None,
    findings: Findings,
    *,
    rows: int,
    limit: int,
    seed: int,
    demands: Demands = DEMANDS,
    tick: Callable[[], None] = lambda: None,
) -> Measured:
    """Send a sample of rows through the processor; what is wrong goes into ``findings``. Without a model the images of
    the sample are decoded only.
    """
    paths = [*data.train, *data.val]
    total = sum(open_parquet(path).metadata.num_rows for path in paths)
    measured, lengths = Measured(), {}
    cell = model.cell() if model else 0
    for path, number, row in _locate(paths, spread(total, rows, seed), demands):
        where, info = f"{path} row {number}", row.get("extra_info") or {}
        tick()
        looked = RowContract(demands).look(row, where)  # a fault has been counted by the first pass
        if looked.faults or None in looked.headers or not _decodes(row, where, cell, findings):
            continue
        seen = findings.attempt(model.see, row, where) if model else unseen(row)
        if seen is None:
            continue
        if model:
            lengths[where] = seen.prompt_tokens
            _add(measured, seen, boxes_of(row, len(seen.tiles)), model.coverage)
            if 0 in seen.tokens_per_box:
                findings.add("D69", "FAIL", "a box has no visual token", where, PREPARE)
        counts = seen.tokens_per_box
        measured.rows.append(
            (
                path,
                number,
                str(row["data_source"]),
                info.get("kind") or "-",
                min(counts, default=0),
                max(counts, default=0),
            )
        )
    error = too_long(lengths, limit)
    if error is not None:
        findings.refused(error, count=sum(n > limit for n in lengths.values()))
    if model and measured.small:
        findings.add(
            "D69",
            "INFO",
            f"boxes are smaller than {model.coverage:g} of a visual token; the tokens that they cover most are used",
            f"{measured.small} of {len(measured.per_box)} boxes",
            "nothing, or larger images",
            count=measured.small,
        )
    return measured


def _add(measured: Measured, seen: Seen, boxes: list[Any], coverage: float) -> None:
    """Count the tokens of a row."""
    measured.prompts.append(seen.prompt_tokens)
    measured.per_box += seen.tokens_per_box
    for tiles, mask_NV, of_image in zip(seen.tiles, seen.masks, boxes, strict=True):
        V, finest = sum(tile.tokens for tile in tiles), tiles[0]
        measured.visual.append(V)
        if len(of_image):
            measured.shares.append(float(mask_NV.any(axis=0).mean()))
        token_area = (finest.x1 - finest.x0) * (finest.y1 - finest.y0) / finest.tokens
        measured.small += sum((x1 - x0) * (y1 - y0) < coverage * token_area for x0, y0, x1, y1 in of_image)


def _decodes(row: Mapping[str, Any], where: str, cell: int, findings: Findings) -> bool:
    """Whether all images of a row can be decoded; an orientation behind the pixels of a PNG shows only now."""
    for i, image in enumerate(row.get("images") or []):
        before, header = read_image(image, where, decode=False), findings.attempt(read_image, image, where)
        if header is None or before is None:
            return False
        if header.orientation != before.orientation:
            findings.attempt(check_stored, header, None, where)
        if min(header.width, header.height) < cell:
            findings.add(
                "D67",
                "WARN",
                "a side of an image is shorter than a visual token; the processor stretches it",
                f"{where}, images[{i}]: {header.width} x {header.height} pixels for tokens of {cell}",
                "leave such images out",
            )
    return True


def choose_samples(rows: Sequence[tuple[Path, int, str, str, int, int]], k: int, seed: int) -> list[tuple[int, str]]:
    """``(index, why)`` of up to ``k`` rows: those with the smallest and the largest boxes, then some of each kind."""
    rng = random.Random(seed)
    boxed = [i for i, row in enumerate(rows) if row[5]]
    chosen: dict[int, str] = {}
    worst = min(3, k // 4)
    for i in sorted(boxed, key=lambda i: rows[i][4])[:worst]:
        chosen.setdefault(i, f"visual tokens of its smallest box: {rows[i][4]}")
    for i in sorted(boxed, key=lambda i: -rows[i][5])[:worst]:
        chosen.setdefault(i, f"visual tokens of its largest box: {rows[i][5]}")
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row[2], row[3]), []).append(i)
    for group in groups.values():
        rng.shuffle(group)
    while len(chosen) < k and any(groups.values()):
        for group in groups.values():
            if group and len(chosen) < k:
                chosen.setdefault(group.pop(), "at random")
    return list(chosen.items())


def build_samples(measured: Measured, model: Model | None, *, k: int, seed: int) -> list[Sample]:
    """The rows that the page shows, read once more."""
    samples = []
    for i, why in choose_samples(measured.rows, k, seed):
        path, number, source, kind, _, _ = measured.rows[i]
        file = open_parquet(path)
        ((_, row),) = rows_at(file, path, columns_of(file, DEMANDS), {number})
        where, info = f"{path} row {number}", row.get("extra_info") or {}
        seen = model.see(row, where) if model else unseen(row)
        none: list[list[Any]] = [[] for _ in seen.tiles]
        pictures = tuple(
            Picture(decoded(image, where), tiles, of_image, names, mask_NV)
            for image, tiles, of_image, names, mask_NV in zip(
                row.get("images") or [],
                seen.tiles,
                boxes_of(row, len(seen.tiles)),
                info.get("box_names") or none,
                seen.masks,
                strict=True,
            )
        )
        question = "\n".join(str(message["content"]) for message in row["prompt"])
        answer, box_source = str(row["reward_model"]["ground_truth"]), str(info.get("box_source") or "-")
        samples.append(
            Sample(
                f"{path.name} row {number}",
                why,
                question,
                answer,
                source,
                kind,
                box_source,
                seen.prompt_tokens if model else None,
                pictures,
            )
        )
    return samples
