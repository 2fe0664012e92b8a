"""All measurements of the probe that need a GPU, on one card, in a quarter of an hour.

    python benchmarks/on_gpu.py                            every stage, some 850 s on an H100; a second call continues
    python benchmarks/on_gpu.py --stages kernels focus     only these, also if they are done
    python benchmarks/on_gpu.py --train --model MODEL      also 20 steps of GRPO and of attn_region, with vLLM
    python benchmarks/on_gpu.py --tiny                     rehearsal of every stage on a CPU, at sizes without meaning

The most important stages run first. Each has a separate process and a time limit, so a stage that fails or hangs costs
at most its limit. The sum of the limits exceeds the limit of a call, because a stage seldom needs its whole limit. A
second call continues after the first. --list names the stages. Install the packages with pip install '.[gpu,dev]'.

OUT/report.jsonl has one line per finding, with all replacements. OUT/cuda.json has the figures of the page:
    cp OUT/cuda.json benchmarks/results/ && python benchmarks/probe_cost.py --page-only
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost.store import append_line, read_lines

ROOT = Path(__file__).resolve().parent.parent
SPARE = 15  # seconds; no stage starts with less
GRACE = 5  # seconds between a stage's own limit and its termination
STOPPED = 3  # exit status of a stage without time for all of its findings
TINY = {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "VERL_PLATFORM": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
ALWAYS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VERL_USE_EXTERNAL_MODULES": "sayo_verl.plugin",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Entry:
    """A stage: its module in ``gpu``, the argument of its ``run``, its limit in seconds and a description."""

    module: str
    argument: str
    limit: int
    about: str


STAGES = {
    "machine": Entry("machine", "", 30, "versions, compiler, rates of products and copies"),
    "kernels": Entry("kernels", "", 130, "against float64 at every family's heads; compilation; times at real sizes"),
    "passes-qwen3": Entry("passes", "qwen3_vl", 180, "probe in 1, 4, all layers and eager against the pass; memory"),
    "engine-qwen3": Entry("engine", "qwen3_vl", 150, "verl's engine at the 8B shape; waits; counterfactual pass"),
    "passes-qwen2.5": Entry("passes", "qwen2_5_vl", 150, "the same passes at the 7B shape"),
    "engine-qwen2.5": Entry("engine", "qwen2_5_vl", 140, "the same engine at the 7B shape"),
    "engine-qwen3-lora": Entry("engine", "qwen3_vl lora", 150, "the 8B shape with LoRA, and the tensors for vLLM"),
    "tilings": Entry("kernels", "tilings", 40, "times of the masses kernel with other tiles"),
    "neighbours": Entry("neighbours", "", 30, "neighbours of attn_anchor: time, waits"),
    "focus": Entry("focus", "qwen2_5_vl", 90, "steps of the focus stage at the 7B shape, LoRA"),
    "tests": Entry("project_tests", "", 90, "the project's own CUDA tests"),
}
TRAIN = Entry("train", "", 1800, "20 steps of GRPO and of attn_region with the whole stack (needs vLLM)")


def parse() -> argparse.Namespace:
    """Parse the command line and set the defaults that depend on other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", choices=[*STAGES, "train"], help="run only these, also if done"
    )
    parser.add_argument("--list", action="store_true", help="print the stages and their limits, run nothing")
    parser.add_argument("--limit", type=int, help="seconds in all (default: 1200; with --train 3000)")
    parser.add_argument("--tiny", action="store_true", help="rehearsal on the CPU")
    parser.add_argument("--out", type=Path, help="folder (default: outputs/on_gpu, with --tiny outputs/on_gpu_tiny)")
    parser.add_argument("--train", action="store_true", help="also the stage 'train'")
    parser.add_argument("--model", default="", help="of the stage 'train': folder or hub name (default: tiny policy)")
    parser.add_argument("--run-stage", help=argparse.SUPPRESS)
    parser.add_argument("--card", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.train = args.train or "train" in (args.stages or [])
    args.limit = args.limit or (3000 if args.train else 1200)
    args.out = (args.out or ROOT / "outputs" / ("on_gpu_tiny" if args.tiny else "on_gpu")).resolve()
    return args


def run_stage(args: argparse.Namespace) -> int:
    """Run one stage in its process; return 0 for success, 1 for a failed finding, ``STOPPED`` for lack of time."""
    from gpu.report import NoTimeLeftError, Stage

    entry = (STAGES | {"train": TRAIN})[args.run_stage]
    stage = Stage(args.run_stage, args.out, args.limit, args.tiny, args.card)
    try:
        run = importlib.import_module(f"gpu.{entry.module}").run
        if entry is TRAIN:
            run(stage, args.model)
        else:
            run(stage, *[entry.argument] * bool(entry.argument))
    except NoTimeLeftError as finding:
        stage.write("no time left", next=str(finding))
        return 1 if stage.wrong else STOPPED
    return 1 if stage.wrong else 0


def find_card(tiny: bool) -> str:
    """Return the name of the card, from a separate process so that this one holds no GPU memory.

    Raises:
        SystemExit: without a card.
    """
    if tiny:
        return "CPU rehearsal"
    code = "import torch; torch.cuda.init(); print(torch.cuda.get_device_name(0))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["unknown reason"])[-1]
        sys.exit(
            f"torch finds no GPU: {last}\nfix: run it on a machine with a card (see sayo doctor), "
            "or rehearse with --tiny"
        )
    return found.stdout.strip()


def stage_command(args: argparse.Namespace, name: str, limit: int, card: str) -> list[str]:
    """The command of a stage's process."""
    options = ["--limit", str(limit), "--out", str(args.out), "--model", args.model, *["--tiny"] * args.tiny]
    return [sys.executable, __file__, "--run-stage", name, "--card", card, *options]


def environment_of(args: argparse.Namespace, name: str) -> dict[str, str]:
    """Environment of a stage: one card, the project's modules and a separate kernel cache."""
    always = dict(ALWAYS)
    if name == "train" and args.model and not Path(args.model).expanduser().exists():
        del always["HF_HUB_OFFLINE"]  # the model comes from the hub
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    one_card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    common = {"CUDA_VISIBLE_DEVICES": one_card, "TRITON_CACHE_DIR": str(args.out / "triton"), "PYTHONPATH": path}
    return {**os.environ, **always, **common, **(TINY if args.tiny else {})}


def supervise(command: list[str], log: Path, limit: float, environment: dict[str, str]) -> str:
    """Run a stage and return its status; at its limit end it and all its child processes."""
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)
        try:
            status = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return "over its limit"
        finally:
            _end(child.pid)
    return {0: "done", STOPPED: "stopped for lack of time"}.get(status, "failed")


