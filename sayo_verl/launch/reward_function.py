"""The run's reward function: its module, whether it is ours, and its settings."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError
from sayo_verl.launch.unread_keys import KWARGS
from sayo_verl.reward import check_settings, compute_score

FUNCTION = "reward.custom_reward_function"


def is_ours(config: DictConfig) -> bool:
    """Whether the run's reward function is ``sayo_verl.reward``'s, under whatever path and name it is loaded."""
    # loaded from its file it is another object with the same code
    return getattr(load_function(config), "__code__", None) == compute_score.__code__


def load_function(config: DictConfig) -> Callable[..., Any] | None:
    """The run's reward function without its settings; None for verl's own, and for one that cannot be loaded."""
    path, name = config.reward.custom_reward_function.path, config.reward.custom_reward_function.name
    return None if path is None else getattr(load(str(path))[0], str(name), None)


def file_of(path: str) -> Path | None:
    """The file that a path of verl's ``load_module`` names; None for a package."""
    return None if path.startswith("pkg://") else Path(path.removeprefix("file://"))


def load(path: str) -> tuple[Any, Exception | None]:
    """The module of a reward function, or None and why it cannot be loaded; run once per state of the file."""
    file = file_of(path)
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
