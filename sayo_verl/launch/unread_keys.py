"""Keys of a reward, and of ``sayo``, that nothing reads: misspelt ones, and those of earlier versions of verl."""

import functools
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError, did_you_mean

KWARGS = "reward.custom_reward_function.reward_kwargs"
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


def check_keys(config: DictConfig) -> None:
    """Refuse keys of the groups ``reward`` and ``sayo`` that nothing reads.

    Raises:
        SayoError: L11 for a key of an earlier version of verl, L34 for one, added with "+", that neither verl nor
            sayo-verl reads.
    """
    _check_legacy(config)
    manager = config.reward.reward_manager
    known = KEYS | {"reward": KEYS["reward"] + MANAGER_KEYS.get(str(manager.name), ()), "sayo": _sayo_keys()}
    if manager.source != "register":
        del known["reward"], known["reward.reward_kwargs"]  # a manager of the user's may read any key there
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
                    fix=f"correct the name; settings of a reward function are keys of {KWARGS}"
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
    """verl 0.9.1 still composes the keys of earlier versions, and its trainer reads none of them."""
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
