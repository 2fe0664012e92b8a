"""Starts, runs and their comparison:

    python -m benchmarks.yardstick start --kind half_ignorant --seeds 0,1,2,3,4 --out outputs/yardstick/starts
    python -m benchmarks.yardstick train --start outputs/yardstick/starts/half_ignorant-0-* --methods grpo,oracle_plus \
        --rates 1e-4,3e-4,6e-4 --seeds 0,1,2 --out outputs/yardstick/runs
    python -m benchmarks.yardstick all --out outputs/yardstick
    python -m benchmarks.yardstick page --results outputs/yardstick
    python -m benchmarks.yardstick score --start outputs/yardstick/starts/knowing-0-* --out outputs/yardstick/scores
    python -m benchmarks.yardstick agree --start outputs/yardstick/starts/knowing-0-* --out outputs/yardstick/agree

A finished run or start is not repeated. Every run is one JSON file with its settings. Torch uses one thread, so that
results do not depend on the machine's cores; run several processes for more.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.yardstick import agree, learning
from benchmarks.yardstick.known import ScoreConfig, as_table
from benchmarks.yardstick.loop import ROOT, VARIANTS, LoopConfig, method_of, names
from benchmarks.yardstick.page import REMARKS, page
from benchmarks.yardstick.picture import picture
from benchmarks.yardstick.plan import Plan, run_plan, score_once, train_once
from benchmarks.yardstick.starts import SCENES, STARTS, greedy_of, is_start, make_start
from benchmarks.yardstick.store import MixedResults, all_of, one_start_each, runs_of, scores_of
from sayo_verl.errors import SayoError
from sayo_verl.launch.method_check import check_method
from sayo_verl.launch.settings import load_methods

RESULTS = ROOT / "benchmarks" / "results" / "yardstick"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="make starts by warm-up")
    start.add_argument("--kind", choices=STARTS, required=True)
    start.add_argument("--seeds", type=_list(int), default=[0], help="one start each (0)")
    start.add_argument("--out", type=Path, required=True, help="folder of starts")
    run = commands.add_parser("train", help="train methods from a start")
    run.add_argument("--start", type=Path, required=True, help="a folder that `start` made")
    run.add_argument("--methods", type=_list(str), required=True, help="such as grpo,region,oracle_plus")
    run.add_argument("--rates", type=_list(float), default=[LoopConfig.rate], help="learning rates (1e-4)")
    run.add_argument("--seeds", type=_list(int), default=[0], help="of training (0)")
    run.add_argument("--steps", type=int, default=LoopConfig.steps)
    run.add_argument("--eval-scenes", type=int, default=LoopConfig.eval_scenes)
    run.add_argument("--out", type=Path, required=True, help="folder of runs")
    scored = commands.add_parser("score", help="score credit against the truth, without training")
    scored.add_argument("--start", type=Path, required=True, help="a folder that `start` made")
    scored.add_argument("--methods", type=_list(str), default=list(ScoreConfig.methods), help="(all)")
    scored.add_argument("--prompts", type=int, default=ScoreConfig.prompts, help="with 8 rollouts each (64)")
    scored.add_argument("--seeds", type=_list(int), default=[0], help="of walks and sampling (0)")
    scored.add_argument("--out", type=Path, required=True, help="folder of scores")
    written = commands.add_parser("page", help="write docs/yardstick.md and its picture from stored results")
    written.add_argument("--results", type=Path, default=RESULTS, help="what `all` wrote (the stored results)")
    written.add_argument("--docs", type=Path, default=ROOT / "docs", help="where yardstick.md is written (docs)")
    plan = commands.add_parser("all", help="everything that the page shows: starts, scores, rates, learning")
    plan.add_argument("--methods", type=_list(str), default=list(Plan.methods), help="with grpo and oracle_plus (all)")
    plan.add_argument("--seeds", type=_list(int), default=list(Plan.seeds), help="of starts and their training (five)")
    plan.add_argument("--kinds", type=_list(str), default=list(Plan.kinds), help="half_ignorant,knowing (both)")
    plan.add_argument("--steps", type=int, default=Plan.steps)
    plan.add_argument("--one-rate", action="store_true", help="do not search for a rate of each method")
    plan.add_argument("--processes", type=int, default=2, help="of one thread each (2)")
    plan.add_argument("--out", type=Path, required=True, help="folder of starts, scores and runs")
    agree.add_command(commands)
    for command in (run, scored, plan):
        command.add_argument("--modules", type=_list(str), default=[], help="files of methods of your own")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        load_methods(getattr(given, "modules", []))
    except SayoError as error:
        parser.error(str(error))
    for name in ("methods", "seeds", "rates", "kinds"):  # each once: two processes would make the same result
        setattr(given, name, list(dict.fromkeys(getattr(given, name, []))))
    given.methods = list(dict.fromkeys(each.removeprefix("attn_") for each in given.methods))
    if unknown := [name for name in given.methods if name not in names()]:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(names())}. --modules loads your own")
    try:
        for name in given.methods:
            if method := method_of(LoopConfig(method=name)):
                check_method(method)
    except SayoError as error:
        parser.error(str(error))
    for name in ("steps", "processes", "prompts", "eval_scenes"):
        if getattr(given, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if not is_start(getattr(given, "start", None)):
        parser.error(f"{given.start} is no start: make one with `start`")
    if given.command == "all" and (wrong := _no_plan(given)):
        parser.error(wrong)
    if given.command == "page":
        try:
            runs, scored = runs_of(given.results / "runs"), scores_of(given.results / "scores")
            one_start_each(runs, scored)
        except MixedResults as error:
            parser.error(str(error))
        if not runs or not scored:
            parser.error(f"{given.results} holds no runs and scores: make them with `all`, or name them with --results")
        own = [name for name in dict.fromkeys(run["method"] for run in runs) if name not in (*Plan.methods, *VARIANTS)]
        rates = sorted({run["rate"] for run in learning.tuning_runs(runs, Plan.tuning_seed)})
        shown = Plan(methods=(*Plan.methods, *own), steps=runs[0]["steps"], rates=rates)
        (given.docs / "images").mkdir(parents=True, exist_ok=True)
        picture(runs, scored, shown, given.docs / "images" / "yardstick.png")
        remarks = REMARKS.read_text() if given.results.resolve() == RESULTS else ""
        lines = page(runs, scored, shown, remarks, all_of(given.results / "agree"), greedy_of(given.results / "starts"))
        (given.docs / "yardstick.md").write_text("\n".join(lines).rstrip() + "\n")
    elif given.command == "start":
        for seed in given.seeds:
            print(make_start(given.out, given.kind, seed, SCENES, log=_log))
    elif given.command == "all":
        chosen = Plan(
            tuple(given.methods),
            seeds=tuple(given.seeds),
            rates=() if given.one_rate else Plan.rates,
            steps=given.steps,
            kinds=tuple(given.kinds),
            modules=tuple(given.modules),
        )
        run_plan(chosen, given.out, given.processes, _log)
    elif given.command == "score":
        for seed in given.seeds:
            config = ScoreConfig(tuple(given.methods), given.prompts, seed=seed)
            print(as_table(score_once(given.start, config, given.out)))
    elif given.command == "agree":
        agree.from_arguments(given)
    else:
        configs = [
            LoopConfig(method=method, rate=rate, steps=given.steps, eval_scenes=given.eval_scenes, seed=seed)
            for seed in given.seeds
            for rate in given.rates
            for method in given.methods
        ]
        for done, config in enumerate(configs):
            _log(f"run {done + 1} of {len(configs)}")
            train_once(given.start, config, given.out, _log)


def _no_plan(given: argparse.Namespace) -> str:
    """Why `all` could not be shown afterwards; "" if it can."""
    if missing := [name for name in (learning.BASELINE, learning.CEILING) if name not in given.methods]:
        return f"--methods lacks {', '.join(missing)}, with which all are compared"
    if variants := [name for name in given.methods if name in VARIANTS]:
        return f"variants come with their method, so name {', '.join(VARIANTS[name][0] for name in variants)} alone"
    if unknown := [kind for kind in given.kinds if kind not in STARTS]:
        return f"no start {', '.join(unknown)}; there are {', '.join(STARTS)}"
    return f"--seeds has {Plan.tuning_seed}, which chooses the rates" if Plan.tuning_seed in given.seeds else ""


def _list(kind: type) -> Callable[[str], list[Any]]:
    def of(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {kind.__name__}, such as 1,2") from None

    return of


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
