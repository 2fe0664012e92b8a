"""What a reward gives: found by calling it on a few rows before the run, else stated by the user.

A method that needs to know which answers are correct reads ``acc`` of the reward function. verl's managers pass on the
keys of a function that returns a dict, and set ``acc`` to the score of a function that returns a number. A reward model
gives a score alone.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sayo_verl.data.contract import PROGRAMS, RUNS_TEXT, runs_text
from sayo_verl.errors import SayoError
from sayo_verl.launch.answer_forms import EMPTY, FORMS, THOUGHTS, Asked, Tried, check_forms
from sayo_verl.launch.reward_call import Returned, call_all
from sayo_verl.launch.reward_function import FUNCTION, is_ours, kwargs_of, load_function
from sayo_verl.launch.training_check import check_filter_metric
from sayo_verl.methods import Method
from sayo_verl.reward import compute_score
from sayo_verl.reward.number import number
from sayo_verl.reward.text import truth_text

CORRECT_FROM = "sayo.correct_from"
SECONDS = 10.0  # for all calls; a function that takes longer is not checked
ROWS = 2  # tried of each data source and form of prompt, in each file
SOURCES = 16  # data sources and forms of which rows are kept
WRONG = "no such answer 73519"


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
        not_acc: the first ``acc`` that is no number.
        rewards: every reward that was seen.
        tried: scores by row and form.
        raised: text of the first error of a call, and how many of the calls raised one.
    """

    keys: frozenset[str]
    numbers: bool
    acc: frozenset[float]
    not_acc: str
    rewards: tuple[float, ...]
    tried: tuple[Tried, ...]
    raised: tuple[str, int]


def check_correct_from(value: Any) -> None:
    """Refuse a value of ``sayo.correct_from`` that is neither null, "acc" nor a number; L86."""
    least = isinstance(value, int | float) and not isinstance(value, bool) and number(value) is not None
    if value not in (None, "acc") and not least:
        raise SayoError(
            "L86",
            "unknown source of correctness",
            where=CORRECT_FROM,
            got=repr(value),
            wanted='null, "acc" or the smallest reward of a correct answer',
            fix="leave it null: the launcher finds acc by calling the reward function",
        )


def check_result(
    config: DictConfig,
    method: Method | None,
    samples: Mapping[str, Sequence[Sample]],
    counted: Mapping[str, Counter[Asked]],
    *,
    dry_run: bool,
) -> str:
    """Check what the reward gives against what the run needs, and the form of answers.

    Args:
        config: the composed configuration; ``check_reward`` has passed.
        method: the run's method; None for an estimator of verl's own.
        samples: some rows of each split whose responses are scored.
        counted: rows of these splits by data source and form.
        dry_run: report what cannot be found here instead of refusing it.

    Returns:
        A line for the plan.

    Raises:
        SayoError: D78 for verl's own rules that run the response as code, L52 for group filtering by a value that the
            reward does not give, L86 if the method needs ``acc`` and it is missing, has other values than 0 to 1, or
            cannot be found, and if the reward does not report another field that the method reads, L87 for a result
            that verl cannot use, L88 for data sources that verl has no rule for, L89 of ``check_forms``.
    """
    check_correct_from(config.sayo.get("correct_from"))
    _check_rules(config, counted)
    function, unchecked = _callable(config)
    result = None
    if function is not None:
        result, unchecked = _call(config, function, [sample for of_split in samples.values() for sample in of_split])
    _check_correctness(config, method, result, unchecked, dry_run=dry_run)
    _check_reported(config, method, result)
    if result is None:
        return f"not checked: {unchecked}"
    check_filter_metric(config, result.keys)
    fix = (
        "prepare the rows with `sayo prepare ... --prompt instruction`, or name a reward function that reads what they "
        "ask for"
        if is_ours(config)
        else "ask for the other form in the prompts, or name another reward function "
        "(pkg://sayo_verl.reward reads <answer>)"
    )
    template = str(config.actor_rollout_ref.model.get("custom_chat_template") or "")
    said = [_describe(config, result)]
    for split, of_split in samples.items():
        rows = {sample.where for sample in of_split}
        tried = [one for one in result.tried if one.where in rows]
        kind = {"train": "training", "val": "validation"}[split]
        said += check_forms(tried, counted[split], kind=kind, template=template, fix=fix)
    return "; ".join(said)


def _describe(config: DictConfig, result: Result) -> str:
    line, groups = f"{', '.join(sorted(result.keys))}; ", config.algorithm.filter_groups
    if result.numbers:
        line = f"a number, which verl also calls acc ({_listed(result.acc)}); "
        if groups.enable and groups.metric == "acc" and result.acc - {0.0, 1.0}:
            line += "the group filter compares this number, with what it gives for the form; "
    line += (
        f"rewards of {min(result.rewards):g} to {max(result.rewards):g} for {len(result.rewards)} synthetic responses"
    )
    first, n = result.raised
    return line + (f"; WARNING: {n} more calls raised an error, and verl drops such responses: {first}" if n else "")


