"""What is checked before any model is loaded: settings first, then files. Each mistake ends with one line.

``preflight`` returns the plan of the run, a list of (name, value) to print. With ``dry_run`` a missing file is an entry
of that plan instead of an error, so that a job can be looked at on any machine.
"""

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.launch.attention_check import ATTENTION, attention_of, check_attention, check_linear_attention
from sayo_verl.launch.data_check import check_data
from sayo_verl.launch.disk_check import check_disk
from sayo_verl.launch.fingerprint_check import place_fingerprint
from sayo_verl.launch.hazard_check import check_hazards, describe_model_code
from sayo_verl.launch.memory_check import check_memory
from sayo_verl.launch.method_check import check_method, describe_passes
from sayo_verl.launch.mode_check import check_mode, describe_mode
from sayo_verl.launch.model_check import HDFS, check_model, load_config, model_folder, sequence_parallel
from sayo_verl.launch.record_check import check_record, is_recording, observation, refuse_recording
from sayo_verl.launch.repeat_check import check_repeatable
from sayo_verl.launch.resources import (
    check_batch_sizes,
    check_paths,
    check_ray_cpus,
    describe_machines,
    elsewhere,
    shared_paths,
)
from sayo_verl.launch.resume import check_metrics, check_resume, describe_checkpoints, metrics_file
from sayo_verl.launch.reward_check import check_reward
from sayo_verl.launch.rollout_check import check_rollout_engine
from sayo_verl.launch.settings import settings_from_config, unused_settings
from sayo_verl.launch.template_check import check_template, describe_focus
from sayo_verl.launch.training_check import check_training, describe_filter, describe_objective
from sayo_verl.methods import METHODS, Method, Mix, own_methods
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.models.location import is_hub_name, why_absent
from sayo_verl.probe.statistics import check_lse_path
from sayo_verl.redact import redact

Plan = list[tuple[str, str]]


def preflight(
    config: DictConfig, *, given: Collection[str] = (), defaults: DictConfig | None = None, dry_run: bool = False
) -> Plan:
    """Check a composed configuration and the files it names.

    Args:
        config: the full configuration of ``sayo_trainer``. A job's settings of ``sayo_verl.reward`` are removed if the
            command line names another reward function.
        given: keys of the command line.
        defaults: the configuration without a command line, for ``place_fingerprint``.
        dry_run: report missing files instead of refusing them.

    Returns:
        The plan, from the method to the output.

    Raises:
        SayoError: for the first mistake found.
    """
    method = check_estimator(config)
    unused = unused_settings(str(config.algorithm.adv_estimator), _attn(config), given)
    if method is not None:
        check_method(method)
    check_training(config, method)
    check_mode(config, method, here=not elsewhere(config, dry_run=dry_run))
    if method is not None:
        check_settings(config, method)
        dataclasses.replace(method.needs().statistics, path=str(config.sayo.probe_path))  # P14
    repeats = check_repeatable(config)
    recorded = check_record(config, method)
    measured = method
    if method is None and is_recording(config):  # attention is measured for verl's own estimators too
        measured = observation(config, method)
        try:
            check_settings(config, measured)
        except SayoError as error:
            raise refuse_recording(error) from error
    check_hazards(config, measured, here=not elsewhere(config, dry_run=dry_run))
    check_batch_sizes(config)
    cpus = check_ray_cpus(config, dry_run=dry_run)
    engine = check_rollout_engine(config, measured, dry_run=dry_run)
    check_paths(config)
    check_metrics(config)
    resumed = check_resume(config)
    disk = check_disk(config, dry_run=dry_run)
    reward = check_reward(config, method, given=given, dry_run=dry_run)
    of_model, model_type = _check_model(config, measured, dry_run)
    memory = check_memory(config, method, dry_run=dry_run)
    plan: Plan = [
        ("estimator", f"{config.algorithm.adv_estimator}" + ("" if method else " (verl's own code, untouched)")),
        ("method", _describe(method) if method else "-"),
        *([("not used", ", ".join(unused))] if unused else []),
        *of_model,
        *([("model's code", code)] if (code := describe_model_code(config)) else []),
        *(of_data := check_data(config, method, model_type, dry_run=dry_run)),
    ]
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    parts = method.methods if isinstance(method, Mix) else (method,)
    faithful = any(isinstance(part, FaithfulMethod) for part in parts)
    several = int(config.trainer.nnodes) > 1
    plan += [
        ("reward", reward),
        ("template", check_template(config)),
        *([("anchoring", describe_focus(config))] if faithful else []),
        *([("changed images", describe_passes(method))] if method and method.needs().interventions else []),
        (
            "rollouts",
            f"{config.data.train_batch_size} prompts x {rollout.n}, up to {config.data.max_response_length} "
            f"tokens, temperature {rollout.temperature}, top-p {rollout.top_p}",
        ),
        *([("rollouts repeat", repeats)] if repeats else []),
        ("engine", engine),
        (
            "update",
            f"{actor.strategy}, lr {actor.optim.lr}, mini-batch {actor.ppo_mini_batch_size} prompts, LoRA rank "
            f"{config.actor_rollout_ref.model.lora_rank or 'off'}",
        ),
        ("objective", describe_objective(config)),
        ("trainer", describe_mode(config, method)),
        *([("group filter", ends)] if (ends := describe_filter(config)) else []),
        ("machines", f"{describe_machines(config)}; {cpus}"),
        *([("every node must see", ", ".join(path for _, path in shared_paths(config)))] if several else []),
        *memory,
        ("length", _length(config, of_data)),
        ("resumes", resumed + place_fingerprint(config, defaults=defaults, dry_run=dry_run)),
        ("checkpoints", describe_checkpoints(config)),
        *disk,
        ("metrics", str(metrics_file(config) or 'no file, nothing for sayo report: trainer.logger has no "file"')),
        ("recorded", recorded),
    ]
    return plan


