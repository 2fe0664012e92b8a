"""Runs a job of the anchoring stage: checks all of its steps, prints the plan, then samples, trains and reports.

Each step is a command of ``sayo focus``, started as a process. No model library is imported before the checks.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sayo_verl.errors import SayoError
from sayo_verl.focus import command
from sayo_verl.focus.config import check_new_folder
from sayo_verl.focus.files import columns_of, missing_files
from sayo_verl.focus.job import FocusJob, leaves, place_rows, read_job, read_yaml
from sayo_verl.focus.plan import Steps, commands, next_command, plan, rows_per_step, steps_of
from sayo_verl.focus.variables import refuse_variables
from sayo_verl.models.location import check_config_file, model_folder
from sayo_verl.script_variables import BY_SCRIPT

INPUTS = {"train_files": "train rows", "val_file": "held-out rows", "base": "model"}  # key -> name in a message
RECORD = "job.yaml"  # in the folder of a job: its values
# Programs as the plan names them -> programs of this Python, whatever PATH is
_PROGRAMS = {"python3": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


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
    """Key -> value of what decides the policy and the report, on any number of GPUs."""
    values: Any = OmegaConf.to_container(OmegaConf.structured(job), resolve=True)
    left_out = ("out", "resume", "gpus", "data", "next_command", "train.accumulation")
    return {key: value for key, value in leaves(values) if key not in left_out} | {
        "train_files": [os.path.abspath(file) for file in job.train_files],
        "rows_per_step": rows_per_step(job),
    }


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
