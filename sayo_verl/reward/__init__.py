"""The reward function for format and answer, by exact rules.

    <think> anything </think> <answer> ANSWER </answer>

 - format is 1 if the whole response is one think block followed by one answer block, with only white space around
   them, each tag exactly once, and a non-empty answer. Otherwise it is 0. With ``think_opened`` the prompt ends with
   ``<think>``, so the response starts inside the think block and must not write ``<think>`` again.
   ``format="released"`` is the rule of SAYO's released code: the last ``<answer>`` must be closed. Other text, think
   tags and an empty answer do not matter.
 - acc is 1 if the answer equals the ground truth, compared by ``sayo_verl.reward.text`` or, with ``judge="math"``, by
   math-verify (``sayo_verl.reward.formula``). It does not depend on format. The answer is the content of the only
   answer block, or of the last one with ``format="released"``. An answer longer than ``SLACK_CHARACTERS`` plus four
   times the ground truth is wrong without comparison. A ground truth of punctuation only equals no answer. Any other
   ground truth that cannot be graded (null, a list, tags, a solution; see ``why_not_gradable``) raises D70. verl then
   drops the group of that row and logs the error. The launcher refuses all of them earlier.
 - With ``length_tokenizer`` (a model folder or hub name) format is multiplied by the length factor of SAYO's released
   code, which its paper does not mention: 1 for 60 to 100 tokens, 0.6 * 100 / n above, 0.6 * n / 60 below. n is the
   number of tokens of the decoded response, tokenised again without the end token. Set it together with
   ``format="released"`` to match that code.
 - score = format_weight * format + accuracy_weight * acc. SAYO's total reward is r_v + r_f, so its accuracy weight is
   0. The estimator adds the region reward r_v, because attention is known there.

Rows of walks (data sources of ``sayo_verl.reward.walk``) are judged by a rule of their own, which reads no setting.

Nothing is evaluated or executed, and no signals or threads are used. The work is linear in the response, which is cut
at ``MAX_CHARACTERS``. Only ``judge="math"`` uses a worker process, for a limited time.

Error codes: D70 a ground truth that cannot be graded, D81 a row of a walk without one, L34 a setting out of range.
"""

import functools
import math
from typing import Any

from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.reward.formula import equal_formulas, same_letters
from sayo_verl.reward.text import (
    MAX_CHARACTERS,
    SLACK_CHARACTERS,
    TAGS,
    normalise,
    truth_text,
    why_not_gradable,
)
from sayo_verl.reward.walk import is_walk, judge_walk, walk_of

__all__ = [
    "FORMATS",
    "JUDGES",
    "MAX_CHARACTERS",
    "SLACK_CHARACTERS",
    "TAGS",
    "check_settings",
    "compute_score",
    "length_factor",
    "normalise",
    "split_response",
    "why_not_gradable",
]

FORMATS = ("think_answer", "released")
JUDGES = ("text", "math")


def split_response(response: str, *, format: str = FORMATS[0], think_opened: bool = False) -> tuple[bool, str | None]:
    """Return ``(format is valid, content of the answer block or None)``; see the rules above."""
    text = response[:MAX_CHARACTERS].strip()
    if format == "released":
        _, opened, last = text.rpartition("<answer>")
        closed = bool(opened) and "</answer>" in last
        return closed, (last.partition("</answer>")[0].strip() or None) if closed else None
    if think_opened:
        text = TAGS[0] + text
    places = [text.find(tag) for tag in TAGS]
    single = [text.count(tag) == 1 for tag in TAGS]
    answer = None
    if single[2] and single[3] and places[2] < places[3]:
        answer = text[places[2] + len("<answer>") : places[3]].strip()
    between = text[places[1] + len("</think>") : places[2]] if all(single) else "absent"
    valid = (
        all(single)
        and places == sorted(places)
        and places[0] == 0
        and not between.strip()
        and places[3] + len("</answer>") == len(text)
        and bool(answer)
    )
    return valid, answer or None


def length_factor(tokens: int, low: int = 60, high: int = 100) -> float:
    """Factor on the format reward in SAYO's released code, 1 within [low, high] tokens and at most 0.6 outside."""
    if tokens > high:
        return 0.6 * high / tokens
    return 1.0 if tokens >= low else 0.6 * tokens / low