def _listed(values: Collection[float]) -> str:
    """The values in order; of more than six, the first three and the last.

    >>> _listed({1.0, 0.5})
    '0.5, 1'
    """
    said = [f"{value:g}" for value in sorted(values)]
    return ", ".join(said if len(said) <= 6 else [*said[:3], "...", said[-1]])


def _check_rules(config: DictConfig, counted: Mapping[str, Collection[Asked]]) -> None:
    """Refuse data sources for which verl's own rule runs the response as code in a worker of the run; D78.

    Programs may run in a sandbox, which verl uses for these data sources only.
    """
    reward = config.reward
    if reward.custom_reward_function.path is not None or reward.reward_model.enable:
        return
    sandbox = OmegaConf.select(config, "reward.sandbox_fusion.url")
    for split, of_split in counted.items():
        for source, _ in of_split:
            if runs_text(source) and not (source in PROGRAMS and sandbox):
                raise SayoError(
                    "D78",
                    RUNS_TEXT,
                    where=f"data.{split}_files, data_source",
                    got=source,
                    wanted="another data source, or a reward function that is named",
                    fix=f"name one: {FUNCTION}.path=pkg://sayo_verl.reward"
                    + ("; or run the programs elsewhere: reward.sandbox_fusion.url=..." if source in PROGRAMS else ""),
                )


def _callable(config: DictConfig) -> tuple[Callable[..., Any] | None, str]:
    """The function with the settings of the run, or None and why it is not called before the run."""
    from verl.utils.reward_score import default_compute_score

    reward, manager = config.reward, config.reward.reward_manager
    if not config.sayo.get("call_reward", True):
        return None, "sayo.call_reward=False"
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
    """Call the function as verl does, with some responses to each row."""
    builtin, ours = config.reward.custom_reward_function.path is None, is_ours(config)
    samples = [one for one in samples if not (builtin and one.asked[0] in PROGRAMS)]
    if not samples:
        return None, "no row can be tried"
    tried = [
        (sample, form, response) for sample in samples for form, response in _responses(sample.truth, wrong=not ours)
    ]
    calls = [
        {
            "data_source": sample.asked[0],
            "solution_str": response,
            "ground_truth": sample.truth,
            # verl's managers add these keys
            "extra_info": {
                **(sample.extra_info or {}),
                "num_turns": 2,
                "rollout_reward_scores": {},
                "experiment_name": str(config.trainer.experiment_name),
            },
        }
        for sample, _, response in tried
    ]
    found, unchecked = call_all(function, calls, SECONDS)
    if unchecked:
        return None, unchecked
    seen = [(sample, form, one) for (sample, form, _), one in zip(tried, found, strict=True)]
    return _read(seen, builtin=builtin)


def _responses(truth: Any, *, wrong: bool) -> list[tuple[str, str]]:
    """(form, response): an empty one, each form with the ground truth if that is text, and with a wrong answer.

    The ground truth comes after each of ``THOUGHTS``: some rewards read only the response to a prompt that has opened
    <think>.
    """
    answer = truth_text(truth)
    right = [] if answer is None else [(form, THOUGHTS, answer) for form in FORMS]
    answers = [*right, *([(f"wrong {form}", THOUGHTS[:1], WRONG) for form in FORMS] if wrong else [])]
    return [
        (EMPTY, ""),
        *(
            (form, thought + FORMS[form.removeprefix("wrong ")][1].replace("%s", answer))
            for form, thoughts, answer in answers
            for thought in thoughts
        ),
    ]


def _read(seen: Sequence[tuple[Sample, str, Returned]], *, builtin: bool) -> tuple[Result | None, str]:
    errors = [(sample, found) for sample, _, found in seen if found.error]
    said = [f"{found.error} ({sample.where})" for sample, found in errors]
    calls, failed = (Counter(sample.where for sample, *_ in found) for found in (seen, errors))
    for sample, found in errors if builtin else ():
        if failed[sample.where] == calls[sample.where]:
            _refuse_rule(sample, found)
    if len(errors) == len(seen):
        return None, f"WARNING: the reward function raises {said[0]}"
    returned = [(sample, form, found) for sample, form, found in seen if not found.error]
    scores: dict[tuple[Asked, str], dict[str, float]] = {}
    rewards = []
    for sample, form, found in returned:
        rewards.append(reward := _score(found, sample))
        # the better of the responses of a form
        of_row = scores.setdefault((sample.asked, sample.where), {})
        of_row[form] = max(reward, of_row.get(form, reward))
    gave = [found for *_, found in returned]
    return Result(
        keys=frozenset.intersection(*(frozenset({"acc"}) if one.keys is None else one.keys for one in gave)),
        numbers=any(one.keys is None for one in gave),
        acc=frozenset(one.acc for one in gave if one.acc is not None),
        not_acc=next((one.acc_text for one in gave if one.acc_text), ""),
        rewards=tuple(rewards),
        tried=tuple(Tried(asked, where, by_form) for (asked, where), by_form in scores.items()),
        raised=(said[0] if said else "", len(errors)),
    ), ""


