"""The rule for walks over a grid of arrows, the rows of ``sayo prepare synthetic --task walk``.

 - acc is 1 if the response has the whole format and its answer is the end of the true walk. format is 1 if the response
   has the whole format: ``sayo_verl.scenes.walk_truth`` defines both. score = acc, whatever the weights are.
 - walk_marks is the truth of the response, one letter for each word: "." right, "x" wrong; of the words that must look
   "P" right, "E" wrong. No reward depends on it.

The row's ``extra_info.walk`` has the arrows. Error code: D81 a row without a valid walk.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sayo_verl.errors import Rule, raise_first
from sayo_verl.reward.text import MAX_CHARACTERS
from sayo_verl.scenes.walk_truth import MAX_GRID, cell_names, walk_path, walk_truth

# Walks like those of training, longer ones, and ones with colours that their directions did not have in training.
WALK_SOURCES = ("sayo/walk", "sayo/walk_more_steps", "sayo/walk_new_pairs")


class WalkRow(NamedTuple):
    """``extra_info.walk`` of a row: arguments of ``walk_truth``."""

    grid: int
    start: int
    directions: tuple[int, ...]
    steps: int
    moves: tuple[int, ...]


def is_walk(data_source: Any) -> bool:
    """Whether rows of this data source are judged by this rule."""
    return data_source in WALK_SOURCES


def walk_of(extra_info: Any, ground_truth: Any, where: str = "extra_info.walk") -> WalkRow:
    """The walk of a row.

    Raises:
        SayoError: D81 if it is missing or impossible, or does not end in the ground truth.
    """
    given = extra_info.get("walk") if isinstance(extra_info, Mapping) else None
    walk = _read(given) if isinstance(given, Mapping) else None
    what = "a row of a walk has no valid walk"
    wanted = "grid, start, directions, steps, moves as `sayo prepare synthetic --task walk` writes them"
    fix = "prepare the rows again, or give rows of your own another data source"
    raise_first([Rule("D81", walk is None, what, where, fix, f"{given!r:.120}", wanted)])
    assert walk is not None
    end = cell_names(walk.grid)[walk_path(*walk)[-1]]
    what = "the ground truth of a walk is not its end"
    raise_first([Rule("D81", ground_truth != end, what, where, fix, f"{ground_truth!r:.40}", repr(end))])
    return walk


def judge_walk(response: str, walk: WalkRow) -> dict[str, Any]:
    """``score``, ``acc``, ``format`` and ``walk_marks`` of a response."""
    truth = walk_truth(response[:MAX_CHARACTERS].split(), *walk)
    acc = float(truth.rewarded)
    return {"score": acc, "acc": acc, "format": float(truth.readable), "walk_marks": truth.marks}


def _read(given: Mapping[str, Any]) -> WalkRow | None:
    """The walk, or None if it is impossible."""
    if not all(_whole(given.get(name)) for name in ("grid", "start", "steps")):
        return None
    grid, start, steps = given["grid"], given["start"], given["steps"]
    lists = [given.get(name) for name in ("directions", "moves")]
    if not all(isinstance(one, Sequence) and all(_whole(way) and 0 <= way < 4 for way in one) for one in lists):
        return None
    directions, moves = (tuple(one) for one in lists if one is not None)
    fits = 3 <= grid <= MAX_GRID and 0 <= start < grid**2 and 1 <= steps < grid**2
    fits = fits and len(directions) == grid**2 and len(moves) in (0, steps)
    return WalkRow(grid, start, directions, steps, moves) if fits else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