def _attn(config: DictConfig) -> Any:
    """``algorithm.attn`` as plain containers; empty if the configuration has none."""
    return OmegaConf.to_container(config.algorithm.attn, resolve=True) if config.algorithm.get("attn") else {}


def check_estimator(config: DictConfig) -> Method | None:
    """The run's method, or None for an estimator of verl's own.

    Raises:
        SayoError: L01 for an unknown name, with the nearest known one; what ``settings_from_config`` raises.
    """
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    name = str(config.algorithm.adv_estimator)
    ours = (*METHODS, Mix.name)
    known = sorted(set(ours) | set(ADV_ESTIMATOR_REGISTRY))
    if name not in known:
        raise SayoError(
            "L01",
            f"unknown advantage estimator{did_you_mean(name, known)}",
            where="algorithm.adv_estimator",
            got=name,
            wanted=f"ours ({', '.join(ours)}) or verl's ({', '.join(k for k in known if k not in ours)})",
            fix=_how_to_register(config) or "correct the name",
        )
    return settings_from_config(name, _attn(config)).method


def _how_to_register(config: DictConfig) -> str:
    """What to do if ``sayo.modules`` names files but none of them registered a method."""
    modules = list(config.sayo.get("modules") or ())
    if not modules or own_methods():
        return ""
    return (
        f"put @register_method above @dataclass(frozen=True) of the class: {', '.join(modules)} registered no method "
        "(docs/add_a_method.md)"
    )


