"""What the partition of ``attn_anchor`` costs: graphs and METIS on CPU cores, written to a page.

    python benchmarks/partition_cost.py              # some minutes on two cores; leave the machine alone meanwhile
    python benchmarks/partition_cost.py --quick      # self-check: every code path, at sizes that measure nothing
    python benchmarks/partition_cost.py --page-only  # write the page again from the numbers that are there

Needs ``pip install 'sayo-verl[anchor]'``. A response is invented: each token looks at one of eight places of 256 visual
tokens, with noise, and tokens that follow one another tend to look at the same place; its neighbours are those that the
probe would give. 16 responses of a length are made and each is handled 64 times. Numbers go to
``benchmarks/results/partition.json``; the page is written from that file alone.

    cores   CPU time, user and system: of this process, and of the workers by /proc
    wall    of ``partition_graphs``, workers running already; the first start is told apart
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

from sayo_verl.methods.anchor import AnchorMethod, token_graph
from sayo_verl.partition import check_graph, metis_labels, partition_graphs
from sayo_verl.probe.graph import top_neighbours

ROOT = Path(__file__).resolve().parent.parent
RESPONSES, PARTS, NEIGHBOURS, VISUAL = 1024, 8, AnchorMethod().neighbours, 256
LENGTHS, DISTINCT, ROUNDS = (500, 1000, 2000, 4000), 16, 3
PROCESSES = (1, 2)
SHARE, PAPER = 0.002, 0.012  # of a step: our target for the partition; all of the method, says the paper


def invent(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours [n, m] and cosines [n, m] of one response."""
    g = torch.Generator().manual_seed(seed)
    places = torch.randn(8, VISUAL, generator=g) * 2
    moves = torch.rand(n, generator=g) < 0.1  # a look lasts ten tokens on average
    places_seen = torch.randint(0, 8, (n + 1,), generator=g)  # one for each look
    place = places_seen[moves.cumsum(0)]
    profile = (places[place] + torch.randn(n, VISUAL, generator=g)).softmax(-1)
    return top_neighbours(profile, NEIGHBOURS)


def cpu_of(pids: list[int]) -> float:
    """CPU seconds that these processes have used, to one tick (10 ms)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(n: int, responses: int, distinct: int, rounds: int) -> dict[str, Any]:
    """One length: parts of the work in this process, then all of it with each number of workers."""
    inputs = [invent(n, seed) for seed in range(distinct)]
    metis_labels(*(part.astype("int32") for part in map(torch.Tensor.numpy, token_graph(*inputs[0]))), PARTS, 0)  # warm
    graphs, seconds = [], {"graph": [], "check": [], "metis": []}
    for index, similarity in inputs:
        start = time.process_time()
        graph = tuple(part.numpy() for part in token_graph(index, similarity))
        seconds["graph"].append(time.process_time() - start)
        narrow = [part.astype("int32") for part in graph]
        start = time.process_time()
        check_graph(*narrow)
        seconds["check"].append(time.process_time() - start)
        start = time.process_time()
        metis_labels(*narrow, PARTS, 0)
        seconds["metis"].append(time.process_time() - start)
        graphs.append(graph)
    found: dict[str, Any] = {
        "tokens": n, "entries": int(statistics.mean(len(graph[1]) for graph in graphs)),
        "per_response": {name: statistics.median(values) for name, values in seconds.items()}, "pool": {},
    }  # fmt: skip
    batch = [graphs[i % distinct] for i in range(responses)]
    for processes in PROCESSES:
        start = time.perf_counter()
        partition_graphs(batch[: 2 * processes], [PARTS] * (2 * processes), processes=processes)
        first = time.perf_counter() - start
        runs = []
        for _ in range(rounds):
            pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            wall, caller, workers = time.perf_counter(), time.process_time(), cpu_of(pids)
            labels = partition_graphs(batch, [PARTS] * responses, processes=processes)
            runs.append({"wall": time.perf_counter() - wall, "caller": time.process_time() - caller,
                         "workers": cpu_of(pids) - workers})  # fmt: skip
            if any(cut is None for cut in labels):
                raise RuntimeError(f"{sum(cut is None for cut in labels)} responses of {n} tokens were not cut")
        found["pool"][str(processes)] = {"first_call_seconds": first, "rounds": runs}
        print(f"  {n} tokens, {processes} worker(s): {min(run['wall'] for run in runs):.2f} s", flush=True)
    return found


def costs(case: dict[str, Any], responses: int) -> dict[str, float]:
    """Core-seconds of a batch: graphs, the caller's share of the partition, the workers (least of all rounds)."""
    runs = [run for pool in case["pool"].values() for run in pool["rounds"]]
    return {
        "graph": case["per_response"]["graph"] * responses,
        "caller": min(run["caller"] for run in runs),
        "workers": min(run["workers"] for run in runs),
    }


