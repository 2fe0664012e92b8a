"""`sayo inspect`: finished data as the model will see it.

Two passes. ``audit`` goes over every row without a model. Then a sample of rows, evenly spread, goes
through the model's own processor, by the calls that verl's data set makes: chat template, images, placeholders. What
verl would feed the model is what is looked at, so the grid of visual tokens is the processor's and nothing is
recomputed (``model_view``). The boxes are then marked on it by the rule that training uses
(``sayo_verl.vision.masks``).
"""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sayo_verl.data.check import columns_of, open_rows
from sayo_verl.data.contract import PREPARE, Demands, RowContract, check_stored
from sayo_verl.data.reading import decoded, open_parquet, read_image, rows_at
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import DEMANDS, Audit, Figures
from sayo_verl.inspection.files import Data, find_data
from sayo_verl.inspection.findings import Finding, Findings
from sayo_verl.inspection.model_view import Model, too_long
from sayo_verl.inspection.page import Picture, Sample, make_page
from sayo_verl.reward import JUDGES


@dataclass
class Measured:
    """What the second pass counted: lists over rows, images or boxes.

    Attributes:
        prompts: tokens of each prompt.
        visual: visual tokens of each image.
        per_box: visual tokens of each box.
        shares: of each image with a box, the share of its visual tokens that lie in one.
        small: boxes whose area is less than ``coverage`` of a visual token.
        rows: of each row: path, number, data source, kind, fewest and most tokens of its boxes.
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
    """Rows by their number in all files together; files that the first pass refused are passed over."""
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
    model: Model,
    findings: Findings,
    *,
    rows: int,
    limit: int,
    seed: int,
    demands: Demands = DEMANDS,
    tick: Callable[[], None] = lambda: None,
) -> Measured:
    """Send a sample of rows through the processor; what is wrong goes into ``findings``."""
    paths = [*data.train, *data.val]
    total = sum(open_parquet(path).metadata.num_rows for path in paths)
    got, lengths = Measured(), {}
    for path, number, row in _locate(paths, spread(total, rows, seed), demands):
        where, info = f"{path} row {number}", row.get("extra_info") or {}
        tick()
        looked = RowContract(demands).look(row, where)  # a fault has been counted by the first pass
        if looked.faults or None in looked.headers or not _decodes(row, where, model.cell(), findings):
            continue
        seen = findings.attempt(model.see, row, where)
        if seen is None:
            continue
        got.prompts.append(seen.prompt_tokens)
        lengths[where] = seen.prompt_tokens
        for tiles, mask_NV, boxes in zip(
            seen.tiles, seen.masks, info.get("boxes") or [[] for _ in seen.tiles], strict=True
        ):
            V, finest = sum(tile.tokens for tile in tiles), tiles[0]
            got.visual.append(V)
            if len(boxes):
                got.shares.append(float(mask_NV.any(axis=0).mean()))
            cell = (finest.x1 - finest.x0) * (finest.y1 - finest.y0) / finest.tokens
            got.small += sum((x1 - x0) * (y1 - y0) < model.coverage * cell for x0, y0, x1, y1 in boxes)
        counts = seen.tokens_per_box
        if 0 in counts:
            findings.add("D69", "FAIL", "a box has no visual token", where, PREPARE)
        got.per_box += counts
        got.rows.append(
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
    if got.small:
        findings.add(
            "D69",
            "INFO",
            f"boxes are smaller than {model.coverage:g} of a visual token, and the most covered tokens stand for them",
            f"{got.small} of {len(got.per_box)} boxes",
            "nothing, or larger images",
            count=got.small,
        )
    return got


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


def build_samples(measured: Measured, model: Model, *, k: int, seed: int) -> list[Sample]:
    """The rows that the page shows, looked at once more."""
    samples = []
    for i, why in choose_samples(measured.rows, k, seed):
        path, number, source, kind, _, _ = measured.rows[i]
        file = open_parquet(path)
        ((_, row),) = rows_at(file, path, columns_of(file, DEMANDS), {number})
        where, info = f"{path} row {number}", row.get("extra_info") or {}
        seen = model.see(row, where)
        none: list[list[Any]] = [[] for _ in seen.tiles]
        pictures = tuple(
            Picture(decoded(image, where), tiles, of_image, names, mask_NV)
            for image, tiles, of_image, names, mask_NV in zip(
                row.get("images") or [],
                seen.tiles,
                info.get("boxes") or none,
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
                seen.prompt_tokens,
                pictures,
            )
        )
    return samples


def figures_told(figures: Figures, measured: Measured, limit: int) -> list[tuple[str, str]]:
    """What there is, as (name, value) to print."""

    def spans(values: Sequence[float], form: str = "{:g}") -> str:
        if not len(values):
            return "-"
        told = zip(("min", "median", "90 %", "max"), np.percentile(values, [0, 50, 90, 100]), strict=True)
        return ", ".join(f"{name} {form.format(value)}" for name, value in told)

    boxes = [n for n, rows in figures.boxes_per_row.items() for _ in range(rows)]
    full = sum(share == 1 for share in measured.shares)
    return [
        ("rows", ", ".join(f"{n} {split}" for split, n in sorted(figures.rows.items())) or "0"),
        (
            "images",
            f"{figures.images}, {figures.distinct_images} different; "
            + ", ".join(f"{name} {n}" for name, n in figures.formats.most_common()),
        ),
        ("boxes per row", spans(boxes)),
        ("data sources", _counted(figures.sources)),
        ("kinds", _counted(figures.kinds)),
        ("sources of boxes", _counted(figures.box_sources)),
        ("rows through the processor", str(len(measured.prompts))),
        ("visual tokens per image", spans(measured.visual)),
        ("visual tokens per box", spans(measured.per_box)),
        (
            "share of visual tokens in boxes",
            spans([100 * share for share in measured.shares], "{:.1f} %") + (f"; all of it in {full}" if full else ""),
        ),
        ("prompt length", f"{spans(measured.prompts)}; limit {limit}"),
    ]


def _counted(counter: Any, most: int = 8) -> str:
    told = ", ".join(f"{name} {n}" for name, n in counter.most_common(most))
    return told + (f" and {len(counter) - most} more" if len(counter) > most else "")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sayo inspect`."""
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA", help="parquet files or prepared folders")
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="model folder or hub name: its processor is used"
    )
    parser.add_argument(
        "--val", type=Path, action="append", default=[], metavar="DATA", help="validation data; may be given again"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 when something is wrong (FAIL or WARN)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write samples, drawn, into this HTML file")
    parser.add_argument("--samples", type=int, default=24, metavar="N", help="on the page (default: %(default)s)")
    parser.add_argument(
        "--rows",
        type=int,
        default=2000,
        metavar="N",
        help="rows that go through the processor, evenly spread (default: %(default)s)",
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        default=2048,
        metavar="N",
        help="data.max_prompt_length of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        default=0.5,
        metavar="X",
        help="algorithm.attn.region.coverage of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--judge",
        default=JUDGES[0],
        choices=(*JUDGES, "none"),
        help="reward_kwargs.judge of the run, or none for a reward function of your own (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Check, print, and write the page.

    Returns:
        0, or 1 with ``--strict`` when there is a finding that is not INFO.

    Raises:
        SayoError: for data, a model or a page file that cannot be read or written.
    """
    from rich.console import Console
    from rich.progress import Progress

    data = find_data(args.data, args.val)
    model = Model(args.model, args.coverage)
    demands = Demands(judge=None if args.judge == "none" else args.judge, qwen_resize=model.family.geometry == "grid")
    total = sum(open_parquet(path).metadata.num_rows for path in (*data.train, *data.val))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        every = progress.add_task("every row", total=total)
        found, figures = Audit(data, demands, lambda: progress.advance(every)).run()
        some = progress.add_task("through the processor", total=min(max(args.rows, 0), total))
        measured = measure(
            data,
            model,
            found,
            rows=max(args.rows, 0),
            limit=args.max_prompt_length,
            seed=args.seed,
            demands=demands,
            tick=lambda: progress.advance(some),
        )
    told, findings = figures_told(figures, measured, args.max_prompt_length), found.sorted()
    _print(Console(), told, findings)
    if args.page:
        samples = build_samples(measured, model, k=args.samples, seed=args.seed)
        about = f"{', '.join(str(path) for path in (*args.data, *args.val))} as {args.model} sees it"
        try:
            args.page.parent.mkdir(parents=True, exist_ok=True)
            args.page.write_text(make_page(about, told, findings, samples), encoding="utf-8")
        except OSError as error:
            raise SayoError(
                "D64",
                f"the page cannot be written ({error.strerror})",
                where="--page",
                got=args.page,
                fix="name a file in a folder that can be written",
            ) from error
        print(f"page: {args.page}")
    return int(args.strict and any(finding.level != "INFO" for finding in findings))


def _print(console: Any, told: Sequence[tuple[str, str]], findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, value in told:
        table.add_row(name, Text(value))
    console.print(table)
    if not findings:
        console.print("no findings")
        return
    table = Table(title="findings", title_justify="left")
    for column in ("", "code", "what", "count", "first", "fix"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    for f in findings:
        table.add_row(f.level, f.code, Text(f.what), str(f.count), Text("\n".join(f.rows[:3])), Text(f.fix))
    console.print(table)
