"""METIS in processes of its own: valid, canonical, repeatable labels, and a caller that survives everything.

Shape suffixes: T nodes, K parts.
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import partition_fakes

from sayo_verl.errors import SayoError
from sayo_verl.metis import (
    MAX_NEIGHBOURS,
    MAX_TOKENS,
    MAX_WEIGHT,
    adjacency,
    canonical,
    metis_labels,
    partition_graphs,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(scope="module", autouse=True)
def _workers_find_the_fakes():
    """Spawned workers get the parent's sys.path, where pytest put this folder."""
    assert os.path.dirname(__file__) in sys.path


def text_order(n):
    """Each token's next, by the least weight."""
    return np.array([[i + 1] for i in range(n - 1)] + [[-1]] * (n > 0), dtype=np.int16).reshape(n, 1)


def chain(n):
    """Tokens that are alike to none: the text's order alone."""
    return text_order(n), np.ones((n, 1), dtype=np.int16)


def random_graph(n, m, seed):
    """As a response gives it: m random neighbours of each token, and the order of the text."""
    g = np.random.default_rng(seed)
    index, weight = g.integers(-1, n, (n, m)), g.integers(0, MAX_WEIGHT + 1, (n, m))
    return np.concatenate([index, text_order(n)], 1), np.concatenate([weight, np.ones_like(index[:, :1])], 1)


# ------------------------------------------------------------------------------------------------------------ the graph


def matrix(graph):
    """int64 [T, T] of weights, 0 where there is no edge; checks on the way that the rows are what METIS reads."""
    T = len(graph.offsets) - 1
    assert all(part.dtype == np.int32 for part in graph)
    assert graph.offsets[0] == 0
    assert graph.offsets[-1] == len(graph.neighbours) == len(graph.weights)
    assert (np.diff(graph.offsets) >= 0).all()
    dense = np.zeros((T, T), dtype=np.int64)
    for i in range(T):
        row = slice(graph.offsets[i], graph.offsets[i + 1])
        assert (np.diff(graph.neighbours[row]) > 0).all(), "ascending, none twice"
        assert i not in graph.neighbours[row]
        dense[i, graph.neighbours[row]] = graph.weights[row]
    assert (graph.weights > 0).all()
    assert (dense == dense.T).all()
    return dense


@PROPERTY
@given(
    T=st.integers(0, 25),
    m=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from([np.int16, np.int32, np.int64]),
)
def test_the_graph_against_a_dense_union(T, m, seed, kind):
    g = np.random.default_rng(seed)
    # anything goes: none, itself, repetitions, weights that are not positive
    index, weight = g.integers(-1, max(T, 1), (T, m)).astype(kind), g.integers(-1000, 1001, (T, m)).astype(kind)
    wanted = np.zeros((T, T), dtype=np.int64)
    for i in range(T):
        for k in range(m):
            j = int(index[i, k])
            if j >= 0 and j != i:
                wanted[i, j] = wanted[j, i] = max(wanted[i, j], int(weight[i, k]))
    assert (matrix(adjacency(index, weight)) == wanted).all()


def test_the_graph_by_hand():
    index = [[1, 2], [0, 3], [3, -1], [2, 0], [-1, -1]]
    graph = adjacency(index, [[500, 0], [700, -200], [250, 9], [250, 1], [1000, 1000]])
    # 0-1 by the larger of two, 0-2 not alike, 1-3 less than that, 2-3 once, 3-0 just seen, 4 alone
    assert graph.offsets.tolist() == [0, 2, 3, 4, 6, 6]
    assert graph.neighbours.tolist() == [1, 3, 0, 3, 0, 2]
    assert graph.weights.tolist() == [700, 1, 700, 250, 1, 250]


def test_the_largest_graph_fits_the_32_bits_of_metis():
    assert MAX_TOKENS * 2 * (MAX_NEIGHBOURS * MAX_WEIGHT + 1) < 2**31
    T = MAX_TOKENS
    graph = adjacency((np.arange(T)[:, None] + 1) % T, np.full((T, 1), MAX_WEIGHT))
    assert graph.offsets.tolist() == list(range(0, 2 * T + 1, 2))
    assert graph.neighbours.max() == T - 1


