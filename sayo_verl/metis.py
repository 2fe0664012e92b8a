"""Cutting the tokens of responses into clusters with METIS, in processes of their own.

METIS is a C library that does not check its input: it is known to crash and to run on for ever. pymetis holds Python's
lock while it runs, so threads do not help either. So responses go to a pool of worker processes, several at a time; a
worker that dies or runs out of time costs one response its labels, never the trainer its life.

    graph   made in the workers, of what is small to send: each token's neighbours and how near they are.
    pool    pebble's ``ProcessPool`` (a time limit per task, new workers for dead ones), made at the first call, kept
            for the life of the process, stopped at its exit. A worker whose parent was killed finds its pipe closed.
    start   ``spawn``: the caller holds Ray's threads, which a fork would not survive. As always with it, a script that
            calls this needs ``if __name__ == "__main__":`` around what it runs. Nothing here imports torch: it would
            be most of what a worker takes to start and to hold.
    retry   when a batch fails its graphs are tried again one by one; then only the bad ones are without labels.

The same neighbours, number of parts and seed give the same labels in every process and every batch.

Shape suffixes: T tokens of one response (nodes), m neighbours, P directed pairs, E entries of the adjacency (two per
edge), K parts.
"""

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
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np

from sayo_verl.errors import SayoError

# Neighbours of each token: index [T, m] in -1 .. T - 1, -1 for none, and weight [T, m]; anything ``np.asarray`` takes.
Neighbours = tuple[Any, Any]
Partitioner = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int], Any]

MAX_TOKENS = 32_768  # longer responses are not cut
MAX_NEIGHBOURS, MAX_WEIGHT = 32, 1000  # METIS adds weights up in 32 bits: 32,768 x 2 x 32 x 1000 < 2^31
PIP = "pip install 'sayo-verl[anchor]'"
START_SECONDS = 60.0  # what starting the workers may take before they are given up
MAX_WORKERS = 64


class Graph(NamedTuple):
    """An undirected graph without self loops, in compressed rows: METIS's ``xadj``, ``adjncy`` and ``adjwgt``.

    Attributes:
        offsets: int32 [T+1]; token i's neighbours lie at offsets[i] .. offsets[i+1] - 1 of the other two.
        neighbours: int32 [E], ascending within a token; j is among i's exactly when i is among j's.
        weights: int32 [E], 1 or more, the same in both directions.
    """

    offsets: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray


def adjacency(index: Any, weight: Any) -> Graph:
    """The graph of a response: i and j are joined when either is among the other's neighbours.

    Args:
        index: whole numbers [T, m] in -1 .. T - 1; -1 for none. A token's own index counts for nothing.
        weight: whole numbers [T, m], at most 1000; an edge weighs the largest that is there for it in either direction,
            and one of 0 or less is none. What stands beside -1 is not looked at.

    Returns:
        ``Graph``. Tokens without an edge have an empty row.

    Raises:
        SayoError: A18 for what does not fit; METIS would take it unseen.
    """
    index, weight = np.asarray(index), np.asarray(weight)
    whole = all(np.issubdtype(part.dtype, np.integer) for part in (index, weight))
    fits = whole and index.ndim == 2 and index.shape == weight.shape and index.shape[1] <= MAX_NEIGHBOURS + 1
    T = len(index) if fits else 0
    if not fits or T > MAX_TOKENS or (index.size and (index.min() < -1 or index.max() >= T)):
        raise _misfit(index, f"whole numbers [T, m] in -1 .. T - 1, T at most {MAX_TOKENS}, m at most {MAX_NEIGHBOURS}")
    source_P, m_P = np.nonzero((index >= 0) & (index != np.arange(T)[:, None]) & (weight > 0))
    target_P, weight_P = index[source_P, m_P].astype(np.int64), weight[source_P, m_P].astype(np.int64)
    if weight_P.size and weight_P.max() > MAX_WEIGHT:
        raise _misfit(weight, f"weights of at most {MAX_WEIGHT}")
    both_ways_E = np.concatenate([source_P * T + target_P, target_P * T + source_P])
    # One sort by place and then weight: the last entry of a place is the largest of its weights.
    code_E = np.sort(both_ways_E * (MAX_WEIGHT + 1) + np.tile(weight_P, 2))
    place_E = code_E // (MAX_WEIGHT + 1)
    last_E = np.ones(len(place_E), dtype=bool)
    last_E[:-1] = place_E[1:] != place_E[:-1]
    place_E, weight_E = place_E[last_E], code_E[last_E] % (MAX_WEIGHT + 1)
    # a row begins at the first entry that lies at or behind its first place
    offsets = np.searchsorted(place_E, np.arange(T + 1, dtype=np.int64) * T)
    return Graph(*(part.astype(np.int32) for part in (offsets, place_E % max(T, 1), weight_E)))


def _misfit(array: np.ndarray, wanted: str) -> SayoError:
    extremes = f", {array.min()} .. {array.max()}" if array.size else ""
    return SayoError(
        "A18",
        "neighbours of tokens do not fit",
        where="the graph of a response",
        got=f"{array.dtype} {array.shape}{extremes}",
        wanted=wanted,
        fix="this is a defect of sayo-verl; report it",
    )


