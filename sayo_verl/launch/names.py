"""What can be refused before an environment is built: names of jobs and methods, variables, folders that do not exist.

Imports the standard library only: ``scripts/run.sh`` calls it with any Python, before it spends minutes on an
environment. The launcher calls it again, before Hydra.
"""

import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sayo_verl.data.folder import no_prepared_folder
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.script_variables import BY_SCRIPT, refuse_unread

CHOICE = re.compile(r"\+{0,2}(job|method|rl|mode)=([\w.-]+)")  # Hydra judges lists and quoted names
# Names of papers -> the method in this repository
PAPERS = {
    "sayo": "region",
    "vgpo": "dual",
    "atrl": "anchor",
    "at-rl": "anchor",
    "faithful-mr1": "faithful",
    "vppo": "sensitivity",
    "evidence-rl": "evidence",
}
_ACTOR, _ROLLOUT, _MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
_REWARD = "reward.custom_reward_function"
# Variables that no script reads -> what to use instead. Names that systems set are not among them: NAME (WSL),
# MODEL_NAME and MODEL_ID (model servers), REGION (clouds), DATA_DIR, OUTPUT_DIR, GPUS, NUM_GPUS, NUM_NODES.
UNREAD = {
    "ADV_ESTIMATOR": "METHOD=NAME in front of the script, or algorithm.adv_estimator=",
    "RL": "+rl=",
    "TRAIN_FILE": "data.train_files=",
    "VAL_FILE": "data.val_files=",
    "POLICY": "MODEL_PATH=FOLDER in front of the script",
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
    "TRAIN_FILES": "data.train_files=",
    "VAL_FILES": "data.val_files=",
}


def refuse_names(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a job or a method without a file; in a script's run also unread variables and absent folders.

    Args:
        arguments: of the command line. Files are looked up in its ``--config-dir``; without one Hydra does it.
        environment: variables of the process. OUT is the absolute folder of the run, which RESUME named.

    Raises:
        SayoError: L30, L67, L74; L44 and D56 for folders.
    """
    if {"-m", "--multirun"} & set(arguments):
        raise SayoError(
            "L74",
            "sweeps are not supported",
            where="--multirun",
            wanted="one run per process, with a folder of its own",
            fix="call the launcher once for each setting, from a shell loop",
        )
    if environment.get(BY_SCRIPT):
        dry_run = any(argument.lower().lstrip("+") == "sayo.dry_run=true" for argument in arguments)
        _check_variables(environment, dry_run=dry_run)
    words = [
        word
        for argument in arguments
        for word in (argument.split("=", 1) if "--config-dir=" in argument else [argument])
    ]
    folder = dict(itertools.pairwise(words)).get("--config-dir")
    for argument in arguments:
        choice = CHOICE.fullmatch(argument)
        if folder is None or choice is None or any("hydra.searchpath" in other for other in arguments):
            continue
        if not Path(folder).is_dir():
            raise SayoError(
                "L30",
                "the folder of configurations does not exist",
                where="--config-dir",
                got=folder,
                fix="name the folder configs of the clone; a relative path starts at the current folder",
            )
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


def _check_variables(environment: Mapping[str, str], *, dry_run: bool) -> None:
    refuse_unread(UNREAD, environment)
    if environment.get("RESUME") and not Path(environment["OUT"]).is_dir():
        raise nothing_to_resume(Path(environment["OUT"]) / "checkpoints")
    data = Path(environment.get("DATA") or ".").expanduser().absolute()
    if not data.is_dir() and not dry_run:
        raise no_prepared_folder(data)


def nothing_to_resume(checkpoints: Path) -> SayoError:
    """L44: the run to resume has no checkpoint."""
    return SayoError(
        "L44",
        "there is no checkpoint to resume",
        where=str(checkpoints),
        fix="name the folder of a run that saved some (trainer.save_freq=...), or leave RESUME (sayo.resume) out "
        "to begin a new run",
    )


def check_names() -> None:
    """``refuse_names`` of this process; ``python -m sayo_verl.launch.names`` does no more."""
    try:
        refuse_names(sys.argv[1:], os.environ)
    except SayoError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    check_names()
