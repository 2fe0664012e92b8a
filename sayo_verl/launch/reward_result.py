"""What a reward gives: found by calling it on a few rows before the run, else stated by the user.

A method that needs to know which answers are correct reads ``acc`` of the reward function. verl's managers pass on the
keys of a function that returns a dict, and set ``acc`` to the score of a function that returns a number. A reward model
gives a score alone.
"""

import copy
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig

from sayo_verl.errors import SayoError
from sayo_verl.launch.answer_forms import EMPTY, FORMS, Asked, Tried, check_forms
from sayo_verl.launch.reward_check import FUNCTION, is_ours, kwargs_of, load_function
from sayo_verl.methods import Method
from sayo_verl.reward import compute_score
from sayo_verl.reward.text import truth_text

CORRECT_FROM = "sayo.correct_from"
SECONDS = 10.0  # for all calls; a function that takes longer is not checked
ROWS = 2  # tried of each data source and form of prompt, in each file
SOURCES = 16  # data sources and forms of which rows are kept
WRONG = "no such answer 73519"
# verl's rules that run a response as a program
_PROGRAMS = ("codecontests", "apps", "codeforces", "taco")


class Sample(NamedTuple):
    """What a reward function gets of one row, beside the response."""

    asked: Asked
    where: str
    truth: Any
    extra_info: Any


class Result(NamedTuple):
    """What a reward gave.

    Attributes:
        keys: in every ``reward_extra_info``.
        numbers: the function returned a number somewhere, so ``acc`` is the score.
        acc: every ``acc`` that was seen.
        rewards: every reward that was seen.
        tried: scores by row and form.
        raised: text of the first error of a call, and how many of the calls raised one.
    """

    keys: frozenset[str]
    numbers: bool
    acc: frozenset[float]
    rewards: tuple[float, ...]
    tried: tuple[Tried, ...]
    raised: tuple[str, int]


