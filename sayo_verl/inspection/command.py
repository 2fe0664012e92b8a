"""`sayo inspect`: finished data as the model will see it.

The first pass checks every row without a model (``audit``). The second sends a sample of rows through the model's own
processor (``sample``). Figures and findings are printed; ``--page`` draws rows into an HTML file (``page``).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sayo_verl.data.contract import Demands
from sayo_verl.data.reading import open_parquet
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import Audit, Figures
from sayo_verl.inspection.files import find_data
from sayo_verl.inspection.findings import Finding
from sayo_verl.inspection.model_view import Model
from sayo_verl.inspection.page import make_page
from sayo_verl.inspection.sample import Measured, build_samples, measure
from sayo_verl.reward import JUDGES

UNCHECKED = "visual tokens of boxes, prompt lengths, whether the model's processor accepts the rows (name a --model)"


def figure_lines(figures: Figures, measured: Measured, limit: int | None) -> list[tuple[str, str]]:
    """What was counted, as (name, value) to print.

    Args:
        figures: of the first pass.
        measured: of the second pass.
        limit: ``data.max_prompt_length``; None without a model.
    """

    def spans(values: Sequence[float], form: str = "{:g}") -> str:
        if not len(values):
            return "-"
        quantiles = zip(("min", "median", "90 %", "max"), np.percentile(values, [0, 50, 90, 100]), strict=True)
        return ", ".join(f"{name} {form.format(value)}" for name, value in quantiles)

    boxes = [n for n, rows in figures.boxes_per_row.items() for _ in range(rows)]
    lines = [
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
    ]
    if limit is None:
        return [*lines, ("rows with images decoded", str(len(measured.rows))), ("not checked", UNCHECKED)]
    full = sum(share == 1 for share in measured.shares)
    return [
        *lines,
        ("rows through the processor", str(len(measured.prompts))),
        ("visual tokens per image", spans(measured.visual)),
        ("visual tokens per box", spans(measured.per_box)),
        (
            "share of visual tokens in boxes",
            spans([100 * share for share in measured.shares], "{:.1f} %")
            + (f"; all tokens in {full} images" if full else ""),
        ),
        ("prompt length", f"{spans(measured.prompts)}; limit {limit}"),
    ]


def _counted(counter: Any, most: int = 8) -> str:
    names = ", ".join(f"{name} {n}" for name, n in counter.most_common(most))
    return names + (f" and {len(counter) - most} more" if len(counter) > most else "")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sayo inspect`."""
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA", help="parquet files or prepared folders")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder or hub name of the model; its processor is used. Without it only what needs none is checked",
    )
    parser.add_argument(
        "--val", type=Path, action="append", default=[], metavar="DATA", help="validation data; may be repeated"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a FAIL or a WARN")
    parser.add_argument("--page", type=Path, metavar="FILE", help="draw sample rows into this HTML file")
    parser.add_argument("--samples", type=int, default=24, metavar="N", help="rows on the page (default: %(default)s)")
    parser.add_argument(
        "--rows",
        type=int,
        default=2000,
        metavar="N",
        help="evenly spread rows for the processor (default: %(default)s)",
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
        0, or 1 with ``--strict`` if there is a FAIL or a WARN.

    Raises:
        SayoError: L17, L18, L23 or D68 for the model; D02 or D64 for data or a page file that cannot be read or
            written.
    """
    from rich.console import Console
    from rich.progress import Progress

    data = find_data(args.data, args.val)
    model = Model(args.model, args.coverage) if args.model else None
    demands = Demands(
        judge=None if args.judge == "none" else args.judge,
        qwen_resize=model is not None and model.family.geometry == "grid",
    )
    total = sum(open_parquet(path).metadata.num_rows for path in (*data.train, *data.val))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        every = progress.add_task("every row", total=total)
        found, figures = Audit(data, demands, lambda: progress.advance(every)).run()
        some = progress.add_task("sample of rows", total=min(max(args.rows, 0), total))
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
    lines = figure_lines(figures, measured, args.max_prompt_length if model else None)
    findings = found.sorted()
    _print(Console(), lines, findings)
    if args.page:
        samples = build_samples(measured, model, k=args.samples, seed=args.seed)
        about = ", ".join(str(path) for path in (*args.data, *args.val))
        about += f" as {args.model} sees it" if model else ", without a model"
        try:
            args.page.parent.mkdir(parents=True, exist_ok=True)
            args.page.write_text(make_page(about, lines, findings, samples), encoding="utf-8")
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


def _print(console: Any, lines: Sequence[tuple[str, str]], findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, value in lines:
        table.add_row(name, Text(value))
    console.print(table)
    if not findings:
        console.print("no findings")
        return
    for f in findings:
        rows = "".join(f"\n    {row}" for row in f.rows[:3])
        console.print(Text(f"\n{f.level} {f.code}, {f.count} times: {f.what}{rows}\n    fix: {f.fix}"), soft_wrap=True)
