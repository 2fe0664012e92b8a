"""The twelve figures: how each is measured.

A figure is a function of a ``Tally`` of the tests that it names. It returns ``passed`` and ``of`` or a ``value``, and
what the page needs beside them. ``NotMeasured`` says why there is no figure.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cost.cells import exponent, ratios
from packaging.requirements import Requirement

from scoreboard import cases, mutation
from scoreboard.tally import ROOT, Tally, run_tests

RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]


class NotMeasured(Exception):
    """Why a figure could not be measured here."""


@dataclass(frozen=True)
class Figure:
    """One line of the scoreboard.

    Attributes:
        title: what is counted.
        measure: from the tally of ``tests``.
        tests: node ids, run together with those of the other figures.
        fast: seconds; the others take minutes.
        command: what measures it, if not ``benchmarks/trust.py`` itself.
    """

    title: str
    measure: Callable[[Tally], Result]
    tests: Sequence[str] = ()
    fast: bool = False
    command: str = ""


def counted(tally: Tally, tests: Sequence[str]) -> Result:
    """How many tests (each case of a parametrized one) passed.

    Raises:
        NotMeasured: none of them ran here.
    """
    mine = {node: test for node, test in tally.tests.items() if any(_belongs(node, test_id) for test_id in tests)}
    own = Tally(mine)
    if not own.ran():
        raise NotMeasured("none of its tests ran here")
    skipped = sum(test["outcome"] == "skipped" for test in mine.values())
    return {"passed": own.passed(), "of": own.ran(), "cases": own.cases(), "skipped": skipped}


def _belongs(node: str, test: str) -> bool:
    return node == test or node.startswith((f"{test}[", f"{test}::"))


# ------------------------------------------------------------------------------------------------------------ numerics
MODES = "tests/hooks/test_modes.py::test_a_mode"


def numerics(tally: Tally) -> Result:
    """The probe in verl's engine against float64 attention: largest error and mean signed error of each family."""
    measured: dict[str, list[list[float]]] = {}
    for family, largest, signed in tally.values("numerics"):
        measured.setdefault(family, []).append([largest, signed])
    if not measured:
        raise NotMeasured("no test recorded an error")
    families = {
        name: {
            "modes": len(found),
            "max_abs": max(largest for largest, _ in found),
            "mean_signed": max((signed for _, signed in found), key=abs),
        }
        for name, found in sorted(measured.items())
    }
    worst = max(entry["max_abs"] for entry in families.values())
    return counted(tally, [MODES]) | {"value": f"largest {worst:.1e}", "families": families}


BITWISE = (
    "tests/probe/test_taps.py::test_evaluation_is_bitwise_that_without_a_tap",
    "tests/probe/test_taps.py::test_outputs_gradients_and_random_numbers_are_those_without_a_tap",
    MODES,
    "tests/hooks/test_modes.py::test_the_probe_changes_nothing_under_sequence_parallelism",
    "tests/hooks/test_counterfactual.py::test_the_first_pass_is_bitwise_what_it_is_without_a_second",
    "tests/hooks/test_record.py::test_training_is_the_same_with_and_without_recording",
)
ZERO = (
    "tests/methods/test_invariants.py::test_strength_zero_is_verls_grpo_bit_for_bit",
    "tests/methods/test_group_advantage.py::test_without_an_applied_term_it_is_verls_grpo_bit_for_bit",
    "tests/methods/test_group_advantage.py::test_the_estimator_at_weight_zero_is_verls_grpo_bit_for_bit",
    "tests/methods/test_faithful_method.py::test_at_weight_zero_it_is_verls_grpo_bit_for_bit",
    "tests/hooks/test_trainer.py::test_weight_zero_is_verls_grpo_bit_for_bit",
)


def zero_strength(tally: Tally) -> Result:
    """Methods at strength zero against verl's own GRPO: drawn batches and recorded ones, compared bit by bit."""
    result = counted(tally, ZERO)
    return result | {"value": f"{result['cases']} drawn batches"}


# ------------------------------------------------------------------------------------------------------ tables of cases
def bad_inputs(tally: Tally) -> Result:
    """Bad inputs by outcome. One counts when all its tests passed, and is left out where one was skipped."""
    inputs = cases.table("bad_inputs")
    apply = {name: case for name, case in inputs.items() if case["outcome"] != "does not apply"}
    handled = {name: case["tests"] for name, case in apply.items() if case["outcome"] != cases.OPEN}
    judged = judge(tally, handled)
    outcomes = Counter(case["outcome"] for case in inputs.values())
    return {
        "passed": len(judged["passed"]),
        "of": len(apply) - len(judged["not_run"]),
        "skipped": len(judged["not_run"]),
        "outcomes": dict(outcomes),
        "failed": judged["failed"],
        "not_run": judged["not_run"],
    }


