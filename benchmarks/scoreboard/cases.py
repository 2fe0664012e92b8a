"""The tables of cases beside this file: bad inputs, faults, situations, and mutants that change nothing."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTCOMES = ("refused", "dropped", "neutral", "exact", "does not apply", "not handled")
OPEN = "not handled"
# 141 bad inputs: none may go missing without a reason in the file
NUMBERS = {"D": 32, "M": 14, "P": 15, "W": 14, "C": 14, "I": 13, "L": 16, "R": 15, "O": 8}
FAULTS = 20


@cache
def table(name: str) -> dict[str, Any]:
    """A table by its name: bad_inputs, faults, situations, equivalent_mutants."""
    return tomllib.loads((HERE / f"{name}.toml").read_text())


@cache
def _tests_of(file: str) -> frozenset[str]:
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def problems() -> list[str]:
    """What is wrong with the tables: unknown tests, codes and outcomes, missing cases, missing reasons."""
    found: list[str] = []
    codes = set(re.findall(r"^\| ([A-Z]\d\d) \|", (ROOT / "docs" / "errors.md").read_text(), re.M))
    inputs, faults = table("bad_inputs"), table("faults")
    wanted = {f"{letter}{n:02}" for letter, count in NUMBERS.items() for n in range(1, count + 1)}
    found += [f"{name}: missing or not a case" for name in sorted(wanted ^ set(inputs))]
    wanted = {f"F{n:02}" for n in range(1, FAULTS + 1)}
    found += [f"{name}: missing or not a fault" for name in sorted(wanted ^ set(faults))]
    for name, case in (*inputs.items(), *faults.items()):
        for test in case.get("tests", []):
            file, _, function = test.partition("::")
            if function not in _tests_of(file):
                found.append(f"{name}: no test {test}")
        found += [f"{name}: no code {code}" for code in case.get("codes", []) if code not in codes]
    for name, case in inputs.items():
        outcome, tests = case["outcome"], case.get("tests")
        if outcome not in OUTCOMES:
            found.append(f"{name}: no outcome {outcome}")
        if outcome not in ("does not apply", OPEN) and not tests:
            found.append(f"{name}: {outcome}, and no test shows it")
        if outcome in ("does not apply", OPEN) and not case.get("note"):
            found.append(f"{name}: {outcome}, and no reason")
        if outcome == "refused" and not case.get("codes"):
            found.append(f"{name}: refused, and no code")
    found += [
        f"{name}: neither a test nor a reason" for name, f in faults.items() if not (f.get("tests") or f.get("not_run"))
    ]
    return found


def tests_of(name: str) -> list[str]:
    """The node ids of all tests that a table names."""
    return sorted({f"tests/{test}" for case in table(name).values() for test in case.get("tests", [])})


def open_cases() -> list[str]:
    """Bad inputs that are not handled, as lines."""
    return [f"{name}: {c['input']} ({c['note']})" for name, c in table("bad_inputs").items() if c["outcome"] == OPEN]
