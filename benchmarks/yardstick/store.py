"""Results as one JSON file each, which is never made twice."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sayo_verl.tiny.prepared import content_hash


def once(out: Path, name: str, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``out/<name>-<hash of settings>.json``; if it is missing, make it.

    The file has the settings and the result. It is complete or absent, because it is renamed when it is written. Two
    processes that make the same result write files of their own, and the last one stays.
    """
    path = out / f"{name}-{content_hash(dict(settings))}.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        unfinished.write_text(json.dumps({**settings, **make()}))
        unfinished.rename(path)
    return json.loads(path.read_text())


def all_of(folder: Path) -> list[dict[str, Any]]:
    """What ``once`` stored in a folder, in the order of names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


class MixedResults(ValueError):
    """Stored results that must not be compared or averaged with each other."""


SAME_IN_RUNS = ("steps", "prompts", "responses", "clip", "eval_every", "eval_scenes")
SAME_IN_SCORES = ("prompts", "responses", "seed")


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """The runs of a folder.

    Raises:
        MixedResults: runs of different length or size; or two results of one start, method, rate and seed, as a method
            leaves them whose settings or file changed.
    """
    runs, known = all_of(folder), dict[tuple[Any, ...], dict[str, Any]]()
    for run in runs:
        _check_same(run, runs[0], SAME_IN_RUNS, folder)
        of = (*_kind_and_seed(run["start"]), run["method"], run["rate"], run["seed"])
        if of in known:
            what = f"{run['method']} at {run['rate']:g} from {run['start']}, seed {run['seed']}"
            raise MixedResults(f"{folder} has two results of {what}; {_apart(known[of], run)}. Remove the old one")
        known[of] = run
    return runs


def scores_of(folder: Path) -> list[dict[str, Any]]:
    """The scores of a folder, one entry a start: those of several lists of methods are put together.

    Raises:
        MixedResults: two starts of one kind and seed, rollouts of different size or seed, or two versions of a method.
    """
    stored, starts = all_of(folder), dict[str, dict[str, Any]]()
    one_start_each(stored)
    for found in stored:
        known = starts.setdefault(found["start"], found)
        _check_same(found, next(iter(starts.values())), SAME_IN_SCORES, folder)
        for name in known["used"].keys() & found["used"].keys():
            if known["used"][name] != found["used"][name]:
                what = f"{name} on {found['start']}, of different settings or code"
                raise MixedResults(f"{folder} has two scores of {what}. Remove the old one")
        for name in ("methods", "used"):
            known[name] |= found[name]
        if known["example"] and found["example"]:
            known["example"]["credit"] |= found["example"]["credit"]
    return list(starts.values())


def one_start_each(*results: Sequence[Mapping[str, Any]]) -> None:
    """Check that results have one start of each kind and seed.

    Raises:
        MixedResults: there are two.
    """
    known = dict[tuple[str, str], str]()
    for found in itertools.chain(*results):
        start = known.setdefault(_kind_and_seed(found["start"]), found["start"])
        if start != found["start"]:
            raise MixedResults(f"the results are of two starts of one kind and seed: {start} and {found['start']}")


def _kind_and_seed(start: str) -> tuple[str, str]:
    kind, seed, _ = start.rsplit("-", 2)
    return kind, seed


def _check_same(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, ...], folder: Path) -> None:
    if different := _apart(one, other, names):
        raise MixedResults(f"{folder} mixes results of different settings: {different}. Give them folders of their own")


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, ...] = ("start", "used")) -> str:
    """Which of the settings differ, with both values."""
    return ", ".join(f"{name} {one[name]} and {other[name]}" for name in names if one[name] != other[name])