def check_settings(
    *, format_weight: Any, accuracy_weight: Any, judge: Any, format: Any, think_opened: Any, length_tokenizer: Any
) -> None:
    """Refuse invalid settings of ``compute_score``.

    Raises:
        SayoError: L34.
    """
    no_tokenizer = length_tokenizer is not None and not (isinstance(length_tokenizer, str) and length_tokenizer.strip())
    raise_first(
        [
            _rule(not _weight(format_weight), "format_weight", format_weight, "a number of at least 0"),
            _rule(not _weight(accuracy_weight), "accuracy_weight", accuracy_weight, "a number of at least 0"),
            _rule(judge not in JUDGES, "judge", judge, " or ".join(JUDGES)),
            _rule(format not in FORMATS, "format", format, " or ".join(FORMATS)),
            _rule(not isinstance(think_opened, bool), "think_opened", think_opened, "true or false"),
            _rule(no_tokenizer, "length_tokenizer", length_tokenizer, "a model folder or hub name, or null"),
        ]
    )


def _rule(broken: bool, name: str, value: Any, wanted: str) -> Rule:
    return Rule(
        "L34",
        broken,
        f"{name} of the reward function is out of range",
        where=f"reward.custom_reward_function.reward_kwargs.{name}",
        got=repr(value),
        wanted=wanted,
        fix="correct the value",
    )


def _weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@functools.lru_cache(maxsize=1024)
def _why_not(truth: str, judge: str) -> str | None:
    return why_not_gradable(truth, judge=judge)


def _same(answer: str | None, truth: object, judge: str) -> bool:
    """Whether an answer equals the ground truth.

    Raises:
        SayoError: D70.
    """
    text = truth_text(truth)
    wanted = "" if text is None else normalise(text)
    if text is not None and not wanted:
        return False  # equals no answer
    reason = why_not_gradable(truth) if text is None else _why_not(text, judge)
    if text is None or reason is not None:
        raise SayoError(
            "D70",
            f"a ground truth cannot be graded: {reason}",
            where="reward_model.ground_truth",
            got=f"{truth!r:.80}",
            wanted="the answer only, as text or a number",
            fix="correct or remove the row",
        )
    if not answer or len(answer) > SLACK_CHARACTERS + 4 * len(text):
        return False
    if judge == "math":
        return (normalise(answer) == wanted and same_letters(answer, text)) or equal_formulas(answer, text)
    return normalise(answer) == wanted


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | float,
    extra_info: Any = None,
    *,
    format_weight: float = 1.0,
    accuracy_weight: float = 1.0,
    judge: str = JUDGES[0],
    format: str = FORMATS[0],
    think_opened: bool = False,
    length_tokenizer: str | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, Any]:
    """verl's reward function (``reward.custom_reward_function``).

    Args:
        data_source: of the row; those of walks have a rule of their own.
        solution_str: the decoded response.
        ground_truth: the answer, text or a number.
        extra_info: of the row; read for walks.
        format_weight: r_f for a well-formed response.
        accuracy_weight: w_acc; 0 in the paper.
        judge: how answers are compared: ``"text"``, or ``"math"`` for numbers and formulas, by math-verify.
        format: ``"think_answer"`` [ours] or ``"released"``, the rule of SAYO's released code.
        think_opened: the generation prompt opens the think block. The launcher sets it from the chat template.
        length_tokenizer: the policy's folder or hub name; enables the length factor.
        reward_router_address, reward_model_tokenizer: unused; verl passes them with a reward model.

    Returns:
        ``score``, ``acc`` and ``format``, the last two 0 or 1 (format without the length factor), and with
        ``length_tokenizer`` also ``length_factor``. For a walk ``score``, ``acc``, ``format`` and ``walk_marks``.

    Raises:
        SayoError: D70 for a ground truth that cannot be graded, D81 from ``walk_of``, L34 for a setting out of range,
            L32 and D71 from ``equal_formulas``.
    """
    check_settings(
        format_weight=format_weight,
        accuracy_weight=accuracy_weight,
        judge=judge,
        format=format,
        think_opened=think_opened,
        length_tokenizer=length_tokenizer,
    )
    if is_walk(data_source):
        return judge_walk(solution_str, walk_of(extra_info, ground_truth))
    valid, answer = split_response(solution_str, format=format, think_opened=think_opened)
    acc = float(_same(answer, ground_truth, judge))
    parts = {"acc": acc, "format": float(valid)}
    if length_tokenizer is not None:
        text = solution_str[:MAX_CHARACTERS]
        parts["length_factor"] = length_factor(len(_tokenizer(length_tokenizer).encode(text, add_special_tokens=False)))
    score = format_weight * parts["format"] * parts.get("length_factor", 1.0) + accuracy_weight * acc
    return {"score": score, **parts}
