"""The ``sayo`` command. Every subcommand explains itself with ``--help``."""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sayo_verl import __version__
from sayo_verl.errors import SayoError

Config = TypeVar("Config")


def add_config_flags(parser: argparse.ArgumentParser, config: type, prefix: str = "") -> None:
    """One flag for each field of a configuration dataclass, with its default."""
    hints = get_type_hints(config)
    group = parser.add_argument_group(f"{config.__name__} (see its docstring in {config.__module__})")
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        kwargs: dict[str, Any] = {"default": field.default, "help": "default: %(default)s"}
        if get_origin(hint) is tuple:
            kwargs.update(nargs="+", type=get_args(hint)[0])
        elif get_args(hint):
            kwargs.update(choices=get_args(hint), help=f"one of {', '.join(get_args(hint))}; default: %(default)s")
        else:
            kwargs.update(type=hint)
        group.add_argument(
            f"--{prefix}{field.name.replace('_', '-')}", dest=f"{config.__name__}.{field.name}", metavar="X", **kwargs
        )


def config_from(args: argparse.Namespace, config: Callable[..., Config]) -> Config:
    """The dataclass from the flags that ``add_config_flags`` made."""
    values = {k.partition(".")[2]: v for k, v in vars(args).items() if k.startswith(f"{config.__name__}.")}
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _synthetic(args: argparse.Namespace) -> int:
    from sayo_verl.data.scenes import SceneConfig, prepare

    made = prepare(args.out, config_from(args, SceneConfig))
    print(f"scenes: {'reused' if made.reused else 'made'} {made.path}", file=sys.stderr)
    print(made.path)
    return 0


def _rows(args: argparse.Namespace) -> int:
    from sayo_verl.data.building.build import build
    from sayo_verl.data.building.options import options_from

    source = importlib.import_module(f"sayo_verl.data.sources.{args.source}").from_args(args)
    print(build(source, args.out, options_from(args)).folder)
    return 0


def _mix(args: argparse.Namespace) -> int:
    from sayo_verl.data.building.mix import from_args

    print(from_args(args).folder)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from sayo_verl.inspection.command import run

    return run(args)


