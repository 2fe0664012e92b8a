"""A pytest plug-in that writes what a run of tests showed, and the call that runs tests with it.

The JSON file has the outcome of each test, the values that tests recorded (``record_property``), and the number of
cases that hypothesis executed. ``SCOREBOARD_FUZZ_FACTOR`` multiplies the cases of each property test and draws them at
random, for nightly runs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE, FACTOR = "SCOREBOARD_TALLY", "SCOREBOARD_FUZZ_FACTOR"
CASES = "hypothesis cases"
_tests: dict[str, dict[str, Any]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Enlarge property tests. hypothesis has no option that overrides the ``settings`` of a test."""
    factor = int(os.environ.get(FACTOR, "1"))
    if factor == 1:
        return
    from hypothesis import settings

    enlarged: set[int] = set()
    for item in items:
        test = getattr(item, "obj", None)
        plain = getattr(test, "_hypothesis_internal_use_settings", None)
        if plain is not None and id(test) not in enlarged:  # the cases of a parametrized test share one function
            enlarged.add(id(test))
            test._hypothesis_internal_use_settings = settings(
                plain, max_examples=plain.max_examples * factor, derandomize=False, database=None
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count the cases where hypothesis left its statistics: on the item, in the process that ran it."""
    report = yield
    if report.when == "teardown":
        text = getattr(item, "hypothesis_statistics", "")
        counts = re.findall(r"(\d+) passing, (\d+) failing, and (\d+) invalid test cases", text)
        report.user_properties.append((CASES, sum(int(count) for phase in counts for count in phase)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test's phases, its recorded values and the cases of hypothesis."""
    test = _tests.setdefault(report.nodeid, {"outcome": "passed", "values": {}, "cases": 0})
    if report.outcome != "passed" and test["outcome"] != "failed":
        test["outcome"] = report.outcome
    for name, value in report.user_properties:
        if name == CASES:
            test["cases"] = value
        else:
            test["values"][name] = value


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Write the file; with several processes only the one that collects their reports does."""
    yield
    if FILE in os.environ and not hasattr(session.config, "workerinput"):
        Path(os.environ[FILE]).write_text(json.dumps(_tests))


@dataclass(frozen=True)
class Tally:
    """What a run of tests showed: node id -> outcome, recorded values, cases."""

    tests: dict[str, dict[str, Any]]

    def passed(self) -> int:
        """Number of tests that passed."""
        return sum(test["outcome"] == "passed" for test in self.tests.values())

    def ran(self) -> int:
        """Number of tests that passed or failed."""
        return sum(test["outcome"] != "skipped" for test in self.tests.values())

    def cases(self) -> int:
        """Number of cases that hypothesis executed."""
        return sum(test["cases"] for test in self.tests.values())

    def values(self, name: str) -> list[Any]:
        """What tests recorded under a name."""
        return [test["values"][name] for test in self.tests.values() if name in test["values"]]

    def of(self, test: str) -> str:
        """The outcome of a test function with all its cases: passed, failed, partly skipped, skipped, or not found."""
        outcomes = {v["outcome"] for node, v in self.tests.items() if node == test or node.startswith(f"{test}[")}
        if outcomes == {"passed", "skipped"}:
            return "partly skipped"
        return next((o for o in ("failed", "passed", "skipped") if o in outcomes), "not found")


def run_tests(selection: Sequence[str], *options: str, factor: int = 1, processes: int = 2) -> Tally:
    """Run tests in a process of their own.

    Raises:
        RuntimeError: pytest could not collect or start.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tally.json"
        paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "scoreboard.tally",
                "-n",
                str(processes),
                *options,
                *selection,
            ],
            cwd=ROOT,
            env={
                **os.environ,
                FILE: str(file),
                FACTOR: str(factor),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1) or not file.exists():  # 1: tests failed, which is a result
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-600:]}")
        return Tally(json.loads(file.read_text()))
