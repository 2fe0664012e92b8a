"""The scoreboard: its tables name what exists, its page is what its figures give, and a run of it measures."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def scoreboard(repo):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo / "benchmarks"))
        from scoreboard import cases, figures, page, tally

        yield type("Scoreboard", (), {"cases": cases, "figures": figures, "page": page, "tally": tally})


def test_every_case_names_tests_and_codes_that_exist_or_a_reason(scoreboard):
    assert scoreboard.cases.problems() == []


def test_a_test_that_is_gone_is_a_problem(scoreboard, monkeypatch):
    table = scoreboard.cases.table("bad_inputs")
    monkeypatch.setitem(table, "D01", table["D01"] | {"tests": ["data/test_build.py::test_gone"], "codes": ["D00"]})
    monkeypatch.setitem(table, "D02", {"input": "?", "outcome": "exact"})
    monkeypatch.setitem(table, "Z01", {"input": "?", "outcome": "not handled"})
    assert scoreboard.cases.problems() == [
        "Z01: missing or not a case",
        "D01: no test data/test_build.py::test_gone",
        "D01: no code D00",
        "D02: exact, and no test shows it",
        "Z01: not handled, and no reason",
    ]


def test_the_page_is_made_of_its_figures(scoreboard, repo):
    stored = json.loads((repo / "benchmarks" / "results" / "trust.json").read_text())
    assert set(stored["figures"]) == set(scoreboard.figures.FIGURES)
    assert (repo / "docs" / "trust.md").read_text() == "\n".join(scoreboard.page.page(stored)).rstrip() + "\n"


def test_a_figure_that_was_not_measured_says_why(scoreboard):
    page = "\n".join(scoreboard.page.page({"full_run": None, "figures": {"fuzz": {"not_measured": "no time"}}}))
    assert "- property tests: not measured (no time)" in page
    board = page.partition("## Twelve figures")[2].partition("## ")[0]
    assert board.count("| not measured |") == 11
    assert "Last full run: none yet." in page


def test_the_interval_of_a_share_is_wilsons(scoreboard):
    low, high = scoreboard.page.interval(80, 100)
    assert (round(low, 1), round(high, 1)) == (71.1, 86.7)


def test_a_run_counts_tests_cases_and_recorded_values(scoreboard, tmp_path, repo):
    (tmp_path / "test_made.py").write_text(
        "import pytest\n"
        "from hypothesis import given, settings, strategies as st\n"
        "@settings(max_examples=30, derandomize=True)\n"
        "@given(x=st.integers())\n"
        "def test_many(x): pass\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_some(n, record_property):\n"
        "    record_property('found', n)\n"
        "    assert n < 3\n"
        "@pytest.mark.skip\n"
        "def test_none(): pass\n"
    )
    file = str(tmp_path / "test_made.py")
    options = ("--rootdir", str(tmp_path), "-c", "/dev/null")
    tally = scoreboard.tally.run_tests([file], *options, processes=0, factor=4)
    assert (tally.passed(), tally.ran(), tally.cases(), tally.values("found")) == (3, 4, 120, [1, 2, 3])
    found = {name: tally.of(f"test_made.py::{name}") for name in ("test_many", "test_some", "test_none", "test_gone")}
    assert list(found.values()) == ["passed", "failed", "skipped", "not found"]


def test_the_command_measures_and_writes_the_page(repo, tmp_path):
    raw, page = tmp_path / "trust.json", tmp_path / "trust.md"
    command = [sys.executable, "benchmarks/trust.py", "--only", "overhead", "memory", "mutation", "--fast"]
    done = subprocess.run(
        [*command, "--raw", str(raw), "--out", str(page)], cwd=repo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(raw.read_text())
    assert sorted(stored["figures"]) == ["memory", "overhead"], "a mutation score takes minutes"
    assert stored["full_run"] is None
    assert "exponent 1." in stored["figures"]["memory"]["value"]
    assert "exponent 1." in page.read_text()


@pytest.mark.usefixtures("scoreboard")
def test_a_test_with_skipped_cases_is_partly_skipped():
    from scoreboard.tally import Tally

    tally = Tally({f"t[{n}]": {"outcome": outcome} for n, outcome in enumerate(("passed", "skipped"))})
    assert tally.of("t") == "partly skipped"


def test_a_skipped_test_counts_neither_as_passed_nor_as_failed(scoreboard):
    outcomes = {"a": "passed", "b": "failed", "c": "skipped", "d[1]": "passed", "d[2]": "skipped"}
    tally = scoreboard.tally.Tally({f"tests/{name}": {"outcome": outcome} for name, outcome in outcomes.items()})
    named = {"one": ["a"], "two": ["a", "c"], "three": ["d"], "four": ["b", "c"], "five": ["a", "gone"]}
    assert scoreboard.figures.judge(tally, named) == {
        "passed": ["one"],
        "failed": ["five", "four"],
        "not_run": ["three", "two"],
    }


def test_bad_inputs_whose_tests_are_skipped_leave_the_count(scoreboard):
    handled = [case["tests"] for case in scoreboard.cases.table("bad_inputs").values() if case.get("tests")]
    tests = {f"tests/{test}" for named in handled for test in named}
    first = f"tests/{handled[0][0]}"
    all_passed = {test: {"outcome": "passed"} for test in tests}
    whole = scoreboard.figures.bad_inputs(scoreboard.tally.Tally(all_passed))
    found = scoreboard.figures.bad_inputs(scoreboard.tally.Tally(all_passed | {first: {"outcome": "skipped"}}))
    skipped = found["skipped"]
    assert skipped >= 1
    assert found["failed"] == whole["failed"] == []
    assert (found["passed"], found["of"]) == (whole["passed"] - skipped, whole["of"] - skipped)
    assert scoreboard.page.result_cell(found) == f"{found['passed']} of {found['of']}, {skipped} skipped"
    failing = scoreboard.figures.bad_inputs(scoreboard.tally.Tally(all_passed | {first: {"outcome": "failed"}}))
    assert (len(failing["failed"]), failing["skipped"], failing["of"]) == (skipped, 0, whole["of"])