def _policy(args: argparse.Namespace) -> int:
    from sayo_verl.data.scenes import SceneConfig
    from sayo_verl.tiny.policy import TinyPolicyConfig
    from sayo_verl.tiny.warmup import WarmupConfig, prepare_policy

    configs = (config_from(args, TinyPolicyConfig), config_from(args, WarmupConfig), config_from(args, SceneConfig))
    made = prepare_policy(args.out, *configs)
    print(f"policy: {'reused' if made.reused else 'made'} {made.path}", file=sys.stderr)
    print(made.path)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from sayo_verl.launch.doctor import examine

    job = f", a dry run of {' '.join(args.job)}" if args.job else ""
    print(f"looking at versions, device, probe, a Ray worker{job}: about half a minute", file=sys.stderr, flush=True)
    findings = examine(args.stack, args.job)
    # as wide as the terminal; in a file every finding keeps to one line
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    table = Table(title=f"sayo-verl {__version__}", title_justify="left", expand=console.is_terminal)
    for column in ("", "what", "found", "wanted"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row("ok" if finding.right else "NO", finding.name, finding.found, finding.wanted)
    console.print(table)
    wrong = [finding for finding in findings if not finding.right]
    for finding in wrong:
        console.print(f"{finding.name}: {finding.fix}", markup=False, soft_wrap=True)
    return 1 if wrong else 0


def _watch(args: argparse.Namespace) -> int:
    from sayo_verl.report.watch import run_and_watch

    return run_and_watch(args.command, args.run, args.steps)


def _report(args: argparse.Namespace) -> int:
    from rich.console import Console

    from sayo_verl.report.curves import plot_run, plot_runs
    from sayo_verl.report.runs import load_run
    from sayo_verl.report.table import first_last_table

    runs = {path.name: load_run(path) for path in args.runs}
    console = Console()
    for path, run in zip(args.runs, runs.values(), strict=True):
        console.print(first_last_table(run, k=args.window))
        console.print(f"curves   {plot_run(run, path / 'curves.png')}", soft_wrap=True, highlight=False)
        for file in run.files:
            console.print(f"metrics  {file}", soft_wrap=True, highlight=False)
        for note in run.notes:
            console.print(f"note     {note}", soft_wrap=True, highlight=False, markup=False)
    if len(runs) > 1:
        console.print(f"compared {plot_runs(runs, args.out)}", soft_wrap=True, highlight=False)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from sayo_verl.tiny.evaluate import evaluate

    result = evaluate(
        args.model,
        args.scenes,
        samples_per_row=args.samples,
        temperature=args.temperature,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
    )
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="sayo", description="Credit by visual attention for stock verl.")
    parser.add_argument("--version", action="version", version=f"sayo-verl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="check versions, device and whether the plug-in loads in Ray workers",
        epilog=DOCTOR_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--stack", choices=("cpu", "gpu"), help="which pins to check (default: those of torch's build)")
    doctor.add_argument(
        "--job",
        nargs="+",
        default=[],
        metavar=("SCRIPT", "OVERRIDE"),
        help="a launch script: its dry run and its memory, on this machine",
    )
    doctor.set_defaults(function=_doctor)

    prepare = commands.add_parser("prepare", help="make data or the tiny policy").add_subparsers(
        required=True, metavar="WHAT"
    )
    _source_flags(prepare, argv)
    synthetic = prepare.add_parser("synthetic", help="draw scenes with exact boxes as verl parquet; prints the folder")
    policy = prepare.add_parser("policy", help="build and warm up the tiny Qwen3-VL; prints the folder")
    for made in (synthetic, policy):
        made.add_argument("--out", type=Path, default=Path(".sayo"), help="parent folder (default: %(default)s)")
    _lazy_flags(synthetic, policy, argv)
    synthetic.set_defaults(function=_synthetic)
    policy.set_defaults(function=_policy)

    inspect = commands.add_parser("inspect", help="check prepared data with the model's processor; a page of pictures")
    if "inspect" in argv:
        importlib.import_module("sayo_verl.inspection.command").add_flags(inspect)
    inspect.set_defaults(function=_inspect)

    watch = commands.add_parser("watch", help="run a training command and show its progress")
    watch.add_argument("run", type=Path, help="run folder, for train.log and metrics.jsonl")
    watch.add_argument("--steps", type=int, help="training steps the command will take (default: as its run.json says)")
    watch.add_argument("command", nargs="+", help="the command, after --")
    watch.set_defaults(function=_watch)

    report = commands.add_parser("report", help="table of first and last steps and curves of runs")
    report.add_argument("runs", type=Path, nargs="+", help="run folders")
    report.add_argument(
        "--window", type=int, default=5, help="steps that make 'first' and 'last' (default: %(default)s)"
    )
    report.add_argument("--out", type=Path, default=Path("curves.png"), help="picture that compares several runs")
    report.set_defaults(function=_report)

    evaluate = commands.add_parser("evaluate", help="let a tiny policy answer held-out scenes; accuracy and attention")
    evaluate.add_argument("model", type=Path)
    evaluate.add_argument("scenes", type=Path, help="a parquet of `sayo prepare synthetic`")
    evaluate.add_argument("--samples", type=int, default=1, help="responses per row (default: %(default)s)")
    evaluate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--max-new-tokens", type=int, default=24)
    evaluate.add_argument("--out", type=Path, help="also write the result to this file")
    evaluate.set_defaults(function=_evaluate)
    return parser


DOCTOR_EXAMPLE = """a job, with variables in front and overrides after the script as in its own call:
  METHOD=grpo NGPUS_PER_NODE=4 sayo doctor --job scripts/run_sayo_qwen3vl_8b.sh sayo.gpu_memory_gib=48
"""

SOURCES = {
    "gqa": "GQA: scene graphs, questions, images",
    "refocus": "ReFocus-Chart: parquet or JSON",
    "jsonl": "your own: one JSON object per line",
    "coco": "COCO detection or panoptic annotations",
    "labelme": "a folder of labelme files",
    "hf": "a data set of the Hugging Face hub, or a folder of one",
}


def _source_flags(prepare: Any, argv: Sequence[str]) -> None:
    """Subcommands that make training rows; their modules are imported when one of them is asked for."""
    for name, what in SOURCES.items():
        parser = prepare.add_parser(
            name, help=f"rows from {what}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv:
            module = importlib.import_module(f"sayo_verl.data.sources.{name}")
            building = importlib.import_module("sayo_verl.data.building.options")
            parser.description = module.__doc__
            module.add_flags(parser)
            parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
            building.add_flags(parser)
        parser.set_defaults(function=_rows, source=name)
    mixed = prepare.add_parser(
        "mix", help="rows drawn from prepared folders by shares", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if "mix" in argv:
        module = importlib.import_module("sayo_verl.data.building.mix")
        mixed.description = module.__doc__
        module.add_flags(mixed)
    mixed.set_defaults(function=_mix)


def _lazy_flags(synthetic: argparse.ArgumentParser, policy: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Flags that need the configuration classes; the policy's live beside torch, which is slow to import, so they are
    made only when asked for."""
    if "prepare" not in argv:
        return
    from sayo_verl.data.scenes import SceneConfig

    add_config_flags(synthetic, SceneConfig)
    if "policy" in argv:
        from sayo_verl.tiny.policy import TinyPolicyConfig
        from sayo_verl.tiny.warmup import WarmupConfig

        add_config_flags(policy, TinyPolicyConfig)
        add_config_flags(policy, WarmupConfig, prefix="warmup-")
        add_config_flags(policy, SceneConfig, prefix="scenes-")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``sayo`` command; 0 for success, 1 for a finding, 2 for a refusal, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args: Any = build_parser(argv).parse_args(argv)
    try:
        return args.function(args)
    except SayoError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
