"""Checks of verl's own training settings: the trainer, the policy loss and the critic, for every estimator.

verl reads these settings when it first trains, after models are loaded and rollouts are made.
``tests/launch/test_training_check.py`` shows, loss by loss, which of its losses keep a method's token weights.
"""

import contextlib
import io
import warnings
from collections.abc import Collection
from importlib.metadata import version

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.launch.reward_function import is_ours
from sayo_verl.methods import Method

LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
LOSS_AGG_MODE = "actor_rollout_ref.actor.loss_agg_mode"
DRO_BETA = "actor_rollout_ref.actor.policy_loss.dro_beta"
# verl checks this in ActorConfig.__post_init__, from a list that it does not name
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# Losses that average the advantages of a response over its tokens, so that weights of mean one cancel.
AVERAGE_OVER_TOKENS = ("geo_mean",)
# The loss of bypass mode, which has no log-prob pass to measure attention in.
NEEDS_BYPASS = ("bypass_mode",)
REPORTED = ("score", "acc", "format")  # by sayo_verl.reward, for every response
# Group filtering without max_num_gen_batches ends after so many groups in a row, and so many batches, of equal values.
# [ours] 1,000 such groups in a row are likely only if fewer than 1 of 300 groups can be trained on.
UNIFORM_GROUPS, UNIFORM_BATCHES = 1000, 8


def check_by_verl(config: DictConfig, *, dry_run: bool = False) -> None:
    """Let verl check the configuration as it does before a run.

    Args:
        config: the composed configuration.
        dry_run: hide what verl and vLLM print meanwhile.

    Raises:
        SayoError: L50 with verl's message.
    """
    from hydra.errors import InstantiationException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with (
            contextlib.redirect_stdout(io.StringIO()) if dry_run else contextlib.nullcontext(),
            warnings.catch_warnings(),
        ):
            if dry_run:
                warnings.filterwarnings("ignore", "Disabled critic")
            validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError, NotImplementedError, InstantiationException) as error:
        said = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise SayoError(
            "L50",
            f"verl refuses the configuration: {said}",
            where="verl.utils.config.validate_config",
            fix="change the settings that the message names",
        ) from error


def check_training(config: DictConfig, method: Method | None) -> None:
    """Refuse settings with which verl would stop after the first rollout or cancel a method's weights.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own.

    Raises:
        SayoError: L04 for the old trainer, L37 for an unknown loss, L38 for a loss without the setting that it needs,
            L39 for a loss that cancels the method's token weights or takes no log-prob pass, L49 for ``gae``
            without a critic, L52 for dynamic sampling that verl would not do.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    if not config.trainer.use_v1:
        raise SayoError(
            "L04",
            "sayo_verl.main_ppo runs verl's V1 trainer only",
            where="trainer.use_v1",
            got=False,
            fix="set trainer.use_v1=True, or launch verl.trainer.main_ppo for the old one",
        )
    for key, known in ((LOSS_MODE, tuple(POLICY_LOSS_REGISTRY)), (LOSS_AGG_MODE, LOSS_AGG_MODES)):
        name = str(OmegaConf.select(config, key))
        if name not in known:
            raise SayoError(
                "L37",
                f"unknown loss setting{did_you_mean(name, known)}",
                where=key,
                got=name,
                wanted=", ".join(known),
                fix="correct the name",
            )
    loss, beta = str(OmegaConf.select(config, LOSS_MODE)), OmegaConf.select(config, DRO_BETA)
    if loss == "dro" and not (isinstance(beta, int | float) and beta > 0):
        raise SayoError(
            "L38",
            "the loss dro needs its beta",
            where=DRO_BETA,
            got=beta,
            wanted="a positive number",
            fix=f"set {DRO_BETA}",
        )
    if method is not None and loss in NEEDS_BYPASS:
        raise SayoError(
            "L39",
            "this loss is for bypass mode, in which no log-prob pass measures attention",
            where=LOSS_MODE,
            got=loss,
            fix=f"set {LOSS_MODE}=vanilla",
        )
    if method is not None and method.gives & {"token", "bonus"} and loss in AVERAGE_OVER_TOKENS:
        raise SayoError(
            "L39",
            f"this loss averages advantages over the tokens of a response, which cancels what {method.name} gives to "
            "single tokens",
            where=LOSS_MODE,
            got=loss,
            wanted=", ".join(name for name in POLICY_LOSS_REGISTRY if name not in AVERAGE_OVER_TOKENS + NEEDS_BYPASS),
            fix=f"set {LOSS_MODE}=vanilla, or choose a method that gives a reward or trajectory weights",
        )
    _check_sampling(config)
    if config.algorithm.adv_estimator == "gae" and config.critic.enable is False:
        raise SayoError(
            "L49",
            "gae needs a critic",
            where="critic.enable",
            got=False,
            wanted="null or true",
            fix="leave critic.enable out",
        )


def describe_objective(config: DictConfig) -> str:
    """What the actor minimises and which groups of rollouts it gets, for the plan: GRPO and DAPO differ here."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    parts = [
        f"{OmegaConf.select(config, LOSS_MODE)} loss, {actor.loss_agg_mode}",
        f"clip {actor.clip_ratio_low} to {actor.clip_ratio_high}, dual clip {actor.clip_ratio_c}",
        f"KL loss {actor.kl_loss_coef} ({actor.kl_loss_type})" if actor.use_kl_loss else "no KL loss",
        *(["KL in the reward"] if algorithm.use_kl_in_reward else []),
        f"entropy {actor.entropy_coeff}",
        f"advantages {'over' if algorithm.norm_adv_by_std_in_grpo else 'not over'} the spread of their group",
        f"groups filtered by {algorithm.filter_groups.metric}" if algorithm.filter_groups.enable else "all groups kept",
    ]
    return ", ".join(parts)


