"""The form in which a prompt asks for the answer, and the form that a reward reads.

A reward is judged by its scores: it is called with the row's ground truth in each form of ``FORMS``, and with an empty
response. Nothing is concluded from its source, so this also works for functions of users.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from sayo_verl.errors import SayoError

EMPTY = ""
# In front of an answer. A template may open <think>, so that the response has the closing tag alone, or none.
THOUGHTS = ("<think>\n\n</think>\n", "\n</think>\n", "")
# Name of a form -> how a prompt names it, and an answer in it.
FORMS: dict[str, tuple[re.Pattern[str], str]] = {
    "<answer>": (re.compile(r"<answer>"), "<answer>%s</answer>"),
    "\\boxed{}": (re.compile(r"\\(?:boxed|fbox)\b"), "\\boxed{%s}"),
    "####": (re.compile(r"####"), "#### %s"),
    "Answer:": (re.compile(r"(?i)\banswer:"), "Answer: %s"),
}
# A prompt that names one of these asks for it. The others are also headings of a prompt.
ASKED = ("<answer>", "\\boxed{}")
# A form is refused if at least this share of a data source asks for it. One prompt may quote \boxed{} for its question.
SHARE = 0.5

Asked = tuple[str, tuple[str, ...]]  # data source, forms that the prompt names


class Tried(NamedTuple):
    """Scores of one row.

    Attributes:
        asked: data source and the forms that the prompt names.
        where: file and number of the row.
        scores: form -> score of the row's ground truth in it; ``EMPTY`` -> score of an empty response.
    """

    asked: Asked
    where: str
    scores: Mapping[str, float]


def forms_in(text: str) -> tuple[str, ...]:
    return tuple(name for name, (pattern, _) in FORMS.items() if pattern.search(text))


def check_forms(
    tried: Sequence[Tried], counted: Counter[Asked], *, kind: str = "training", template: str = "", fix: str = ""
) -> list[str]:
    """Refuse prompts that ask for a form which earns nothing, while another form does.

    Args:
        tried: scores of some rows.
        counted: rows of the split by data source and named forms.
        kind: of the split, for the message.
        template: a chat template of the run, which may name a form as well.
        fix: of the error.

    Returns:
        Warnings for the plan: forms that few prompts ask for.

    Raises:
        SayoError: L89.
    """
    warnings, also = [], forms_in(template)
    rows_of: Counter[str] = Counter()
    for (source, _), n in counted.items():
        rows_of[source] += n
    for asked in dict.fromkeys(one.asked for one in tried):
        named = {*asked[1], *also}
        wrong = [form for form in asked[1] if form in ASKED]
        rows = [one for one in tried if one.asked == asked]
        read = [read_form(one.scores, named) for one in rows]
        if not wrong or not all(read):
            continue
        n, of, source = counted[asked], rows_of[asked[0]], asked[0]
        share = f"{n} of {of} {kind} prompts of {source!r} ask for {' and '.join(wrong)}"
        if n < SHARE * of:
            warnings.append(f"WARNING: {share}, and the reward reads {read[0]} ({rows[0].where})")
            continue
        form = str(read[0])
        raise SayoError(
            "L89",
            "prompts ask for the answer in another form than the reward reads",
            where=rows[0].where,
            got=share,
            wanted=f"{form}: the ground truth scores {rows[0].scores[form]:g} in it, and "
            f"{max(rows[0].scores[name] for name in wrong):g} in {wrong[0]}, no more than an empty response",
            fix=fix,
        )
    return warnings


def read_form(scores: Mapping[str, float], named: Collection[str]) -> str | None:
    """The form that a reward reads if it reads none of the named ones; else None.

    >>> read_form({"": 0.0, "<answer>": 2.0, "\\\\boxed{}": 0.0}, ["\\\\boxed{}"])
    '<answer>'
    """
    if EMPTY not in scores or not all(form in scores for form in named):
        return None
    better = [form for form in FORMS if scores.get(form, scores[EMPTY]) > scores[EMPTY]]
    return better[0] if better and not set(better) & set(named) else None
