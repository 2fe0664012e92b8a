"""What a run is: method, reward, data, model, seeds and batch. ``sayo.json`` beside each checkpoint holds it.

``fingerprint_check.py`` compares it when a run resumes. ``hooks/fingerprint.py`` writes it in the task runner, before
verl saves. Values of environment variables and of secrets are stored as digests.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sayo_verl import __version__
from sayo_verl.launch.checkpoints import SCHEMA
from sayo_verl.launch.fingerprint_files import digest, of_code, of_data, of_model
from sayo_verl.launch.job import leaves
from sayo_verl.launch.resume import devices_of, parts_of
from sayo_verl.methods import METHODS, PREFIX, Mix

PACKAGES = ("verl", "torch", "transformers", "vllm", "sglang", "ray", "tensordict", "TransferQueue")
ACTOR, MODEL, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.model", "actor_rollout_ref.rollout"
ESTIMATOR = "algorithm.adv_estimator"
OPTIMIZER = ("lr", "weight_decay", "betas", "optimizer", "optimizer_impl", "override_optimizer_config")
# What must be the same, by the name that sayo.resume_anyway accepts -> patterns of its settings.
COMPARED: dict[str, tuple[str, ...]] = {
    "method": (
        "algorithm.*",
        "sayo.correct_from",
        *(
            f"{ACTOR}.{key}"
            for key in (
                "policy_loss.*",
                "clip_ratio*",
                "tau_*",
                "loss_agg_mode",
                "loss_scale_factor",
                "entropy_coeff",
                "use_kl_loss",
                "kl_loss_*",
                "ppo_epochs",
            )
        ),
    ),
    "reward": (
        "reward.custom_reward_function.*",
        "reward.reward_manager.*",
        "reward.reward_model.enable",
    ),
    "data": (
        "data.shuffle",
        "trainer.v1.sampler.custom_sampler.*",
        "data.train_max_samples",
        "data.filter_overlong_prompts",
        "data.max_prompt_length",
        "data.truncation",
        "data.*_key",
        "data.custom_cls.*",
        "data.apply_chat_template_kwargs*",
        "data.mm_processor_kwargs*",
    ),
    "model": (
        *(
            f"{MODEL}.{key}"
            for key in (
                "lora_rank",
                "lora_alpha",
                "target_modules",
                "exclude_modules",
                "custom_chat_template",
            )
        ),
        f"{ACTOR}.strategy",
        f"{ACTOR}.freeze_vision_tower",
    ),
    "seed": ("*.seed", "*_seed", "sayo.repeatable_rollouts"),
    "batch": (
        "data.train_batch_size",
        "data.gen_batch_size",
        "data.dataloader_num_workers",
        f"{ROLLOUT}.n",
        f"{ACTOR}.ppo_mini_batch_size",
    ),
    "mode": ("trainer.v1.trainer_mode",),
    # verl restores these with the optimizer, so another value has no effect.
    "optimizer": tuple(f"{part}.optim.{key}" for part in (ACTOR, "critic") for key in OPTIMIZER),
}
# Limits of time and effort.
IGNORED = (
    "*._target_",
    "algorithm.filter_groups.max_*",
    "algorithm.attn.*.time_limit",
    "algorithm.attn.*.processes",
)
# Settings that name a file with code, by the name of the difference. The file is compared, not its path.
CODE = {
    "reward": ("reward.custom_reward_function.path", "reward.reward_manager.module.path"),
    "data": ("data.custom_cls.path", "trainer.v1.sampler.custom_sampler.path"),
}
# Settings that name a model or a part of one, likewise.
MODELS = {
    "model": (f"{MODEL}.path", f"{MODEL}.lora_adapter_path", f"{MODEL}.tokenizer_path", f"{MODEL}.hf_config_path"),
    "reward": ("reward.reward_model.model_path",),
}
# Differences that a resume may have; the plan names them.
SAID = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "data.train_files",
    "data.val_files",
    "data.max_response_length",
    f"{MODEL}.path",
    f"{ROLLOUT}.temperature",
    f"{ROLLOUT}.top_p",
    f"{ROLLOUT}.top_k",
    *(f"{ACTOR}.optim.{key}" for key in ("lr_scheduler_type", "lr_warmup_steps*", "min_lr_ratio", "num_cycles")),
)
SECRET = re.compile(r"^reward\..*(key$|token$|secret|password|credential)", re.IGNORECASE)

Flat = dict[str, Any]


def fingerprint_of(config: DictConfig) -> dict[str, Any]:
    """The record of a run: ``schema``, ``compared`` (name -> settings and files), ``said``, ``saved``."""
    settings = dict(settings_of(config))
    left_out = (*IGNORED, *_unused_methods(config))

    def chosen(patterns: tuple[str, ...]) -> Flat:
        return {
            key: value for key, value in settings.items() if _matches(key, patterns) and not _matches(key, left_out)
        }

    compared = {name: chosen(patterns) for name, patterns in COMPARED.items()}
    critic = "critic" in parts_of(config)
    elsewhere = ("algorithm.", *(() if critic else ("critic.",)))  # seeds of methods are in "method"
    for name in ("seed", "optimizer"):
        compared[name] = {key: value for key, value in compared[name].items() if not key.startswith(elsewhere)}
    compared["method"] |= _own_code(config)
    compared["data"] |= of_data(config.data.train_files)
    for name, of_files in CODE.items():
        compared[name] |= {key: of_code(path) for key, path in _named(config, of_files).items()}
    for name, of_folders in MODELS.items():
        for key, path in _models(config, of_folders, critic=critic).items():
            compared[name] |= of_model(key, path)
    return {
        "schema": SCHEMA,
        "compared": compared,
        "said": chosen(SAID) | {f"version of {name}": found for name, found in versions().items()},
        "saved": {
            "devices": devices_of(config),
            "parts": list(parts_of(config)),
            "fsdp": config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2"),
            "queue": config.trainer.v1.trainer_mode != "sync",
        },
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that a run uses, as far as they are installed."""
    found = {"sayo-verl": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vllm or sglang: one engine is enough
            continue
    return found


# ------------------------------------------------------------------------------------------------------------- settings


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def settings_of(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """(dotted key, resolved value) of the settings that are compared or named."""
    patterns = (*(pattern for patterns in COMPARED.values() for pattern in patterns), *SAID)
    raw: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in leaves(raw):
        if _matches(key, patterns):
            resolved = OmegaConf.select(config, key, throw_on_missing=False)
            resolved = OmegaConf.to_container(resolved, resolve=True) if OmegaConf.is_config(resolved) else resolved
            hidden = SECRET.search(key) or "oc.env" in str(value)
            yield key, f"sha256 {digest(str(resolved).encode())}" if hidden and resolved is not None else resolved


def _unused_methods(config: DictConfig) -> tuple[str, ...]:
    """Patterns of settings of methods that do not run."""
    name, attn = str(config.algorithm.adv_estimator), config.algorithm.get("attn") or {}
    if name not in (*METHODS, Mix.name):
        return ("algorithm.attn.*",)
    used = list(attn.get("mix") or []) if name == Mix.name else [name.removeprefix(PREFIX)]
    nodes = [each.removeprefix(PREFIX) for each in METHODS]
    return tuple(f"algorithm.attn.{node}.*" for node in nodes if node not in used)


def _own_code(config: DictConfig) -> Flat:
    """Digests of the files of a user's own methods that run."""
    name = str(config.algorithm.adv_estimator)
    mix = (config.algorithm.get("attn") or {}).get("mix") or []
    used = [PREFIX + node for node in mix] if name == Mix.name else [name]
    own = [METHODS[each] for each in used if each in METHODS and not METHODS[each].__module__.startswith("sayo_verl.")]
    return {f"code of {cls.__name__}": digest(Path(inspect.getfile(cls)).read_bytes()) for cls in own}


def _named(config: DictConfig, keys: Sequence[str]) -> dict[str, str]:
    """Setting -> the path it names, without those that name none."""
    return {key: str(path) for key in keys if (path := OmegaConf.select(config, key)) is not None}


def _models(config: DictConfig, keys: Sequence[str], *, critic: bool) -> dict[str, str]:
    """``_named`` for the models that the run loads."""
    named = _named(config, (*keys, *(["critic.model.path"] if critic and f"{MODEL}.path" in keys else [])))
    if not OmegaConf.select(config, "reward.reward_model.enable"):
        named.pop("reward.reward_model.model_path", None)
    own = named.get(f"{MODEL}.path")
    repeated = (f"{MODEL}.tokenizer_path", f"{MODEL}.hf_config_path")  # null means the model's own
    return {key: path for key, path in named.items() if key not in repeated or path != own}
