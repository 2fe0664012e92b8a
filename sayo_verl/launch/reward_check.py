"""Checks of the reward function and its settings before a run."""

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.reward_function import FUNCTION, file_of, is_ours, kwargs_of, load, own_settings
from sayo_verl.launch.reward_manager_check import check_manager
from sayo_verl.launch.unread_keys import KWARGS, check_keys
from sayo_verl.methods import EvidenceMethod, Method, Mix
from sayo_verl.reward import check_settings, compute_score
from sayo_verl.reward.formula import require_math_verify

# Keywords with which every reward manager of verl calls the function, and those added with a reward model.
PASSED = ("data_source", "solution_str", "ground_truth", "extra_info")
PASSED_BESIDE_MODEL = ("reward_router_address", "reward_model_tokenizer")


def check_reward(
    config: DictConfig, method: Method | None, *, given: Collection[str] = (), dry_run: bool = False
) -> str:
    """Refuse a reward that fails later, ignores its settings, or does not depend on the answer.

    Args:
        config: the composed configuration; ``_leave_out`` changes it.
        method: the run's method; None for an estimator of verl's own.
        given: keys of the command line.
        dry_run: report a reward function that cannot be loaded here instead of refusing it.

    Returns:
        One line for the plan.

    Raises:
        SayoError: A24 for a reward of correctness that is not the one that the method replaces, L11 and L34 for keys
            that nothing reads, L19 for a file that is missing or cannot be loaded, L31 for a reward that does not
            depend on the answer, L32 without math-verify, L34 for a setting that the function does not take, L35 for a
            function that is missing or does not take what verl passes, L36 for a manager or reward model that does not
            work with it.
    """
    _check_overrides(kwargs_of(config))
    check_keys(config)
    check_manager(config)
    path, name = config.reward.custom_reward_function.path, str(config.reward.custom_reward_function.name)
    if path is None:
        model = config.reward.reward_model
        if model.enable:
            return f"the score of the reward model {model.model_path}"
        return "verl's built-in rule for the data source"
    file = file_of(str(path))
    if file is not None and not file.is_file():
        raise SayoError(
            "L19",
            "the file of the reward function does not exist",
            where=f"{FUNCTION}.path",
            got=path,
            fix="use pkg://sayo_verl.reward or correct the path",
        )
    left_out, kwargs = _leave_out(config, given), kwargs_of(config)
    plan = f"{path}:{name} {kwargs or ''}".strip()
    if left_out:
        plan += f"; without the job's settings of sayo_verl.reward ({', '.join(left_out)})"
    module, error = load(str(path))
    if error is not None:
        reason = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:200]}"
        if dry_run:
            return f"{plan} - NOT CHECKED, it cannot be loaded here ({reason})"
        raise SayoError(
            "L19",
            "the reward function cannot be loaded",
            where=f"{FUNCTION}.path",
            got=f"{path} ({reason})",
            fix="correct the module",
        ) from error
    function = _function(module, str(path), name)
    _check_kind(config, function)
    _check_arguments(config, function, kwargs)
    if not is_ours(config):
        return plan
    settings = own_settings(config)
    check_settings(**settings)
    if settings["judge"] == "math":
        require_math_verify()
    judge = "" if "judge" in kwargs else f"judge {settings['judge']}"
    remarks = [judge, _check_correctness(settings, method), _check_tokenizer(settings["length_tokenizer"], dry_run)]
    return "; ".join([plan, *filter(None, remarks)])


def _leave_out(config: DictConfig, given: Collection[str]) -> list[str]:
    """Remove a job's settings of ``sayo_verl.reward`` if the command line names another function; return their names.

    Hydra merges ``reward_kwargs`` of the job, and verl would pass them on.
    """
    if f"{FUNCTION}.path" not in given or is_ours(config):
        return []
    ours = inspect.signature(compute_score).parameters
    names = [name for name in kwargs_of(config) if name in ours and f"{KWARGS}.{name}" not in given]
    with open_dict(config):
        for name in names:
            del config.reward.custom_reward_function.reward_kwargs[name]
    return names


def _check_tokenizer(path: str | None, dry_run: bool) -> str:
    """Refuse a path without a tokenizer; other names are looked up on the hub."""
    local = path is not None and (
        path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    )
    if path is None or not local or Path(path).is_dir():
        return ""
    if dry_run:
        return f"{path} - NOT THERE YET, needed before the run"
    raise SayoError(
        "L34",
        "no tokenizer at this path",
        where=f"{KWARGS}.length_tokenizer",
        got=path,
        wanted="a model folder or hub name",
        fix="correct it; ~ is not expanded",
    )


def _check_overrides(kwargs: Mapping[str, Any]) -> None:
    """verl lets ``reward_kwargs`` replace its own arguments: every response would have the same truth."""
    for key in kwargs:
        if key in PASSED + PASSED_BESIDE_MODEL:
            raise SayoError(
                "L34",
                "this setting would replace what verl passes for each response",
                where=f"{KWARGS}.{key}",
                got=repr(kwargs[key]),
                wanted="settings of the function's own",
                fix="leave it out",
            )


