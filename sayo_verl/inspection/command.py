"""`sayo inspect`: prepared rows as the model will see them.

All rows are checked without a model, a sample of them with the model's own processor (``audit``). Figures and findings
are printed; ``--page`` draws rows into an HTML file (``page``).
"""

import argparse
from pathlib import Path

from sayo_verl.command_line import progress_bar
from sayo_verl.data.contract import Demands
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import Audit, find_data
from sayo_verl.inspection.model_view import Model
from sayo_verl.inspection.page import make_page
from sayo_verl.reward import JUDGES


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sayo inspect`."""

    def number(flag: str, default: float, what: str) -> None:
        what += " (default: %(default)s)"
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help=what)

    model = "folder or hub name; its processor is used. Without it visual tokens and prompt lengths are not checked"
    judge = "reward_kwargs.judge of the run, or none for a reward function of your own (default: %(default)s)"
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA", help="parquet files or prepared folders")
    parser.add_argument("--model", metavar="PATH", help=model)
    parser.add_argument("--val", type=Path, action="append", default=[], metavar="DATA", help="validation data")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a FAIL or a WARN")
    parser.add_argument("--page", type=Path, metavar="FILE", help="draw boxes, and some rows, into this HTML file")
    number("--samples", 24, "rows on the page, at most")
    number("--rows", 2000, "rows whose images are decoded and go through the processor, at random")
    number("--max-prompt-length", 2048, "data.max_prompt_length of the run")
    number("--coverage", 0.5, "algorithm.attn.region.coverage of the run")
    parser.add_argument("--judge", default=JUDGES[0], choices=(*JUDGES, "none"), help=judge)


def run(args: argparse.Namespace) -> int:
    """Check, print, and write the page; D64 if it cannot. Returns 1 with ``--strict`` if there is a FAIL or a WARN."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    files = find_data(args.data, args.val)
    model = Model(args.model, args.coverage) if args.model else None
    resized = model is not None and model.family.geometry == "grid"
    demands = Demands(judge=None if args.judge == "none" else args.judge, qwen_resize=resized)
    n_rows, n_shown = max(args.rows, 0), max(args.samples, 0) if args.page else 0
    audit = Audit(files, demands, model, n_rows, n_shown, args.max_prompt_length)
    with progress_bar() as progress:
        task = progress.add_task("rows", total=audit.total)
        findings = audit.run(lambda: progress.advance(task))
    figures = audit.figures()
    console, table = Console(), Table(show_header=False, box=None)
    for name, value in figures.items():
        table.add_row(name, Text(value))
    console.print(table)
    lines = [(f"\n{f.level} {f.code}, count {f.count}: {f.what}", *f.rows, f"fix: {f.fix}") for f in findings]
    for of_finding in lines or [("no findings",)]:
        console.print(Text("\n    ".join(of_finding)), soft_wrap=True)
    if args.page:
        about = ", ".join(map(str, (*args.data, *args.val))) + (f" as {args.model} sees it" if model else "")
        page = make_page(about, figures, findings, audit.boxes_N4, audit.shown)
        try:
            args.page.parent.mkdir(parents=True, exist_ok=True)
            args.page.write_text(page, encoding="utf-8")
        except OSError as error:
            what, fix = f"the page cannot be written ({error.strerror})", "name a file in a folder that can be written"
            raise SayoError("D64", what, where="--page", got=args.page, fix=fix) from error
        print(f"page: {args.page}")
    return int(args.strict and any(finding.level != "INFO" for finding in findings))