def _refuse_rule(sample: Sample, found: Returned) -> None:
    """Explain an error of verl's own rules, each of which a run would meet for every response."""
    if found.unknown:
        raise SayoError(
            "L88",
            "verl has no reward for this data source",
            where=sample.where,
            got=sample.asked[0],
            wanted="a data source of verl.utils.reward_score.default_compute_score, such as hiyouga/geometry3k",
            fix=f"name a reward function: {FUNCTION}.path=pkg://sayo_verl.reward",
        )
    raise SayoError(
        "L87",
        "verl's reward for this data source fails",
        where=sample.where,
        got=f"{sample.asked[0]}: {found.error}",
        fix=f"pip install {found.missing}"
        if found.missing
        else "install the missing package, or correct the ground truth of the row",
    )


def _score(found: Returned, sample: Sample) -> float:
    """The score that verl's managers read.

    Raises:
        SayoError: L87 for a result that has none.
    """
    if found.score is None:
        raise SayoError(
            "L87",
            "the reward function returns no score",
            where=f"{FUNCTION}, called for {sample.where}",
            got=found.text,
            wanted="a number, or a dict with 'score'",
            fix="return {'score': ..., 'acc': 0 or 1}",
        )
    if found.unusable:
        raise SayoError(
            "L87",
            "verl cannot use the score of the reward function",
            where=f"{FUNCTION}, called for {sample.where}",
            got=f"{found.text}: {found.unusable}",
            wanted="a number of Python",
            fix="return float(...) of the score",
        )
    return found.score


def _check_correctness(
    config: DictConfig, method: Method | None, result: Result | None, unchecked: str, *, dry_run: bool
) -> None:
    """Refuse a method that needs to know which answers are correct, if the reward does not say it."""
    asked = config.sayo.get("correct_from")
    known = isinstance(asked, int | float) or is_ours(config)
    if method is None or not method.needs().correctness or known:
        return
    state = f"set {CORRECT_FROM} to the smallest reward of a correct answer"
    what, got, fix = "", "", f"return {{'score': ..., 'acc': ...}}, or {state}"
    if config.reward.reward_model.enable and config.reward.custom_reward_function.path is None:
        what, got = "a reward model gives no acc", "a score"
        fix = f"{state}, or name a function that asks the model ({FUNCTION}.path)"
    elif result is None:
        if asked == "acc" or dry_run:
            return
        what, got = "it is unknown whether the reward gives acc", f"not called before the run: {unchecked}"
        fix = f"set {CORRECT_FROM}=acc if it returns acc, else to the smallest reward of a correct answer"
    elif "acc" not in result.keys:
        what, got = "the reward function does not return acc", ", ".join(sorted(result.keys))
    elif result.not_acc:
        what, got = "acc is no number", result.not_acc
    elif result.numbers and result.acc - {0.0, 1.0}:
        what, got = "the reward function returns a number only, which is not 0 or 1", _listed(result.acc)
    elif any(not 0.0 <= value <= 1.0 for value in result.acc):
        what, got = "acc is out of range", _listed(result.acc)
    if what:
        raise SayoError(
            "L86",
            f"the method needs to know which answers are correct, and {what}",
            where=f"{FUNCTION}, algorithm.adv_estimator={method.name}",
            got=got,
            wanted="acc, 1 for a correct answer and 0 for a wrong one",
            fix=fix,
        )


def _check_reported(config: DictConfig, method: Method | None, result: Result | None) -> None:
    """Refuse a method that reads a field which the reward does not report.

    Of a function that is not called before the run nothing is known here; the first step says what is missing (A23).
    """
    names = [] if method is None else [one.name for one in method.needs().reported]
    alone = config.reward.reward_model.enable and config.reward.custom_reward_function.path is None
    if method is None or not (result or alone):
        return
    keys = frozenset() if result is None else result.keys
    for name in names:
        if name not in keys:
            raise SayoError(
                "L86",
                f"the method reads {name}, which the reward does not report",
                where=f"{FUNCTION}, algorithm.adv_estimator={method.name}",
                got="a score, of a reward model" if alone else ", ".join(sorted(keys)),
                wanted=f"a key {name!r} in what the reward function returns",
                fix=f"return {{'score': ..., {name!r}: ...}}, or choose another method",
            )