def _function(module: Any, path: str, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        functions = [n for n in own if inspect.isfunction(vars(module)[n]) and not n.startswith("_")]
        raise SayoError(
            "L35",
            f"unknown reward function{did_you_mean(name, functions)}",
            where=f"{FUNCTION}.name",
            got=name,
            wanted=f"a function of {path}: {', '.join(functions)}",
            fix="correct the name",
        )
    return function


def _check_kind(config: DictConfig, function: Callable[..., Any]) -> None:
    """Refuse what verl would not call correctly: it awaits only a function defined with ``async def``."""
    asynchronous = inspect.iscoroutinefunction(function)
    hidden = [
        f
        for f in (inspect.unwrap(function), getattr(function, "__call__", None))  # noqa: B004 (its kind)
        if inspect.iscoroutinefunction(f)
    ]
    kind, fix = "", "name a function defined with def or async def"
    if inspect.isclass(function):
        kind = "a class"
    elif hidden and not asynchronous:
        kind = "a wrapper around an async function: verl does not await it and takes the coroutine as the score"
        fix = "name a function defined with async def; or with def, without functools.wraps, that runs it"
    else:
        try:
            inspect.signature(function)
        except ValueError:
            kind = "a function without a signature"
    if kind:
        raise SayoError(
            "L35",
            f"the reward function is {kind}",
            where=f"{FUNCTION}.name",
            got=f"{function!r:.80}",
            wanted="a function",
            fix=fix,
        )
    manager = config.reward.reward_manager
    if asynchronous and manager.source == "register" and manager.name == "remote":
        raise SayoError(
            "L36",
            "this manager does not await an async reward function",
            where="reward.reward_manager.name",
            got=manager.name,
            fix="set it to naive, or define the function with def",
        )


def _check_arguments(config: DictConfig, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Compare what verl passes and what the configuration sets with the function's parameters."""
    passed = PASSED + (PASSED_BESIDE_MODEL if config.reward.reward_model.enable else ())
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        absent = [key for key in passed if key not in named]
        if absent:
            raise SayoError(
                "L35",
                "the reward function does not take what verl passes",
                where=f"{FUNCTION}.name",
                got=f"parameters {', '.join(named)}",
                wanted=", ".join(passed),
                fix=f"add the parameters {', '.join(absent)}, or **kwargs",
            )
        settable = [name for name in named if name not in PASSED + PASSED_BESIDE_MODEL]
        for key in kwargs:
            if key not in named:
                raise SayoError(
                    "L34",
                    f"the reward function has no setting {key!r}{did_you_mean(key, settable)}",
                    where=f"{KWARGS}.{key}",
                    got=kwargs[key],
                    wanted=", ".join(settable) or "none",
                    fix=f"correct the name or leave it out; ~{KWARGS}.{key} removes one that a job's file sets",
                )
    unset = [
        p.name for p in parameters if p.default is p.empty and p.name in named and p.name not in (*passed, *kwargs)
    ]
    if unset:
        raise SayoError(
            "L35",
            "the reward function needs settings that are missing",
            where=KWARGS,
            got=", ".join(kwargs) or "none",
            wanted=", ".join(unset),
            fix=f"add +{KWARGS}.{unset[0]}=...",
        )


def _check_correctness(settings: Mapping[str, Any], method: Method | None) -> str:
    """Refuse a reward that does not depend on the answer, unless the method gives one; then return a remark.

    Raises:
        SayoError: L31, A24.
    """
    parts = method.methods if isinstance(method, Mix) else (method,)
    for part in parts:
        if isinstance(part, EvidenceMethod) and part.gives and part.replaced != settings["accuracy_weight"]:
            raise SayoError(
                "A24",
                "the method takes the place of a correct answer's reward, and the reward function gives another one",
                where="algorithm.attn.evidence.replaced",
                got=f"{part.replaced:g}; {KWARGS}.accuracy_weight={settings['accuracy_weight']:g}",
                wanted="equal numbers",
                fix=f"set algorithm.attn.evidence.replaced={settings['accuracy_weight']:g}",
            )
    giving = [part for part in parts if part is not None and "reward" in part.gives]
    if settings["accuracy_weight"] > 0:
        return ""
    if not giving:
        alone = "trains on format alone" if settings["format_weight"] > 0 else "is 0 for every response"
        raise SayoError(
            "L31",
            f"the reward does not depend on the answer: it {alone}",
            where=f"{KWARGS}.accuracy_weight",
            got=settings["accuracy_weight"],
            wanted="more than 0",
            fix=f"set ++{KWARGS}.accuracy_weight=1",
        )
    if any(part.needs().correctness for part in giving):
        return ""
    what = "attention and format only" if settings["format_weight"] > 0 else "attention only"
    paper = ", the paper's setting" if any(part.name == "attn_region" for part in giving) else ""
    return f"{what}: the reward does not depend on the answer{paper}"
