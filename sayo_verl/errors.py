"""The one kind of error a user of sayo-verl sees: what, where, got and wanted, how to fix it.

Every message has one shape, so that people can read it and a log can be searched for it:

    SAYO-P03: layer 36 does not exist | at algorithm.attn.layers | got 36, wanted -36..35 | fix: set ...

The letter of a code names the area (``AREAS``). The class of an error follows from its code (``kind_of``), so
``raise SayoError("D02", ...)`` raises a ``DataError``. docs/errors.md lists all codes.
"""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from sayo_verl.redact import redact

AREAS = {
    "A": "Advantages and methods",
    "C": "Model families on verl",
    "D": "Data",
    "E": "Evaluation",
    "F": "Training of the <Focus> token",
    "L": "Launch",
    "P": "Probe of attention",
    "R": "Reports",
    "T": "Tiny task",
    "V": "Boxes, grids and changed images",
    "W": "Where a model looks: look and diagnose",
    "X": "Plug-in and verl",
}


class SayoError(RuntimeError):
    """An error with a code, a place, what was found, what was wanted and what to do.

    The constructor makes an instance of the subclass that belongs to the code.

    Args:
        code: letter and two digits, such as ``"D04"``; unique per kind of mistake.
        what: one sentence that names the mistake.
        where: configuration key, file, row id or verl name.
        fix: an instruction the reader can follow.
        got: what was found, if that helps.
        wanted: what is accepted, if that helps.

    Attributes:
        row: index in the batch, of an error whose row of data the trainer can name.
    """

    row: int | None = None

    def __new__(cls, code: str = "", *_: object, **__: object) -> "SayoError":
        return super().__new__(kind_of(code) if cls is SayoError else cls)

    def __init__(
        self, code: str, what: str, *, where: str, fix: str, got: object | None = None, wanted: object | None = None
    ) -> None:
        self.code, self.what, self.where, self.fix = code, what, where, fix
        self.got, self.wanted = got, wanted
        found = [f"got {got}"] if got is not None else []
        found += [f"wanted {wanted}"] if wanted is not None else []
        parts = [f"SAYO-{code}: {what}", f"at {where}"]
        if found:
            parts.append(", ".join(found))
        parts.append(f"fix: {fix}")
        super().__init__(redact(" | ".join(parts)))

    def __reduce__(self):
        # Ray pickles errors between processes; keyword-only arguments need a hand
        make = functools.partial(type(self), where=self.where, fix=self.fix, got=self.got, wanted=self.wanted)
        return make, (self.code, self.what), self.__dict__


class ConfigError(SayoError, ValueError):
    """A setting or an option cannot be used."""


class DataError(SayoError):
    """A row, an image, a box, or a file of data is missing or wrong."""


class ProbeError(SayoError):
    """Attention, or what a method computes from it, is missing or does not fit the batch."""


class SetupError(SayoError):
    """A model, a package, verl, a device or a recorded run is not what the code was written for."""


# A letter, or the whole code where an error is of another kind than its letter.
KINDS: dict[str, type[SayoError]] = {
    **dict.fromkeys("L", ConfigError),
    **dict.fromkeys("D", DataError),
    **dict.fromkeys("APV", ProbeError),
    **dict.fromkeys("CEFRTWX", SetupError),
    **dict.fromkeys(
        ("A05", "A12", "A14", "D20", "D46", "D57", "D80", "D83", "F05", "F21", "F23", "V04", "X10"), ConfigError
    ),
    **dict.fromkeys(("F26", "F27", "F28", "F29", "F30", "F31", "F32"), ConfigError),
    **dict.fromkeys(("X30", "X31", "X32", "X33", "X34", "X35", "X36"), ConfigError),
    **dict.fromkeys(("F10", "F13", "F14", "F20", "F22", "F24", "V01", "V02", "V03"), DataError),
    **dict.fromkeys(("A15", "A27", "A28", "A29", "A30", "D71", "L28", "L32"), SetupError),
}


def kind_of(code: str) -> type[SayoError]:
    """The class of a code; ``SayoError`` itself for a letter that is not in ``AREAS``."""
    return KINDS.get(code) or KINDS.get(code[:1], SayoError)


@dataclass(frozen=True)
class Rule:
    """One check of a list of checks.

    Attributes:
        code, what, where, fix, got, wanted: as of ``SayoError``.
        broken: whether the mistake was made.
    """

    code: str
    broken: bool
    what: str
    where: str
    fix: str
    got: object | None = None
    wanted: object | None = None


def raise_first(rules: Iterable[Rule]) -> None:
    """Raise the error of the first broken rule, if there is one."""
    for rule in rules:
        if rule.broken:
            raise SayoError(rule.code, rule.what, where=rule.where, got=rule.got, wanted=rule.wanted, fix=rule.fix)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'attn_region'?)"`` for a near miss, else an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
