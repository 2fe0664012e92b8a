"""Benchmark of the attention probe: time and memory against the old-log-prob pass that contains it, as a page.

    python benchmarks/probe_cost.py                 # on the GPU if there is one, else on one CPU core
    python benchmarks/probe_cost.py --device cpu    # under ten minutes on an idle machine
    python benchmarks/probe_cost.py --device cuda   # one GPU of 80 GB or more
    python benchmarks/probe_cost.py --quick         # self-check of every code path, at sizes without meaning
    python benchmarks/probe_cost.py --page-only     # write the page again from the stored numbers

Needs this package (installed, or PYTHONPATH=.), transformers and, on a GPU, Triton. It needs neither verl nor a
download, because weights are random. It stores numbers in ``benchmarks/results/<device>.json`` after each case, so an
interrupted run keeps them, and ``--models`` adds one model at a time. The page uses all files of that folder, so a GPU
run adds its rows to those of the CPU.

    cpu     a text model of 1/8 of Qwen3-VL-8B's width and all of its depth, float32, one thread, CPU time
    cuda    the true shapes of Qwen3-VL-8B and Qwen2.5-VL-7B in bfloat16, CUDA events

A case is timed in rounds that run every variant once, in a new order. The page shows medians of ratios within a round.
Memory is measured separately from time. On a CPU it is the high-water mark of a separate process, reset before each
variant. On a GPU it comes from the allocator.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from cost.page import write_page
from cost.shapes import REAL
from cost.store import Store, read_all

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
SELF_CHECK = ROOT / "outputs" / "benchmarks"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# With these settings of glibc every allocation of 64 KiB or more is returned when freed, so resident memory is memory
# in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def parse() -> argparse.Namespace:
    """Parse the command line and set the defaults that depend on other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in REAL]
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="self-check on the CPU; writes below outputs/benchmarks")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, help="the page (default: docs/benchmarks.md)")
    parser.add_argument("--raw", type=Path, help="this run's numbers (default: benchmarks/results/<device>.json)")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="on a GPU (default: both)")
    parser.add_argument("--rounds", type=int, default=10, help="of a case on a GPU (default: 10; eager attention: 3)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=16384,
        help="of a pass on a GPU, if they fit into memory (default: 16384, verl's default for log-probs; 0: as many as "
        "fit)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.max_tokens < 0:
        parser.error("--rounds must be at least 1, --max-tokens at least 0")
    if args.quick and args.device == "cuda":
        parser.error("--quick runs the GPU's code on the CPU; remove --device")
    if args.quick or (args.page_only and args.device == "auto"):
        args.device = "cpu"
    elif args.device == "auto":
        args.device = "cuda" if _gpu() else "cpu"
    elif args.device == "cuda" and not args.page_only and not _gpu():
        parser.error("torch finds no GPU (torch.cuda.is_available() is false)")
    args.raw = (args.raw or (SELF_CHECK if args.quick else RESULTS) / f"{args.device}.json").resolve()
    args.out = (args.out or (SELF_CHECK / "benchmarks.md" if args.quick else PAGE)).resolve()
    return args


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def work(args: argparse.Namespace) -> None:
    """Measure in a process whose environment ``main`` has set. A worker is ``part:what``, such as ``cpu:memory``."""
    import torch
    from cost.cases import card_cases, cpu_cases, measure_case, measure_scaling
    from cost.workload import TextStack

    start, store = time.monotonic(), Store(args.raw)

    def report(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)

    for worker in args.worker.split(","):
        part, what = worker.split(":")
        on_gpu = part == "card" and not args.quick
        device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
        if not on_gpu:
            torch.set_num_threads(1)
        cases = cpu_cases(args.quick) if part == "cpu" else card_cases(args.quick, args.models, args.rounds)
        stack = None
        for n, case in enumerate(cases):
            if stack is None or stack.shape != case.shape:
                stack = None  # free the old weights first
                report(f"making {case.shape.name} with random weights on {device}")
                stack = TextStack(case.shape, device, dtype)
            report(f"{part}, {what}: case {n + 1} of {len(cases)}")
            measure_case(case, stack, store, args.max_tokens, what, report)
        shape = cases[0].shape
        measure_scaling(part, shape, device, dtype, store, args.quick, what, report)


def run_worker(args: argparse.Namespace, worker: str, models: list[str], environment: dict[str, str]) -> bool:
    """Run one worker; a failure is stored with the numbers and shown on the page until a run succeeds."""
    key = f"{worker} {' '.join(models)}".strip()
    command = [
        sys.executable,
        __file__,
        "--worker",
        worker,
        "--raw",
        str(args.raw),
        "--rounds",
        str(args.rounds),
        "--max-tokens",
        str(args.max_tokens),
        "--device",
        args.device,
    ]
    command += ["--quick"] * args.quick + (["--models", *models] if models else [])
    done = subprocess.run(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        Store(args.raw).drop("failures", key)
        return True
    print(done.stderr, file=sys.stderr, flush=True)
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    Store(args.raw).update("failures", key, {"date": time.strftime("%Y-%m-%d"), "error": last}, replace=True)
    return False


def main() -> int:
    """Measure and write the page; return 1 if a measurement failed."""
    args = parse()
    if args.worker:
        work(args)
        return 0
    if args.page_only:
        workers: list[tuple[str, list[str], dict[str, str]]] = []
    elif args.quick:
        args.raw.unlink(missing_ok=True)
        everything = {**ONE_THREAD, **MALLOC, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        workers = [("cpu:time,cpu:memory,card:both", [], everything)]
    elif args.device == "cpu":
        workers = [("cpu:time", [], ONE_THREAD), ("cpu:memory", [], {**ONE_THREAD, **MALLOC})]
    else:
        workers = [("card:both", [model], {}) for model in args.models]
    start = time.monotonic()
    done = [run_worker(args, *worker) for worker in workers]
    known = [args.raw.with_name(f"{device}.json") for device in ("cpu", "cuda", "wire")]
    write_page(args.out, read_all([*(path for path in known if path != args.raw), args.raw]))
    print(f"wrote {args.out} from {args.raw.parent} after {time.monotonic() - start:.0f} s")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
