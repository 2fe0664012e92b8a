"""The <Focus> stage: respond samples texts to imitate, train writes a model
folder, report compares. run starts these three with the values of a file.

On N devices: torchrun --nproc_per_node=N -m sayo_verl.focus train ...,
and the same for respond.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sayo_verl.command_line import Command
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.focus.config import FocusConfig, RespondConfig
from sayo_verl.focus.files import check_boxes, missing_files

# flag -> (type, meaning); the defaults are those of FocusConfig
_FLAGS: dict[str, tuple[Any, str]] = {
    "weight": (float, "lambda of the anchoring loss"),
    "alpha": (float, "background share of the target"),
    "layers": (int, "decoder layers, negative from the last; none: floor(2 L / 3)"),
    "steps": (int, "optimiser steps"),
    "batch_size": (int, "rows per device and forward"),
    "accumulation": (int, "forwards per step"),
    "learning_rate": (float, "of AdamW, constant after the rise"),
    "warmup_steps": (int, "of linear rise"),
    "weight_decay": (float, ""),
    "clip": (float, "gradient norm limit"),
    "lora_rank": (int, "0 trains all weights of the decoder"),
    "lora_alpha": (int, ""),
    "train_vision": (bool, "also train the vision tower"),
    "dtype": (str, "float32 or bfloat16"),
    "attention": (str, "attn_implementation; empty: transformers' choice"),
    "checkpointing": (bool, "gradient checkpointing"),
    "max_tokens": (int, "longest row; 0: any"),
    "seed": (int, ""),
    "trainer_args": (json.loads, "JSON: any fields of transformers.TrainingArguments"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """``run``, ``train``, ``respond`` and ``report`` with their flags. No model library is loaded."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)

    job = commands.add_parser("run", help="respond, train and report with the values of a file (configs/focus)")
    job.add_argument("job", type=Path, help="yaml file")
    job.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="such as train.steps=300 train.layers=[14,18]")
    job.add_argument("--dry-run", action="store_true", help="check and print the plan; write no file")
    job.set_defaults(stage=_run_job)
    job.intermixed = True

    train = commands.add_parser("train", help="add <Focus>, train it, write a model folder; prints the folder")
    train.add_argument("--base", required=True, help="model folder or hub name")
    train.add_argument("--rows", nargs="+", required=True, help="parquet files")
    train.add_argument("--out", type=Path, required=True, help="new folder")
    train.set_defaults(stage=_train)
    train.show_only("--weight", "--layers", "--steps", "--batch-size", "--learning-rate", "--lora-rank", "--dtype")

    respond = commands.add_parser("respond", help="write rows with the policy's own right answers to imitate")
    respond.add_argument("--base", required=True)
    respond.add_argument("--rows", nargs="+", required=True, help="parquet files")
    respond.add_argument(
        "--out", type=Path, required=True, help="parquet file; the same command resumes an interrupted one"
    )
    for field in dataclasses.fields(RespondConfig):
        respond.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=float if field.name == "temperature" else int,
            default=field.default,
            help="the first rows only; default: all" if field.name == "max_rows" else "default: %(default)s",
        )
    respond.set_defaults(stage=_respond)

    report = commands.add_parser("report", help="figures and picture of <Focus> on held-out rows, before and after")
    report.add_argument("--base", required=True, help="the model that `train` started from")
    report.add_argument("--after", required=True, help="the folder that `train` wrote")
    report.add_argument("--rows", required=True, help="parquet file of held-out rows")
    report.add_argument("--out", type=Path, required=True, help="folder for focus.png and focus.json")
    report.add_argument("--max-rows", type=int, help="default: all")
    report.add_argument("--answers", action="store_true", help="also sample answers (tiny policy only)")
    report.set_defaults(stage=_report)

    for command, names in ((train, tuple(_FLAGS)), (report, ("alpha", "layers", "dtype", "attention"))):
        _config_flags(command, names)
    for command in (job, train, respond, report):
        command.add_argument("--check", action="store_true", help="refuse wrong arguments, and do nothing else")