def filter_limit(config: DictConfig) -> dict[str, int] | None:
    """When group filtering ends with an error; None without group filtering.

    Returns:
        ``groups`` and ``needed`` of ``sayo_verl.hooks.filter_limit.check_limit``. With ``max_num_gen_batches`` they are
        verl's documented meaning of it: so many batches are generated for one batch of training. They have
        ``data.gen_batch_size`` prompts if that is larger than a batch of training. verl's V1 trainer replaces it by 1
        when it starts, and a small one is only the number of prompts that it fetches at once.
    """
    groups, v1 = config.algorithm.filter_groups, config.trainer.v1
    if not groups.enable:
        return None
    batch, batches = int(config.data.train_batch_size), int(groups.max_num_gen_batches or 0)
    if batches <= 0:
        return {"groups": max(UNIFORM_GROUPS, UNIFORM_BATCHES * batch), "needed": 0}
    updates = int((v1.get(str(v1.trainer_mode)) or {}).get("parameter_sync_step", 1))
    generated = max(batch, int(config.data.get("gen_batch_size") or 0))
    return {"groups": batches * generated, "needed": max(1, batch // updates)}


def describe_filter(config: DictConfig) -> str:
    """When group filtering ends the run, for the plan; empty without group filtering."""
    limit = filter_limit(config)
    if limit is None:
        return ""
    if limit["needed"]:
        return f"the run ends if {limit['groups']} generated groups do not fill a batch (max_num_gen_batches)"
    return f"the run ends after {limit['groups']} groups in a row with equal {config.algorithm.filter_groups.metric}"


def _check_sampling(config: DictConfig) -> None:
    """Refuse dynamic sampling that verl silently leaves out, or at which it stops later.

    verl gives a custom sampler neither the metric of group filtering nor the refill of failed groups.
    """
    sampler, groups = config.trainer.v1.sampler, config.algorithm.filter_groups
    custom = sampler.get("custom_sampler") or {}
    if custom.get("path") and custom.get("name"):
        refill = "trainer.v1.sampler.sync_refill_failed_groups"
        asked = {"algorithm.filter_groups.enable": groups.enable, refill: sampler.sync_refill_failed_groups}
        raise_first(
            Rule(
                "L52",
                bool(on),
                "verl does not do this with a custom sampler",
                where=key,
                got=True,
                fix=f"set {key}=False, or leave trainer.v1.sampler.custom_sampler out",
            )
            for key, on in asked.items()
        )
    check_filter_metric(config, REPORTED if is_ours(config) else None)


def check_filter_metric(config: DictConfig, keys: Collection[str] | None) -> None:
    """Refuse group filtering by a value that the reward does not give: verl stops at the first finished group.

    Args:
        config: the composed configuration.
        keys: what the reward function returns beside the reward; None: not known.

    Raises:
        SayoError: L52.
    """
    groups = config.algorithm.filter_groups
    # verl 0.9.0 looks for every metric in what the reward function returns; later "reward" is the reward itself
    own = () if version("verl") == "0.9.0" else ("reward",)
    known = None if keys is None else sorted((*keys, *own))
    if groups.enable and (not groups.metric or (known is not None and groups.metric not in known)):
        raise SayoError(
            "L52",
            "the reward function does not report the metric of dynamic sampling",
            where="algorithm.filter_groups.metric",
            got=groups.metric,
            wanted=", ".join(known or ("a key that your reward function returns", *own)),
            fix="set it to one of these" if known else "set it to acc",
        )
