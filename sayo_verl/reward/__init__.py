"""The reward function: format and answer, by exact rules.

    <think> anything </think> <answer> ANSWER </answer>

 - format is 1 when the whole response is one think block followed by one answer block, with nothing but white space
   around them, each tag exactly once, and a non-empty answer; otherwise 0.
 - acc is 1 when the response has exactly one answer block and its content equals the ground truth after normalising:
   Unicode NFKC, lower case, white space collapsed, surrounding punctuation and a leading "the", "a" or "an" dropped.
   Numbers are compared as text ("3" is not "3.0"). It does not depend on format. An answer of more than
   ``SLACK_CHARACTERS`` plus four times the ground truth is wrong unread: normalising marks takes quadratic time.
 - With ``length_tokenizer`` (a model folder or hub name) format is multiplied by the length factor of SAYO's released
   code, which its paper does not mention: 1 for 60 to 100 tokens, 0.6 * 100 / n above, 0.6 * n / 60 below. n counts the
   decoded response tokenised again, without the end token.
 - score = format_weight * format + accuracy_weight * acc. SAYO's total reward is r_v + r_f, so its accuracy weight is
   0; the region reward r_v joins in the estimator, where attention is known.

Nothing is evaluated or executed, no signals or threads are used, and the work is linear in the response, which is cut
at ``MAX_CHARACTERS``.
"""

import functools
from typing import Any

from sayo_verl.reward.text import MAX_CHARACTERS, SLACK_CHARACTERS, TAGS, normalise, truth_text, why_not_gradable

__all__ = [
    "MAX_CHARACTERS",
    "SLACK_CHARACTERS",
    "compute_score",
    "length_factor",
    "normalise",
    "split_response",
    "why_not_gradable",
]


def split_response(response: str) -> tuple[bool, str | None]:
    """``(format is right, content of the only answer block or None)``."""
    text = response[:MAX_CHARACTERS].strip()
    places = [text.find(tag) for tag in TAGS]
    single = [text.count(tag) == 1 for tag in TAGS]
    answer = None
    if single[2] and single[3] and places[2] < places[3]:
        answer = text[places[2] + len("<answer>") : places[3]].strip()
    between = text[places[1] + len("</think>") : places[2]] if all(single) else "absent"
    right = (
        all(single)
        and places == sorted(places)
        and places[0] == 0
        and not between.strip()
        and places[3] + len("</answer>") == len(text)
        and bool(answer)
    )
    return right, answer or None


def length_factor(tokens: int, low: int = 60, high: int = 100) -> float:
    """Factor on the format reward in SAYO's released code: 1 within [low, high] tokens, at most 0.6 outside."""
    if tokens > high:
        return 0.6 * high / tokens
    return 1.0 if tokens >= low else 0.6 * tokens / low


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Any = None,
    *,
    format_weight: float = 1.0,
    accuracy_weight: float = 1.0,
    length_tokenizer: str | None = None,
    **_ignored: Any,
) -> dict[str, float]:
    """verl's reward function (``reward.custom_reward_function``).

    Args:
        data_source: unused; verl passes it.
        solution_str: the decoded response.
        ground_truth: the answer.
        extra_info: unused; verl passes it.
        format_weight: r_f for a well-formed response.
        accuracy_weight: w_acc; 0 in the paper.
        length_tokenizer: switches the length factor on; the policy's folder or hub name.

    Returns:
        ``score``, ``acc`` and ``format``, the last two 0 or 1 (format without the length factor), and with
        ``length_tokenizer`` also ``length_factor``.
    """
    right, answer = split_response(solution_str)
    truth = truth_text(ground_truth) or ""
    longest = SLACK_CHARACTERS + 4 * len(truth)
    acc = float(answer is not None and len(answer) <= longest and normalise(answer) == normalise(truth) != "")
    parts = {"acc": acc, "format": float(right)}
    if length_tokenizer is not None:
        text = solution_str[:MAX_CHARACTERS]
        parts["length_factor"] = length_factor(len(_tokenizer(length_tokenizer).encode(text, add_special_tokens=False)))
    score = format_weight * parts["format"] * parts.get("length_factor", 1.0) + accuracy_weight * acc
    return {"score": score, **parts}
