"""From a command line to the configuration that is checked: its keys, its errors, and a job's short settings.

The short settings are ``sayo.data``, ``sayo.out`` and ``sayo.resume``; ``write_out`` replaces them by verl's own.
"""

import difflib
import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from sayo_verl.data.folder import split_files
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.checkpoints import TRACKER
from sayo_verl.launch.names import nothing_to_resume
from sayo_verl.report.runs import next_metrics_file

SPLITS = ("train", "val")
LOGGER_PATH = "VERL_FILE_LOGGER_PATH"
# verl's own defaults of settings that a job or a user may set
VERL_FILES = {"train": "~/data/rlhf/gsm8k/train.parquet", "val": "~/data/rlhf/gsm8k/test.parquet"}
VERL_CHECKPOINTS = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
# Resolvers for files of configs: a sum, a quotient, and a value that depends on another one.
OmegaConf.register_new_resolver("sayo.sum", lambda *numbers: sum(numbers), replace=True)
OmegaConf.register_new_resolver("sayo.quotient", lambda whole, parts: whole // parts, replace=True)
OmegaConf.register_new_resolver(
    "sayo.choose", lambda got, match, then, otherwise: then if got == match else otherwise, replace=True
)
# How near an added key must be to one that exists, and groups whose keys verl passes on to other packages.
NEARLY, FREE = 0.85, ("_kwargs", "override_config", "attn")
NAMED_BY_USER = ("distillation.teacher_models",)  # groups whose keys are names that a user chooses
COMPUTED = (
    "actor_rollout_ref.rollout.max_model_len",
    "reward.custom_reward_function.reward_kwargs.accuracy_weight",
    "trainer.v1.separate_async.parameter_sync_step",
)


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The keys that Hydra overrides set; of ``data={train_files: x}`` it is ``data.train_files``.

    Raises:
        SayoError: L68 when the folder of the run is named twice.
    """
    found: set[str] = set()
    folders = []
    for override in overrides:
        key, _, text = override.lstrip("+~").partition("=")
        if key in ("sayo.out", "sayo.resume"):
            folders.append(text)
        value = OverridesParser.create().parse_override(override).value() if text.startswith("{") else None
        found |= {leaf for leaf, _ in leaves(value, f"{key}.")} if isinstance(value, dict) else {key}
    if len(folders) > 1:
        raise SayoError(
            "L68",
            "the folder of the run is named twice",
            where="sayo.out",
            got=" and ".join(folders),
            wanted="one of them",
            fix="name it by OUT=, or by RESUME= to resume, in front of the script; or by sayo.out or sayo.resume alone",
        )
    return found


def check_added(given: Collection[str], defaults: DictConfig) -> None:
    """Refuse a key that a "+" adds beside one of nearly the same name: nothing would read it.

    Args:
        given: keys of the command line.
        defaults: the configuration without overrides.

    Raises:
        SayoError: L70.
    """
    plain: Any = OmegaConf.to_container(defaults, resolve=False)
    for key in sorted(given):
        group, path = plain, key.split(".")
        for depth, part in enumerate(path):
            if not isinstance(group, Mapping) or not group:
                break
            if part not in group:
                known = list(_of_ray_init() if path[:depth] == ["ray_kwargs", "ray_init"] else group)
                near = difflib.get_close_matches(part, known, n=1, cutoff=NEARLY)
                free = ".".join(path[:depth]) in NAMED_BY_USER
                if near and near[0] != part and not free and not any(name.endswith(FREE) for name in path[1:depth]):
                    raise _unknown(".".join(path[: depth + 1]), f" (did you mean {near[0]!r}?)", part, None)
                break
            group = group[part]


def _of_ray_init() -> list[str]:
    import ray

    return list(inspect.signature(ray.init).parameters)


def composition_error(error: Exception) -> SayoError:
    """L70: an override, a file or an interpolation cannot be composed. The cause has the keys beside an unknown one."""
    cause = error.__cause__
    if not isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return SayoError(
            "L70",
            f"Hydra cannot compose the configuration: {' '.join(str(error).split())}",
            where="the command line",
            fix="correct the override or the file that the message names",
        )
    beside = [str(key) for key in cause.parent_node or () if key != "hydra"]
    hint = did_you_mean(str(cause.key), beside)
    return _unknown(str(cause.full_key), hint, cause.key, None if hint or not beside else ", ".join(beside))


def _unknown(where: str, hint: str, got: Any, wanted: str | None) -> SayoError:
    return SayoError(
        "L70",
        f"unknown setting{hint}",
        where=where,
        got=got,
        wanted=wanted,
        fix="correct the name"
        + ("" if hint else "; a + in front of the override adds a setting that does not exist yet"),
    )


def leaves(part: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested values."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_out(config: DictConfig, given: Collection[str]) -> None:
    """Replace ``sayo.data``, ``sayo.out`` and ``sayo.resume`` by verl's own settings, and make paths absolute.

    Args:
        config: the composed configuration; it is changed, and so is ``VERL_FILE_LOGGER_PATH`` of this process if it is
            not set.
        given: keys of the command line. They win over a job's file.

    Raises:
        SayoError: L44 if there is nothing to resume, L68 for two sources of training rows, D56 for a folder that
            ``sayo prepare`` did not make.
    """
    _place_output(config, given)
    _place_data(config, given)
    model = str(config.actor_rollout_ref.model.path)
    if Path(model).expanduser().is_dir():
        config.actor_rollout_ref.model.path = _absolute(model)
    for key in COMPUTED:  # verl's own task runner does not know our resolvers
        if (value := OmegaConf.select(config, key)) is not None:
            OmegaConf.update(config, key, value)


def _absolute(path: str) -> str:
    """An absolute path: workers run in other folders."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _place_data(config: DictConfig, given: Collection[str]) -> None:
    named = {split: f"data.{split}_files" in given for split in SPLITS}  # on the command line
    if "sayo.data" not in given:  # or in a job's file
        named |= {split: True for split in SPLITS if config.data[f"{split}_files"] != VERL_FILES[split]}
    both = config.sayo.data is not None and named["train"]
    if both and ("sayo.data" in given or "data.train_files" not in given):
        raise SayoError(
            "L68",
            "the training rows are named twice",
            where="data.train_files",
            got=f"{config.data.train_files} and sayo.data={config.sayo.data}",
            wanted="one of them",
            fix="leave out DATA=... (sayo.data) or data.train_files; data.val_files may be given with either. In a "
            "job's own file set sayo.data to null",
        )
    if both and not named["val"]:
        raise SayoError(
            "L68",
            "training and validation rows would come from two places",
            where="data.val_files",
            got=f"data.train_files={config.data.train_files}, and validation rows of sayo.data={config.sayo.data}",
            wanted="data.val_files beside data.train_files",
            fix="set data.val_files too",
        )
    left = [split for split in SPLITS if not named[split]]
    if config.sayo.data is not None and left:
        folder = Path(_absolute(str(config.sayo.data)))
        if config.sayo.dry_run and not folder.exists():
            files = {split: [folder / f"{split}-*.parquet"] for split in SPLITS}
        else:
            files = split_files(folder)
        for split in left:
            config.data[f"{split}_files"] = [str(file) for file in files[split]]
    for split in SPLITS:
        chosen = config.data[f"{split}_files"]
        if isinstance(chosen, str):
            config.data[f"{split}_files"] = _absolute(chosen)
        elif chosen:
            config.data[f"{split}_files"] = [_absolute(str(file)) for file in chosen]


def _place_output(config: DictConfig, given: Collection[str]) -> None:
    resumed = config.sayo.resume is not None
    out = config.sayo.resume if resumed else config.sayo.out
    if isinstance(path := config.trainer.resume_from_path, str):
        config.trainer.resume_from_path = _absolute(path)  # without a slash at its end, where verl reads the step
    if out is None:
        return
    folder = Path(_absolute(str(out)))
    trainer: Any = OmegaConf.to_container(config.trainer, resolve=False)
    own = trainer["default_local_dir"] != VERL_CHECKPOINTS or "trainer.default_local_dir" in given
    checkpoints = Path(_absolute(str(config.trainer.default_local_dir))) if own else folder / "checkpoints"
    # Without a checkpoint verl would begin a new run. ``check_resume`` checks those that exist.
    searched = resumed and config.trainer.resume_mode != "resume_path"
    if searched and not (checkpoints / TRACKER).exists() and not any(checkpoints.glob("global_step_*")):
        raise nothing_to_resume(checkpoints)
    config.trainer.default_local_dir = str(checkpoints)
    if "trainer.resume_mode" not in given and config.trainer.resume_mode in ("auto", "disable"):
        config.trainer.resume_mode = "auto" if resumed else "disable"
    metrics = next_metrics_file(folder) if resumed else folder / "metrics.jsonl"
    os.environ.setdefault(LOGGER_PATH, str(metrics))
