"""Checks of the reward before a run: the function and its settings, the manager that calls it, the chat template.

Error codes: L11, L19, L31 to L36.
"""

import functools
import inspect
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.model_check import model_folder
from sayo_verl.methods import Method, Mix
from sayo_verl.reward import TAGS, check_settings, compute_score
from sayo_verl.reward.formula import require_math_verify

FUNCTION = "reward.custom_reward_function"
KWARGS = f"{FUNCTION}.reward_kwargs"
# Keywords by which every reward manager of verl calls the function, and those beside a reward model.
PASSED = ("data_source", "solution_str", "ground_truth", "extra_info")
PASSED_BESIDE_MODEL = ("reward_router_address", "reward_model_tokenizer")
# verl/trainer/config/reward/reward.yaml, and what verl's managers read beside it (experimental/reward_loop).
KEYS: dict[str, tuple[str, ...]] = {
    "reward": ("_target_", "num_workers", "custom_reward_function", "reward_manager", "reward_model", "sandbox_fusion"),
    "reward.custom_reward_function": ("path", "name", "reward_kwargs"),
    "reward.reward_manager": ("_target_", "source", "name", "module"),
    "reward.reward_kwargs": ("overlong_buffer_cfg", "max_resp_len"),
}
MANAGER_KEYS: dict[str, tuple[str, ...]] = {
    "dapo": ("reward_kwargs",),
    "rate_limited": ("max_concurrent", "max_rpm", "max_tpm", "estimated_tokens_per_request", "timeout"),
}
# What the keys of earlier versions of verl are called today; the rest moves below reward.
_RENAMED = {
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_loop_source": "reward.reward_manager.source",
    "reward_model.reward_loop_module_path": "reward.reward_manager.module.path",
    "reward_model.reward_loop_class_name": "reward.reward_manager.name",
    "reward_model.model.path": "reward.reward_model.model_path",
}


def check_reward(config: DictConfig, method: Method | None, *, dry_run: bool) -> str:
    """Refuse a reward that fails later, is not what was set, or does not know which answers are right.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own.
        dry_run: report a reward function that cannot be loaded here instead of refusing it.

    Returns:
        One line for the plan.

    Raises:
        SayoError: L11 for keys that verl ignores, L19 for a file that is not there or cannot be loaded, L31 for a
            reward that no answer changes, L32 without math-verify, L34 for a setting that the function does not take,
            L35 for a function that is not there or does not take what verl passes, L36 for a manager or reward model
            that does not work with it.
    """
    _check_overrides(_kwargs(config))
    _check_legacy(config)
    _check_keys(config)
    _check_manager(config)
    path, name = config.reward.custom_reward_function.path, str(config.reward.custom_reward_function.name)
    if path is None:
        return "verl's built-in rule for the data source"
    file = _file(str(path))
    if file is not None and not file.is_file():
        raise SayoError(
            "L19",
            "there is no reward function file",
            where=f"{FUNCTION}.path",
            got=path,
            fix="use pkg://sayo_verl.reward or correct the path",
        )
    kwargs = _kwargs(config)
    plan = f"{path}:{name} {kwargs or ''}".strip()
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
    remarks = [_check_correctness(settings, method), _check_tokenizer(settings["length_tokenizer"], dry_run)]
    return "; ".join([plan, *filter(None, remarks)])


def _check_tokenizer(path: str | None, dry_run: bool) -> str:
    """Refuse a path of a tokenizer that is not there; other names are looked for on the hub."""
    local = path is not None and (
        path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    )
    if path is None or not local or Path(path).is_dir():
        return ""
    if dry_run:
        return f"{path} - NOT THERE YET, needed before the run"
    raise SayoError(
        "L34",
        "there is no tokenizer at this path",
        where=f"{KWARGS}.length_tokenizer",
        got=path,
        wanted="a model folder or hub name",
        fix="correct it; ~ is not expanded",
    )


def is_ours(config: DictConfig) -> bool:
    """Whether the run's reward function is ``sayo_verl.reward``'s, under whatever path and name it is loaded."""
    path, name = config.reward.custom_reward_function.path, config.reward.custom_reward_function.name
    function = None if path is None else getattr(_load(str(path))[0], str(name), None)
    # loaded from its file it is another object with the same code
    return getattr(function, "__code__", None) == compute_score.__code__


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
    kwargs = _kwargs(config)
    return {name: kwargs.get(name, defaults[name].default) for name in names}


def _kwargs(config: DictConfig) -> dict[str, Any]:
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
    """verl lets ``reward_kwargs`` replace what it passes itself: every response would have the same truth."""
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


