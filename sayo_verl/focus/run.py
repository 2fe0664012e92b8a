"""Runs a job of the anchoring stage: checks all of its steps, prints the plan, then samples, trains and reports.

Each step is a command of ``sayo focus``, started as a process. No model library is imported before the checks.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sayo_verl.data.building.folder import verl_flags
from sayo_verl.errors import SayoError
from sayo_verl.focus import command
from sayo_verl.focus.config import BLOCK, FocusConfig, RespondConfig, check_new_folder
from sayo_verl.focus.files import columns_of, count_rows, missing_files
from sayo_verl.focus.job import FocusJob, leaves, place_rows, read_job, read_yaml
from sayo_verl.focus.variables import refuse_variables
from sayo_verl.models.location import check_config_file, model_folder, why_absent
from sayo_verl.script_variables import BY_SCRIPT

MS_PER_TOKEN = 28  # of a 7B model and a batch of any size: docs/anchoring.md
INPUTS = {"train_files": "train rows", "val_file": "held-out rows", "base": "model"}  # key -> name in a message
RECORD = "job.yaml"  # in the folder of a job: its values
# Programs as the plan names them -> programs of this Python, whatever PATH is
_PROGRAMS = {"python3": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def batches_per_block(tries: int, *, right: bool) -> int:
    """Batches that sampling takes for a block: if each try answers half of the open rows, or none of them, rightly."""
    if not right:
        return BLOCK * tries
    return sum(max(BLOCK >> n, 1) for n in range(tries))


def sampling_minutes(rows: int, gpus: int, respond: RespondConfig, *, right: bool) -> int:
    """Minutes that sampling takes by the arithmetic of docs/anchoring.md; rounded up."""
    blocks = math.ceil(rows / (BLOCK * respond.batch_size))
    tokens = math.ceil(blocks / gpus) * batches_per_block(respond.tries, right=right) * respond.max_new_tokens
    return math.ceil(tokens * MS_PER_TOKEN / 60_000)


def _duration(minutes: int) -> str:
    return f"{minutes} min" if minutes < 120 else f"{math.floor(minutes / 6 + 0.5) / 10} h"


@dataclass(frozen=True)
class Steps:
    """Arguments of ``sayo focus`` for each step.

    Attributes:
        respond: None if nothing is sampled.
        train: reads the sampled rows, if there are any.
        train_check: the same on the rows of the source, which are there before the first step.
        report: of the trained policy.
    """

    respond: list[str] | None
    train: list[str]
    train_check: list[str]
    report: list[str]


def steps_of(job: FocusJob, folder: Path) -> Steps:
    """The arguments of the steps. A flag is there if its value is not the default."""
    policy, sampled = str(folder / "policy"), str(folder / "rows.parquet")
    base, source = ["--base", str(job.base)], ["--rows", *job.train_files]
    trained = ["--out", policy, *_flags(job.train, FocusConfig())]
    respond = ["respond", *base, *source, "--out", sampled, *_flags(job.respond, RespondConfig())]
    compared = ["--after", policy, "--rows", str(job.val_file), "--out", str(folder)]
    return Steps(
        respond=respond if job.sample else None,
        train=["train", *base, *(["--rows", sampled] if job.sample else source), *trained],
        train_check=["train", *base, *source, *trained],
        report=["report", *base, *compared, *_flags(job.report, FocusConfig())],
    )


def _flags(values: Any, defaults: Any) -> list[str]:
    flags: list[str] = []
    for name in (f.name for f in dataclasses.fields(values)):
        value = getattr(values, name)
        value = tuple(value) if isinstance(value, list) else value
        unused = name == "lora_alpha" and not values.lora_rank
        if value is None or value is False or value == getattr(defaults, name, None) or unused:
            continue
        flags.append("--" + name.replace("_", "-"))
        if isinstance(value, tuple):
            flags += [str(item) for item in value]
        elif value is not True:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags


def check_steps(steps: Steps) -> None:
    """Check the arguments of all steps, and the files of rows that exist.

    Raises:
        SayoError: what ``command.check`` raises.
    """
    parser = argparse.ArgumentParser(prog="sayo focus")
    command.add_flags(parser)
    for step in (steps.respond, steps.train_check, steps.report):
        if step:
            command.check(parser.parse_args(step))


def check_inputs(job: FocusJob, *, dry_run: bool) -> list[str]:
    """Check that the model and the files of rows exist, and the columns of the files.

    Args:
        job: with the files of ``place_rows``.
        dry_run: something missing is no error.

    Returns:
        Keys of the job whose files or folder are missing.

    Raises:
        SayoError: what ``columns_of``, ``model_folder`` and ``check_config_file`` raise.
    """
    missing = []
    for key, files in (("train_files", job.train_files), ("val_file", [str(job.val_file)])):
        absent = missing_files(files) if dry_run else []
        missing += [key] if absent else []
        for file in files:
            if file not in absent:
                columns_of(file)
    model = model_folder(job.base, where="base", dry_run=dry_run)
    if model is None:
        return [*missing, "base"]
    check_config_file(model, job.base, where="base")
    return missing


def commands(job: FocusJob, steps: Steps) -> list[list[str]]:
    """The command lines of the steps."""
    on_one = ["python3", "-m", "sayo_verl.focus"]
    on_all = ["torchrun", "--standalone", f"--nproc_per_node={job.gpus}", *on_one[1:]] if job.gpus else on_one
    sampled = [[*on_all, *steps.respond]] if steps.respond else []
    return [*sampled, [*on_all, *steps.train], [*on_one, *steps.report]]


def next_command(job: FocusJob, folder: Path) -> str:
    """The command of the reinforcement stage on the trained policy, to paste into a shell."""
    words = f"MODEL_PATH={shlex.quote(str((folder / 'policy').absolute()))} {job.next_command}"
    files = {"train": [Path(file) for file in job.train_files], "val": [Path(str(job.val_file))]}
    if job.data is not None:
        words = f"DATA={shlex.quote(job.data)} {words}"
        files = {split: [f for f in of if f.parent != Path(job.data).expanduser()] for split, of in files.items()}
    return f"{words} {verl_flags(files)}".rstrip()


def plan(job: FocusJob, steps: Steps, folder: Path, missing: Collection[str]) -> list[str]:
    """The lines that describe a job before it starts; ``missing`` is of ``check_inputs``."""

    def found(file: str) -> str:
        n = count_rows([file])
        return f"{file} - NOT THERE YET, needed before the run" if n is None else f"{file}: {n} rows"

    per_step = (job.gpus or 1) * job.train.batch_size * job.train.accumulation
    seen, rank = per_step * job.train.steps, job.train.lora_rank
    limits = (count_rows(job.train_files), job.respond.max_rows if job.sample else None)
    rows = min((n for n in limits if n is not None), default=None)
    absent = missing_files([*job.train_files, str(job.val_file)])
    unread = f"; rows not checked, missing: {', '.join(absent)}" if absent else ""
    sampling = []
    if job.sample and job.gpus:
        half, none = (
            _duration(sampling_minutes(rows or 10_000, job.gpus, job.respond, right=r)) for r in (True, False)
        )
        sampling = [
            f"sampling   {half} for {rows or 'every 10000'} rows if each try answers half of them rightly, {none} if "
            "none; by arithmetic for a 7B model, not measured"
        ]
    passes = f": {seen / rows:.1f} passes" if rows else ""
    passes += f" if all {rows} sampled rows are kept, more if fewer are" if rows and job.sample else ""
    return [
        f"model      {job.base}{f' - {why_absent(job.base)}' if 'base' in missing else ''}",
        *(f"rows       {found(file)}" for file in job.train_files),
        f"held out   {found(str(job.val_file))}",
        f"arguments  checked{unread}",
        f"weights    {f'LoRA rank {rank} and the row of <Focus>' if rank else 'all of the decoder'}",
        *sampling,
        f"per step   {per_step} rows, {job.train.steps} steps, lr {job.train.learning_rate:g}",
        f"training   {seen} rows seen{passes}; time not estimated",
        *(f"{n}.         {_shown(line)}" for n, line in enumerate(commands(job, steps), 1)),
        f"then       {next_command(job, folder)}",
    ]


def _shown(words: Sequence[str]) -> str:
    """A command to paste into a shell; the shell expands the pattern of a folder that is missing."""
    parts = (word.rpartition("/") if word.endswith("-*.parquet") else ("", "", word) for word in words)
    return " ".join(f"{shlex.quote(f)}/{name}" if slash else shlex.quote(name) for f, slash, name in parts)


def check_gpus(job: FocusJob) -> None:
    """Refuse a job on GPUs on a machine that has none.

    Raises:
        SayoError: L21.
    """
    if job.gpus and shutil.which("nvidia-smi") is None:
        raise SayoError(
            "L21",
            "no GPU on this machine",
            where="gpus",
            got=job.gpus,
            fix="look at the job with DRY_RUN=1 (--dry-run), or anchor the tiny policy: "
            "bash scripts/run_faithful_anchor_tiny.sh",
        )


def folder_of(job: FocusJob, name: str) -> Path:
    """The folder of the job; a new one below ``outputs`` if the job names none.

    Raises:
        SayoError: F29 for ``out`` together with ``resume``.
    """
    if job.out is not None and job.resume is not None:
        raise SayoError(
            "F29",
            "the folder of the job is named twice",
            where="out",
            got=f"out={job.out} and resume={job.resume}",
            wanted="one of them",
            fix="leave out OUT (out): a resumed job stays in its folder",
        )
    return Path(job.resume or job.out or time.strftime(f"outputs/focus_{name}/%Y%m%d-%H%M%S")).expanduser()


def trained_already(job: FocusJob, folder: Path, missing: Collection[str] = ()) -> bool:
    """Whether the folder of a resumed job has a trained policy. A new job gets a folder without files.

    Args:
        job: with the files of ``place_rows``.
        folder: of the job.
        missing: of ``check_inputs``. These keys are not compared: a dry run may not know their final values.

    Raises:
        SayoError: F16 for a new job in a folder with files, F29 for nothing to resume, F31 for a policy that was
            trained with other settings.
    """
    if job.resume is None:
        check_new_folder(folder, "choose a new folder (OUT=..., out=), or resume the job in it (RESUME=..., resume=)")
        return False
    record = folder / RECORD
    if not record.is_file():
        raise SayoError(
            "F29",
            "there is no job to resume",
            where=str(record),
            fix="name the folder of an interrupted job, or leave RESUME (resume) out to start a new one",
        )
    if not (folder / "policy").exists():
        return False
    before, now = read_yaml(record), _record(job)
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if not key.startswith(("report.", "val_file", *missing)) and before.get(key) != now.get(key)
    ]
    if changed:
        raise SayoError(
            "F31",
            "the policy of this folder was trained with other settings",
            where=str(folder / "policy"),
            got={key: now.get(key) for key in changed},
            wanted={key: before.get(key) for key in changed},
            fix="give those settings, or start a new job (OUT=...)",
        )
    return True


def _record(job: FocusJob) -> dict[str, Any]:
    """Key -> value of what decides the policy and the report."""
    values: Any = OmegaConf.to_container(OmegaConf.structured(job), resolve=True)
    places = ("out", "resume", "gpus", "data", "next_command")
    return {key: value for key, value in leaves(values) if key not in places}


def run_job(file: Path, settings: Sequence[str], *, dry_run: bool, check: bool) -> int:
    """Run the steps of a job; a dry run prints the plan, a check prints nothing.

    Args:
        file: yaml file.
        settings: ``KEY=VALUE`` of the command line.

    Returns:
        0, or the exit code of the step that failed.

    Raises:
        SayoError: codes of the functions above, before the first step.
    """
    refuse_variables(os.environ)
    job, given = read_job(file, settings)
    job.base = os.path.expanduser(job.base)  # transformers does not
    folder = folder_of(job, file.stem)
    if not dry_run and not check:
        check_gpus(job)
    place_rows(job, given, dry_run=dry_run or check)
    steps = steps_of(job, folder)
    check_steps(steps)
    missing = check_inputs(job, dry_run=dry_run or check)
    trained = trained_already(job, folder, missing)
    if check:
        return 0
    print("\n".join(plan(job, steps, folder, missing)), flush=True)
    if trained:
        print("the policy is trained: the report alone is left", flush=True)
    if dry_run:
        lack = f"; still missing: {', '.join(INPUTS[key] for key in missing)}" if missing else ""
        print(f"dry run: the settings of all steps pass the checks; nothing was started{lack}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(_record(job)), folder / RECORD)
    kept = [setting for setting in settings if not setting.startswith(("out=", "resume="))]
    again = os.environ.get(BY_SCRIPT) or shlex.join(["sayo", "focus", "run", str(file), *kept, f"resume={folder}"])
    print(f"to resume  {again}", flush=True)
    for line in commands(job, steps)[-1 if trained else 0 :]:
        done = subprocess.run([*_PROGRAMS[line[0]], *line[1:]], check=False)
        if done.returncode:
            return done.returncode
    print(f"policy     {folder / 'policy'}")
    print(f"next       {next_command(job, folder)}")
    return 0