def page(results: dict[str, Any]) -> str:
    cases, responses = results["cases"], results["responses"]
    rows, pools, steps = [], [], []
    for case in cases:
        cost, per, n = costs(case, responses), case["per_response"], case["tokens"]
        total = sum(cost.values())
        rows.append(f"| {n:,} | {case['entries']:,} | {per['graph'] * 1e3:.1f} | {per['check'] * 1e3:.1f} | "
                    f"{per['metis'] * 1e3:.1f} | {cost['graph']:.1f} | {cost['caller']:.1f} | {cost['workers']:.1f} | "
                    f"{total:.1f} |")  # fmt: skip
        walls = [min(run["wall"] for run in pool["rounds"]) for pool in case["pool"].values()]
        pools.append(f"| {n:,} | " + " | ".join(f"{wall:.2f}" for wall in walls) + f" | {walls[0] / walls[-1]:.2f} |")
        for processes in (16, 64):
            added = cost["graph"] + cost["caller"] + cost["workers"] / processes
            steps.append(f"| {n:,} | {processes} | {added:.1f} | {added / SHARE:,.0f} | {added / PAPER:,.0f} |")
    first = [pool["first_call_seconds"] for pool in cases[0]["pool"].values()]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    last = costs(cases[-1], responses)
    graph_share = last["graph"] / (last["graph"] + last["caller"] + last["workers"] / 16)
    idle = f"Load of the machine when it began: {results['load']:.1f}."
    if results["load"] > 0.25 * results["cores"]:
        idle += ("\n\n**Other work ran at the same time: wall seconds below are too long and say nothing about how "
                 "workers scale.**\nCore-seconds suffer less, by shared caches and cores.")  # fmt: skip
    return f"""# What the partition of `attn_anchor` costs

Written by `benchmarks/partition_cost.py` from `benchmarks/results/partition.json`; its `--help` says what is measured.

{results["machine"]}, {results["cores"]} cores, {versions}, {results["date"]}.
{responses:,} invented responses of one length, {NEIGHBOURS} neighbours, {PARTS} parts, one thread. Figures are medians
over responses, and the least of {results["rounds"]} rounds of the batch. {idle}

## Core-seconds

| tokens | entries of the graph | graph, ms | check, ms | METIS, ms | graphs, all | caller, all | workers, all | sum |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The first five columns are of one response, "all" is the batch of {responses:,} in core-seconds. Graphs are built where
advantages are computed, one after another; "caller" is what goes on there while workers partition (mostly pickling);
"workers" is METIS, the check of its input and unpickling.

## Wall seconds of `partition_graphs`

| tokens | {" | ".join(f"{p} process{'es' if p > 1 else ''}" for p in PROCESSES)} | ratio |
|---|---|---|---|
{chr(10).join(pools)}

Workers run already; the first call took {" and ".join(f"{s:.1f} s" for s in first)}, once a run: new processes that
import what the calling script imports, here torch. The method starts one per core, at most 16.

## Share of a step

The partition adds graphs + caller + workers / processes seconds to a step, as if the caller's work did not overlap with
the workers' and more workers were faster in proportion. Divided by a share that is how long a step must be for the
partition to be no more than that share of it. Processes beyond {max(PROCESSES)} are arithmetic, not measurement.

| tokens | processes | added, s | step of which that is 0.2 %, s | step of which that is 1.2 %, s |
|---|---|---|---|---|
{chr(10).join(steps)}

With 16 processes and responses of {cases[-1]["tokens"]:,} tokens {graph_share:.0%} of what is added is the building of
graphs, which is not spread over processes.

1.2 % is the overhead that the paper reports for all of its method; 0.2 % is our target for the partition alone.
The probe's part (profiles and neighbours, on the GPU) is not in these figures.
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
        model = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        results: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"), "machine": model[0] if model else platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "responses": responses,
            "rounds": rounds, "cases": [],
            "versions": {name: version(name) for name in ("pymetis", "pebble", "torch", "numpy")},
        }  # fmt: skip
        for n in lengths:
            print(f"{n} tokens: inventing {distinct} responses", flush=True)
            results["cases"].append(measure(n, responses, distinct, rounds))
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(results, indent=1) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(json.loads(raw.read_text())))
    print(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