def _check_keys(config: DictConfig) -> None:
    """Keys, added with "+", that neither verl nor sayo-verl reads."""
    manager = config.reward.reward_manager
    known = KEYS | {"reward": KEYS["reward"] + MANAGER_KEYS.get(str(manager.name), ()), "sayo": _sayo_keys()}
    if manager.source != "register":
        del known["reward"], known["reward.reward_kwargs"]  # a manager of the user's reads what it likes there
    for group, names in known.items():
        for key in OmegaConf.select(config, group) or ():
            if key not in names:
                value = OmegaConf.select(config, f"{group}.{key}")
                raise SayoError(
                    "L34",
                    f"nothing reads this key{did_you_mean(str(key), _names(names))}",
                    where=f"{group}.{key}",
                    got=value,
                    wanted=", ".join(_names(names)),
                    fix=f"correct the name; settings of a reward function stand in {KWARGS}"
                    if group != "sayo"
                    else "correct the name",
                )


def _names(keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if key != "_target_"]


@functools.cache
def _sayo_keys() -> tuple[str, ...]:
    """The keys of the group ``sayo`` that the package ships."""
    return tuple(OmegaConf.load(Path(__file__).parent.parent / "config" / "sayo_trainer.yaml").sayo)


def _check_legacy(config: DictConfig) -> None:
    """Keys that earlier versions read. verl 0.9.1 still composes them, and its trainer reads none."""
    for group in ("custom_reward_function", "reward_model", "sandbox_fusion"):
        for key, value in _leaves(config.get(group), group):
            if value is not None:
                raise SayoError(
                    "L11",
                    "verl 0.9 ignores this key of earlier versions",
                    where=key,
                    got=value,
                    fix=f"use {_RENAMED.get(key, f'reward.{key}')}",
                )


