"""docs/errors.md lists the codes of the source, and every code has a test."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
MADE = runpy.run_path(str(ROOT / "docs" / "make_errors.py"))
SOURCE = "".join(p.read_text(encoding="utf-8") for room in ("sayo_verl", "recipe") for p in (ROOT / room).rglob("*.py"))
CODES = sorted(set(re.findall(r'"([A-Z]\d\d)"', SOURCE)))


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == MADE["page"](), "run python docs/make_errors.py"


def test_every_code_has_an_entry_that_says_what_is_wrong():
    entries = {entry.code for entry in MADE["entries"]() if entry.what != MADE["UNKNOWN"]}
    assert [code for code in CODES if code not in entries] == []


def test_every_code_belongs_to_an_area():
    assert {code[0] for code in CODES} <= set(MADE["AREAS"])


def test_every_code_is_named_by_a_test():
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__))
    named = set(re.findall(r"\b[A-Z]\d\d\b", tests))
    assert [code for code in CODES if code not in named] == []