def faults(tally: Tally) -> Result:
    """Injected faults; one counts when its tests passed, and one whose tests were skipped is named."""
    shown = {name: fault["tests"] for name, fault in cases.table("faults").items() if fault.get("tests")}
    judged = judge(tally, shown)
    return {
        "passed": len(judged["passed"]),
        "of": cases.FAULTS - len(judged["not_run"]),
        "skipped": len(judged["not_run"]),
        "failed": judged["failed"],
        "not_run": judged["not_run"],
    }


def judge(tally: Tally, named: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Cases by ``passed``, ``failed`` (a test failed or is gone) and ``not_run`` (else: a test or a case was skipped).

    Args:
        tally: of a run of their tests.
        named: case -> its tests, below ``tests/``.
    """
    found: dict[str, list[str]] = {"passed": [], "failed": [], "not_run": []}
    for name, tests in sorted(named.items()):
        outcomes = {tally.of(f"tests/{test}") for test in tests}
        failed = outcomes & {"failed", "not found"}
        found["failed" if failed else "passed" if outcomes <= {"passed"} else "not_run"].append(name)
    return found


# ----------------------------------------------------------------------------------------------------------- contract
CONTRACT = "tests/hooks/test_contract.py"


def contract(tally: Tally) -> Result:
    """Names of verl that are as recorded, in the installed version and, where an index is reached, in the other."""
    records = {file.stem.removeprefix("verl-"): len(json.loads(file.read_text())) for file in _records()}
    installed = importlib.metadata.version("verl")
    result = counted(tally, [CONTRACT]) | {"names": records, "installed": installed, "others": {}}
    for version in records:
        if version != installed:
            done = subprocess.run(
                ["bash", "scripts/contract.sh", version], cwd=ROOT, capture_output=True, text=True, check=False
            )
            lines = (done.stdout + done.stderr).strip().splitlines()
            same = "as recorded" if done.returncode == 0 else f"exit {done.returncode}: {lines[-1] if lines else ''}"
            result["others"][version] = same
    return result


def _records() -> list[Path]:
    return sorted((ROOT / "tests" / "hooks" / "contract").glob("verl-*.json"))


# --------------------------------------------------------------------------------------------------------------- fuzz
FUZZ_FACTOR = "TRUST_FUZZ_FACTOR"


def fuzz(tally: Tally) -> Result:
    """Cases that hypothesis executed in all property tests; failures are counted as tests."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "@given" in path.read_text() and path.name not in ("test_trust.py",)
    ]
    factor = int(os.environ.get(FUZZ_FACTOR, "1"))
    found = run_tests(files, "-m", "not e2e and not nightly", factor=factor)
    property_tests = {node: test for node, test in found.tests.items() if test["cases"]}
    own = Tally(property_tests)
    return {
        "passed": own.passed(),
        "of": own.ran(),
        "value": f"{own.cases():,} cases",
        "cases": own.cases(),
        "factor": factor,
    }


# ---------------------------------------------------------------------------------------------------------------- costs
def _stored(device: str) -> dict[str, Any]:
    file = RESULTS / f"{device}.json"
    if not file.exists():
        raise NotMeasured(f"there is no {file.relative_to(ROOT)}")
    return json.loads(file.read_text())


def overhead(tally: Tally) -> Result:
    """Time of the pass with the probe of all layers over the pass without it: median of ratios of one round."""
    rows = {}
    for device in ("cpu", "cuda"):
        for name, case in _stored(device)["cases"].items():
            layers = case["shape"]["layers"]
            found = ratios(case, f"probe {'reference' if device == 'cpu' else 'fast'} {layers}")
            if found:
                rows[name] = {"ratio": statistics.median(found), "date": case["machine"]["date"]}
    if not rows:
        raise NotMeasured("no stored case has the probe of all layers")
    worst = {
        part: max((r["ratio"] for n, r in rows.items() if n.startswith(part)), default=None) for part in ("cpu", "card")
    }
    titles = {"cpu": "CPU, reference path", "card": "H100, fast path"}
    value = ", ".join(f"{titles[name]}: at most {ratio:.3f}" for name, ratio in worst.items() if ratio)
    return {"value": value, "rows": rows, "date": max(row["date"] for row in rows.values())}


def memory(tally: Tally) -> Result:
    """Slope of the logarithm of the probe's extra peak memory over that of the tokens; 1 is linear, attention has 2."""
    series = next(iter(_stored("cpu").get("scaling", {}).values()), None)
    if series is None:
        raise NotMeasured("no stored growth over the tokens")
    found = {name: exponent(series, name, "memory") for name in next(iter(series["rows"].values()))["memory"]}
    ours = found["reference, chunk 128"]  # what users get
    if ours is None:
        raise NotMeasured("fewer than three lengths were measured")
    tokens = [row["tokens"] for row in series["rows"].values()]
    value = f"exponent {ours:.2f} over {min(tokens):,} to {max(tokens):,} tokens on a CPU; not measured on a GPU"
    return {"value": value, "exponents": found, "date": series["machine"]["date"]}


