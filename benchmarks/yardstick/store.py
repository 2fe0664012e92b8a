"""Results as one JSON file each, which is never made twice."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sayo_verl.tiny.prepared import content_hash


def once(out: Path, name: str, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``out/<name>-<hash of settings>.json``; if it is missing, make it.

    The file has the settings and the result. It is complete or absent, because it is renamed when it is written.
    """
    path = out / f"{name}-{content_hash(dict(settings))}.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({**settings, **make()}))
        unfinished.rename(path)
    return json.loads(path.read_text())


def all_of(folder: Path) -> list[dict[str, Any]]:
    """What ``once`` stored in a folder, in the order of names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