def _end(group: int) -> None:
    """End the remaining processes of a stage, also those that it did not wait for."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(20):
            try:
                os.killpg(group, sign)
            except ProcessLookupError:
                return
            time.sleep(0.1)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(group, os.WNOHANG)


def finished(report: Path, card: str) -> set[str]:
    """Stages done on this card, by their last line in the report."""
    ends = {line["stage"]: line["status"] for line in read_lines(report) if "status" in line and line["card"] == card}
    return {name for name, status in ends.items() if status == "done"}


def verdicts(report: Path, card: str, stages: Iterable[str]) -> list[str]:
    """Return a line for each checked finding of these stages on this card, by its last line in the report."""
    checked = {
        (line["stage"], line["finding"]): line
        for line in read_lines(report)
        if "finding" in line and line["card"] == card and ("wrong" in line or "error" in line)
    }
    return [
        f"{'WRONG' if line.get('wrong') or 'error' in line else 'ok':5} {stage:18} {finding}: {_figure_of(line)}"
        for (stage, finding), line in checked.items()
        if stage in stages
    ]


def _figure_of(line: dict[str, Any]) -> str:
    """The fact behind the verdict: an error if there is one, else the first number or text."""
    if "error" in line:
        return str(line["error"])
    names = [name for name in line if name not in ("stage", "finding", "at_s", "card", "stood_in", "wrong", "seconds")]
    for name in sorted(names, key=lambda name: "error" not in name):
        value = line[name]
        if isinstance(value, dict) and value and all(isinstance(x, bool) for x in value.values()):
            return f"{name} {all(value.values())}"
        if isinstance(value, dict) and value and all(isinstance(x, int | float) for x in value.values()):
            return f"{name} {max(value.values()):.3g} at most"
        if isinstance(value, int | float | str):
            return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
    return "no figure"


def main() -> int:
    """Run the stages; return 0 if all selected stages are done."""
    args = parse()
    if args.run_stage:
        return run_stage(args)
    if args.list:
        for name, entry in (STAGES | {"train": TRAIN}).items():
            only = "only with --train: " if entry is TRAIN else ""
            print(f"{name:18} {entry.limit:5} s  {only}{entry.about}")
        print("Limit of each stage. All but train need some 850 s on an H100; start it again for the rest.")
        return 0
    begin, card = time.monotonic(), find_card(args.tiny)
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "report.jsonl"
    wanted = {name: (STAGES | {"train": TRAIN})[name] for name in args.stages or [*STAGES, *["train"] * args.train]}
    done = finished(report, card) - set(args.stages or ())
    left_over = []
    for n, (name, entry) in enumerate(wanted.items(), 1):
        print(f"[{n} of {len(wanted)}] {name}: ", end="", flush=True)
        if name in done:
            print("done in an earlier call", flush=True)
            continue
        left = int(args.limit - (time.monotonic() - begin))
        limit, lines, start = min(entry.limit, left - GRACE), len(read_lines(report)), time.monotonic()
        if left < SPARE:
            status = f"not started: {max(left, 0)} s are left"
        else:
            print(f"{entry.about}; at most {limit} s ... ", end="", flush=True)
            if name == "kernels":
                shutil.rmtree(args.out / "triton", ignore_errors=True)  # this stage measures compilation
            command, log = stage_command(args, name, limit, card), args.out / f"{name}.log"
            status = supervise(command, log, limit + GRACE, environment_of(args, name))
        end = {"stage": name, "status": status, "seconds": round(time.monotonic() - start, 1), "card": card}
        if status in ("failed", "over its limit"):
            end["last_of_log"] = log.read_text(errors="replace").strip().splitlines()[-3:]
        found = len(read_lines(report)) - lines
        append_line(report, end)
        print(
            status if status.startswith("not") else f"{status} after {end['seconds']:.0f} s, {found} findings",
            flush=True,
        )
        left_over += [name] if status != "done" else []
    found_wrong = False
    for line in verdicts(report, card, wanted):
        found_wrong |= line.startswith("WRONG")
        print(line)
    print(f"{report} after {time.monotonic() - begin:.0f} s; figures for the page: {args.out / 'cuda.json'}")
    if left_over:
        print(f"not done: {' '.join(left_over)}; see {args.out}/STAGE.log; a second call continues there")
    figures = f"cp {args.out / 'cuda.json'} benchmarks/results/ && python benchmarks/probe_cost.py --page-only"
    if args.tiny:
        print("next: the same on a card; figures of a rehearsal have no meaning")
    elif found_wrong:
        print(f"next: send {report} and the STAGE.log of each WRONG stage in an issue")
    else:
        print(f"next: {figures}; then send report.jsonl and cuda.json in an issue")
    return 1 if left_over else 0


if __name__ == "__main__":
    sys.exit(main())
