"""``sayo prepare``: rows from a source, mixtures, drawn scenes, the tiny policy."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from sayo_verl.command_line import AddFlags, Command, Run, add_commands, add_config_flags, config_from

# name -> (module of sayo_verl.data.sources, what it reads)
SOURCES = {
    "gqa": ("gqa", "GQA: scene graphs, questions, images"),
    "refocus": ("refocus", "ReFocus-Chart: parquet or JSON"),
    "jsonl": ("jsonl", "your own data: one JSON object per line"),
    "coco": ("coco", "COCO detection annotations"),
    "labelme": ("labelme", "a folder of labelme files"),
    "yolo": ("yolo", "a YOLO data set: images, labels, data.yaml"),
    "conversations": ("conversations", "conversations as of LLaVA and Visual-CoT"),
    "table": ("table", "parquet, csv or a data set of the Hugging Face hub"),
    "hf": ("table", "the same as table"),
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
        from sayo_verl.data.boxes import BOX_FORMATS
        from sayo_verl.data.build import BuildOptions, build
        from sayo_verl.data.rows import PROMPTS
        from sayo_verl.data.sources.common import add_box_flags

        module = importlib.import_module(f"sayo_verl.data.sources.{name}")
        default = {field.name: field.default for field in dataclasses.fields(BuildOptions)}
        parser.description = module.__doc__
        module.add_flags(parser.add_argument_group("source"))
        if module.NAMED_BOXES:
            boxes = parser.add_argument_group("boxes")
            boxes.add_argument(
                "--box-format",
                choices=BOX_FORMATS,
                metavar="FORMAT",
                help="such as xyxy, xywh, cxcywh_unit: docs/data.md",
            )
            add_box_flags(boxes)
        group = parser.add_argument_group("rows")
        group.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
        group.add_argument("--limit", type=float, metavar="N", help="draw N examples, or a share; 0: all")
        group.add_argument("--val-share", type=float, metavar="X", help="of the images, to hold out")
        group.add_argument("--seed", type=int, metavar="N", help="of the draw and the split")
        group.add_argument("--prompt", metavar="TEXT", help=f"{', '.join(PROMPTS[1:])}, or a template")
        group.add_argument("--keep-without-boxes", action="store_true", help="keep rows without a usable box")
        group.add_argument("--link", action="store_true", help="store paths of images, not bytes")
        group.add_argument("--max-drop", type=float, metavar="X", help="of the examples, that may be unusable")
        group.add_argument("--skip-missing", action="store_true", help="leave out rows of missing images")
        group.add_argument("--overwrite", action="store_true", help="replace prepared data")
        for action in parser._actions:
            if action.dest in default and action.default is None:
                action.default = default[action.dest]
                action.help = f"{action.help} ({action.default})"
        assert isinstance(parser, Command)
        left = {"--box-frame", "--rescale", "--seed", "--max-drop", "--skip-missing"} if module.NAMED_BOXES else set()
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
    mix.add_flags(parser)

    def run(args: argparse.Namespace) -> int:
        _finish(mix.from_args(args).folder)
        return 0

    return run


def _finish(folder: Path) -> None:
    """Print the rows of a finished folder, what was left out, and what to give to verl; the path on stdout."""
    from rich.console import Console
    from rich.table import Table

    from sayo_verl.data.folder import LEFT_OUT, MANIFEST, read_folder, verl_flags
    from sayo_verl.data.rows import REASONS

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
        lines.append("no image was held out: for validation rows set a higher --val-share")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(folder)


def _synthetic(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.data.rows import PROMPTS
    from sayo_verl.data.sources.scenes import SceneConfig, prepare

    parser.add_argument("--out", type=Path, default=Path(".sayo"), help="parent folder (default: %(default)s)")
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        default="question",
        help="how the form of the answer is asked for (default: %(default)s)",
    )
    add_config_flags(parser, SceneConfig)
    assert isinstance(parser, Command)
    parser.show_only("--out", "--question-kinds", "--n-train", "--n-val", "--seed", "--prompt")

    def run(args: argparse.Namespace) -> int:
        made = prepare(args.out, config_from(args, SceneConfig), args.prompt)
        bare = "" if args.prompt != "question" else "; prompts for the tiny policy, others need --prompt instruction"
        print(f"scenes: {'reused' if made.reused else 'made'} {made.path}{bare}", file=sys.stderr)
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
    parser.show_only("--out", "--seed", "--scenes-question-kinds")

    def run(args: argparse.Namespace) -> int:
        made = prepare_policy(args.out, *(config_from(args, config) for config in configs))
        print(f"policy: {'reused' if made.reused else 'made'} {made.path}", file=sys.stderr)
        print(made.path)
        return 0

    return run
