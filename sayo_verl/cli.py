"""The ``sayo`` command. Every subcommand explains itself with ``--help``.

A subcommand is a function that adds its flags to a parser and returns what runs it. Only the chosen one is called, so
no other one's modules are imported: torch takes seconds.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sayo_verl import __version__
from sayo_verl.errors import SayoError

Config = TypeVar("Config")
Run = Callable[[argparse.Namespace], int]
AddFlags = Callable[[argparse.ArgumentParser], Run | None]


class Command(argparse.ArgumentParser):
    """A parser that adds its flags when it begins to parse: argparse lets only the chosen subcommand's parser do so."""

    def __init__(self, *args: Any, add_flags: AddFlags | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.add_flags = add_flags

    def parse_known_args(self, args=None, namespace=None):
        if self.add_flags:
            add_flags, self.add_flags = self.add_flags, None
            self.set_defaults(function=add_flags(self))
        return super().parse_known_args(args, namespace)


def add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, tuple[str, AddFlags]]) -> None:
    """Subcommands by name, each with one line of help and the function that adds its flags."""
    choices = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    for name, (summary, add_flags) in commands.items():
        choices.add_parser(name, help=summary, add_flags=add_flags)


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


def _doctor(parser: argparse.ArgumentParser) -> Run:
    parser.epilog = DOCTOR_EXAMPLE
    parser.add_argument("--stack", choices=("cpu", "gpu"), help="which pins to check (default: those of torch's build)")
    parser.add_argument(
        "--job",
        nargs="+",
        default=[],
        metavar=("SCRIPT", "OVERRIDE"),
        help="a launch script: its dry run and its memory, on this machine",
    )
    return _run_doctor


def _run_doctor(args: argparse.Namespace) -> int:
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


def _synthetic(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.data.scenes import SceneConfig, prepare

    parser.add_argument("--out", type=Path, default=Path(".sayo"), help="parent folder (default: %(default)s)")
    add_config_flags(parser, SceneConfig)

    def run(args: argparse.Namespace) -> int:
        made = prepare(args.out, config_from(args, SceneConfig))
        print(f"scenes: {'reused' if made.reused else 'made'} {made.path}", file=sys.stderr)
        print(made.path)
        return 0

    return run


def _policy(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.data.scenes import SceneConfig
    from sayo_verl.tiny.policy import TinyPolicyConfig
    from sayo_verl.tiny.warmup import WarmupConfig, prepare_policy

    parser.add_argument("--out", type=Path, default=Path(".sayo"), help="parent folder (default: %(default)s)")
    configs = {TinyPolicyConfig: "", WarmupConfig: "warmup-", SceneConfig: "scenes-"}
    for config, prefix in configs.items():
        add_config_flags(parser, config, prefix)

    def run(args: argparse.Namespace) -> int:
        made = prepare_policy(args.out, *(config_from(args, config) for config in configs))
        print(f"policy: {'reused' if made.reused else 'made'} {made.path}", file=sys.stderr)
        print(made.path)
        return 0

    return run


def _rows(source: str) -> AddFlags:
    """The command that makes training rows from a source."""

    def add_flags(parser: argparse.ArgumentParser) -> Run:
        from sayo_verl.data.building import build, options

        module = importlib.import_module(f"sayo_verl.data.sources.{source}")
        parser.description = module.__doc__
        module.add_flags(parser)
        parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
        options.add_flags(parser)

        def run(args: argparse.Namespace) -> int:
            print(build.build(module.from_args(args), args.out, options.options_from(args)).folder)
            return 0

        return run

    return add_flags


def _mix(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.data.building import mix

    parser.description = mix.__doc__
    mix.add_flags(parser)

    def run(args: argparse.Namespace) -> int:
        print(mix.from_args(args).folder)
        return 0

    return run


def _prepare(parser: argparse.ArgumentParser) -> None:
    sources = {name: (f"rows from {summary}", _rows(name)) for name, summary in SOURCES.items()}
    add_commands(
        parser,
        {
            **sources,
            "mix": ("rows drawn from prepared folders by shares", _mix),
            "synthetic": ("draw scenes with exact boxes as verl parquet; prints the folder", _synthetic),
            "policy": ("build and warm up the tiny Qwen3-VL; prints the folder", _policy),
        },
    )


def _inspect(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.inspection import command

    command.add_flags(parser)
    return command.run


def _focus(parser: argparse.ArgumentParser) -> Run:
    from sayo_verl.focus import command

    parser.description = command.__doc__
    command.add_flags(parser)
    return command.run


def _watch(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run", type=Path, help="run folder, for train.log and metrics.jsonl")
    parser.add_argument("--steps", type=int, help="training steps of the command (default: as its run.json says)")
    parser.add_argument("command", nargs="+", help="the command, after --")
    return _run_watch


def _run_watch(args: argparse.Namespace) -> int:
    from sayo_verl.report.watch import run_and_watch

    return run_and_watch(args.command, args.run, args.steps)


def _report(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument(
        "--window", type=int, default=5, help="steps that make 'first' and 'last' (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture that compares several runs")
    return _run_report


def _run_report(args: argparse.Namespace) -> int:
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


def _evaluate(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("model", type=Path)
    parser.add_argument("scenes", type=Path, help="a parquet of `sayo prepare synthetic`")
    parser.add_argument("--samples", type=int, default=1, help="responses per row (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return _run_evaluate


def _run_evaluate(args: argparse.Namespace) -> int:
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


SOURCES = {
    "gqa": "GQA: scene graphs, questions, images",
    "refocus": "ReFocus-Chart: parquet or JSON",
    "jsonl": "your own: one JSON object per line",
    "coco": "COCO detection or panoptic annotations",
    "labelme": "a folder of labelme files",
    "hf": "a data set of the Hugging Face hub, or a folder of one",
}
DOCTOR_EXAMPLE = """a job, with variables in front and overrides after the script as in its own call:
  METHOD=grpo NGPUS_PER_NODE=4 sayo doctor --job scripts/run_sayo_qwen3vl_8b.sh sayo.gpu_memory_gib=48
"""
COMMANDS: dict[str, tuple[str, AddFlags]] = {
    "doctor": ("check versions, device and whether the plug-in loads in Ray workers", _doctor),
    "prepare": ("make data or the tiny policy", _prepare),
    "inspect": ("check prepared data with the model's processor; a page of pictures", _inspect),
    "focus": ("teach a model to look at annotated regions, before attn_faithful", _focus),
    "watch": ("run a training command and show its progress", _watch),
    "report": ("table of first and last steps and curves of runs", _report),
    "evaluate": ("let a tiny policy answer held-out scenes; accuracy and attention", _evaluate),
}


def _all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"sayo-verl {__version__}")
    add_commands(parser, COMMANDS)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    return Command(prog="sayo", description="Credit by visual attention for stock verl.", add_flags=_all)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``sayo`` command; 0 for success, 1 for a finding, 2 for a refusal, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.function(args)
    except SayoError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
