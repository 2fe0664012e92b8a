"""Benchmark of the partition of ``attn_anchor``: graphs and METIS on CPU cores, as a page.

    python benchmarks/partition_cost.py              # some minutes on two idle cores
    python benchmarks/partition_cost.py --quick      # self-check of every code path, at sizes without meaning
    python benchmarks/partition_cost.py --page-only  # write the page again from the stored numbers

Needs ``pip install 'sayo-verl[anchor]'``. Responses are synthetic. Each token attends to one of eight places of 256
visual tokens, with noise, and consecutive tokens tend to attend to the same place. Neighbours are computed as in the
probe. A batch has 16 responses of one length, 64 times each, and goes through ``AnchorMethod.credit``. Numbers are
stored in ``benchmarks/results/partition.json``, from which the page is written.

    cores   CPU time, user and system: of this process, and of the workers by /proc
    wall    of ``AnchorMethod.credit`` with running workers; the first start is reported separately
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sayo_verl.methods import Signals
from sayo_verl.methods.anchor import AnchorMethod, edges
from sayo_verl.metis import adjacency, metis_labels
from sayo_verl.probe.neighbours import top_neighbours

ROOT = Path(__file__).resolve().parent.parent
RESPONSES, PARTS, NEIGHBOURS, VISUAL = 1024, 8, AnchorMethod().neighbours, 256
LENGTHS, DISTINCT, ROUNDS = (500, 1000, 2000, 4000), 16, 3
PROCESSES = (1, 2)
SHARE, PAPER = 0.002, 0.012  # of a step: our target for the partition; the paper's figure for the whole method


def synthesise(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours [n, m] and cosines [n, m] of one synthetic response."""
    g = torch.Generator().manual_seed(seed)
    places = torch.randn(8, VISUAL, generator=g) * 2
    moves = torch.rand(n, generator=g) < 0.1  # a stay lasts ten tokens on average
    places_seen = torch.randint(0, 8, (n + 1,), generator=g)  # one for each stay
    place = places_seen[moves.cumsum(0)]
    profile = (places[place] + torch.randn(n, VISUAL, generator=g)).softmax(-1)
    return top_neighbours(profile, NEIGHBOURS)


def cpu_of(pids: list[int]) -> float:
    """CPU seconds of these processes, to one tick (10 ms)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def batch_of(inputs: list[tuple[torch.Tensor, torch.Tensor]], responses: int) -> Signals:
    """Signals of a batch that repeats these responses, all of one length."""
    row, n = [i % len(inputs) for i in range(responses)], len(inputs[0][0])
    given = {
        "image_mass": torch.rand(responses, n),
        "sink_mass": torch.zeros(responses, n),
        "neighbour_index": torch.stack([index.float() for index, _ in inputs])[row],
        "neighbour_similarity": torch.stack([similarity for _, similarity in inputs])[row],
    }
    return Signals(
        response_mask=torch.ones(responses, n, dtype=torch.long),
        entropy=torch.zeros(responses, n),
        log_probs=torch.zeros(responses, n),
        image_tokens=torch.full((responses,), float(VISUAL)),
        statistics={statistic: given[statistic.name] for statistic in AnchorMethod().needs().statistics.statistics},
        region_tokens=torch.zeros(responses),
        is_padding=torch.zeros(responses, dtype=torch.bool),
        uid=("one",) * responses,
    )


def measure(n: int, responses: int, distinct: int, rounds: int) -> dict[str, Any]:
    """Measure one length: parts of the work in this process, then all of it with each number of workers."""
    inputs = [synthesise(n, seed) for seed in range(distinct)]
    near = [tuple(part.numpy() for part in edges(*pair)) for pair in inputs]
    metis_labels(*adjacency(*near[0]), PARTS, 0)  # warm
    seconds: dict[str, list[float]] = {"graph": [], "metis": []}
    entries = []
    for index, weight in near:
        start = time.process_time()
        graph = adjacency(index, weight)
        seconds["graph"].append(time.process_time() - start)
        start = time.process_time()
        metis_labels(*graph, PARTS, 0)
        seconds["metis"].append(time.process_time() - start)
        entries.append(len(graph.neighbours))
    found: dict[str, Any] = {
        "tokens": n,
        "entries": int(statistics.mean(entries)),
        "per_response": {name: statistics.median(values) for name, values in seconds.items()},
        "pool": {},
    }
    batch = batch_of(inputs, responses)
    for processes in PROCESSES:
        method = AnchorMethod(parts=PARTS, processes=processes)
        start = time.perf_counter()
        method.credit(batch_of(inputs, 2 * processes))
        first = time.perf_counter() - start
        runs = []
        for _ in range(rounds):
            pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            wall, caller, workers = time.perf_counter(), time.process_time(), cpu_of(pids)
            metrics = method.credit(batch).metrics
            runs.append(
                {
                    "wall": time.perf_counter() - wall,
                    "caller": time.process_time() - caller,
                    "workers": cpu_of(pids) - workers,
                }
            )
            if metrics["partition_failed_rows"] or metrics["anchor_uncut_rows"]:
                raise RuntimeError(f"some responses of {n} tokens were not cut: {metrics}")
        found["pool"][str(processes)] = {"first_call_seconds": first, "rounds": runs}
        print(f"  {n} tokens, {processes} worker(s): {min(run['wall'] for run in runs):.2f} s", flush=True)
    return found


def costs(case: dict[str, Any]) -> dict[str, float]:
    """Core-seconds of a batch: of the process that computes advantages, and of the workers (minimum of all rounds)."""
    runs = [run for pool in case["pool"].values() for run in pool["rounds"]]
    return {name: min(run[name] for run in runs) for name in ("caller", "workers")}


def page(results: dict[str, Any]) -> str:
    cases, responses = results["cases"], results["responses"]
    rows, pools, steps = [], [], []
    for case in cases:
        cost, per, n = costs(case), case["per_response"], case["tokens"]
        rows.append(
            f"| {n:,} | {case['entries']:,} | {per['graph'] * 1e3:.1f} | {per['metis'] * 1e3:.1f} | "
            f"{cost['caller']:.2f} | {cost['workers']:.1f} |"
        )
        walls = [min(run["wall"] for run in pool["rounds"]) for pool in case["pool"].values()]
        pools.append(f"| {n:,} | " + " | ".join(f"{wall:.2f}" for wall in walls) + f" | {walls[0] / walls[-1]:.2f} |")
        for processes in (16, 64):
            added = cost["caller"] + cost["workers"] / processes
            steps.append(f"| {n:,} | {processes} | {added:.2f} | {added / SHARE:,.0f} | {added / PAPER:,.0f} |")
    first = [pool["first_call_seconds"] for pool in cases[0]["pool"].values()]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    idle = f"Load of the machine at the start: {results['load']:.1f}."
    if results["load"] > 0.25 * results["cores"]:
        idle += (
            "\n\n**Other work ran at the same time, so wall seconds below are too long and do not show how workers "
            "scale.**\nCore-seconds are affected less, through shared caches and cores."
        )
    return f"""# What the partition of `attn_anchor` costs

