"""Storage of raw numbers: JSON files that are replaced atomically, and reports that grow line by line."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Store:
    """One file, ``{section: {key: values}}``; a new measurement replaces the old one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def update(self, section: str, key: str, values: dict[str, Any], *, replace: bool = False) -> None:
        """Add values to an entry, or replace it."""
        raw = self.read()
        entries = raw.setdefault(section, {})
        entries[key] = values if replace else {**entries.get(key, {}), **values}
        self._write(raw)

    def drop(self, section: str, key: str) -> None:
        """Remove an entry if it exists."""
        raw = self.read()
        if raw.get(section, {}).pop(key, None) is not None:
            self._write(raw)

    def _write(self, raw: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(raw, indent=1) + "\n")
        os.replace(new, self.path)


def read_all(paths: list[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Merge several files; a later file's entry wins."""
    sections = ("cases", "scaling", "failures", "figures", "wire")
    merged: dict[str, dict[str, dict[str, Any]]] = {section: {} for section in sections}
    for path in paths:
        for section, entries in Store(path).read().items():
            merged[section].update(entries)
    return merged


def append_line(report: Path, line: dict[str, Any]) -> None:
    """Append a line to a report and flush it to the file."""
    with report.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


def read_lines(report: Path) -> list[dict[str, Any]]:
    """The lines of a report, oldest first, without truncated ones."""
    lines = []
    for text in report.read_text().splitlines() if report.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
