"""Calls that run text or files as code. Each one in our Python code is listed here with its reason."""

import ast
from pathlib import Path

import pytest

FOLDERS = ("sayo_verl", "scripts", "benchmarks", "recipe", "docs")
# Dotted names as they are written, with the aliases of `import x as y` resolved.
NEVER = {
    *("eval", "exec", "compile", "__import__", "input"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("hydra.utils.instantiate", "hydra.utils.call", "tarfile.open", "zipfile.ZipFile.extractall"),
}
STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
# "file: call" -> why it is safe
ALLOWED = {
    "sayo_verl/hooks/record_agent.py: hydra.utils.instantiate": "the agent loop of the run, as verl's own worker makes "
    "it of the same entry of its registry; a configuration is code (docs/security.md)"
}


def forbidden(source: str) -> list[str]:
    """The forbidden calls of a module, each as it is written here."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (call := _forbidden(node, _dotted(node.func, names))):
            found.append(call)
    return found


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _forbidden(call: ast.Call, name: str) -> str:
    given = {key.arg: key.value for key in call.keywords}

    def is_set(key: str, value: object) -> bool:
        return isinstance(given.get(key), ast.Constant) and given[key].value is value

    if name in NEVER or name.endswith((".extractall", ".extract")):
        return name
    if name == "torch.load" and not is_set("weights_only", True):
        return "torch.load without weights_only=True"
    if name in ("numpy.load", "np.load") and "allow_pickle" in given and not is_set("allow_pickle", False):
        return "numpy.load with allow_pickle"
    if "shell" in given and not is_set("shell", False):
        return f"{name} with shell"
    text = isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp) if call.args else False
    if name in STARTS and text:
        return f"{name} with a text"
    return "trust_remote_code=True" if is_set("trust_remote_code", True) else ""


def calls_of(root: Path) -> list[str]:
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    assert files
    return [f"{file.relative_to(root)}: {call}" for file in files for call in forbidden(file.read_text())]


def test_our_code_runs_no_text_or_file_as_code_but_where_it_says_why(repo):
    assert sorted(set(calls_of(repo))) == sorted(ALLOWED)
    assert all(len(reason) > 20 for reason in ALLOWED.values())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval(x)", "eval"),
        ("def f():\n    return lambda: exec(x)", "exec"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import system as s\ns('ls')", "os.system"),
        ("import pickle as p\np.loads(x)", "pickle.loads"),
        ("import yaml\nyaml.load(x, Loader=yaml.Loader)", "yaml.load"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=maybe)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load with allow_pickle"),
        ("import subprocess\nsubprocess.run(['ls'], shell=True)", "subprocess.run with shell"),
        ("import subprocess\nsubprocess.run(f'ls {x}')", "subprocess.run with a text"),
        ("from subprocess import Popen\nPopen('ls')", "subprocess.Popen with a text"),
        ("archive.extractall(folder)", "?.extractall"),
        ("load(model, trust_remote_code=True)", "trust_remote_code=True"),
        ("import hydra\nhydra.utils.instantiate(c)", "hydra.utils.instantiate"),
    ],
)
def test_a_forbidden_call_is_found(source, found):
    assert forbidden(source) == [found.replace("?", "archive")]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()\nre.compile(x)\nast.literal_eval(x)",
        "import torch\ntorch.load(f, weights_only=True)\nimport numpy as np\nnp.load(f)",
        "import subprocess\nsubprocess.run(['ls', x], shell=False)\nimport yaml\nyaml.safe_load(x)",
        "load(model, trust_remote_code=config.trust)",
    ],
)
def test_a_safe_call_is_not(source):
    assert forbidden(source) == []
