"""The one kind of error a user of sayo-verl sees: what, where, got and wanted, how to fix it.

Every message has one shape, so that people can read it and a log can be searched for it:

    SAYO-P03: layer 36 does not exist | at algorithm.attn.layers | got 36, wanted -36..35 | fix: set ...

The letter of the code names the room it comes from: A advantage and methods, C compatibility with verl, D data,
F anchoring of the ``<Focus>`` token, L launch, P probe, R report, T tiny task, V vision, X environment.
"""

import difflib
from collections.abc import Iterable


class SayoError(RuntimeError):
    """A refusal with a code, a place, what was found, what was wanted and what to do.

    Args:
        code: letter and two digits, such as ``"D04"``; unique per kind of mistake.
        what: one sentence that names the mistake.
        where: configuration key, file, row id or verl name.
        fix: an instruction the reader can follow.
        got: what was found, if that helps.
        wanted: what is accepted, if that helps.
    """

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
        super().__init__(" | ".join(parts))

    def __reduce__(self):
        # Ray pickles errors between processes; keyword-only arguments need a hand.
        return _rebuild, (self.code, self.what, self.where, self.fix, self.got, self.wanted)


def _rebuild(code: str, what: str, where: str, fix: str, got: object, wanted: object) -> SayoError:
    return SayoError(code, what, where=where, fix=fix, got=got, wanted=wanted)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'attn_region'?)"`` for a near miss, else an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