# ------------------------------------------------------------------------------------------------------------- mutation
def mutants(tally: Tally) -> Result:
    """Changed lines that a test notices."""
    if not mutation.available():
        raise NotMeasured("mutmut is not installed (scripts/nightly.sh installs it)")
    return mutation.measure(int(os.environ.get("TRUST_MUTANTS", "240")), seed=0)


# --------------------------------------------------------------------------------------------------------- supply chain
CODE = (
    "tests/reward/test_reward_hostile.py::test_no_module_executes_text_or_sets_an_alarm",
    "tests/test_forbidden_calls.py::test_our_code_runs_no_text_or_file_as_code_but_where_it_says_why",
    "tests/test_supply.py::test_no_pinned_version_is_below_its_floor",
)
PERMISSIVE = (
    "apache",
    "mit",
    "bsd",
    "isc",
    "psf",
    "python software foundation",
    "mpl",
    "mozilla",
    "hpnd",
    "cmu",
    "unlicense",
    "0bsd",
    "zlib",
    "unicode",
)


def supply(tally: Tally) -> Result:
    """Modules without forbidden calls, licences of the packages that are installed with this one, and the audit."""
    result = counted(tally, CODE)
    licences, other = licences_of("sayo-verl")
    value = f"{len(other)} of {licences} licences not permissive or not declared"
    return result | {"value": value, "packages": licences, "other_licences": other, "audit": audit()}


def licences_of(name: str) -> tuple[int, dict[str, str]]:
    """(number of installed packages that a package needs, those without a permissive licence -> what they declare)."""
    waiting, seen, other = [name], set(), {}
    while waiting:
        package = waiting.pop().lower().replace("_", "-")
        if package in seen:
            continue
        try:
            found = importlib.metadata.metadata(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package that is not installed
        seen.add(package)
        declared = [found.get("License-Expression") or "", (found.get("License") or "").strip().split("\n")[0][:80]]
        declared += [c.split(" :: ")[-1] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
        text = "; ".join(dict.fromkeys(filter(None, declared)))
        if not any(word in text.lower() for word in PERMISSIVE):
            other[package] = text or "none declared"
        for line in importlib.metadata.requires(package) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": "cpu" if package == name else ""}):
                waiting.append(needed.name)
    return len(seen) - 1, other


def audit() -> str:
    """What pip-audit says of the installed packages, in one line."""
    if find_spec("pip_audit") is None:
        return "not audited: pip-audit is not installed"
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "-f", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        return f"not audited: no advisory source answered ({type(error).__name__})"
    audited = [package for package in packages if "skip_reason" not in package]
    found = {package["name"]: [v["id"] for v in package["vulns"]] for package in audited if package["vulns"]}
    if not audited:
        return f"not audited: no advisory source has data of the {len(packages)} packages"
    return f"{len(audited)} packages audited, {len(found)} with advisories: {json.dumps(found)}"


RESUME = (
    "tests/test_e2e.py::test_a_killed_run_resumes_to_the_very_numbers_of_one_that_was_not",
    "tests/test_e2e.py::test_a_run_that_is_repeated_has_the_very_same_numbers",
)
FIGURES = {
    "numerics": Figure("statistics in verl's engine against float64 attention", numerics, (MODES,)),
    "non_interference": Figure(
        "log-probs, gradients, RNG and updates with and without the probe, bitwise",
        lambda t: counted(t, BITWISE),
        BITWISE,
    ),
    "zero_strength": Figure("strength 0 against verl's GRPO, bitwise", zero_strength, ZERO, fast=True),
    "bad_inputs": Figure("bad inputs with the wanted outcome", bad_inputs, cases.tests_of("bad_inputs")),
    "resume": Figure(
        "equal after a kill: kill points and quantities; controls red", lambda t: counted(t, RESUME), RESUME
    ),
    "faults": Figure("injected faults with the wanted end", faults, cases.tests_of("faults")),
    "contract": Figure("names of verl as recorded", contract, (CONTRACT,)),
    "fuzz": Figure("property tests", fuzz, command="python benchmarks/trust.py --only fuzz"),
    "overhead": Figure(
        "time of a log-prob pass with the probe, all layers, over without",
        overhead,
        fast=True,
        command="python benchmarks/probe_cost.py",
    ),
    "memory": Figure(
        "growth of the probe's extra peak memory", memory, fast=True, command="python benchmarks/probe_cost.py"
    ),
    "mutation": Figure("mutants of methods and reference probe that a test notices", mutants),
    "supply": Figure("modules without eval, exec and the like; licences; advisories", supply, CODE, fast=True),
}
