"""The scoreboard of trust: twelve figures, each with its command, as docs/trust.md.

    python benchmarks/trust.py                       # all of them: half an hour on two cores
    python benchmarks/trust.py --fast                # those that take seconds
    python benchmarks/trust.py --only numerics fuzz  # some
    python benchmarks/trust.py --page-only           # write the page again from the stored figures

It stores figures in ``benchmarks/results/trust.json``; a figure that is not measured again keeps its value and date. It
runs the tests that the figures name and reads what ``benchmarks/probe_cost.py`` stored. Figures that cannot be measured
here say why. ``TRUST_FUZZ_FACTOR=10`` multiplies the cases of property tests; ``TRUST_MUTANTS=240`` is the number of
mutants. Exits with 1 if a test that a figure names failed.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from scoreboard import cases
from scoreboard.figures import FIGURES, NotMeasured
from scoreboard.page import write_page
from scoreboard.tally import ROOT, Tally, run_tests

RAW, PAGE = ROOT / "benchmarks" / "results" / "trust.json", ROOT / "docs" / "trust.md"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the figures to measure are in ``only``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(FIGURES), default=list(FIGURES), metavar="NAME", help=", ".join(FIGURES)
    )
    parser.add_argument("--fast", action="store_true", help="of them, those that take seconds")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--raw", type=Path, default=RAW, help="the figures (default: benchmarks/results/trust.json)")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/trust.md)")
    args = parser.parse_args(arguments)
    args.full = len(args.only) == len(FIGURES) and not args.fast
    if args.page_only:
        args.only = []
    elif args.fast:
        args.only = [name for name in args.only if FIGURES[name].fast]
    return args


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """Measure figures: one run of all tests that they name, then each figure of it."""
    selection = sorted({test for name in names for test in FIGURES[name].tests})
    there = [test for test in selection if (ROOT / test.partition("::")[0]).exists()]
    start, failed, tally = time.monotonic(), "", Tally({})
    print(f"{len(there)} selections of tests for {', '.join(names)}", flush=True)
    try:
        tally = run_tests(there, "-m", "") if there else tally  # nightly tests too
    except RuntimeError as error:
        failed = str(error)
    found = {}
    for name in names:
        try:
            if failed and FIGURES[name].tests:
                raise NotMeasured(failed.splitlines()[0])
            result = FIGURES[name].measure(tally)
        except NotMeasured as reason:
            result = {"not_measured": str(reason)}
        found[name] = {"date": time.strftime("%Y-%m-%d"), "version": version()} | result
        print(
            f"[{time.monotonic() - start:5.0f} s] {name}: {result.get('not_measured') or summary(result)}", flush=True
        )
    return found


def summary(result: dict[str, Any]) -> str:
    """A figure in a line."""
    return " ".join(str(result[key]) for key in ("passed", "of", "value") if key in result)


def version() -> str:
    """The versions that a figure is of."""
    return f"{importlib.metadata.version('sayo-verl')}, verl {importlib.metadata.version('verl')}"


def main() -> int:
    """Measure, store, write the page."""
    args = parse()
    wrong = cases.problems()
    if wrong and not args.page_only:
        print("the tables of benchmarks/scoreboard are wrong:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    stored = json.loads(args.raw.read_text()) if args.raw.exists() else {"full_run": None, "figures": {}}
    found = measure(args.only) if args.only else {}
    for name, result in found.items():
        if "not_measured" not in result or name not in stored["figures"]:
            stored["figures"][name] = result
    if args.full and args.only:
        stored["full_run"] = time.strftime("%Y-%m-%d")
    args.raw.parent.mkdir(parents=True, exist_ok=True)
    args.raw.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    write_page(args.out, stored)
    print(f"page: {args.out}")
    tested = (
        "numerics",
        "non_interference",
        "zero_strength",
        "bad_inputs",
        "resume",
        "faults",
        "contract",
        "fuzz",
        "supply",
    )
    red = [name for name in found if name in tested and found[name].get("failed")]
    red += [
        n
        for n in found
        if n in tested and n not in ("bad_inputs", "faults") and found[n].get("passed") != found[n].get("of")
    ]
    if red:
        print(f"red: {', '.join(red)}", file=sys.stderr)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