def check_settings(config: DictConfig, method: Method) -> None:
    """Refuse the settings of verl under which attention statistics would be absent, wrong or without effect."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    correction = config.algorithm.get("rollout_correction") or {}
    attention = attention_of(config)
    rules = [
        Rule(
            "L06",
            bool(correction.get("bypass_mode", False)),
            "bypass mode skips the log-prob pass in which attention is measured",
            where="algorithm.rollout_correction.bypass_mode",
            got=True,
            fix="set it to False",
        ),
        Rule(
            "L07",
            bool(config.algorithm.use_pf_ppo),
            "use_pf_ppo pairs rows wrongly on the V1 trainer (verl issue 7956)",
            where="algorithm.use_pf_ppo",
            got=True,
            fix="set it to False",
        ),
        Rule(
            "L08",
            actor.strategy not in ("fsdp", "fsdp2"),
            "attention is captured in verl's FSDP engine only",
            where="actor_rollout_ref.actor.strategy",
            got=actor.strategy,
            fix="use fsdp or fsdp2, or algorithm.adv_estimator=grpo",
        ),
        Rule(
            "L09",
            sequence_parallel(config) > 1 and not config.actor_rollout_ref.model.use_remove_padding,
            "verl's sequence parallelism needs packed rows",
            where="actor_rollout_ref.model.use_remove_padding",
            got=False,
            fix="set it to True, or actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=1",
        ),
        Rule(
            "L24",
            sequence_parallel(config) > 1 and "flash_attention" not in attention,
            "verl exchanges heads for tokens in FlashAttention only; with another kernel each device attends to its "
            "own part, without an error",
            where=ATTENTION,
            got=attention,
            fix="set it to flash_attention_2, or actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=1",
        ),
        Rule(
            "L10",
            bool(config.algorithm.filter_groups.enable) and "reward" in method.gives,
            "group filtering comes before the attention pass and would drop groups that differ only in the method's "
            "reward",
            where="algorithm.filter_groups.enable",
            got=True,
            fix="set it to False, or give the method's reward term weight 0",
        ),
        Rule(
            "L12",
            int(rollout.n) < 2,
            "a group of one has nothing to compare with",
            where="actor_rollout_ref.rollout.n",
            got=rollout.n,
            fix="set it to 2 or more (paper: 16)",
        ),
        Rule(
            "L13",
            bool(rollout.multi_turn.enable),
            "multi-turn rollouts are not supported",
            where="actor_rollout_ref.rollout.multi_turn.enable",
            got=True,
            fix="set it to False",
        ),
        Rule(
            "L20",
            config.actor_rollout_ref.model.external_lib not in (None, "sayo_verl.hooks.engine"),
            "external_lib is what loads the engine with the attention mixin",
            where="actor_rollout_ref.model.external_lib",
            got=config.actor_rollout_ref.model.external_lib,
            fix="name your own module in VERL_USE_EXTERNAL_MODULES instead",
        ),
    ]
    raise_first(rules)
    check_lse_path(
        str(config.sayo.probe_path),
        packed=bool(config.actor_rollout_ref.model.use_remove_padding),
        ranks=sequence_parallel(config),
        flash="flash_attention" in attention,
    )


def _describe(method: Method) -> str:
    if isinstance(method, Mix):
        return f"{method.name}: " + "; ".join(_describe(part) for part in method.methods)
    return f"{method.name}: " + ", ".join(f"{key} {value}" for key, value in vars(method).items())


def _check_model(config: DictConfig, method: Method | None, dry_run: bool) -> tuple[Plan, str | None]:
    """Lines of the plan, and ``model_type`` if the model is on this machine."""
    path = str(config.actor_rollout_ref.model.path)
    model, folder = load_config(path, dry_run=dry_run), model_folder(path, dry_run=dry_run)
    if model is None or folder is None:
        if path.startswith(HDFS):
            found = "not checked: verl copies it from HDFS when the run starts"
        else:
            unchecked = ", so its family and layers were not checked" if is_hub_name(path) else ""
            found = f"{why_absent(path)}{unchecked}"
        line = f"{path} - {found}"
    else:
        line = f"{path} ({check_model(config, method, folder, model) if method else model.model_type})"
    attention = check_attention(config, model, dry_run=dry_run)
    linear = check_linear_attention(config, model, dry_run=dry_run)
    plan = [("model", line), ("attention", attention), *([("linear attention", linear)] if linear else [])]
    return plan, getattr(model, "model_type", None)


def show(plan: Plan, write: Callable[[str], None] = print) -> None:
    """Print the plan as aligned lines, without secrets. A terminal gets wrapped lines; a log, which is searched, one
    line per entry."""
    indent = 4 + max(len(name) for name, _ in plan)
    columns = max(shutil.get_terminal_size().columns, indent + 40) if sys.stdout.isatty() else sys.maxsize
    for name, value in plan:
        lines = textwrap.wrap(redact(value), columns - indent, break_long_words=False, break_on_hyphens=False) or [""]
        for n, line in enumerate(lines):
            write(f"  {'' if n else name}".ljust(indent) + line)


def _length(config: DictConfig, of_data: Plan) -> str:
    """Steps, if they are set, and epochs."""
    steps, epochs = config.trainer.total_training_steps, f"{config.trainer.total_epochs} epochs"
    if steps is not None:
        return f"{steps} steps, {epochs}"
    absent = any(name == "train data" and "NOT THERE YET" in value for name, value in of_data)
    why = "the data does not exist yet" if absent else "verl counts them when it has filtered the prompts"
    return f"{epochs}; steps unknown: {why}"
