"""Checks of what calls the reward function: verl's reward manager, one of the user's, or a reward model."""

import inspect

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.reward_function import FUNCTION, is_ours, load


def check_manager(config: DictConfig) -> None:
    """Refuse a manager or a reward model that does not work with the run's reward function.

    Raises:
        SayoError: L36; L52 for group filtering with a reward model that scores too late.
    """
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    manager, model, where = config.reward.reward_manager, config.reward.reward_model, "reward.reward_manager.name"
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
    if model.enable:
        _check_model(config)


def _check_model(config: DictConfig) -> None:
    """Refuse a reward model with which verl 0.9.1 fails, or that scores too late."""
    model, custom = config.reward.reward_model, config.reward.custom_reward_function.path is not None
    if is_ours(config):
        raise SayoError(
            "L36",
            "sayo_verl.reward does not ask a reward model",
            where="reward.reward_model.enable",
            got=True,
            fix="set it to False, or name a reward function that does",
        )
    if custom and not model.enable_resource_pool:
        raise SayoError(
            "L36",
            "without devices of its own the reward model gets no data source or ground truth, and "
            "the reward function fails",
            where="reward.reward_model.enable_resource_pool",
            got=False,
            fix="set it to True, with nnodes and n_gpus_per_node beside it",
        )
    if model.model_path is None:
        raise SayoError(
            "L36",
            "no reward model is named",
            where="reward.reward_model.model_path",
            got=None,
            wanted="a model folder or hub name",
            fix="set it, or set reward.reward_model.enable=False",
        )
    if model.enable_resource_pool and not custom:
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


def _check_own_manager(manager: DictConfig) -> None:
    """Load a manager of the user's as verl does; verl would do so when the models are there."""
    path, name = manager.module.path, str(manager.name)
    problem, where = "", "reward.reward_manager.module.path"
    if manager.source != "importlib":
        problem, where = "verl knows no such source", "reward.reward_manager.source"
    elif path is None:
        problem = "no file is named"
    else:
        module, error = load(str(path))
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