def check_correct_from(value: Any) -> None:
    """Refuse a value of ``sayo.correct_from`` that is neither null, "acc" nor a number; L86."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value not in (None, "acc") and not number:
        raise SayoError(
            "L86",
            "unknown source of correctness",
            where=CORRECT_FROM,
            got=repr(value),
            wanted='null, "acc" or the smallest reward of a correct answer',
            fix="leave it null: the launcher finds acc by calling the reward function",
        )


def check_result(
    config: DictConfig, method: Method | None, samples: Sequence[Sample], counted: Counter[Asked], *, dry_run: bool
) -> str:
    """Check what the reward gives against what the run needs, and the form of answers.

    Args:
        config: the composed configuration; ``check_reward`` has passed.
        method: the run's method; None for an estimator of verl's own.
        samples: some rows.
        counted: rows of the run by data source and form.
        dry_run: report what cannot be found here instead of refusing it.

    Returns:
        A line for the plan.

    Raises:
        SayoError: L36 for a reward model with which verl fails, L52 for group filtering by a value that the reward does
            not give, L86 if the method needs ``acc`` and it is missing, has other values than 0 to 1, or cannot be
            found, L87 for a result that verl cannot use, L88 for data sources that verl has no rule for, L89 of
            ``check_forms``.
    """
    check_correct_from(config.sayo.get("correct_from"))
    _check_reward_model(config)
    function, unchecked = _callable(config)
    result = None
    if function is not None:
        result, unchecked = _call(config, function, samples)
    _check_correctness(config, method, result, unchecked, dry_run=dry_run)
    if result is None:
        return f"not checked: {unchecked}"
    _check_metric(config, result)
    fix = (
        "prepare the rows with `sayo prepare ... --prompt instruction`, or name a reward function that reads what they "
        "ask for"
        if is_ours(config)
        else "ask for the other form in the prompts, or name another reward function "
        "(pkg://sayo_verl.reward reads <answer>)"
    )
    template = str(config.actor_rollout_ref.model.get("custom_chat_template") or "")
    return "; ".join([_describe(result), *check_forms(result.tried, counted, template=template, fix=fix)])


def _describe(result: Result) -> str:
    line = f"{', '.join(sorted(result.keys))}{' (its score)' if result.numbers else ''}; "
    line += (
        f"rewards of {min(result.rewards):g} to {max(result.rewards):g} for {len(result.rewards)} synthetic responses"
    )
    first, n = result.raised
    return line + (f"; WARNING: {n} more calls raised an error, and verl drops such responses: {first}" if n else "")


def _check_reward_model(config: DictConfig) -> None:
    """Refuse a reward model without a function on devices of its own: in verl 0.9.1 each of its rollouts fails."""
    model = config.reward.reward_model
    if not model.enable:
        return
    if model.enable_resource_pool and config.reward.custom_reward_function.path is None:
        raise SayoError(
            "L36",
            "verl fails at the first rollout: its agent loop reads reward_extra_info, which a reward model without a "
            "reward function does not return",
            where="reward.reward_model.enable_resource_pool",
            got=True,
            fix=f"set it to False, or name a function that asks the model ({FUNCTION}.path)",
        )
    if not model.enable_resource_pool and config.algorithm.filter_groups.enable:
        raise SayoError(
            "L52",
            "a reward model on the devices of the policy gives its score after sampling, too late for group filtering",
            where="algorithm.filter_groups.enable",
            got=True,
            fix="set it to False, or use a reward function",
        )


def _callable(config: DictConfig) -> tuple[Callable[..., Any] | None, str]:
    """The function with the settings of the run, or None and why it is not called before the run."""
    from verl.utils.reward_score import default_compute_score

    reward, manager = config.reward, config.reward.reward_manager
    if reward.reward_model.enable:
        return None, "the reward model starts with the run"
    if manager.source != "register":
        return None, f"{manager.name} is a reward manager of your own"
    if manager.name == "rate_limited":
        return None, "the manager rate_limited is for services, which may cost money"
    if reward.custom_reward_function.path is None:
        return default_compute_score, ""
    function, kwargs = load_function(config), kwargs_of(config)
    if function is None:
        return None, "the reward function cannot be loaded here"
    if inspect.iscoroutinefunction(function):
        return None, "the reward function is async, so it may ask a service"
    if is_ours(config):
        function = compute_score
        kwargs.pop("length_tokenizer", None)  # it may still be missing in a dry run, and is loaded slowly
    return lambda **passed: function(**{**passed, **kwargs}), ""


def _call(config: DictConfig, function: Callable[..., Any], samples: Sequence[Sample]) -> tuple[Result | None, str]:
    """Call the function as verl does, in a thread that is left behind if it takes too long."""
    builtin, ours = config.reward.custom_reward_function.path is None, is_ours(config)
    samples = [one for one in samples if not (builtin and one.asked[0] in _PROGRAMS)]
    if not samples:
        return None, "no row can be tried"
    seen: list[tuple[Sample, str, Any]] = []
    done = threading.Event()

    def work() -> None:
        for sample in samples:
            for form, response in _responses(sample.truth, wrong=not ours):
                try:
                    found = function(
                        data_source=sample.asked[0],
                        solution_str=response,
                        ground_truth=copy.deepcopy(sample.truth),
                        # verl's managers add these keys
                        extra_info={
                            **copy.deepcopy(sample.extra_info or {}),
                            "num_turns": 2,
                            "rollout_reward_scores": {},
                            "experiment_name": str(config.trainer.experiment_name),
                        },
                    )
                except Exception as error:  # noqa: BLE001 (a user's function may raise anything; it is reported)
                    found = error
                seen.append((sample, form, found))
        done.set()

    thread = threading.Thread(target=work, daemon=True, name="sayo-reward-check")
    thread.start()
    thread.join(SECONDS)
    if not done.is_set():
        return None, f"the reward function takes more than {SECONDS:g} s for {len(seen) + 1} responses"
    return _read(seen, builtin=builtin)


def _responses(truth: Any, *, wrong: bool) -> list[tuple[str, str]]:
    """(name, response): an empty one, each form with the ground truth if that is text, and with a wrong answer."""
    answers = [("", truth_text(truth)), *([("wrong ", WRONG)] if wrong else [])]
    made = [
        (prefix + form, response.replace("%s", answer))
        for prefix, answer in answers
        if answer is not None
        for form, (_, response) in FORMS.items()
    ]
    return [(EMPTY, ""), *made]


def _read(seen: Sequence[tuple[Sample, str, Any]], *, builtin: bool) -> tuple[Result | None, str]:
    errors = [(sample, found) for sample, _, found in seen if isinstance(found, Exception)]
    said = [f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({one.where})" for one, error in errors]
    calls, failed = (Counter(sample.where for sample, *_ in found) for found in (seen, errors))
    for sample, error in errors if builtin else ():
        if failed[sample.where] == calls[sample.where]:
            _refuse_rule(sample, error)
    if len(errors) == len(seen):
        return None, f"WARNING: the reward function raises {said[0]}"
    keys: set[str] | None = None
    numbers, acc, rewards = False, set(), []
    scores: dict[tuple[Asked, str], dict[str, float]] = {}
    for sample, form, found in seen:
        if isinstance(found, Exception):
            continue
        info = _info(found, sample)
        numbers |= not isinstance(found, Mapping)
        keys = set(info) if keys is None else keys & set(info)
        reward = float(found["score"] if isinstance(found, Mapping) else found)
        rewards.append(reward)
        scores.setdefault((sample.asked, sample.where), {})[form] = reward
        if (value := _number(info.get("acc"))) is not None:
            acc.add(value)
    tried = tuple(Tried(asked, where, by_form) for (asked, where), by_form in scores.items())
    raised = (said[0] if said else "", len(errors))
    return Result(frozenset(keys or ()), numbers, frozenset(acc), tuple(rewards), tried, raised), ""


def _refuse_rule(sample: Sample, error: Exception) -> None:
    """Explain an error of verl's own rules, each of which a run would meet for every response."""
    if isinstance(error, NotImplementedError):
        raise SayoError(
            "L88",
            "verl has no reward for this data source",
            where=sample.where,
            got=sample.asked[0],
            wanted="a data source of verl.utils.reward_score.default_compute_score, such as hiyouga/geometry3k",
            fix=f"name a reward function: {FUNCTION}.path=pkg://sayo_verl.reward",
        ) from error
    raise SayoError(
        "L87",
        "verl's reward for this data source fails",
        where=sample.where,
        got=f"{sample.asked[0]}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
        fix="install the missing package, or correct the ground truth of the row"
        if not isinstance(error, ImportError)
        else f"pip install {error.name}",
    ) from error


