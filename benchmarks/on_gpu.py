"""Everything about the probe that only a GPU can tell, on one card, in ten minutes.

    python benchmarks/on_gpu.py                            every stage, at most 600 s in all
    python benchmarks/on_gpu.py --stages kernels focus     these, again
    python benchmarks/on_gpu.py --train --model MODEL      also 20 steps of GRPO and of attn_region, with vLLM
    python benchmarks/on_gpu.py --tiny                     rehearsal on a CPU: every stage, sizes that measure nothing

Stages run in the order of their value, each in a process of its own with a limit of its own. One that fails or hangs
costs no more than its limit. A second call goes on where the first stopped. --list names the stages.

OUT/report.jsonl has one line per finding, with what stood in for what. OUT/cuda.json has the figures of the page:
    cp OUT/cuda.json benchmarks/results/ && python benchmarks/probe_cost.py --page-only
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cost.store import append_line, read_lines

ROOT = Path(__file__).resolve().parent.parent
SPARE = 15  # seconds: no stage is begun with less
STOPPED = 3  # exit status of a stage that had no time for all of its findings
TINY = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VERL_PLATFORM": "cpu", "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1"}  # fmt: skip
ALWAYS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VERL_USE_EXTERNAL_MODULES": "sayo_verl.plugin",
          "PYTHONUNBUFFERED": "1"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A stage: the module of ``gpu`` whose ``run`` it is, with which argument, its limit in seconds, and what it says."""

    module: str
    argument: str
    limit: int
    about: str


STAGES = {
    "machine": Entry("machine", "", 30, "versions, compiler, rates of products and copies"),
    "kernels": Entry("kernels", "", 90, "against float64 at every family's heads; compilation; times at real sizes"),
    "passes-qwen3": Entry("passes", "qwen3_vl", 110, "probe in 1, 4, all layers and eager beside the pass; memory"),
    "engine-qwen3": Entry("engine", "qwen3_vl", 120, "verl's engine at the 8B shape; waits; counterfactual pass"),
    "passes-qwen2.5": Entry("passes", "qwen2_5_vl", 90, "the same passes at the 7B shape"),
    "engine-qwen2.5": Entry("engine", "qwen2_5_vl", 110, "the same engine at the 7B shape"),
    "engine-qwen3-lora": Entry("engine", "qwen3_vl lora", 110, "the 8B shape with LoRA, and what vLLM would get"),
    "neighbours": Entry("neighbours", "", 30, "of attn_anchor: time, waits"),
    "focus": Entry("focus", "qwen2_5_vl", 90, "steps of the anchoring stage at the 7B shape, LoRA"),
    "tests": Entry("project_tests", "", 90, "the project's own CUDA tests"),
}
TRAIN = Entry("train", "", 1800, "20 steps of GRPO and of attn_region with the whole stack (needs vLLM)")


