"""Cutting graphs into parts with METIS, in processes of their own.

METIS is a C library that does not check its input: it is known to crash and to run on for ever. pymetis holds Python's
lock while it runs, so threads do not help either. So graphs go to a pool of worker processes, several at a time; a
worker that dies or runs out of time costs one graph its labels, never the trainer its life.

    pool    pebble's ``ProcessPool`` (a time limit per task, new workers for dead ones), made at the first call, kept
            for the life of the process, stopped at its exit. A worker whose parent was killed finds its pipe closed.
    start   ``spawn``: the caller holds Ray's threads, which a fork would not survive. As always with it, a script that
            calls this needs ``if __name__ == "__main__":`` around what it runs.
    retry   when a batch fails its graphs are tried again one by one; then only the bad ones are without labels.

The same graph, number of parts and seed give the same labels in every process and every batch.

Shape suffixes: T tokens of one response (nodes), E entries of the adjacency (two per edge), K parts.
"""

import atexit
import importlib.util
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np

from sayo_verl.errors import SayoError

# offsets [T+1], neighbours [E], weights [E]: see ``sayo_verl.probe.graph.Graph``; anything ``np.asarray`` takes.
CSR = tuple[Any, Any, Any]
Partitioner = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int], Any]

MAX_TOKENS = 32_768  # longer responses are not cut; 32 neighbours of weight 1000 each then fit METIS's 32-bit sums
PIP = "pip install 'sayo-verl[anchor]'"
START_SECONDS = 60.0  # what starting the workers may take before they are given up
MAX_WORKERS = 16


def metis_labels(offsets: np.ndarray, neighbours: np.ndarray, weights: np.ndarray, parts: int, seed: int) -> Any:
    """METIS's labels [T] for one graph: parts of about equal size, the weight of cut edges as small as it finds.

    Runs in a worker. ``parts`` must be in 2 .. T - 1; pymetis bisects recursively up to 8 parts, k-way above.
    """
    import pymetis

    adjacency = pymetis.CSRAdjacency(offsets, neighbours)
    return pymetis.part_graph(parts, adjacency, eweights=weights, options=pymetis.Options(seed=seed)).vertex_part


def check_graph(offsets: np.ndarray, neighbours: np.ndarray, weights: np.ndarray) -> None:
    """Refuse what METIS would take unseen: its answer to a graph that is not one is undefined.

    Raises:
        SayoError: A18 unless rows are ascending without repetition, j is among i's neighbours with the weight that i
            has among j's, no node is its own neighbour and weights are positive whole numbers of 32 bits in sum.
    """
    T, E = len(offsets) - 1, len(neighbours)
    whole = all(part.ndim == 1 and np.issubdtype(part.dtype, np.integer) for part in (offsets, neighbours, weights))
    wrong = ""
    if not whole or T < 0 or len(weights) != E:
        wrong = "three flat arrays of whole numbers do not fit together"
    elif offsets[0] != 0 or offsets[-1] != E or (np.diff(offsets) < 0).any():
        wrong = "the offsets do not cover the neighbours"
    elif E and (neighbours.min() < 0 or neighbours.max() >= T):
        wrong = "a neighbour is no node"
    elif E and (weights.min() < 1 or weights.sum(dtype=np.int64) > 2**31 - 1):
        wrong = "a weight is not positive, or their sum has more than 32 bits"
    else:
        source = np.repeat(np.arange(T, dtype=np.int64), np.diff(offsets))
        place, mirrored = source * T + neighbours, neighbours * np.int64(T) + source
        order = mirrored.argsort()
        if (np.diff(place) <= 0).any():
            wrong = "a node's neighbours are not in ascending order, or repeat"
        elif (source == neighbours).any():
            wrong = "a node is its own neighbour"
        elif not np.array_equal(place, mirrored[order]) or not np.array_equal(weights, weights[order]):
            wrong = "an edge is not there in both directions with one weight"
    if wrong:
        raise SayoError("A18", wrong, where="the graph of a response", got=f"{T} nodes, {E} entries",
                        wanted="an undirected graph as sayo_verl.probe.graph.adjacency makes it",
                        fix="this is a defect of sayo-verl; report it")  # fmt: skip


def canonical(labels: Any, nodes: int, parts: int) -> np.ndarray | None:
    """Labels numbered by the first token that bears each, so that parts have one name whatever METIS calls them.

    Returns:
        int64 [T] in 0 .. (parts that are not empty) - 1; None when ``labels`` is not one whole number in 0 .. parts - 1
        per node.
    """
    found = np.asarray(labels)
    if found.shape != (nodes,) or not np.issubdtype(found.dtype, np.integer):
        return None
    if nodes and (found.min() < 0 or found.max() >= parts):
        return None
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[first.argsort()] = np.arange(len(first))
    return rank[inverse]