def _leaves(node: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(node, DictConfig):
        return [(prefix, node)]
    return [leaf for key in node for leaf in _leaves(node[key], f"{prefix}.{key!s}")]


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
    if manager.source == "register" and manager.name == "rate_limited" and is_ours(config):
        raise SayoError(
            "L36",
            "this manager turns every error of the reward function into reward 0",
            where=where,
            got=manager.name,
            fix="set it to naive; there is no service whose rate to limit",
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


def _function(module: Any, path: str, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        functions = [n for n in own if inspect.isfunction(vars(module)[n]) and not n.startswith("_")]
        raise SayoError(
            "L35",
            f"there is no such reward function{did_you_mean(name, functions)}",
            where=f"{FUNCTION}.name",
            got=name,
            wanted=f"a function of {path}: {', '.join(functions)}",
            fix="correct the name",
        )
    return function


def _check_kind(config: DictConfig, function: Callable[..., Any]) -> None:
    """Refuse what verl would not call as meant: it awaits a function defined with ``async def``, and nothing else."""
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
    """What verl passes and what the configuration sets, against the function's parameters."""
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
                    fix="correct the name or leave it out",
                )
    unset = [
        p.name for p in parameters if p.default is p.empty and p.name in named and p.name not in (*passed, *kwargs)
    ]
    if unset:
        raise SayoError(
            "L35",
            "the reward function needs settings that are not there",
            where=KWARGS,
            got=", ".join(kwargs) or "none",
            wanted=", ".join(unset),
            fix=f"add +{KWARGS}.{unset[0]}=...",
        )


def _check_correctness(settings: Mapping[str, Any], method: Method | None) -> str:
    """Refuse a reward that no answer changes; what to say about one whose method does not ask for the answer."""
    parts = method.methods if isinstance(method, Mix) else (method,)
    giving = [part for part in parts if part is not None and "reward" in part.gives]
    if settings["accuracy_weight"] > 0:
        return ""
    if not giving:
        alone = "trains on format alone" if settings["format_weight"] > 0 else "is 0 for every response"
        raise SayoError(
            "L31",
            f"nothing says which answer is right: the reward {alone}",
            where=f"{KWARGS}.accuracy_weight",
            got=settings["accuracy_weight"],
            wanted="more than 0",
            fix=f"put ACCURACY_WEIGHT=1 in front of the script, or set ++{KWARGS}.accuracy_weight=1",
        )
    if any(part.needs().correctness for part in giving):
        return ""
    what = "attention and format only" if settings["format_weight"] > 0 else "attention only"
    paper = ", the paper's setting" if any(part.name == "attn_region" for part in giving) else ""
    return f"{what}: nothing says which answer is right{paper}"


# ------------------------------------------------------------------------------------------------- the chat template


def check_template(config: DictConfig) -> str:
    """Whether the generation prompt has opened the think block, for our reward function.

    The prompt is rendered as verl does it: by the processor, else the tokenizer, with ``custom_chat_template`` and
    ``data.apply_chat_template_kwargs``. An empty block that the template adds and closes is the template's own:
    responses are graded without it.

    Returns:
        One line for the plan.

    Raises:
        SayoError: L33 for a ``think_opened`` that contradicts the template, and for a tokenizer that takes a tag for a
            special token: verl drops those from the text of a response. L33 also for a template that has opened the
            answer block: no response then holds ``<answer>``.
    """
    if not is_ours(config):
        return "-"
    found = _prompt(config)
    if isinstance(found, str):
        return f"not checked: {found}"
    released = own_settings(config)["format"] == "released"
    dropped = [tag for tag in (TAGS[2:] if released else TAGS) if tag in found.dropped]
    if dropped:
        raise SayoError(
            "L33",
            "the tokenizer takes a tag for a special token, and verl drops those from responses",
            where="actor_rollout_ref.model.path",
            got=", ".join(dropped),
            wanted="the tag as plain text",
            fix="add the token to the tokenizer with special=False",
        )
    if found.opens(TAGS[2], TAGS[3]):
        raise SayoError(
            "L33",
            "the chat template opens the answer block, and responses are read for <answer>",
            where="actor_rollout_ref.model.path",
            got=repr(found.text[-80:]),
            wanted="no open <answer>",
            fix="set actor_rollout_ref.model.custom_chat_template to one that does not",
        )
    if released:
        return "format=released reads no think block"
    asked = _kwargs(config).get("think_opened")
    if asked is not None and asked != found.opened:
        raise SayoError(
            "L33",
            f"the chat template {'opens' if found.opened else 'does not open'} the think block",
            where=f"{KWARGS}.think_opened",
            got=asked,
            wanted=found.opened,
            fix="leave it out: the launcher sets it from the template",
        )
    if found.opened:
        return "the chat template opens <think>: responses are graded as its continuation"
    if TAGS[1] in found.text:
        return "the chat template adds a closed think block: responses are graded without it"
    return "the chat template opens no <think>"


def describe_focus(config: DictConfig) -> str:
    """A line for the plan of ``attn_faithful``: whether prompts end in ``<Focus>``, which its anchoring stage trained.

    The reinforcement stage measures the attention of response tokens, so it runs without the token as well.
    """
    from sayo_verl.focus.token import FOCUS

    found = _prompt(config)
    if isinstance(found, str):
        return f"not checked: {found}"
    if found.text.endswith(FOCUS):
        return f"prompts end in {FOCUS}: the model is of the anchoring stage"
    return (
        f"prompts do not end in {FOCUS}: reinforcement alone. For both stages run the anchoring stage first "
        "(docs/anchoring.md) and give its folder as the model (MODEL_PATH=...), without a custom_chat_template"
    )


def configure(config: DictConfig) -> None:
    """Set ``think_opened`` of our reward function where the chat template has opened the think block."""
    found = _prompt(config) if is_ours(config) and own_settings(config)["format"] != "released" else ""
    if not isinstance(found, str) and found.opened:
        with open_dict(config):
            OmegaConf.update(config, f"{KWARGS}.think_opened", True, force_add=True)


@dataclass(frozen=True)
class _Prompt:
    """What stands between the user's message and the response, and the tags that decoding drops."""

    text: str
    dropped: tuple[str, ...]

    @property
    def opened(self) -> bool:
        return self.opens(TAGS[0], TAGS[1])

    def opens(self, start: str, end: str) -> bool:
        return self.text.rfind(start) > self.text.rfind(end)


def _prompt(config: DictConfig) -> _Prompt | str:
    model = config.actor_rollout_ref.model
    kwargs = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    path, remote = model.get("tokenizer_path") or model.path, bool(model.get("trust_remote_code", False))
    return _render(str(path), model.get("custom_chat_template"), json.dumps(kwargs), remote)


@functools.lru_cache(maxsize=1)
def _render(path: str, template: str | None, kwargs: str, trust_remote_code: bool) -> _Prompt | str:
    """The generation prompt, or why it cannot be had here."""
    if model_folder(path, dry_run=True) is None:
        return "the model is not on this machine"
    from jinja2 import TemplateError
    from verl.utils import hf_tokenizer
    from verl.utils.tokenizer.chat_template import apply_chat_template
    from verl.workers.config import model as verl_model

    content: Any = [{"type": "text", "text": "?"}]
    try:
        tokenizer = hf_tokenizer(path, trust_remote_code=trust_remote_code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # verl warns again in the run where there is no processor
            renderer = verl_model.hf_processor(path, trust_remote_code=trust_remote_code)
        if renderer is None:
            renderer, content = tokenizer, "?"
        renderer.chat_template = template or renderer.chat_template or tokenizer.chat_template
        asked, plain = (
            apply_chat_template(
                renderer,
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=generation,
                **json.loads(kwargs),
            )
            for generation in (True, False)
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, ArithmeticError, TemplateError) as error:
        said = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()), maxsplit=1)[0]  # its first sentence
        return f"no prompt can be rendered here ({type(error).__name__}: {textwrap.shorten(said, 200)})"
    decoded = {
        tag: tokenizer.decode(tokenizer.encode(tag, add_special_tokens=False), skip_special_tokens=True) for tag in TAGS
    }
    return _Prompt(asked.removeprefix(plain), tuple(tag for tag, text in decoded.items() if tag not in text))
