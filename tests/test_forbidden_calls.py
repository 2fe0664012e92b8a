"""Calls that run text or files as code. Each one in our Python code is listed here with its reason."""

import ast
from pathlib import Path

import pytest

FOLDERS = ("sayo_verl", "scripts", "benchmarks", "recipe", "docs")
# Dotted names, with the aliases of imports and of plain assignments resolved.
NEVER = {
    *("eval", "exec", "compile", "__import__", "input"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "asyncio.subprocess.create_subprocess_shell"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("hydra.utils.instantiate", "hydra.utils.call", "tarfile.open", "zipfile.ZipFile.extractall"),
}
STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
# Modules of these functions: a function of theirs that is chosen by its name could be any of them.
MODULES = {name.rpartition(".")[0] for name in NEVER | STARTS if "." in name} - {"pandas", "zipfile.ZipFile"} | {
    "builtins"
}
SAME = {"_pickle": "pickle", "cPickle": "pickle", "posix": "os", "np": "numpy"}
BY_NAME = {"getattr", "operator.attrgetter", "vars", "importlib.import_module"}
# "file: call" -> why it is safe
ALLOWED = {
    "sayo_verl/hooks/record_agent.py: hydra.utils.instantiate": "the agent loop of the run, as verl's own worker makes "
    "it of the same entry of its registry; a configuration is code (docs/security.md)"
}


def forbidden(source: str) -> list[str]:
    """The forbidden calls of a module, each as it is written here, in the order of its lines."""
    tree = ast.parse(source)
    names, found = _names(tree), []
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.append((node, _forbidden(node, _dotted(node.func, names), names)))
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in called:
            name = _dotted(node, names)  # handed on, as in map(pickle.loads, x)
            found.append((node, name if "." in name and name in NEVER else ""))
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.module in MODULES:
            found.append((node, f"from {node.module} import *"))
    return [call for node, call in sorted(found, key=lambda entry: (entry[0].lineno, entry[0].col_offset)) if call]


def _names(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> what it stands for, for imports and for `name = module` or `name = module.function`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = _dotted(node.value, names)
            if value in MODULES | NEVER | STARTS | {"torch.load", "numpy.load"}:
                names |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    # C modules and the Python 2 name have the functions of the module that they serve
    return {
        name: SAME.get(value.partition(".")[0], value.partition(".")[0]) + value[len(value.partition(".")[0]) :]
        for name, value in names.items()
    }


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _forbidden(call: ast.Call, name: str, names: dict[str, str]) -> str:
    first = call.args[0] if call.args else None
    if name in BY_NAME and first is not None:
        of = str(first.value) if isinstance(first, ast.Constant) else _dotted(first, names)
        if of in MODULES:
            return f"{name} of {of}"
    name = name.removeprefix("builtins.")
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
        ("from subprocess import run as r\nr('ls')", "subprocess.run with a text"),
        ("from subprocess import run as r\nr(['ls'], shell=True)", "subprocess.run with shell"),
        ("import os as o\no.system('ls')", "os.system"),
        ("import os\no = os\no.system('ls')", "os.system"),
        ("import posix\nposix.system('ls')", "os.system"),
        ("import os\ngetattr(os, 'system')('ls')", "getattr of os"),
        ("import subprocess as s\ngetattr(s, name)(x)", "getattr of subprocess"),
        ("import os\nvars(os)['system']('ls')", "vars of os"),
        ("import importlib\nimportlib.import_module('pickle').loads(x)", "importlib.import_module of pickle"),
        ("__import__('os').system('ls')", "__import__"),
        ("import builtins\nbuiltins.eval(x)", "eval"),
        ("from builtins import exec as e\ne(x)", "exec"),
        ("from os import *\nsystem('ls')", "from os import *"),
        ("from yaml import load as read, FullLoader as L\nread(x, Loader=L)", "yaml.load"),
        ("import yaml as y\ny.unsafe_load(x)", "yaml.unsafe_load"),
        ("from torch import load\nload(f, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\nread = torch.load\nread(f)", "torch.load without weights_only=True"),
        ("from numpy import load as l\nl(f, allow_pickle=True)", "numpy.load with allow_pickle"),
        ("import _pickle as p\np.loads(x)", "pickle.loads"),
        ("from cPickle import Unpickler\nUnpickler(f)", "pickle.Unpickler"),
        ("import pickle\nlist(map(pickle.loads, x))", "pickle.loads"),
        ("import asyncio\nasyncio.create_subprocess_shell(x)", "asyncio.create_subprocess_shell"),
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
        "import torch\ngetattr(torch, name)\ngetattr(module, 'system')\nimport os\nos.environ\nos.path.join(a, b)",
        "def f(input, compile):\n    return input + compile",
    ],
)
def test_a_safe_call_is_not(source):
    assert forbidden(source) == []
