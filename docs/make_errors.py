"""Write docs/errors.md from the error codes in the source: `python docs/make_errors.py`.

The source is parsed, not imported. A text that is filled in at run time is shown as "...".
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sayo_verl.errors import AREAS, kind_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, RECIPES, PAGE = ROOT / "sayo_verl", ROOT / "recipe", ROOT / "docs" / "errors.md"
CODE = re.compile(r"[A-Z]\d\d")
HEAD = """# Error codes

Made by `python docs/make_errors.py`; a test fails if this page is stale. Every error is one line:

    SAYO-CODE: what | at where | got ..., wanted ... | fix: ...

The class of an error follows from its code: `ConfigError` (also a `ValueError`), `DataError`, `ProbeError` and
`SetupError`, all of them `sayo_verl.errors.SayoError`. `sayo inspect` counts errors of data instead of raising them.
"""


UNKNOWN = "..."


class Entry(NamedTuple):
    """One place in the source that makes an error."""

    code: str
    what: str
    fix: str
    file: str


def text_of(node: ast.expr | None, function: ast.AST | None, constants: dict[str, str]) -> str:
    """A text of the source; what is not known before the run as "..."."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, function, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "" if "did_you_mean" in ast.dump(node) else UNKNOWN
    if isinstance(node, ast.BinOp):
        return text_of(node.left, function, constants) + text_of(node.right, function, constants)
    if isinstance(node, ast.IfExp):
        texts = (text_of(branch, function, constants) for branch in (node.body, node.orelse))
        return " / ".join(text for text in texts if text)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Name) and function is not None:
        assigned = [value for n in ast.walk(function) if isinstance(n, ast.Assign) for value in _given(n, node.id)]
        if texts := [text for value in assigned if (text := text_of(value, None, constants)).strip(".")]:
            return " / ".join(dict.fromkeys(texts))
    return UNKNOWN


def _given(node: ast.Assign, name: str) -> Iterator[ast.expr]:
    """The values that an assignment, also one of several names at once, gives to a name."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=True)
        else:
            pairs = zip([target], [node.value], strict=True)
        yield from (value for each, value in pairs if isinstance(each, ast.Name) and each.id == name)


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All places in the package and in the recipes."""
    return tuple(_entries())


def _entries() -> Iterator[Entry]:
    paths = [*sorted(PACKAGE.rglob("*.py")), *sorted(RECIPES.rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    everywhere = {name: text for tree in trees.values() for name, text in _constants(tree)}
    for path, tree in trees.items():
        constants = everywhere | dict(_constants(tree))  # a name means what its own file says first
        file = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).as_posix()
        # call -> the innermost function around it, if there is one
        inside: dict[ast.Call, ast.FunctionDef | None] = {n: None for n in ast.walk(tree) if isinstance(n, ast.Call)}
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                inside |= {node: function for node in ast.walk(function) if isinstance(node, ast.Call)}
        for call in inside:
            yield from _of_call(call, inside[call], file, constants)


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Texts that have a name of capitals, such as ``PREPARE``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((n.id, node.value.value) for n in node.targets if isinstance(n, ast.Name) and n.id.isupper())


def _of_call(call: ast.Call, function: ast.FunctionDef | None, file: str, constants: dict[str, str]) -> Iterator[Entry]:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    codes = [n.value for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant)] if call.args else []
    codes = [code for code in codes if isinstance(code, str) and CODE.fullmatch(code)]
    # of a record: code, broken, what; of a finding of `sayo inspect`: code, level, what, fix
    place = {"SayoError": 1, "Rule": 2, "Finding": 2, "rule": 3}.get(name)
    if not codes or place is None:
        return
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    fix_place = {"Rule": 4, "Finding": 3}.get(name, len(call.args))
    by_place = call.args[fix_place] if len(call.args) > fix_place else None
    fix = text_of(given.get("fix", by_place), function, constants)
    what = text_of(call.args[place], function, constants)
    if not what.strip(".") and function is not None:  # the words come from a caller: the docstring says "D58: ..."
        summary = (ast.get_docstring(function) or "").partition("\n")[0]
        what = summary.removeprefix(f"{codes[0]}: ").rstrip(".") if summary.startswith(f"{codes[0]}: ") else UNKNOWN
    whats = what.split(" / ") if isinstance(call.args[0], ast.IfExp) else [what] * len(codes)
    for code, each in zip(codes, whats, strict=True):
        yield Entry(code, each, fix, file)


def page() -> str:
    """The text of docs/errors.md."""
    found = sorted(entries())
    known = {entry.code for entry in found if entry.what != UNKNOWN}
    found = [entry for entry in found if entry.what != UNKNOWN or entry.code not in known]
    lines = [HEAD]
    for letter, area in AREAS.items():
        lines += [f"## {letter}: {area}\n", "| code | class | what | fix | where |", "|---|---|---|---|---|"]
        rows = {}
        for code, what, fix, file in found:
            if code.startswith(letter):
                rows.setdefault((code, what, fix), []).append(file)
        for (code, what, fix), files in rows.items():
            where = ", ".join(f"`{file}`" for file in dict.fromkeys(files))
            fix = fix if fix.strip(".") else "as the message says"
            cells = (code, f"`{kind_of(code).__name__}`", _cell(what), _cell(fix), where)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "-"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len({entry.code for entry in entries()})} codes")