@pytest.mark.parametrize(
    ("index", "weight"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([[0], [0]], [[0, 0], [0, 0]]),
        ([[0.5], [0.5]], [[1], [1]]),
        ([[1], [0]], [[1.0], [1.0]]),
        ([[2], [0]], [[1], [1]]),
        ([[-2], [0]], [[1], [1]]),
        ([[1], [0]], [[MAX_WEIGHT + 1], [1]]),
        (np.zeros((3, MAX_NEIGHBOURS + 2), int), np.zeros((3, MAX_NEIGHBOURS + 2), int)),
        (np.full((MAX_TOKENS + 1, 1), -1), np.zeros((MAX_TOKENS + 1, 1), int)),
    ],
    ids=["flat", "shapes", "half a token", "fractions", "too high", "too low", "heavy", "many neighbours", "long"],
)
def test_what_metis_would_take_unseen_is_refused(index, weight):
    with pytest.raises(SayoError, match=r"^SAYO-A18: neighbours of tokens do not fit"):
        adjacency(index, weight)


# ---------------------------------------------------------------------------------------------------------- the labels


@PROPERTY
@given(n=st.integers(3, 60), m=st.integers(1, 9), parts=st.integers(2, 9), seed=st.integers(0, 9999))
def test_any_graph_of_a_response_is_cut_into_valid_parts(n, m, parts, seed):
    graph = random_graph(n, m, seed)
    (labels,) = partition_graphs([graph], [parts])
    assert labels.shape == (n,)
    found = np.unique(labels)
    assert found.tolist() == list(range(len(found)))
    assert len(found) <= parts
    _, first = np.unique(labels, return_index=True)
    assert (np.diff(first) > 0).all() or len(found) == 1, "numbered by the first token of each"


