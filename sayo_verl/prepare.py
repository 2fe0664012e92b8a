"""``sayo prepare``: rows from a source, mixtures, drawn scenes, the tiny policy."""

import argparse
import dataclasses
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from sayo_verl.command_line import (
    AddFlags,
    Command,
    Run,
    add_commands,
    add_config_flags,
    add_task_flags,
    config_from,
    task_config,
    unread_by_task,
)
from sayo_verl.errors import SayoError, raise_first

# name -> (module of sayo_verl.data.sources, what it reads)
SOURCES = {
    "gqa": ("gqa", "GQA: scene graphs, questions, images"),
    "refocus": ("refocus", "ReFocus-Chart: parquet or JSON"),
    "jsonl": ("jsonl", "your own data: one JSON object per line"),
    "coco": ("coco", "COCO detection annotations"),
    "labelme": ("labelme", "a folder of labelme files"),
    "yolo": ("yolo", "a YOLO data set: images, labels, data.yaml"),
    "conversations": ("conversations", "LLaVA or Visual-CoT conversations"),
    "table": ("table", "parquet, csv or a data set of the Hugging Face hub"),
    "hf": ("table", "a table: another name of table"),
    "verl": ("verl_rows", "parquet files that verl reads, and boxes from a side file"),
}


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """The subcommands of ``sayo prepare``."""
    sources = {name: (f"rows from {what}", _rows(module)) for name, (module, what) in SOURCES.items()}
    add_commands(
        parser,
        {
            **sources,
            "mix": ("rows from prepared folders, drawn by shares", _mix),
            "synthetic": ("drawn scenes with exact boxes; prints the folder", _synthetic),
            "policy": ("a tiny warmed-up Qwen3-VL; prints the folder", _policy),
        },
    )


def _rows(name: str) -> AddFlags:
    """The subcommand that makes training rows from a source."""

    def add_flags(parser: argparse.ArgumentParser) -> Run:
        from sayo_verl.data.boxes import BOX_FORMATS, FRAMES
        from sayo_verl.data.build import BuildOptions, build
        from sayo_verl.reward.prompts import PROMPTS

        module = importlib.import_module(f"sayo_verl.data.sources.{name}")
        default = {field.name: field.default for field in dataclasses.fields(BuildOptions)}
        parser.description = module.__doc__
        module.add_flags(parser.add_argument_group("source"))
        boxes, group = parser.add_argument_group("boxes"), parser.add_argument_group("rows")

        def add(flag: str, help: str, to: argparse._ArgumentGroup = group, **kwargs: Any) -> None:
            value = default.get(flag[2:].replace("-", "_"))
            if flag in getattr(module, "NO_EFFECT", ()):
                return
            if isinstance(value, bool):
                kwargs["action"] = "store_true"
            elif value is not None:
                kwargs["default"] = value
                help += "" if "(default" in help else " (default: %(default)s)"
            to.add_argument(flag, help=help, **kwargs)

        if getattr(module, "NAMED_BOXES", False):
            listed = "such as xyxy, xywh, cxcywh_unit: docs/data.md"
            add("--box-format", listed, boxes, choices=BOX_FORMATS, metavar="FORMAT")
        frames = f"how boxes follow the EXIF rotation: {', '.join(FRAMES)}"
        add("--box-frame", frames, boxes, choices=FRAMES, metavar="FRAME")
        add("--rescale", "boxes were drawn on resized copies of the images", boxes)
        add("--trust-boxes", "the format was checked: build although boxes look wrong", boxes)
        add("--out", "folder to make", type=Path, required=True, metavar="FOLDER")
        add("--limit", "draw N rows, or a share below 1 (default: 0, all)", type=float, metavar="N")
        add("--val-share", "share of the images held out for validation", type=float, metavar="X")
        add("--seed", "seed of the draw and of the split", type=int, metavar="N")
        prompts = f"{PROMPTS[0]} (default), {', '.join(PROMPTS[1:])}, or your text with {{question}}"
        add("--prompt", prompts, metavar="TEXT")
        add("--keep-without-boxes", "keep rows without a usable box")
        add("--link", "store the paths of the images, not their bytes")
        add("--max-drop", "stop if more than this share of the rows is unusable", type=float, metavar="X")
        add("--skip-missing", "leave out rows whose image is missing")
        add("--overwrite", "replace prepared data")
        assert isinstance(parser, Command)
        left = {"--box-frame", "--rescale", "--trust-boxes", "--seed", "--max-drop", "--skip-missing"}
        left |= {"--name", "--config"}
        parser.show_only(*({flag for action in parser._actions for flag in action.option_strings} - left))

        def run(args: argparse.Namespace) -> int:
            options = {name: value for name, value in vars(args).items() if name in default}
            _finish(build(module.from_args(args), args.out, BuildOptions(**options)).folder)
            return 0

        return run

    return add_flags


