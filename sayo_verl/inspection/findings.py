"""Mistakes in data, by kind: counted, with the first rows named.

Levels:

    FAIL  training on these rows crashes or trains the wrong thing
    WARN  training works, but the data is probably not what the user intended
    INFO  worth knowing
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sayo_verl.errors import SayoError

LEVELS = ("FAIL", "WARN", "INFO")
FIRST = 5  # rows that a finding names


@dataclass(frozen=True)
class Finding:
    """One kind of mistake.

    Attributes:
        code: as in ``SayoError``.
        level: one of ``LEVELS``.
        what: the mistake, in one sentence.
        count: number of occurrences.
        rows: the first few, each with the value found and the value wanted.
        fix: instruction for the user.
    """

    code: str
    level: str
    what: str
    count: int
    rows: tuple[str, ...]
    fix: str


class Findings:
    """Findings by kind, in the order of their level and then of their first occurrence."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], tuple[int, list[str], str]] = {}

    def add(self, code: str, level: str, what: str, row: str, fix: str, *, count: int = 1) -> None:
        """Count an occurrence; ``row`` names it, with the value found."""
        before, rows, _ = self._found.get((code, level, what), (0, [], fix))
        self._found[code, level, what] = (before + count, [*rows, row][:FIRST], fix)

    def attempt(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The value of a check, or None if it raises a ``SayoError``, which is counted as a FAIL."""
        try:
            return check(*args, **kwargs)
        except SayoError as error:
            self.refused(error)
            return None

    def refused(self, error: SayoError, *, count: int = 1) -> None:
        """Count an error."""
        # the message of a library, in brackets, differs from row to row
        what, bracket, detail = error.what.partition(" (")
        found = [f"got {error.got}"] if error.got is not None else []
        found += [f"wanted {error.wanted}"] if error.wanted is not None else []
        found += [detail.removesuffix(")")] if bracket else []
        self.add(
            error.code,
            "FAIL",
            what,
            ": ".join([error.where, *([", ".join(found)] if found else [])]),
            error.fix,
            count=count,
        )

    def sorted(self) -> list[Finding]:
        """All findings."""
        found = [
            Finding(code, level, what, count, tuple(rows), fix)
            for (code, level, what), (count, rows, fix) in self._found.items()
        ]
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))