def parse() -> argparse.Namespace:
    """The command line; the defaults that hang on one another are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", metavar="STAGE", choices=[*STAGES, "train"], help="these, done or not")
    parser.add_argument("--list", action="store_true", help="name the stages and their limits, run nothing")
    parser.add_argument("--limit", type=int, help="seconds in all (default: 600; with --train 2400)")
    parser.add_argument("--tiny", action="store_true", help="rehearsal on the CPU")
    parser.add_argument("--out", type=Path, help="folder (default: outputs/on_gpu, with --tiny outputs/on_gpu_tiny)")
    parser.add_argument("--train", action="store_true", help="also the stage 'train'")
    parser.add_argument("--model", default="", help="of the stage 'train': folder or hub name (default: tiny policy)")
    parser.add_argument("--stage-limit", type=int, help="seconds of every stage, instead of its own limit")
    parser.add_argument("--run-stage", help=argparse.SUPPRESS)
    parser.add_argument("--card", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.train = args.train or "train" in (args.stages or [])
    args.limit = args.limit or (2400 if args.train else 600)
    args.out = (args.out or ROOT / "outputs" / ("on_gpu_tiny" if args.tiny else "on_gpu")).resolve()
    return args


def run_stage(args: argparse.Namespace) -> int:
    """The process of one stage: 0 when all went well, 1 when a finding failed, ``STOPPED`` when time was short."""
    from gpu.report import NoTimeLeftError, Stage

    name = args.run_stage
    entry = (STAGES | {"train": TRAIN})[name]
    argument = args.model if name == "train" else entry.argument
    stage = Stage(name, args.out, args.limit, args.tiny, args.card)
    try:
        run = importlib.import_module(f"gpu.{entry.module}").run
        run(stage, argument) if argument or name == "train" else run(stage)
    except NoTimeLeftError as finding:
        stage.tell("no time left", next=str(finding))
        return 1 if stage.wrong else STOPPED
    return 1 if stage.wrong else 0


def find_card(tiny: bool) -> str:
    """The name of the card, asked in a process of its own: it would hold memory in this one.

    Raises:
        SystemExit: there is none.
    """
    if tiny:
        return "CPU rehearsal"
    ask = "import torch; torch.cuda.init(); print(torch.cuda.get_device_name(0))"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no word why"])[-1]
        sys.exit(f"torch finds no GPU: {last}\nfix: run it on a machine with a card (sayo doctor says what is amiss), "
                 "or rehearse with --tiny")  # fmt: skip
    return found.stdout.strip()


def supervise(args: argparse.Namespace, name: str, limit: int, card: str) -> str:
    """Run one stage; end it, with all that it started, when its limit is over. Returns how it ended."""
    command = [sys.executable, __file__, "--run-stage", name, "--card", card, "--limit", str(limit), "--out",
               str(args.out), "--model", args.model, *["--tiny"] * args.tiny]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ALWAYS, "TRITON_CACHE_DIR": str(args.out / "triton"), "PYTHONPATH": path}
    environment |= TINY if args.tiny else {}
    with (args.out / f"{name}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
        try:
            status = child.wait(timeout=limit + 5)
        except subprocess.TimeoutExpired:
            return "over its limit"
        finally:
            if child.poll() is None:
                _end(child)
    return {0: "done", STOPPED: "stopped for lack of time"}.get(status, "failed")


def _end(child: subprocess.Popen) -> None:
    """End a stage and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
            child.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def main() -> int:
    """0 when every stage that was wanted is done."""
    args = parse()
    if args.run_stage:
        return run_stage(args)
    stages = STAGES | ({"train": TRAIN} if args.train else {})
    if args.list:
        for name, entry in (STAGES | {"train": TRAIN}).items():
            print(f"{name:18} {entry.limit:5} s  {entry.about}")
        return 0
    begin = time.monotonic()
    card = find_card(args.tiny)
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "report.jsonl"
    ends = {line["stage"]: line["status"] for line in read_lines(report) if "status" in line and line["card"] == card}
    named = set(args.stages or ())
    failed = []
    for n, (name, entry) in enumerate(((s, e) for s, e in stages.items() if not named or s in named), 1):
        count = f"[{n} of {len(named) or len(stages)}]"
        if not named and ends.get(name) == "done":
            print(f"{count} {name}: done in an earlier call", flush=True)
            continue
        left = int(args.limit - (time.monotonic() - begin))
        limit = min(args.stage_limit or entry.limit, left - 5)
        if left < SPARE and not args.stage_limit:
            status, took = f"not begun: {left} s are left", 0.0
        else:
            print(f"{count} {name}: {entry.about}; at most {limit} s ... ", end="", flush=True)
            if name == "kernels":
                shutil.rmtree(args.out / "triton", ignore_errors=True)  # it measures compilation
            start = time.monotonic()
            status = supervise(args, name, limit, card)
            took = time.monotonic() - start
        append_line(report, {"stage": name, "status": status, "seconds": round(took, 1), "card": card})
        mine = [line for line in read_lines(report) if line["stage"] == name and "finding" in line]
        print(f"{status} after {took:.0f} s, {len(mine)} lines" if took else f"{count} {name}: {status}", flush=True)
        if status != "done":
            failed.append(name)
    print(f"{args.out / 'report.jsonl'} after {time.monotonic() - begin:.0f} s" + (
        f"; not done: {' '.join(failed)} (see {args.out}/STAGE.log)" if failed else "; every stage is done"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