def _info(found: Any, sample: Sample) -> Mapping[str, Any]:
    """``reward_extra_info`` as verl's managers make it.

    Raises:
        SayoError: L87 for a result that has no score.
    """
    score = found.get("score") if isinstance(found, Mapping) else found
    if _number(score) is None:
        raise SayoError(
            "L87",
            "the reward function returns no score",
            where=f"{FUNCTION}, called for {sample.where}",
            got=f"{found!r:.80}",
            wanted="a number, or a dict with 'score'",
            fix="return {'score': ..., 'acc': 0 or 1}",
        )
    return found if isinstance(found, Mapping) else {"acc": found}


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_correctness(
    config: DictConfig, method: Method | None, result: Result | None, unchecked: str, *, dry_run: bool
) -> None:
    """Refuse a method that needs to know which answers are correct, if the reward does not say it."""
    asked = config.sayo.get("correct_from")
    known = isinstance(asked, int | float) or is_ours(config)
    if method is None or not method.needs().correctness or known:
        return
    state = f"set {CORRECT_FROM} to the smallest reward of a correct answer"
    what, got = "", ""
    if config.reward.reward_model.enable and config.reward.custom_reward_function.path is None:
        what, got = "a reward model gives no acc", "a score"
    elif result is None:
        if asked == "acc" or dry_run:
            return
        what, got = "it is unknown whether the reward gives acc", f"not called before the run: {unchecked}"
        state = f"set {CORRECT_FROM}=acc if it returns acc, else to the smallest reward of a correct answer"
    elif "acc" not in result.keys:
        what, got = "the reward function does not return acc", ", ".join(sorted(result.keys))
    elif result.numbers and result.acc - {0.0, 1.0}:
        what = "the reward function returns a number only, which is not 0 or 1"
        got = ", ".join(f"{value:g}" for value in sorted(result.acc))
    elif any(not 0.0 <= value <= 1.0 for value in result.acc):
        what, got = "acc is out of range", ", ".join(f"{value:g}" for value in sorted(result.acc))
    if what:
        raise SayoError(
            "L86",
            f"the method rewards correct answers only, and {what}",
            where=f"{FUNCTION}, algorithm.adv_estimator={method.name}",
            got=got,
            wanted="acc, 1 for a correct answer and 0 for a wrong one",
            fix=f"return {{'score': ..., 'acc': ...}}, or {state}",
        )


def _check_metric(config: DictConfig, result: Result) -> None:
    """Refuse group filtering by a key that the reward does not give: verl stops at the first finished group."""
    groups = config.algorithm.filter_groups
    if groups.enable and groups.metric not in (known := {*result.keys, "reward"}):
        raise SayoError(
            "L52",
            "the reward function does not report the metric of dynamic sampling",
            where="algorithm.filter_groups.metric",
            got=groups.metric,
            wanted=", ".join(sorted(known)),
            fix="set it to one of these",
        )