def _config_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    for name in names:
        kind, text = _FLAGS[name]
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, nargs="+" if name == "layers" else None, help=text, metavar="X")


def _config(args: argparse.Namespace) -> FocusConfig:
    given: dict[str, Any] = {f.name: vars(args).get(f.name) for f in dataclasses.fields(FocusConfig)}
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return FocusConfig(**kept)


def _respond_config(args: argparse.Namespace) -> RespondConfig:
    return RespondConfig(**{field.name: vars(args)[field.name] for field in dataclasses.fields(RespondConfig)})


def check(args: argparse.Namespace) -> list[str]:
    """Refuse wrong arguments of a step before a model is loaded.

    Args:
        args: of ``train``, ``respond`` or ``report``.

    Returns:
        Files of rows that do not exist. Then the other files of the step are not checked either.

    Raises:
        SayoError: F05 for a setting out of range, F21 for a name in ``--trainer-args`` that transformers does not know,
            F22 and what ``columns_of`` raises for the files that are there.
    """
    if args.stage is _respond:
        _respond_config(args)
        return []
    config = _config(args)
    if config.trainer_args:
        from transformers import TrainingArguments

        if not isinstance(config.trainer_args, dict):
            raise SayoError(
                "F21",
                "not a JSON object",
                where="--trainer-args",
                got=config.trainer_args,
                wanted='such as {"logging_steps": 5}',
                fix="name each argument with its value",
            )
        known = [field.name for field in dataclasses.fields(TrainingArguments)]
        for name in config.trainer_args:
            if name not in known:
                raise SayoError(
                    "F21",
                    f"transformers has no such training argument{did_you_mean(name, known)}",
                    where="--trainer-args",
                    got=name,
                    wanted="fields of transformers.TrainingArguments",
                    fix="correct the name",
                )
    files = [args.rows] if isinstance(args.rows, str) else args.rows
    missing = missing_files(files)
    if config.weight and not missing:
        check_boxes(files)
    return missing


def _run_job(args: argparse.Namespace) -> int:
    from sayo_verl.focus.run import run_job

    return run_job(args.job, args.settings, dry_run=args.dry_run, check=args.check)


def _train(args: argparse.Namespace) -> None:
    from sayo_verl.focus.trainer import anchor

    done = anchor(args.base, args.rows, args.out, _config(args))
    if os.environ.get("RANK", "0") != "0":
        return
    counts = f"{done['rows']} rows, {done['rows_without_boxes']} without boxes"
    if done["rows_without_response"]:
        counts += f", {done['rows_without_response']} without a response, which imitated an empty thought"
    print(f"anchored on {counts}; layers {done['layers']}, {done['seconds']:.0f} s", file=sys.stderr)
    print(args.out)


def _respond(args: argparse.Namespace) -> None:
    import torch

    from sayo_verl.focus.respond import write_responses

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
    device = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
    done = write_responses(
        args.base,
        args.rows,
        args.out,
        _respond_config(args),
        rank=rank,
        world=world,
        device=device,
    )
    if "left" in done:  # the process that finishes last prints the rest
        print(f"process {rank} of {world} is done; {done['left']} blocks are with others", file=sys.stderr)
        return
    print(f"kept {done['kept']} of {done['rows']} rows", file=sys.stderr)
    print(args.out)


def _report(args: argparse.Namespace) -> None:
    from rich.console import Console

    from sayo_verl.focus.report import compare, comparison_table

    picture = args.out / "focus.png"
    result = compare(
        args.base, args.after, args.rows, _config(args), max_rows=args.max_rows, picture=picture, answers=args.answers
    )
    (args.out / "focus.json").write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(comparison_table(result), markup=False)
    console.print(f"picture  {picture}", soft_wrap=True, highlight=False)


def run(args: argparse.Namespace) -> int:
    """Run the command that the flags of ``add_flags`` name; returns the exit code."""
    if args.check and args.stage is not _run_job:
        if missing := check(args):
            print(f"not checked, missing: {', '.join(missing)}")
        return 0
    return args.stage(args) or 0