def partition_graphs(
    graphs: Sequence[CSR],
    parts: Sequence[int],
    *,
    seed: int = 0,
    time_limit: float = 5.0,
    processes: int | None = None,
    batch: int = 16,
    partition: Partitioner = metis_labels,
) -> list[np.ndarray | None]:
    """Cut each graph into its number of parts.

    Args:
        graphs: (offsets, neighbours, weights) each. They need not be connected; METIS places a node without edges
            where there is room.
        parts: number of parts wanted of each, 1 or more.
        seed: of METIS.
        time_limit: seconds that a batch, then a single graph of a batch that failed, may take in a worker.
        processes: workers; None: one per core of this process, at most 16. Another number than before makes a new pool.
        batch: graphs that travel together, at most.
        partition: what runs in the workers; a function that they can import.

    Returns:
        Per graph ``canonical`` labels int64 [T], or None: more than ``MAX_TOKENS`` nodes, the worker died or ran out of
        time, METIS refused, or what came back were no labels. No more than ``max(16, 2 %)`` graphs are tried to the
        end: where METIS fails that often the rest is None too. Without METIS: one part (all 0), no fewer parts than
        nodes (each node its own).

    Raises:
        SayoError: A15 without the packages, A18 for what is not an undirected graph.
    """
    _require_packages()
    labels: list[np.ndarray | None] = [None] * len(graphs)
    ready: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, int]] = {}
    for i, (graph, k) in enumerate(zip(graphs, parts, strict=True)):
        nodes = len(graph[0]) - 1
        if k < 1:
            raise SayoError("A18", "a graph is to be cut into no parts", where="partition_graphs", got=k,
                            wanted="1 or more", fix="this is a defect of sayo-verl; report it")  # fmt: skip
        if k == 1 or nodes <= 1:
            labels[i] = np.zeros(nodes, dtype=np.int64)
        elif k >= nodes:
            labels[i] = np.arange(nodes, dtype=np.int64)
        elif nodes <= MAX_TOKENS:
            offsets, neighbours, weights = (_narrow(part) for part in graph)
            ready[i] = (offsets, neighbours, weights, k)
    if not ready:
        return labels
    workers = processes or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    size = max(1, min(batch, -(-len(ready) // (4 * workers))))
    todo = list(ready)
    for jobs, most in (
        ([todo[at : at + size] for at in range(0, len(todo), size)], len(todo)),
        (None, max(16, len(graphs) // 50)),
    ):
        if jobs is None:
            jobs = [[i] for i in todo if labels[i] is None]
        for i, found in _run(jobs, ready, (partition, seed, time_limit), workers, most).items():
            labels[i] = canonical(found, len(ready[i][0]) - 1, ready[i][3])
    return labels


def _require_packages() -> None:
    """Raises: SayoError A15."""
    for package in ("pymetis", "pebble"):
        if importlib.util.find_spec(package) is None:
            raise SayoError("A15", f"the package {package} is not installed", where="attn_anchor", fix=PIP)


def _narrow(part: Any) -> np.ndarray:
    """METIS's own 32 bits, half of what travels; numbers that do not fit are kept for ``check_graph`` to see."""
    array = np.asarray(part)
    fits = np.issubdtype(array.dtype, np.integer) and (not array.size or np.abs(array).max() < 2**31)
    return np.ascontiguousarray(array, dtype=np.int32) if fits else array


# -------------------------------------------------------------------------------------------------------------- workers


def _run(
    jobs: Sequence[list[int]], ready: dict[int, Any], what: tuple[Partitioner, int, float], workers: int, most: int
) -> dict[int, Any]:
    """Graph -> what the worker found, of the jobs that were done; after ``most`` failed jobs the rest is left."""
    from pebble import ProcessExpired

    results: dict[int, Any] = {}
    if not jobs:
        return results
    partition, seed, time_limit = what
    pool = _pool(workers)
    futures = [pool.schedule(_work, args=(partition, [ready[i] for i in job], seed, time_limit), timeout=time_limit)
               for job in jobs]  # fmt: skip
    deadline = time.monotonic() + START_SECONDS + time_limit * (1 + -(-len(jobs) // workers))
    failed = 0
    try:
        for job, future in zip(jobs, futures, strict=True):
            if failed >= most or not _finished(future, pool, deadline):
                break
            try:
                results |= zip(job, future.result(), strict=True)
            except SayoError:
                raise
            except ImportError as error:
                raise SayoError("A15", "a worker process cannot import METIS", where="attn_anchor", got=error,
                                fix=PIP) from error  # fmt: skip
            # dead, too slow, refused by METIS, or (ValueError) no list of one result per graph
            except (ProcessExpired, FutureTimeoutError, CancelledError, RuntimeError, MemoryError, ValueError):
                failed += 1
    finally:
        for future in futures:
            future.cancel()
    return results


def _finished(future: Future, pool: Any, deadline: float) -> bool:
    """Wait for one task; False, and the pool is thrown away, when the pool broke or nothing comes of it."""
    while not wait([future], timeout=0.5).done:
        if not pool.active or time.monotonic() > deadline:
            _stop()
            return False
    return True


def _work(partition: Partitioner, batch: Sequence[Any], seed: int, time_limit: float) -> list[Any]:
    """In the worker."""
    # The pool watches the time. This alarm, whose default action ends the process even inside of C, is for the worker
    # whose pool was killed.
    signal.setitimer(signal.ITIMER_REAL, time_limit + 10)
    try:
        found = []
        for offsets, neighbours, weights, k in batch:
            check_graph(offsets, neighbours, weights)
            found.append(partition(offsets, neighbours, weights, k, seed))
        return found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _start_worker() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


_LOCK = threading.Lock()
_CURRENT: tuple[int, int, Any] | None = None  # process that made it, workers, pool


def _pool(workers: int) -> Any:
    """The pool of this process with that many workers; a forked child does not use its parent's."""
    global _CURRENT
    from pebble import ProcessPool

    with _LOCK:
        if _CURRENT is not None and (_CURRENT[:2] != (os.getpid(), workers) or not _CURRENT[2].active):
            _close()
        if _CURRENT is None:
            pool = ProcessPool(
                max_workers=workers, initializer=_start_worker, context=multiprocessing.get_context("spawn")
            )
            _CURRENT = (os.getpid(), workers, pool)
        return _CURRENT[2]


def _close() -> None:
    global _CURRENT
    old, _CURRENT = _CURRENT, None
    if old is not None and old[0] == os.getpid():
        old[2].stop()
        old[2].join()


def _stop() -> None:
    with _LOCK:
        _close()


atexit.register(_stop)
