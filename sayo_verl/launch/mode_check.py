"""Checks of verl's trainer mode, for every estimator: its name, and what ``separate_async`` needs.

verl asserts most of this when it builds its trainer, after Ray has started. It does not check the rules of L78.
"""

import os

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.methods import Method

MODES = ("sync", "colocate_async", "separate_async")
MODE = "trainer.v1.trainer_mode"
SYNC_STEP = "trainer.v1.separate_async.parameter_sync_step"
STRATEGY = "trainer.v1.sampler.max_off_policy_strategy"
STALE = {"drop": "dropped", "wait": "waited for"}  # verl's strategies for stale rollouts
ROLLOUT = "actor_rollout_ref.rollout"
BACKEND = f"{ROLLOUT}.checkpoint_engine.backend"
BY_FILE = f"replace {MODE}=separate_async by +mode=separate_async, which sets all of it"


def check_mode(config: DictConfig, method: Method | None, *, here: bool) -> None:
    """Refuse an unknown trainer mode, and ``separate_async`` with settings that do not fit.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own, which may use a mode that a plug-in registered.
        here: the run uses the packages of this machine.

    Raises:
        SayoError: L05 for a mode, L77 for what verl asserts, L78 for what verl does wrong.
    """
    mode = str(config.trainer.v1.trainer_mode)
    if mode not in MODES and not (method is None and _is_registered(mode)):
        raise SayoError(
            "L05",
            f"unknown trainer mode{did_you_mean(mode, MODES)}",
            where=MODE,
            got=mode,
            wanted=" or ".join(MODES),
            fix="correct the name",
        )
    strategy = str(OmegaConf.select(config, STRATEGY))
    stale = Rule(
        "L77",
        strategy not in STALE,
        f"unknown strategy for stale rollouts{did_you_mean(strategy, STALE)}",
        where=STRATEGY,
        got=strategy,
        wanted=" or ".join(STALE),
        fix="correct the name",
    )
    raise_first([stale, *(_rules(config) if mode == "separate_async" else ())])
    if mode == "separate_async" and here:
        _check_backend(config)


def rollout_devices(config: DictConfig) -> int:
    """Devices that ``separate_async`` gives to rollouts only, beside those of the trainer; 0 in other modes."""
    if config.trainer.v1.trainer_mode != "separate_async":
        return 0
    return int(config.actor_rollout_ref.rollout.nnodes) * int(config.actor_rollout_ref.rollout.n_gpus_per_node)


def prompts_per_update(config: DictConfig) -> int:
    """Prompts of one log-prob pass: ``separate_async`` makes several of a batch, and other modes one."""
    step = OmegaConf.select(config, SYNC_STEP) if config.trainer.v1.trainer_mode == "separate_async" else 1
    return int(config.data.train_batch_size) // max(int(step), 1)


def describe_mode(config: DictConfig, method: Method | None) -> str:
    """The mode, how far rollouts may be behind, and what of a model is measured and sent, for the plan."""
    mode, v1 = str(config.trainer.v1.trainer_mode), config.trainer.v1
    parts = [mode]
    if mode == "separate_async":
        updates = int(config.data.train_batch_size) // prompts_per_update(config)
        parts.append(f"{updates} update(s) of {prompts_per_update(config)} prompts between transfers of weights")
    if mode != "sync" and v1.sampler.max_off_policy_threshold is not None:
        action = STALE[v1.sampler.max_off_policy_strategy]
        parts.append(f"groups over {v1.sampler.max_off_policy_threshold} versions old are {action}")
    if mode != "sync" and method is not None:
        parts.append("attention statistics are of the old policy, not of older weights that generated")
    if mode == "separate_async" and _adapter(config):
        parts.append("LoRA is sent merged into the model")
    return ", ".join(parts)


def _adapter(config: DictConfig) -> bool:
    """Whether the run trains or loads a LoRA adapter."""
    model = config.actor_rollout_ref.model
    rank = int((model.get("lora") or {}).get("rank") or 0) or int(model.get("lora_rank") or 0)
    return bool(rank or model.get("lora_adapter_path"))


