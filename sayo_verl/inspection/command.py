"""`sayo inspect`: prepared rows as the model will see them.

All rows are checked without a model, a sample of them with the model's own processor (``audit``). Figures and findings
are printed; ``--page`` draws rows into an HTML file (``page``).
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sayo_verl.command_line import progress_bar
from sayo_verl.data.check import columns_of
from sayo_verl.data.contract import Demands
from sayo_verl.data.reading import open_parquet, rows_at
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import DEMANDS, Audit, Finding, Sampled, find_data
from sayo_verl.inspection.model_view import Model, unseen
from sayo_verl.inspection.page import Shown, make_page
from sayo_verl.reward import JUDGES


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sayo inspect`."""
    add = parser.add_argument
    add("data", type=Path, nargs="+", metavar="DATA", help="parquet files or prepared folders")
    add("--model", metavar="PATH", help="folder or hub name; its processor is used. Without it visual tokens and prompt "
        "lengths are not checked")  # fmt: skip
    add("--val", type=Path, action="append", default=[], metavar="DATA", help="validation data; may be repeated")
    add("--strict", action="store_true", help="exit with 1 if there is a FAIL or a WARN")
    add("--page", type=Path, metavar="FILE", help="draw sample rows, and where boxes are, into this HTML file")
    for flag, value, what in (
        ("--samples", 24, "rows on the page"),
        ("--rows", 2000, "evenly spread rows whose images are decoded and, with --model, processed"),
        ("--max-prompt-length", 2048, "data.max_prompt_length of the run"),
        ("--seed", 0, "of the choice of rows"),
    ):
        add(flag, type=int, default=value, metavar="N", help=f"{what} (default: %(default)s)")
    what = "algorithm.attn.region.coverage of the run (default: %(default)s)"
    add("--coverage", type=float, default=0.5, metavar="X", help=what)
    what = "reward_kwargs.judge of the run, or none for a reward function of your own (default: %(default)s)"
    add("--judge", default=JUDGES[0], choices=(*JUDGES, "none"), help=what)


def run(args: argparse.Namespace) -> int:
    """Check, print, and write the page.

    Returns:
        0, or 1 with ``--strict`` if there is a FAIL or a WARN.

    Raises:
        SayoError: L17, L18, L23 or D68 for the model; D02 or D64 for data or a page file that cannot be read or
            written.
    """
    data = find_data(args.data, args.val)
    model = Model(args.model, args.coverage) if args.model else None
    judge = None if args.judge == "none" else args.judge
    demands = Demands(judge=judge, qwen_resize=model is not None and model.family.geometry == "grid")
    with progress_bar() as progress:
        task = progress.add_task("rows")
        audit = Audit(
            data,
            demands,
            model,
            sample=max(args.rows, 0),
            limit=args.max_prompt_length,
            seed=args.seed,
            tick=lambda: progress.advance(task),
        )
        progress.update(task, total=audit.total)
        findings = audit.run()
    figures = audit.figures()
    _print(figures, findings)
    if args.page:
        about = ", ".join(map(str, (*args.data, *args.val))) + (f" as {args.model} sees it" if model else "")
        samples = [_shown(row, model) for row in choose(audit.sampled, args.samples, args.seed)]
        try:
            args.page.parent.mkdir(parents=True, exist_ok=True)
            args.page.write_text(make_page(about, figures, findings, audit.positions, samples), encoding="utf-8")
        except OSError as error:
            raise SayoError(
                "D64",
                f"the page cannot be written ({error.strerror})",
                where="--page",
                got=args.page,
                fix="name a file in a folder that can be written",
            ) from error
        print(f"page: {args.page}")
    return int(args.strict and any(finding.kind.level != "INFO" for finding in findings))


def choose(rows: Sequence[Sampled], k: int, seed: int) -> list[Sampled]:
    """Up to ``k`` rows: some with the smallest and the largest boxes, then some of each data source and kind."""
    turns: Counter[tuple[str, str]] = Counter()

    def turn(row: Sampled) -> int:
        turns[row.group] += 1
        return turns[row.group]

    boxed, n = [row for row in rows if row.areas], min(3, k // 4)
    smallest = sorted(boxed, key=lambda row: min(row.areas))[:n]
    largest = sorted(boxed, key=lambda row: -max(row.areas))[:n]
    mixed = sorted(random.Random(seed).sample(rows, len(rows)), key=turn)
    return list({row[:2]: row for row in (*smallest, *largest, *mixed)}.values())[:k]


def _shown(sampled: Sampled, model: Model | None) -> Shown:
    path, where = sampled.path, f"{sampled.path} row {sampled.number}"
    file = open_parquet(path)
    ((_, row),) = rows_at(file, path, columns_of(file, DEMANDS), {sampled.number})
    return Shown(f"{path.name} row {sampled.number}", row, model.see(row, where) if model else unseen(row))


def _print(figures: Mapping[str, str], findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table(show_header=False, box=None)
    for name, value in figures.items():
        table.add_row(name, Text(value))
    console.print(table)
    for (code, level, what, fix), count, rows in ((f.kind, f.count, f.rows) for f in findings):
        named = "".join(f"\n    {row}" for row in rows[:3])
        console.print(Text(f"\n{level} {code}, {count} times: {what}{named}\n    fix: {fix}"), soft_wrap=True)
    if not findings:
        console.print("no findings")
