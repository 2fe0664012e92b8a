"""Answers the rows of a set, measures where the model looks, and writes a report.

Nothing is trained. The data are rows of docs/data.md; without boxes, what needs them is left out. An interrupted run
goes on where it was when the same command is given again. docs/diagnose.md says how to read the result.
"""

import argparse
import importlib
from pathlib import Path

from sayo_verl.command_line import Command, Run
from sayo_verl.diagnose.config import Asked


def add_flags(parser: argparse.ArgumentParser) -> Run:
    assert isinstance(parser, Command)
    parser.show_only("--model", "--data", "--against", "--out", "--rows", "--samples", "--max-new-tokens")
    parser.add_argument("--model", required=True, help="folder or hub name of the model")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="PARQUET",
        help="a parquet file, or a folder of `sayo prepare` (val)",
    )
    parser.add_argument("--against", metavar="MODEL", help="a second model, on the same rows")
    parser.add_argument(
        "--out", type=Path, default=Path("diagnosis"), metavar="FOLDER", help="results (default: %(default)s)"
    )
    defaults = Asked(Path())
    parser.add_argument("--rows", type=int, metavar="N", help="use the first N rows (default: all)")
    parser.add_argument(
        "--samples", type=int, default=defaults.samples, metavar="N", help="responses per row (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, metavar="X", help="0: greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest response (default: 1024, or what the context leaves)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="a Python module that registers methods of yours"
    )
    return run


def run(args: argparse.Namespace) -> int:
    from sayo_verl.diagnose.run import diagnose

    for module in args.module:
        importlib.import_module(module)
    asked = Asked(args.data, args.rows, args.samples, args.temperature, args.max_new_tokens, args.seed)
    models = [args.model, *([args.against] if args.against else [])]
    page = diagnose(models, asked, args.out)
    print(f"report   {page}\nfigures  {args.out}/*.png, *.csv\nnumbers  {args.out}/summary.json")
    return 0