def metis_labels(offsets: np.ndarray, neighbours: np.ndarray, weights: np.ndarray, parts: int, seed: int) -> Any:
    """METIS's labels [T] for one ``Graph``: parts of about equal size, the weight of cut edges as small as it finds.

    Runs in a worker. ``parts`` must be in 2 .. T - 1; pymetis bisects recursively up to 8 parts, k-way above.
    """
    import pymetis

    adjacency = pymetis.CSRAdjacency(offsets, neighbours)
    return pymetis.part_graph(parts, adjacency, eweights=weights, options=pymetis.Options(seed=seed)).vertex_part


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
    responses: Sequence[Neighbours],
    parts: Sequence[int],
    *,
    seed: int = 0,
    time_limit: float = 20.0,
    processes: int | None = None,
    batch: int = 16,
    partition: Partitioner = metis_labels,
) -> list[np.ndarray | None]:
    """Cut the graph of each response into its number of parts.

    Args:
        responses: (index [T, m], weight [T, m]) each, as ``adjacency`` takes them; they travel as they are, so 16 bits
            are better than 64. The graph need not be connected; METIS places a token without edges where there is
            room.
        parts: number of parts wanted of each, 1 or more.
        seed: of METIS.
        time_limit: seconds that a batch, then a single one of a batch that failed, may take in a worker.
        processes: workers; None: one per core of this process, at most 64. Another number than before makes a new pool.
        batch: responses that travel together, at most.
        partition: what runs in the workers; a function that they can import.

    Returns:
        Per response ``canonical`` labels int64 [T], or None: more than ``MAX_TOKENS`` tokens, the worker died or ran
        out of time, METIS refused, or what came back were no labels. No more than ``max(16, 2 %)`` are tried to the
        end: where METIS fails that often the rest is None too. Without METIS: one part (all 0), no fewer parts than
        tokens (each its own).

    Raises:
        SayoError: A15 without the packages, A18 for what is no neighbourhood.
    """
    _require_packages()
    labels: list[np.ndarray | None] = [None] * len(responses)
    ready: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
    for i, ((index, weight), k) in enumerate(zip(responses, parts, strict=True)):
        nodes = len(index)
        if k < 1:
            raise SayoError(
                "A18",
                "a response is to be cut into no parts",
                where="partition_graphs",
                got=k,
                wanted="1 or more",
                fix="this is a defect of sayo-verl; report it",
            )
        if k == 1 or nodes <= 1:
            labels[i] = np.zeros(nodes, dtype=np.int64)
        elif k >= nodes:
            labels[i] = np.arange(nodes, dtype=np.int64)
        elif nodes <= MAX_TOKENS:
            ready[i] = (np.asarray(index), np.asarray(weight), k)
    if not ready:
        return labels
    workers = processes or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    size = max(1, min(batch, -(-len(ready) // (4 * workers))))
    todo = list(ready)
    for jobs, most in (
        ([todo[at : at + size] for at in range(0, len(todo), size)], len(todo)),
        (None, max(16, len(responses) // 50)),
    ):
        if jobs is None:
            jobs = [[i] for i in todo if labels[i] is None]
        for i, found in _run(jobs, ready, (partition, seed, time_limit), workers, most).items():
            labels[i] = canonical(found, len(ready[i][0]), ready[i][2])
    return labels


def _require_packages() -> None:
    """Raises: SayoError A15."""
    for package in ("pymetis", "pebble"):
        if importlib.util.find_spec(package) is None:
            raise SayoError("A15", f"the package {package} is not installed", where="attn_anchor", fix=PIP)


# -------------------------------------------------------------------------------------------------------------- workers


def _run(
    jobs: Sequence[list[int]], ready: dict[int, Any], what: tuple[Partitioner, int, float], workers: int, most: int
) -> dict[int, Any]:
    """Response -> what the worker found, of the jobs that were done; after ``most`` failed jobs the rest is left."""
    from pebble import ProcessExpired

    results: dict[int, Any] = {}
    if not jobs:
        return results
    partition, seed, time_limit = what
    pool = _pool(workers)
    futures = [
        pool.schedule(_work, args=(partition, [ready[i] for i in job], seed, time_limit), timeout=time_limit)
        for job in jobs
    ]
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
                raise SayoError(
                    "A15", "a worker process cannot import METIS", where="attn_anchor", got=error, fix=PIP
                ) from error
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
        return [partition(*adjacency(index, weight), k, seed) for index, weight, k in batch]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _start_worker() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


_LOCK = threading.Lock()
_CURRENT: tuple[int, int, Any, Finalize] | None = None  # process that made it, workers, pool, what stops it


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
            # not ``atexit``: a process of ``multiprocessing`` does not call it, and would wait for the workers for ever
            _CURRENT = (os.getpid(), workers, pool, Finalize(None, _stop, exitpriority=0))
        return _CURRENT[2]


def _close() -> None:
    global _CURRENT
    old, _CURRENT = _CURRENT, None
    if old is not None and old[0] == os.getpid():
        old[3].cancel()
        old[2].stop()
        old[2].join()


def _stop() -> None:
    with _LOCK:
        _close()
