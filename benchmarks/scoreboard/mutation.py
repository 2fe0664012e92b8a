"""Mutation score of the methods and of the reference probe: do their tests notice a changed line?

mutmut makes one small change at a time (an operator, a number, a condition, an argument) and runs the tests that reach
the changed function. A mutant is killed when a test fails or does not end. The sample is drawn with a seed, because all
mutants would take hours. Two kinds of mutants are not drawn, because no result of a run depends on them: those of the
words of error messages, and those of methods/random_signals.py, which makes the batch of a trial.

mutmut is no dependency of the project: ``pip install mutmut==3.8.1``, as scripts/nightly.sh does.
"""

import ast
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MUTATED = ("sayo_verl/methods/*.py", "sayo_verl/probe/reference.py")
TESTS = (
    "tests/methods",
    "tests/launch/test_method_settings.py",  # of the registry
    "tests/probe/test_probe.py",
    "tests/probe/test_measure.py",
    "tests/probe/test_probe_limits.py",
    "tests/probe/test_place.py",
    "tests/probe/test_probe_fast_tiles.py::test_stretches_cover_what_is_marked_in_whole_tiles_and_visit_no_key_twice",
)
PROBE_FUNCTIONS = ("attention_masses", "attention_profile")
TRIAL = "sayo_verl.methods.random_signals."
COPIED = ("sayo_verl", "tests", "configs", "docs", "recipe", "benchmarks", "scripts")
SURVIVED, NOT_COVERED, NOT_RUN = 0, 33, None  # exit codes of mutmut


def available() -> bool:
    """Whether mutmut can be imported."""
    return find_spec("mutmut") is not None


def lay_out(folder: Path) -> None:
    """Copy the project and write mutmut's settings, so that the checkout stays as it is.

    mutmut leaves decorated functions alone, and the two functions of the reference probe are decorated. In the copy the
    same decorator is applied below them.
    """
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    probe = folder / MUTATED[1]
    text, count = re.subn(r"^@torch\.no_grad\(\)\n(?=def )", "", probe.read_text(), flags=re.M)
    assert count == len(PROBE_FUNCTIONS), "the decorated functions of the reference probe have changed"
    probe.write_text(text + "".join(f"\n{name} = torch.no_grad()({name})\n" for name in PROBE_FUNCTIONS))

    def lines(values: tuple[str, ...]) -> str:
        return "".join(f"\n    {value}" for value in values)

    settings = {
        "source_paths": "sayo_verl",
        "only_mutate": lines(MUTATED),
        "also_copy": lines(COPIED[2:]),
        "pytest_add_cli_args": lines(("-n0", "-q")),
        "pytest_add_cli_args_test_selection": lines(TESTS),
        "timeout_constant": "10",
        "use_git_change_detection": "False",
    }
    (folder / "setup.cfg").write_text("[mutmut]\n" + "".join(f"{key}={value}\n" for key, value in settings.items()))
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = tests\nmarkers =\n    e2e:\n    nightly:\n")


class _WithoutWords(ast.NodeTransformer):
    """Leaves only the code of a SayoError, and of a setting's rule whether it holds."""

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        if len(node.elts) == 2 and isinstance(node.elts[0], ast.Compare | ast.BoolOp):
            return self.visit(node.elts[0])
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if getattr(node.func, "id", "") == "SayoError":
            return ast.Call(node.func, node.args[:1], [])
        return self.generic_visit(node)


def functions(source: Path) -> dict[str, str]:
    """Name of each function of a mutated file -> what it does, without the words of its errors."""
    tree = _WithoutWords().visit(ast.parse(source.read_text()))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            name, node.name = node.name, "f"
            found[name] = ast.dump(node)
    return found


def candidates(mutants: Path) -> list[str]:
    """Names of the mutants that change more than words."""
    names: list[str] = []
    for meta in sorted(mutants.rglob("*.py.meta")):
        body = functions(meta.with_suffix(""))
        for name in json.loads(meta.read_text())["exit_code_by_key"]:
            changed = name.rpartition(".")[2]
            original = changed.rpartition("__mutmut_")[0] + "__mutmut_orig"
            if body[changed] != body[original] and not name.startswith(TRIAL):
                names.append(name)
    return sorted(names)


def _mutmut(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def measure(sample: int, seed: int, folder: Path | None = None) -> dict[str, Any]:
    """Draw and run mutants.

    Args:
        sample: number of mutants.
        seed: of the draw.
        folder: where to work; a second call with the same folder runs nothing that has run.

    Returns:
        passed, of: mutants killed, and run. Beside them the number of mutants to draw from, the seed, and the
        survivors, each with its change as a diff.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        if not (work / "setup.cfg").exists():
            lay_out(work)
        if not (work / "mutants" / "mutmut-stats.json").exists():
            first = _mutmut(
                work, "run", "--max-children", "1", "nothing of this name"
            )  # makes mutants, runs the tests once
            if not (work / "mutants" / "mutmut-stats.json").exists():
                raise RuntimeError(f"mutmut: {(first.stderr or first.stdout).strip()[-800:]}")
        everything = candidates(work / "mutants")
        drawn = random.Random(seed).sample(everything, min(sample, len(everything)))
        _mutmut(work, "run", "--max-children", "2", *drawn)
        codes = {}
        for meta in (work / "mutants").rglob("*.py.meta"):
            codes |= json.loads(meta.read_text())["exit_code_by_key"]
        run = [name for name in drawn if codes[name] is not NOT_RUN]
        survivors = [name for name in run if codes[name] in (SURVIVED, NOT_COVERED)]
        return {
            "passed": len(run) - len(survivors),
            "of": len(run),
            "population": len(everything),
            "seed": seed,
            "survivors": {name: changed_lines(_mutmut(work, "show", name).stdout) for name in sorted(survivors)},
        }


def changed_lines(diff: str) -> str:
    """The lines that a diff takes out and puts in."""
    return "\n".join(line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))