Written by `benchmarks/partition_cost.py` from `benchmarks/results/partition.json`; its `--help` describes the figures.

{results["machine"]}, {results["cores"]} cores, {versions}, {results["date"]}.
{responses:,} synthetic responses of one length, {NEIGHBOURS} neighbours, {PARTS} parts. Figures are medians over
responses, and the minimum of {results["rounds"]} rounds of the batch. {idle}

## Core time

| tokens | entries of the graph | graph, ms | METIS, ms | caller, all, s | workers, all, s |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The first columns are for one response, "all" is the batch of {responses:,}. "Caller" is the process that computes
advantages; it mostly gathers and sends neighbours. "Workers" includes building graphs, METIS and unpickling.

## Wall seconds of the whole method

| tokens | {" | ".join(f"{p} process{'es' if p > 1 else ''}" for p in PROCESSES)} | ratio |
|---|---|---|---|
{chr(10).join(pools)}

The workers were running already; the first call took {" and ".join(f"{s:.1f} s" for s in first)}, once per run.
The caller works in parallel with the first workers. A run starts one worker per core, at most 64.

## Share of a step

Credit is computed in a thread while verl runs the reference and value passes, if there are any. The partition then adds
the time in `sayo/credit_wait_seconds`, which is zero if those passes take longer. A run without them (no KL, no critic)
waits for the whole partition: caller + workers / processes seconds. This assumes that the caller's work does not
overlap with that of the workers, and that workers scale linearly. The last columns divide this time by a share. They
show the length of a step without those passes in which the partition takes that share. Figures for more than
{max(PROCESSES)} processes are computed, not measured.

| tokens | processes | added, s | step of which that is 0.2 %, s | step of which that is 1.2 %, s |
|---|---|---|---|---|
{chr(10).join(steps)}

1.2 % is the overhead that the paper reports for its whole method; 0.2 % is our target for the partition.
These figures do not include the work of the probe (profiles and neighbours, on the GPU).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="writes below outputs/benchmarks")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    folder = ROOT / "outputs" / "benchmarks"
    raw = folder / "partition.json" if args.quick else ROOT / "benchmarks" / "results" / "partition.json"
    out = folder / "partition_cost.md" if args.quick else ROOT / "docs" / "partition_cost.md"
    if not args.page_only:
        torch.set_num_threads(1)
        lengths, responses, distinct = ((40, 80), 8, 2) if args.quick else (LENGTHS, RESPONSES, DISTINCT)
        rounds = 1 if args.quick else ROUNDS
        model = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        results: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": model[0] if model else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "responses": responses,
            "rounds": rounds,
            "cases": [],
            "versions": {name: version(name) for name in ("pymetis", "pebble", "torch", "numpy")},
        }
        for n in lengths:
            print(f"{n} tokens: {distinct} synthetic responses", flush=True)
            results["cases"].append(measure(n, responses, distinct, rounds))
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(results, indent=1) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(json.loads(raw.read_text())))
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
