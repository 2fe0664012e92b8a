"""The launcher: ``python -m sayo_verl.main_ppo`` takes what ``python -m verl.trainer.main_ppo`` takes.

It checks the run before anything is loaded (``sayo_verl.launch.preflight``). Ray's workers load the plug-in through a
variable, so that a failure is an error. It selects verl's trainer of the chosen mode with attention. For an estimator
of verl's own, such as ``grpo``, it selects nothing unless rollouts are recorded: verl's task runner, trainer and engine
run, with the guards of ``sayo_verl.plugin`` around them.
"""

import json
import os
import sys
import uuid
from collections.abc import Mapping

import hydra
import ray
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.utils.device import auto_set_device

from sayo_verl import __version__
from sayo_verl.errors import SayoError
from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.hooks.watchdog import Watchdog
from sayo_verl.launch.cluster import check_address, check_cluster
from sayo_verl.launch.ending import at_end, record_end
from sayo_verl.launch.folder_lock import hold_folders
from sayo_verl.launch.job import check_added, composition_error, keys_of, write_out
from sayo_verl.launch.limits import read_limits
from sayo_verl.launch.model_check import load_config
from sayo_verl.launch.names import check_names
from sayo_verl.launch.preflight import check_estimator, preflight, show
from sayo_verl.launch.record_check import is_recording
from sayo_verl.launch.resources import STARTED_HERE, check_devices, find_cluster, sizes_of_ray
from sayo_verl.launch.run_card import write_run_card
from sayo_verl.launch.settings import load_methods
from sayo_verl.launch.template_check import configure as configure_reward
from sayo_verl.launch.training_check import check_by_verl, filter_limit
from sayo_verl.launch.type_check import check_types
from sayo_verl.methods import METHODS, Mix
from sayo_verl.models import internvl

PLUGIN = "sayo_verl.plugin"
ENGINE = "sayo_verl.hooks.engine"
# Settings of this process that its Ray workers must share, also when they run on a cluster that is already up.
FORWARDED = (
    "VERL_PLATFORM",
    "VERL_ENGINE_DEVICE",
    "VERL_FILE_LOGGER_PATH",
    "VERL_LOGGING_LEVEL",
    "SAYO_ALLOW_VERL",
    "TORCHDYNAMO_DISABLE",
    "VLLM_CPU_KVCACHE_SPACE",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "VLLM_NO_USAGE_STATS",
)


@ray.remote
class SayoTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """verl's task runner in a process that has the trainers with attention registered."""

    def run(self, config: DictConfig) -> None:
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

        import sayo_verl.hooks.modes  # noqa: F401 (registers the trainers)
        from sayo_verl.hooks.estimator import register_estimators

        load_methods(config.sayo.modules)
        register_estimators()
        if config.algorithm.adv_estimator not in ADV_ESTIMATOR_REGISTRY:
            raise SayoError(
                "X02",
                "the plug-in was not loaded in the task runner",
                where="VERL_USE_EXTERNAL_MODULES",
                got=os.environ.get("VERL_USE_EXTERNAL_MODULES", ""),
                wanted=PLUGIN,
                fix="launch with `python -m sayo_verl.main_ppo` and install sayo-verl on every node",
            )
        super().run(config)


def worker_variables() -> dict[str, str]:
    """Environment of Ray's workers: the plug-in's module, the run's token and what is forwarded.

    Variables of a job of ``ray job submit`` reach the workers anyway, and Ray refuses a second value of them.
    """
    modules = [m for m in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if m]
    if PLUGIN not in modules:
        modules.append(PLUGIN)
    env = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    env["VERL_USE_EXTERNAL_MODULES"] = ",".join(modules)
    env[RUN_TOKEN] = uuid.uuid4().hex[:16]
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env", {}).get("env_vars", {})
    return {name: value for name, value in env.items() if job.get(name) != value}


def prepare_workers(config: DictConfig, variables: Mapping[str, str]) -> None:
    """Write variables, limits and the checked address into the configuration; remove what Ray refuses with it."""
    address, where = find_cluster(config)
    with open_dict(config):
        if address:
            for key in sizes_of_ray(config):
                del config.ray_kwargs.ray_init[key]
        if not address or where != STARTED_HERE:  # with an address Ray does not look for that cluster's token
            config.ray_kwargs.ray_init.address = address or "local"
        for name, value in variables.items():
            OmegaConf.update(config, f"ray_kwargs.ray_init.runtime_env.env_vars.{name}", value, force_add=True)
        if limit := filter_limit(config):
            OmegaConf.update(config, "trainer.v1.sampler.sampler_kwargs.filter_limit", limit, force_add=True)


def select_method(config: DictConfig) -> bool:
    """Select the attention trainer and engine if attention is measured; return whether it is.

    That is for the methods, and for recorded rollouts (``sayo.viz_every``) of verl's own estimators.
    """
    ours = config.algorithm.adv_estimator in (*METHODS, Mix.name) or is_recording(config)
    if ours:
        config.trainer.v1.trainer_mode = f"sayo_{config.trainer.v1.trainer_mode}"
        config.actor_rollout_ref.model.external_lib = ENGINE
    return ours


@hydra.main(config_path="config", config_name="sayo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Check, plan, run."""
    try:
        defaults = compose(HydraConfig.get().job.config_name)
        given = keys_of(HydraConfig.get().overrides.task)
        check_added(given, defaults)
        check_types(config, defaults)
        read_limits(config)
        check_devices(config, dry_run=config.sayo.dry_run)
        if not config.sayo.dry_run:
            check_address(config)
        write_out(config, given)
        config.sayo.modules = load_methods(config.sayo.modules)
        internvl.configure(config, load_config(str(config.actor_rollout_ref.model.path), dry_run=True))
        plan = preflight(config, given=given, defaults=defaults, dry_run=config.sayo.dry_run)
        check_by_verl(config, dry_run=config.sayo.dry_run)
        variables = worker_variables()
        method = check_estimator(config)
        packages = method.needs().packages if method else ()
        nodes = [] if config.sayo.dry_run else check_cluster(config, variables, packages)
        if not config.sayo.dry_run:
            hold_folders(config)
    except SayoError as error:
        sys.exit(str(error))
    except OmegaConfBaseException as error:  # an interpolation leads nowhere
        sys.exit(str(composition_error(error)))
    print(f"sayo-verl {__version__}: the plan")
    show([*plan, *([("nodes", ", ".join(nodes))] if nodes else [])])
    if config.sayo.dry_run:
        absent = list(dict.fromkeys(name for name, value in plan if "NOT THERE YET" in value))
        missing = f"; still missing: {', '.join(absent)}" if absent else ""
        print(f"dry run: the configuration composes and passes the checks{missing}; nothing was started")
        return
    configure_reward(config)
    auto_set_device(config)
    write_run_card(config)
    prepare_workers(config, variables)
    ours = select_method(config)
    at_end(config)
    try:
        with Watchdog(config, variables[RUN_TOKEN]) as watchdog:
            run_ppo(config, task_runner_class=watchdog.runner(SayoTaskRunner if ours else TaskRunnerV1))
    except BaseException as error:
        record_end(config, error)
        raise
    record_end(config, None)


def launch() -> None:
    """``main``, with one line for a command line that cannot be composed."""
    check_names()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints its errors itself, over several lines
    try:
        main()
    except (ConfigCompositionException, MissingConfigException, OverrideParseException) as error:
        sys.exit(str(composition_error(error)))
    except KeyboardInterrupt:  # before training; the watchdog takes it then
        print("sayo-verl: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    launch()
