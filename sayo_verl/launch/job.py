"""A job's short settings, written out before the checks: names of files, ``sayo.data``, ``sayo.out``, ``sayo.resume``.

``refuse_names`` looks at the command line before Hydra does. ``write_out`` changes the composed configuration.
"""

import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sayo_verl.data.building.folder import split_files
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.resume import TRACKER
from sayo_verl.report.runs import next_metrics_file
from sayo_verl.retired import refuse_retired

SPLITS = ("train", "val")
LOGGER_PATH = "VERL_FILE_LOGGER_PATH"
CHOICE = re.compile(r"\+{0,2}(job|method|rl)=(.+)")
# Names of papers and what their methods are called here
PAPERS = {"sayo": "region", "vgpo": "dual", "atrl": "anchor", "at-rl": "anchor", "faithful-mr1": "faithful"}
# verl's own defaults of settings that a job or a user may name
VERL_FILES = {"train": "~/data/rlhf/gsm8k/train.parquet", "val": "~/data/rlhf/gsm8k/test.parquet"}
VERL_CHECKPOINTS = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
_ACTOR, _ROLLOUT, _MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
_REWARD = "reward.custom_reward_function"
# What files of configs/job compute: a sum, and a value that depends on another one.
OmegaConf.register_new_resolver("sayo.sum", lambda *numbers: sum(numbers), replace=True)
OmegaConf.register_new_resolver(
    "sayo.choose", lambda got, match, then, otherwise: then if got == match else otherwise, replace=True
)
COMPUTED = ("actor_rollout_ref.rollout.max_model_len", f"{_REWARD}.reward_kwargs.accuracy_weight")
# Variables of the scripts of earlier versions, and what replaced them. NAME is not among them: WSL sets it everywhere.
RETIRED = {
    "ADV_ESTIMATOR": "METHOD=NAME in front of the script, or algorithm.adv_estimator=",
    "RL": "+rl=",
    "TRAIN_FILE": "data.train_files=",
    "VAL_FILE": "data.val_files=",
    "POLICY": "MODEL_PATH=FOLDER in front of the script",
    "REGION": "DATA=FOLDER in front of the script, made by `sayo prepare synthetic --region distractor`",
    "CACHE": "DATA= and MODEL_PATH= in front of the script, made by `sayo prepare synthetic` and `sayo prepare policy`",
    "REGION_WEIGHT": "algorithm.attn.region.weight=",
    "ENTROPY_FRACTION": "algorithm.attn.region.entropy_fraction=",
    "FORMAT_WEIGHT": f"{_REWARD}.reward_kwargs.format_weight=",
    "ACCURACY_WEIGHT": f"{_REWARD}.reward_kwargs.accuracy_weight=",
    "REWARD_PATH": f"{_REWARD}.path=",
    "REWARD_NAME": f"{_REWARD}.name=",
    "GROUP_SIZE": f"{_ROLLOUT}.n=",
    "TEMPERATURE": f"{_ROLLOUT}.temperature=",
    "TOP_P": f"{_ROLLOUT}.top_p=",
    "ROLLOUT_TP": f"{_ROLLOUT}.tensor_model_parallel_size=",
    "ROLLOUT_GPU_MEM_UTIL": f"{_ROLLOUT}.gpu_memory_utilization=",
    "TRAIN_BATCH_SIZE": "data.train_batch_size=",
    "MINI_BATCH_SIZE": f"{_ACTOR}.ppo_mini_batch_size=",
    "MAX_PROMPT_LENGTH": "data.max_prompt_length=",
    "MAX_RESPONSE_LENGTH": "data.max_response_length=",
    "SEED": "data.seed=",
    "LR": f"{_ACTOR}.optim.lr=",
    "WEIGHT_DECAY": f"{_ACTOR}.optim.weight_decay=",
    "GRAD_CLIP": f"{_ACTOR}.grad_clip=",
    "KL_COEF": f"{_ACTOR}.kl_loss_coef=",
    "PPO_MAX_TOKEN_LEN_PER_GPU": f"{_ACTOR}.ppo_max_token_len_per_gpu=",
    "LORA_RANK": f"{_MODEL}.lora_rank=",
    "LORA_ALPHA": f"{_MODEL}.lora_alpha=",
    "LORA_EXCLUDE": f"{_MODEL}.exclude_modules=",
    "EPOCHS": "trainer.total_epochs=",
    "STEPS": "trainer.total_training_steps=",
    "SAVE_FREQ": "trainer.save_freq=",
    "TEST_FREQ": "trainer.test_freq=",
    "LOGGER": "trainer.logger=",
}


