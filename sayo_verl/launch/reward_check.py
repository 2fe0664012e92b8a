"""Checks of the reward before a run: the function, its settings, and the manager that calls it."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.unread_keys import KWARGS, check_keys
from sayo_verl.methods import Method, Mix
from sayo_verl.reward import check_settings, compute_score
from sayo_verl.reward.formula import require_math_verify

FUNCTION = "reward.custom_reward_function"
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
        SayoError: L11 and L34 for keys that nothing reads, L19 for a file that is missing or cannot be loaded, L31 for
            a reward that does not depend on the answer, L32 without math-verify, L34 for a setting that the function
            does not take, L35 for a function that is missing or does not take what verl passes, L36 for a manager or
            reward model that does not work with it.
    """
    _check_overrides(kwargs_of(config))
    check_keys(config)
    _check_manager(config)
    path, name = config.reward.custom_reward_function.path, str(config.reward.custom_reward_function.name)
    if path is None:
        model = config.reward.reward_model
        if model.enable:
            return f"the score of the reward model {model.model_path}"
        return "verl's built-in rule for the data source"
    file = _file(str(path))
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
    module, error = _load(str(path))
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


def is_ours(config: DictConfig) -> bool:
    """Whether the run's reward function is ``sayo_verl.reward``'s, under whatever path and name it is loaded."""
    # loaded from its file it is another object with the same code
    return getattr(load_function(config), "__code__", None) == compute_score.__code__


def load_function(config: DictConfig) -> Callable[..., Any] | None:
    """The run's reward function without its settings; None for verl's own, and for one that cannot be loaded."""
    path, name = config.reward.custom_reward_function.path, config.reward.custom_reward_function.name
    return None if path is None else getattr(_load(str(path))[0], str(name), None)


def _file(path: str) -> Path | None:
    """The file that a path of verl's ``load_module`` names; None for a package."""
    return None if path.startswith("pkg://") else Path(path.removeprefix("file://"))


def _load(path: str) -> tuple[Any, Exception | None]:
    """The module of a reward function, or None and why it cannot be loaded; run once per state of the file."""
    file = _file(path)
    if file is None:
        return _load_once(path, None)
    if not file.is_file():
        return None, FileNotFoundError(path)
    return _load_once(str(file.resolve()), (file.stat().st_mtime_ns, file.stat().st_size))


@functools.lru_cache(maxsize=4)
def _load_once(path: str, state: tuple[int, int] | None) -> tuple[Any, Exception | None]:
    from verl.utils.import_utils import load_module

    try:
        return load_module(path), None
    except Exception as error:  # noqa: BLE001 (a user's module may raise anything; the caller reports it)
        return None, error


def own_settings(config: DictConfig) -> dict[str, Any]:
    """Settings of ``sayo_verl.reward.compute_score`` that are checked: those of the run over the defaults."""
    names = inspect.signature(check_settings).parameters
    defaults = inspect.signature(compute_score).parameters
    kwargs = kwargs_of(config)
    return {name: kwargs.get(name, defaults[name].default) for name in names}


def kwargs_of(config: DictConfig) -> dict[str, Any]:
    node = OmegaConf.select(config, KWARGS)
    kwargs = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(kwargs, Mapping | None):
        raise SayoError(
            "L34",
            "not a group of settings",
            where=KWARGS,
            got=repr(kwargs),
            wanted="settings by name",
            fix=f"set {KWARGS}.<name> to a value",
        )
    return {str(key): value for key, value in (kwargs or {}).items()}


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


def _check_manager(config: DictConfig) -> None:
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    manager, model = config.reward.reward_manager, config.reward.reward_model
    where, custom = "reward.reward_manager.name", config.reward.custom_reward_function.path is not None
    if manager.source == "register" and manager.name not in REWARD_MANAGER:
        raise SayoError(
            "L36",
            f"unknown reward manager{did_you_mean(str(manager.name), REWARD_MANAGER)}",
            where=where,
            got=manager.name,
            wanted=", ".join(sorted(REWARD_MANAGER)),
            fix="correct the name",
        )
    if manager.source != "register":
        _check_own_manager(manager)
    if manager.source == "register" and manager.name == "rate_limited" and is_ours(config):
        raise SayoError(
            "L36",
            "this manager turns every error of the reward function into reward 0",
            where=where,
            got=manager.name,
            fix="set it to naive; no service is called whose rate needs a limit",
        )
    if model.enable and is_ours(config):
        raise SayoError(
            "L36",
            "sayo_verl.reward does not ask a reward model",
            where="reward.reward_model.enable",
            got=True,
            fix="set it to False, or name a reward function that does",
        )
    if model.enable and custom and not model.enable_resource_pool:
        raise SayoError(
            "L36",
            "without devices of its own the reward model gets no data source or ground truth, and "
            "the reward function fails",
            where="reward.reward_model.enable_resource_pool",
            got=False,
            fix="set it to True, with nnodes and n_gpus_per_node beside it",
        )
    if model.enable and model.model_path is None:
        raise SayoError(
            "L36",
            "no reward model is named",
            where="reward.reward_model.model_path",
            got=None,
            wanted="a model folder or hub name",
            fix="set it, or set reward.reward_model.enable=False",
        )


def _check_own_manager(manager: DictConfig) -> None:
    """Load a manager of the user's as verl does; verl would do so when the models are there."""
    path, name = manager.module.path, str(manager.name)
    problem, where = "", "reward.reward_manager.module.path"
    if manager.source != "importlib":
        problem, where = "verl knows no such source", "reward.reward_manager.source"
    elif path is None:
        problem = "no file is named"
    else:
        module, error = _load(str(path))
        if error is not None:
            problem = f"it cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        elif not inspect.iscoroutinefunction(getattr(getattr(module, name, None), "run_single", None)):
            problem, where = "it has no such class with `async def run_single`", "reward.reward_manager.name"
    if problem:
        raise SayoError(
            "L36",
            f"a reward manager of your own: {problem}",
            where=where,
            got=OmegaConf.select(manager, where.removeprefix("reward.reward_manager.")),
            wanted="source=importlib, the file at module.path and the class at name",
            fix="correct it, or set reward.reward_manager.source=register and name=naive",
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
    """Refuse a reward that does not depend on the answer, unless the method gives one; then return a remark."""
    parts = method.methods if isinstance(method, Mix) else (method,)
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
