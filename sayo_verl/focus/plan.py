"""The steps of a job of the anchoring stage as command lines, and the plan that describes them. Nothing is run here."""

import dataclasses
import json
import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sayo_verl.data.folder import verl_flags
from sayo_verl.focus.config import BLOCK, FocusConfig, RespondConfig
from sayo_verl.focus.files import count_rows, missing_files
from sayo_verl.focus.job import FocusJob
from sayo_verl.models.location import why_absent

MS_PER_TOKEN = 28  # of a 7B model and a batch of any size: docs/anchoring.md


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


def rows_per_step(job: FocusJob) -> int:
    """Rows of one optimizer step on all GPUs."""
    return (job.gpus or 1) * job.train.batch_size * job.train.accumulation


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
        words = f"DATA={shlex.quote(str(Path(job.data).expanduser().absolute()))} {words}"
        files = {split: [f for f in of if f.parent != Path(job.data).expanduser()] for split, of in files.items()}
    return f"{words} {verl_flags(files)}".rstrip()


def plan(job: FocusJob, steps: Steps, folder: Path, missing: Collection[str]) -> list[str]:
    """The lines that describe a job before it starts; ``missing`` are keys of the job whose files are missing."""

    def found(file: str) -> str:
        n = count_rows([file])
        return f"{file} - NOT THERE YET, needed before the run" if n is None else f"{file}: {n} rows"

    per_step = rows_per_step(job)
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