def _is_registered(mode: str) -> bool:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return mode in TRAINER_REGISTRY and not mode.startswith("sayo_")


def _check_backend(config: DictConfig) -> None:
    """verl leaves out a backend whose packages are missing, and fails when it has loaded the model."""
    from verl.checkpoint_engine import CheckpointEngineRegistry
    from verl.utils.import_utils import import_external_libs

    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    try:
        import_external_libs(engine.custom_backend_module or None)
        CheckpointEngineRegistry.get(engine.backend)
    except (ImportError, ValueError) as error:
        raise SayoError(
            "L77",
            "the backend that sends weights to the rollouts cannot be loaded",
            where=BACKEND,
            got=f"{engine.backend} ({error})",
            fix="install what it needs (nccl: pip install 'verl[cupy-cu130]'), or correct the name or "
            f"{ROLLOUT}.checkpoint_engine.custom_backend_module",
        ) from error


def _rules(config: DictConfig) -> list[Rule]:
    rollout, actor, model = (config.actor_rollout_ref[name] for name in ("rollout", "actor", "model"))
    sizes = config.data.train_batch_size, actor.ppo_mini_batch_size, OmegaConf.select(config, SYNC_STEP)
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    prompts, mini, step = sizes
    updates = max(prompts // mini, 1) if whole else 1
    reward = config.reward.reward_model
    lora = model.get("lora") or {}
    by_hand = rollout.checkpoint_engine.backend == "naive"  # verl's default: the file of the mode was not added
    level = os.environ.get("VERL_LOGGING_LEVEL", "INFO")
    return [
        Rule(
            "L77",
            not whole or prompts != step * mini,
            "separate_async trains a batch in parameter_sync_step updates of one mini-batch each",
            where=SYNC_STEP,
            got=f"{prompts} prompts, {step} updates, mini-batch {mini}",
            wanted="data.train_batch_size = parameter_sync_step x actor_rollout_ref.actor.ppo_mini_batch_size",
            fix=BY_FILE
            if by_hand
            else f"set {SYNC_STEP}={updates} and data.train_batch_size={updates} x the mini-batch",
        ),
        *(
            Rule(
                "L77",
                int(rollout[key] or 0) < 1,
                "separate_async needs devices for rollouts, beside those of the trainer",
                where=f"{ROLLOUT}.{key}",
                got=rollout[key],
                wanted="at least 1",
                fix=BY_FILE if by_hand else f"set {ROLLOUT}.nnodes and {ROLLOUT}.n_gpus_per_node",
            )
            for key in ("nnodes", "n_gpus_per_node")
        ),
        Rule(
            "L77",
            by_hand,
            "separate_async sends weights to other devices, which this backend cannot",
            where=BACKEND,
            got="naive",
            wanted="nccl, nixl, mooncake, kimi_ckpt_engine or another backend of verl; cpu_file on the CPU stack",
            fix=f"{BY_FILE} (on the CPU stack +mode=separate_async_cpu)",
        ),
        Rule(
            "L77",
            bool(reward.enable and not reward.enable_resource_pool),
            "a reward model needs devices of its own, because the rollouts of separate_async never pause for it",
            where="reward.reward_model.enable_resource_pool",
            got=False,
            fix="set it to True, with reward.reward_model.nnodes and n_gpus_per_node",
        ),
        Rule(
            "L78",
            _adapter(config) and not lora.get("merge", False),
            "verl would send the base model without its adapter to the rollouts of separate_async",
            where="actor_rollout_ref.model.lora.merge",
            got=lora.get("merge", False),
            fix="set it to True, or use another trainer mode",
        ),
        Rule(
            "L78",
            not config.actor_rollout_ref.get("hybrid_engine", True) and level.upper() in ("DEBUG", "INFO", "NOTSET"),
            "verl 0.9.1 fails in a log message of this setting (TypeError: unexpected keyword argument 'flush')",
            where="actor_rollout_ref.hybrid_engine",
            got=f"False, with VERL_LOGGING_LEVEL={level}",
            fix="export VERL_LOGGING_LEVEL=WARNING, or leave hybrid_engine out",
        ),
    ]