def test_two_communities_are_told_apart():
    n = 40
    index = np.array([[(i + d) % 20 + (i // 20) * 20 for d in range(1, 6)] for i in range(n)])
    graph = np.concatenate([index, text_order(n)], 1), np.repeat([[900] * 5 + [1]], n, axis=0)
    (labels,) = partition_graphs([graph], [2])
    assert labels.tolist() == [0] * 20 + [1] * 20


def test_weights_decide_where_edges_alone_do_not():
    n = 8  # all are joined to all; even numbers heavily to even ones, odd ones to odd ones
    index = np.array([[j for j in range(n) if j != i] for i in range(n)])
    like = (index % 2) == (np.arange(n) % 2)[:, None]
    (labels,) = partition_graphs([(index, np.where(like, 900, 100))], [2])
    assert labels.tolist() == [0, 1] * 4


def test_equal_graphs_get_equal_labels_in_every_worker_batch_and_process():
    graphs = [random_graph(30 + i % 3, 4, i % 3) for i in range(24)]
    one = partition_graphs(graphs, [4] * 24, processes=1, batch=24)
    two = partition_graphs(graphs, [4] * 24, processes=2, batch=2)
    for i in range(24):
        assert np.array_equal(one[i], two[i])
        assert np.array_equal(one[i], one[i % 3])
    here = canonical(metis_labels(*adjacency(*graphs[0]), 4, 0), 30, 4)
    assert np.array_equal(one[0], here)
    code = (
        "import sys; sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/methods')\n"
        "from test_metis import random_graph, partition_graphs\n"
        "if __name__ == '__main__':\n"
        "    print(partition_graphs([random_graph(30, 4, 0)], [4])[0].tolist())"
    )
    script = os.path.join(os.path.dirname(__file__), "..", "..")
    done = subprocess.run([sys.executable, "-c", code], cwd=script, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(one[0].tolist())


def test_the_seed_reaches_metis():
    graphs = [random_graph(60, 3, i) for i in range(8)]
    # the C library's generator takes 0 for 1, so those two are one seed
    zero, again, two = (partition_graphs(graphs, [6] * 8, seed=seed) for seed in (0, 0, 2))
    assert all(np.array_equal(a, b) for a, b in zip(zero, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(zero, two, strict=True))


def test_all_equal_weights_are_cut_the_same_way_twice():
    graph = chain(50)
    first, second = partition_graphs([graph, graph], [5, 5])
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("n", "parts", "expected"),
    [(0, 3, []), (1, 3, [0]), (4, 1, [0, 0, 0, 0]), (3, 3, [0, 1, 2]), (3, 8, [0, 1, 2])],
)
def test_what_needs_no_metis(n, parts, expected, monkeypatch):
    monkeypatch.setattr("sayo_verl.metis._pool", None)  # calling it would fail
    (labels,) = partition_graphs([chain(n)], [parts])
    assert labels.tolist() == expected


def test_a_response_beyond_the_cap_is_left_alone():
    (labels,) = partition_graphs([(np.full((MAX_TOKENS + 1, 1), -1), np.zeros((MAX_TOKENS + 1, 1), int))], [4])
    assert labels is None


def test_a_response_of_twenty_thousand_tokens_is_cut():
    (labels,) = partition_graphs([chain(20_000)], [8])
    assert len(labels) == 20_000
    assert np.bincount(labels).min() > 2000  # parts of about equal size


def test_disconnected_nodes_and_parts_are_placed():
    (labels,) = partition_graphs([(np.full((8, 1), -1), np.zeros((8, 1), dtype=int))], [2])
    assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize("fake", ["crash_on_five", "hang_on_five", "garbage_on_five", "short_on_five"])
def test_one_bad_graph_costs_its_own_labels_only(fake):
    sizes = [8, 5, 9, 12, 7]
    partition_graphs([chain(8)], [2], processes=1)  # workers run
    start = time.monotonic()
    labels = partition_graphs(
        [chain(n) for n in sizes],
        [2] * 5,
        time_limit=2.0,
        batch=5,
        processes=1,
        partition=getattr(partition_fakes, fake),
    )
    assert time.monotonic() - start < 20, "two time limits of 2 s and a new worker after each"
    assert [found is None for found in labels] == [n == 5 for n in sizes]
    assert partition_graphs([chain(8)], [2])[0] is not None, "the pool goes on"


def test_when_everything_crashes_the_caller_lives():
    labels = partition_graphs([chain(8)] * 20, [2] * 20, processes=2, partition=partition_fakes.always_crash)
    assert labels == [None] * 20


def test_neighbours_that_are_none_are_refused_by_the_worker_and_told_to_the_caller():
    with pytest.raises(SayoError, match=r"^SAYO-A18: .*0 \.\. 9"):
        partition_graphs([chain(8), ([[9], [0], [1]], [[1], [1], [1]])], [2, 2])
    assert partition_graphs([chain(8)], [2])[0] is not None, "the pool goes on"


def test_workers_do_not_import_torch():
    """Starting and holding it would be most of what a worker costs."""
    code = "import sys, sayo_verl.metis; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_defect_of_the_partitioner_is_not_taken_for_a_failure_of_metis():
    with pytest.raises(TypeError):
        partition_graphs([chain(8)], [2], partition=len)


CALLER = """
import multiprocessing, os, sys, time
sys.path[:0] = {tests!r}
print("main runs as", __name__, flush=True)
if __name__ == "__main__":
    from test_metis import chain, partition_graphs
    labels = partition_graphs([chain(9)] * 6, [2] * 6, processes=2)
    assert all(found is not None for found in labels)
    print("workers", *[child.pid for child in multiprocessing.active_children()], flush=True)
    {end}
"""


def runs(pid: int) -> bool:
    """Whether there is such a process, one that has ended and was not waited for not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(5)", 5),
        ("os._exit(3)", 3),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
    ids=["end", "exit", "hard exit", "killed", "terminated"],
)
def test_no_worker_outlives_the_script_that_called(end, code, tmp_path, repo):
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(tests=[str(repo / "tests"), str(repo / "tests" / "methods")], end=end))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(repo)},
    )
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("workers ")]
    pids = [int(pid) for pid in line.split()[1:]]
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(runs, pids))


def cut_once():
    labels = partition_graphs([chain(9)] * 2, [2] * 2, processes=1)
    assert all(found is not None for found in labels)


def test_a_process_of_multiprocessing_ends_after_it_called():
    process = multiprocessing.get_context("spawn").Process(target=cut_once)
    process.start()
    process.join(timeout=90)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_the_cost_page_is_made_of_its_numbers(repo):
    spec = importlib.util.spec_from_file_location("partition_cost", repo / "benchmarks" / "partition_cost.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads((repo / "benchmarks" / "results" / "partition.json").read_text())
    assert [case["tokens"] for case in results["cases"]] == list(benchmark.LENGTHS)
    written = benchmark.page(results)
    assert written == (repo / "docs" / "partition_cost.md").read_text()
    case = {
        "pool": {"1": {"rounds": [{"caller": 2.0, "workers": 9.0}]}, "2": {"rounds": [{"caller": 3.0, "workers": 8.0}]}}
    }
    assert benchmark.costs(case) == {"caller": 2.0, "workers": 8.0}


def test_no_parts_and_no_package_are_refused(monkeypatch):
    with pytest.raises(SayoError, match=r"^SAYO-A18: "):
        partition_graphs([chain(5)], [0])
    real = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "pymetis" else real(name, *a))
    with pytest.raises(SayoError, match=r"^SAYO-A15: .*pymetis.*fix: pip install 'sayo-verl\[anchor\]'"):
        partition_graphs([chain(5)], [2])


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 5], [0, -1, 1], [0.5, 1, 0], [[0, 1, 1]], None])
def test_labels_that_are_none_are_told(labels):
    assert canonical(labels, 3, 2) is None
    assert canonical([1, 1, 0], 3, 2).tolist() == [0, 0, 1]