def _mix(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.data import mix

    parser.description = mix.__doc__
    parser.add_argument(
        "--from",
        dest="parts",
        action="append",
        required=True,
        metavar="FOLDER=SHARE",
        help="a prepared folder, and a number, all or rest; repeat it",
    )
    parser.add_argument("--rows", type=int, required=True, metavar="N", help="training rows of the mixture")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the mixture")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of prepared data")
    assert isinstance(parser, Command)
    parser.show_only(*(flag for action in parser._actions for flag in action.option_strings))

    def run(args: argparse.Namespace) -> int:
        parts = [text.rpartition("=") for text in args.parts]
        shares = {Path(folder).resolve(): share for folder, _, share in parts}
        if len(shares) < len(parts) or not all(folder for folder, _, _ in parts):
            wanted = "FOLDER=SHARE, each folder once"
            raise SayoError("D57", "--from is invalid", where="--from", got=args.parts, wanted=wanted, fix="correct it")
        _finish(mix.mix_folders(shares, args.rows, args.out, args.seed, overwrite=args.overwrite).folder)
        return 0

    return run


def _finish(folder: Path) -> None:
    """Print the rows of a finished folder, what was left out, and what to give to verl; the path on stdout."""
    from rich.console import Console
    from rich.table import Table

    from sayo_verl.data.folder import LEFT_OUT, MANIFEST, read_folder, verl_flags
    from sayo_verl.data.rows import REASONS

    folder = folder.resolve()
    built, manifest = read_folder(folder), json.loads((folder / MANIFEST).read_text())
    table = Table(show_header=False, box=None)
    for split, rows in built.rows.items():
        table.add_row(f"{rows:,}", split, "rows")
    if manifest.get("rows_without_boxes"):
        table.add_row(f"{manifest['rows_without_boxes']:,}", "without boxes", "neutral for methods that need boxes")
    for reason, rows in built.left_out.items():
        table.add_row(f"{rows:,}", reason, REASONS[reason])
    for change, images in manifest.get("images_changed", {}).items():
        table.add_row(f"{images:,}", "image changed", change)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    console.print(table)
    lines = [f"left out: {folder / LEFT_OUT}"] if built.left_out else []
    lines += [verl_flags(built.files)]
    if not built.rows["val"]:
        lines.append("no image was held out: for validation rows prepare with a higher --val-share")
    if 0 < manifest.get("boxes", 0) < 10:
        lines.append("too few boxes to judge their format: look at the page")
    elif any(reason.startswith("box_") for reason in built.left_out):
        lines.append("rows were left out for their boxes: look at the page")
    lines.append(f"look at rows: sayo inspect {shlex.quote(str(folder))} --page {shlex.quote(f'{folder}.html')}")
    if built.rows["train"]:  # SAYO needs boxes; VGPO does not
        script = "run_sayo_qwen3vl_4b_1gpu" if manifest.get("boxes", 1) else "run_vgpo_qwen2_5vl_7b"
        lines.append(f"train: DATA={shlex.quote(str(folder))} bash scripts/{script}.sh")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(folder)


def _synthetic(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.reward.prompts import PROMPTS
    from sayo_verl.scenes import SceneConfig
    from sayo_verl.scenes.config import KINDS
    from sayo_verl.scenes.walk import WalkConfig
    from sayo_verl.tiny.prepared import prepare_scenes, prepare_walks

    tasks: dict[str, type] = {"scenes": SceneConfig, "walk": WalkConfig}
    parser.add_argument("--out", type=Path, default=Path(".sayo"), help="parent folder (default: %(default)s)")
    parser.add_argument(
        "--task",
        choices=tasks,
        default="scenes",
        help="questions about objects, or walks over a grid of arrows (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="instructions about the form of the answer; scenes only (default: question)",
    )
    add_task_flags(parser, tasks)
    for action in parser._actions:
        if "--question-kinds" in action.option_strings:
            action.help = f"some of {', '.join(KINDS)} (default: {', '.join(SceneConfig.question_kinds)})"
    assert isinstance(parser, Command)
    parser.show_only("--out", "--task", "--question-kinds", "--steps", "--n-train", "--n-val", "--seed", "--prompt")

    def run(args: argparse.Namespace) -> int:
        config, bare = task_config(args, tasks, args.task), ""
        if isinstance(config, WalkConfig):
            raise_first([unread_by_task("prompt", args.task)] if args.prompt else [])
            made = prepare_walks(args.out, config)
        else:
            made = prepare_scenes(args.out, config, args.prompt or "question")
            if args.prompt in (None, "question"):
                bare = "; prompts for the tiny policy, others need --prompt instruction"
        kind = made.path.name.partition("-")[0]
        print(f"{kind}: {'reused' if made.reused else 'made'} {made.path}{bare}", file=sys.stderr)
        print(made.path)
        return 0

    return run


def _policy(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.scenes import SceneConfig
    from sayo_verl.tiny.policy import TinyPolicyConfig
    from sayo_verl.tiny.warmup import WarmupConfig, prepare_policy

    parser.add_argument("--out", type=Path, default=Path(".sayo"), help="parent folder (default: %(default)s)")
    configs = {TinyPolicyConfig: "", WarmupConfig: "warmup-", SceneConfig: "scenes-"}
    for config, prefix in configs.items():
        add_config_flags(parser, config, prefix)
    assert isinstance(parser, Command)
    parser.show_only("--out", "--family", "--seed", "--scenes-question-kinds")

    def run(args: argparse.Namespace) -> int:
        made = prepare_policy(args.out, *(config_from(args, config) for config in configs))
        print(f"policy: {'reused' if made.reused else 'made'} {made.path}", file=sys.stderr)
        print(made.path)
        return 0

    return run
