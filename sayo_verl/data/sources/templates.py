"""Questions about pictures that have boxes and names but no questions: counts and presence. Ours.

    count     "How many {names} are in the image?"      the number     the boxes of all of them
    presence  "Is there a {name} in the image?"         yes            the boxes of all of them

What is asked must be answered by the boxes, and the boxes must be all of it: a name with a member that has no box of
its own (a crowd in COCO, a circle in labelme) is not asked about, and counted as left out.

Presence alone is a poor task: where every answer is yes, saying yes is right without looking. Questions with the answer
no have no region, and are made only on request (``absent_names``), as many as there are questions with yes. They need
pictures in which every object of the names asked about is marked.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sayo_verl.errors import SayoError, did_you_mean

ASKS = ("count", "presence")
_PLURALS = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "knife": "knives",
    "shelf": "shelves",
    "leaf": "leaves",
    "wolf": "wolves",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "bus": "buses",
}
_ALWAYS_PLURAL = ("scissors", "skis", "glasses", "sunglasses", "pants", "jeans", "shorts", "trousers", "headphones")


class Thing(NamedTuple):
    """One marked object.

    Attributes:
        name: what it is called.
        box: four numbers, or None where it has no box of its own.
        why: without a box: why.
    """

    name: str
    box: tuple[float, ...] | None
    why: str = ""


class Asked(NamedTuple):
    """A question made of things.

    Attributes:
        ask: "count" or "presence".
        name: of the things it is about.
        question, answer: text.
        boxes: of the things.
        why_not: if not "": why it cannot be asked.
    """

    ask: str
    name: str
    question: str
    answer: str
    boxes: tuple[tuple[float, ...], ...]
    why_not: str = ""


def check_asks(asks: Sequence[str], questions: object, where: str) -> None:
    """Either templates or a file of questions.

    Raises:
        SayoError: D58.
    """
    wrong = [ask for ask in asks if ask not in ASKS]
    if wrong:
        raise SayoError(
            "D58",
            f"there is no question {wrong[0]!r}{did_you_mean(wrong[0], ASKS)}",
            where=where,
            wanted=", ".join(ASKS),
            fix="name one of them",
        )
    if bool(asks) == bool(questions):
        raise SayoError(
            "D58",
            "there must be either questions to make or a file of questions",
            where=where,
            got="both" if asks else "neither",
            wanted="--ask or --questions",
            fix="set --ask count, --ask presence or --questions FILE: annotations have none",
        )


def ask_about(things: Sequence[Thing], asks: Sequence[str]) -> Iterator[Asked]:
    """The questions of one picture, names in the order of their first thing."""
    of_name: dict[str, list[Thing]] = {}
    for thing in things:
        of_name.setdefault(thing.name, []).append(thing)
    for name, members in of_name.items():
        boxes = tuple(thing.box for thing in members if thing.box is not None)
        missing = [thing.why for thing in members if thing.box is None]
        why_not = f"{len(missing)} of {len(members)} {name!r} have no box ({missing[0]})" if missing else ""
        for ask in asks:
            if ask == "count":
                yield Asked(ask, name, how_many(name), str(len(members)), boxes, why_not)
            else:
                yield Asked(ask, name, is_there(name), "yes", boxes, why_not)


def absent_names(present: Sequence[str], names: Sequence[str], how_many: int, seed: str) -> list[str]:
    """Names that are not there, chosen by a hash of seed and name: the same every time, whatever else is asked."""
    rest = [name for name in names if name not in set(present)]
    return sorted(rest, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())[:how_many]


def how_many(name: str) -> str:
    """The question for a count."""
    return f"How many {plural(name)} are in the image?" if _is_words(name) else f"How many {name!r} are in the image?"


def is_there(name: str) -> str:
    """The question for presence."""
    if not _is_words(name):
        return f"Is there a {name!r} in the image?"
    if name.split()[-1] in _ALWAYS_PLURAL:
        return f"Are there {name} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def plural(name: str) -> str:
    """The English plural of a name of plain words; only its last word changes."""
    *before, last = name.split()
    if last in _ALWAYS_PLURAL:
        many = last
    elif last in _PLURALS:
        many = _PLURALS[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        many = last + "es"
    elif re.search(r"[^aeiou]y$", last):
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return " ".join([*before, many])


def _is_words(name: str) -> bool:
    """Plain small words; other names ("apc2016_obj3", "N/A") are quoted, not bent."""
    return re.fullmatch(r"[a-z]+(?:[ -][a-z]+)*", name) is not None


def join_names(wanted: Sequence[str], known: Mapping[str, object] | Sequence[str], where: str) -> None:
    """Names that a question joins on must be names of the annotations.

    Raises:
        SayoError: D62.
    """
    for name in wanted:
        if name not in known:
            raise SayoError(
                "D62",
                f"there is no category {name!r}{did_you_mean(name, list(known))}",
                where=where,
                wanted=", ".join(list(known)[:20]),
                fix="use the names of the annotation file",
            )
