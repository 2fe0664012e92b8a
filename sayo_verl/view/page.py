"""The shell of a page: one HTML file that fetches nothing, light and dark, from a phone's width on.

Its content security policy lets the browser run the viewer's script only and load data of the file only. So a text that
escapes our escaping still runs nothing.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("maps.js", "words.js", "heads.js", "said.js", "viewer.js")  # in the order of their use, joined to one script

NUMBER = re.compile(
    r"[+-]?\d[\d.,]*(e[+-]?\d+)?( ?(%|s|ms|min|h|MB|GB|± ?[\d.]+))*"
)  # what a table aligns to the right


def page(title: str, body: str, *, data: Mapping[str, Any] | None = None, viewer: bool = False) -> str:
    """The whole file.

    Args:
        title: text, shown by the browser; the body has its own heading.
        body: HTML, see ``text`` and ``table``.
        data: id -> JSON for the viewer's script, see ``viewer.mount``.
        viewer: adds the viewer's script.
    """
    islands = "".join(
        f'<script type="application/json" id="{text(name)}">{_json(value)}</script>\n'
        for name, value in (data or {}).items()
    )
    script = _script() if viewer else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'" if viewer else "script-src 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{_read('style.css')}</style></head>\n<body>\n{body}\n{islands}"
        + (f"<script>{script}</script>\n" if viewer else "")
        + "</body></html>\n"
    )


def text(value: object) -> str:
    """A value as text of HTML, also within a quoted attribute."""
    return escape(str(value))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of HTML cells: escape texts with ``text`` first. An empty header gives a table without one.

    It scrolls sideways by itself where the page is too narrow. Numbers are aligned to the right.
    """
    head = "<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in header) + "</tr></thead>"
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{head if header else ""}<tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    return f'<td class="number">{value}</td>' if NUMBER.fullmatch(str(value)) else f"<td>{value}</td>"


def _json(value: object) -> str:
    """JSON for a script element, which ends at ``</script`` whatever the JSON says. No NaN: a browser refuses it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def _script() -> str:
    """The viewer's script; in one function, so that no name of it is global."""
    return '"use strict";\n(() => {\n' + "".join(map(_read, SCRIPTS)) + "})();\n"


@cache
def _read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
