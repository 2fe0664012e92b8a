"""Can this run's rollouts repeat (``sayo.repeatable_rollouts``)? ``sayo_verl.hooks.repeat`` makes them."""

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import Rule, raise_first

KEY = "sayo.repeatable_rollouts"


def is_repeatable(config: DictConfig) -> bool:
    """Whether the run asks for it; False for a run that verl's own launcher started."""
    return bool(OmegaConf.select(config, KEY))


def check_repeatable(config: DictConfig) -> str | None:
    """Refuse settings under which rollouts cannot repeat.

    Returns:
        A line for the plan; None if the run does not ask for it.

    Raises:
        SayoError: L97.
    """
    if not is_repeatable(config):
        return None
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer.v1
    rules = [
        Rule(
            "L97",
            trainer.trainer_mode != "sync",
            "rollouts cannot repeat: in an asynchronous mode it depends on time which weights generate a token",
            where="trainer.v1.trainer_mode",
            got=trainer.trainer_mode,
            wanted="sync",
            fix=f"set it to sync, or {KEY}=False",
        ),
        Rule(
            "L97",
            str(rollout.name) != "vllm",
            "rollouts cannot repeat: of verl's engines only vLLM takes a seed for each request",
            where="actor_rollout_ref.rollout.name",
            got=rollout.name,
            wanted="vllm",
            fix=f"set it to vllm, or {KEY}=False",
        ),
        Rule(
            "L97",
            bool(rollout.multi_turn.enable),
            "rollouts cannot repeat: every turn of a rollout would draw the same random numbers",
            where="actor_rollout_ref.rollout.multi_turn.enable",
            got=True,
            fix=f"set it to False, or {KEY}=False",
        ),
        Rule(
            "L97",
            bool(config.algorithm.filter_groups.enable),
            "rollouts cannot repeat: how many prompts replace filtered groups depends on which rollouts end first",
            where="algorithm.filter_groups.enable",
            got=True,
            fix=f"set it to False, or {KEY}=False",
        ),
    ]
    raise_first(rules)
    return f"from seed {rollout.get('seed', 0)}; exactly only if the engine's sums do not depend on its batch"
