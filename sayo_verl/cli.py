"""The ``sayo`` command. ``--help`` of every subcommand fits a screen.

A subcommand is a function that adds its flags to a parser and returns the function that runs it. Only the function of
the chosen subcommand is called, so that the modules of the others are not imported: torch takes seconds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sayo_verl import __version__
from sayo_verl.command_line import AddFlags, Command, Run, add_commands
from sayo_verl.errors import SayoError
from sayo_verl.prepare import add_prepare


def _doctor(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.doctor import command

    command.add_flags(parser)
    return command.run


def _inspect(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.inspection import command

    command.add_flags(parser)
    return command.run


def _look(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.look import command

    command.add_flags(parser)
    return command.run


def _focus(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.focus import command

    parser.description = command.__doc__
    command.add_flags(parser)
    return command.run


def _diagnose(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.diagnose import command

    parser.description = command.__doc__
    command.add_flags(parser)
    return command.run


def _watch(parser: argparse.ArgumentParser) -> Run:
    parser.epilog = WATCH_EXAMPLE
    parser.add_argument("run", type=Path, help="folder of the run, for train.log and metrics.jsonl")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: those in its run.json)")
    parser.add_argument("command", nargs="+", help="the training command, after --")
    return _run_watch


def _run_watch(args: argparse.Namespace) -> int:
    from sayo_verl.report.watch import run_and_watch

    return run_and_watch(args.command, args.run, args.steps)


def _report(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--window",
        type=int,
        default=5,
        metavar="N",
        help="steps in the means 'first' and 'last' (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves.png"),
        metavar="FILE",
        help="figure that compares several runs (default: %(default)s)",
    )
    return _run_report


def _run_report(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sayo_verl.report.card import load_config
    from sayo_verl.report.curves import plot_run, plot_runs
    from sayo_verl.report.failed import failed_rollouts
    from sayo_verl.report.page import write_page
    from sayo_verl.report.runs import load_run
    from sayo_verl.report.table import first_last_table

    names = [path.resolve().name for path in args.runs]
    named = [name if names.count(name) == 1 else str(path) for name, path in zip(names, args.runs, strict=True)]
    runs = {name: load_run(path) for name, path in zip(named, args.runs, strict=True)}
    console = Console()
    for path, run in zip(args.runs, runs.values(), strict=True):
        console.print(first_last_table(run, k=args.window))
        console.print(f"curves   {plot_run(run, path / 'curves.png')}", soft_wrap=True, highlight=False)
        console.print(f"page     {write_page(run, args.window)}", soft_wrap=True, highlight=False)
        for file in run.files:
            console.print(f"metrics  {file}", soft_wrap=True, highlight=False)
        failed = failed_rollouts(run, load_config(run.files[-1], run.overrides))
        for note in [*([failed] if failed else []), *run.notes]:
            console.print(f"note     {note}", soft_wrap=True, highlight=False, markup=False)
    if len(runs) > 1:
        console.print(f"compared {plot_runs(runs, args.out)}", soft_wrap=True, highlight=False)
    return 0


def _compare(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--label",
        nargs="+",
        default=[],
        metavar="L",
        help="one per run, in their order; runs with one label are one group (default: runs that differ only in "
        "the seed)",
    )
    parser.add_argument("--baseline", default="", metavar="L", help="label of a group (default: verl's own estimator)")
    parser.add_argument(
        "--window", type=int, default=5, metavar="N", help="last steps that the numbers are means of (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    return _run_compare


def _run_compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sayo_verl.report.compare import compare
    from sayo_verl.report.compare_page import comparison_page, markdown, print_comparison
    from sayo_verl.report.page import write_text

    shown = compare(args.runs, args.label, args.baseline, args.window)
    console = Console()
    print_comparison(shown, console)
    write_text(args.out, comparison_page(shown))
    console.print(f"page     {args.out}", soft_wrap=True, highlight=False)
    if args.markdown:
        write_text(args.markdown, markdown(shown))
        console.print(f"markdown {args.markdown}", soft_wrap=True, highlight=False)
    return 0


def _evaluate(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("model", type=Path, help="folder of a tiny policy")
    parser.add_argument("scenes", type=Path, help="a folder of `sayo prepare synthetic`, or one of its parquet files")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="responses per row (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=24, metavar="N", help="longest response (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result to this file")
    return _run_evaluate


def _run_evaluate(args: argparse.Namespace) -> int:
    from sayo_verl.tiny.evaluate import evaluate

    result = evaluate(
        args.model,
        args.scenes,
        samples_per_row=args.samples,
        temperature=args.temperature,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
    )
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


WATCH_EXAMPLE = """example:
  sayo watch outputs/mine -- \\
    env OUT=outputs/mine bash scripts/run_sayo_qwen3vl_8b.sh
"""
COMMANDS: dict[str, tuple[str, AddFlags]] = {
    "doctor": ("check versions, machine, plug-in and Ray; a job, a cluster, a run folder", _doctor),
    "prepare": ("make data or the tiny policy", add_prepare),
    "inspect": ("check prepared data and draw it as the model sees it", _inspect),
    "look": ("draw where a model looks while it answers, as one HTML page", _look),
    "focus": ("train a <Focus> token on annotated regions, before attn_faithful", _focus),
    "watch": ("run a training command and show its progress", _watch),
    "report": ("table, curves and a page of runs", _report),
    "compare": ("compare runs: seeds as mean and interval, differences, cost", _compare),
    "diagnose": ("where a model looks over a set of questions, and whether that helps", _diagnose),
    "evaluate": ("accuracy and attention of a tiny policy on held-out scenes", _evaluate),
}


def _all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"sayo-verl {__version__}")
    add_commands(parser, COMMANDS)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    return Command(prog="sayo", description="Credit assignment by visual attention for stock verl.", add_flags=_all)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``sayo`` command; 0 for success, 1 for a finding, 2 for an error, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.function(args)
    except SayoError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