def refuse_names(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a job or a method that has no file, and in a script's run a variable that scripts no longer read.

    Args:
        arguments: of the command line. Files are looked up in its ``--config-dir``; without one Hydra does it.
        environment: variables of the process.

    Raises:
        SayoError: L30, L67.
    """
    refuse_retired(RETIRED, environment)
    words = [
        word
        for argument in arguments
        for word in (argument.split("=", 1) if "--config-dir=" in argument else [argument])
    ]
    folder = dict(itertools.pairwise(words)).get("--config-dir")
    for argument in arguments:
        choice = CHOICE.fullmatch(argument)
        if folder is None or choice is None:
            continue
        kind, name = choice.groups()
        known = sorted(path.stem for path in (Path(folder) / kind).glob("*.yaml"))
        if name not in known:
            paper = PAPERS.get(name.lower())
            hint = f" (did you mean {paper!r}?)" if paper in known else did_you_mean(name.removesuffix(".yaml"), known)
            raise SayoError(
                "L30",
                f"there is no {kind} of this name{hint}",
                where=kind.upper(),
                got=name,
                wanted=f"a file of {folder}/{kind}: {' '.join(known)}",
                fix="correct the name",
            )


def check_names() -> None:
    """``refuse_names`` of this process; ``python -m sayo_verl.launch.job`` does no more."""
    try:
        refuse_names(sys.argv[1:], os.environ)
    except SayoError as error:
        sys.exit(str(error))


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
        found |= {f"{key}.{leaf}" for leaf in _leaves(value)} if isinstance(value, dict) else {key}
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


def _leaves(value: Mapping[Any, Any]) -> Iterator[str]:
    for key, part in value.items():
        yield from (f"{key}.{leaf}" for leaf in _leaves(part)) if isinstance(part, Mapping) else [str(key)]


def write_out(config: DictConfig, given: Collection[str]) -> None:
    """Replace ``sayo.data``, ``sayo.out`` and ``sayo.resume`` by verl's own settings, and make paths absolute.

    Args:
        config: the composed configuration; it is changed, and so is ``VERL_FILE_LOGGER_PATH`` of this process if it is
            not set.
        given: keys of the command line. They win over what a job's file says.

    Raises:
        SayoError: L44 nothing to resume, L68 two sources of training rows, D56 not a folder of ``sayo prepare``.
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
    """Workers run in other folders."""
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
            fix="leave out DATA=... (sayo.data) or data.train_files; data.val_files may stand beside both. In a job's "
            "own file set sayo.data to null",
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
    if out is None:
        return
    folder = Path(_absolute(str(out)))
    trainer: Any = OmegaConf.to_container(config.trainer, resolve=False)
    own = trainer["default_local_dir"] != VERL_CHECKPOINTS or "trainer.default_local_dir" in given
    checkpoints = Path(_absolute(str(config.trainer.default_local_dir))) if own else folder / "checkpoints"
    # verl would begin a new run. What is there is judged by ``check_resume``.
    searched = resumed and config.trainer.resume_mode != "resume_path"
    if searched and not (checkpoints / TRACKER).exists() and not any(checkpoints.glob("global_step_*")):
        raise SayoError(
            "L44",
            "there is no checkpoint to resume",
            where=str(checkpoints),
            fix="name the folder of a run that saved some (trainer.save_freq=...), or leave RESUME (sayo.resume) out "
            "to begin a new run",
        )
    config.trainer.default_local_dir = str(checkpoints)
    if "trainer.resume_mode" not in given and config.trainer.resume_mode in ("auto", "disable"):
        config.trainer.resume_mode = "auto" if resumed else "disable"
    metrics = next_metrics_file(folder) if resumed else folder / "metrics.jsonl"
    os.environ.setdefault(LOGGER_PATH, str(metrics))


if __name__ == "__main__":
    check_names()
