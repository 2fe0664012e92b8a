"""Neighbours by attention profile and their graph, against dense float64 and against what METIS asks for.

Shape suffixes: T tokens, V visual tokens, m neighbours, E entries of the adjacency.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sayo_verl.errors import SayoError
from sayo_verl.probe.graph import MAX_LEVELS, Graph, adjacency, top_neighbours


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def attention(T: int, V: int, seed: int) -> torch.Tensor:
    """float32 [T, V]: profiles of a few kinds, as softmax rows times the image's share."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(4, V, generator=generator) * 2
    logits = kinds[torch.randint(0, 4, (T,), generator=generator)] + torch.randn(T, V, generator=generator)
    return logits.softmax(-1) * torch.rand(T, 1, generator=generator)


def dense_cosines(profile: torch.Tensor) -> np.ndarray:
    """float64 [T, T], one pair at a time."""
    rows = profile.double().numpy()
    out = np.zeros((len(rows), len(rows)))
    for i, j in itertools.product(range(len(rows)), repeat=2):
        size = np.sqrt((rows[i] ** 2).sum()) * np.sqrt((rows[j] ** 2).sum())
        out[i, j] = (rows[i] * rows[j]).sum() / size if size else 0.0
    return out


def matrix(graph: Graph) -> torch.Tensor:
    """int64 [T, T] of weights, 0 where there is no edge; checks on the way that the rows are what METIS reads."""
    T = len(graph.offsets) - 1
    assert all(part.dtype == torch.int64 for part in graph)
    assert graph.offsets[0] == 0
    assert graph.offsets[-1] == len(graph.neighbours) == len(graph.weights)
    assert (graph.offsets.diff() >= 0).all()
    dense = torch.zeros(T, T, dtype=torch.int64)
    for i in range(T):
        row = slice(int(graph.offsets[i]), int(graph.offsets[i + 1]))
        assert (graph.neighbours[row].diff() > 0).all()  # ascending, none twice
        assert i not in graph.neighbours[row]
        dense[i, graph.neighbours[row]] = graph.weights[row]
    assert (graph.weights > 0).all()
    assert torch.equal(dense, dense.T)
    return dense


# ------------------------------------------------------------------------------------------------------ neighbours


def test_neighbours_against_dense_float64():
    largest = 0.0
    for seed, (T, V, m) in enumerate([(40, 16, 5), (7, 100, 6), (64, 3, 8), (30, 1, 4), (2, 9, 1)]):
        profile = attention(T, V, seed)
        index, similarity = top_neighbours(profile, m, chunk=16)
        cosines = dense_cosines(profile)
        assert index.dtype == torch.int64
        assert similarity.dtype == torch.float32
        assert index.shape == similarity.shape == (T, m)
        for i in range(T):
            assert len(set(index[i].tolist()) - {i}) == m
            largest = max(largest, np.abs(similarity[i].numpy() - cosines[i, index[i]]).max())
            best = np.sort(np.delete(cosines[i], i))[::-1][:m]
            largest = max(largest, np.abs(similarity[i].numpy() - best).max())
        assert (similarity.diff(dim=1) <= 0).all()
    print(f"largest difference of a similarity from dense float64: {largest:.1e}")
    assert largest < 1e-7


def test_among_equals_the_lower_index_comes_first():
    profile = attention(6, 8, 0)[[3, 0, 3, 1, 3, 0, 3]]
    index, similarity = top_neighbours(profile, 4)
    assert index[:, :3].tolist()[0::2] == [[2, 4, 6], [0, 4, 6], [0, 2, 6], [0, 2, 4]]
    assert (similarity[0::2, :3] == 1).all()
    # a scaled profile looks the same way
    scaled, _ = top_neighbours(profile * torch.tensor([1, 2, 4, 1, 0.5, 8, 1])[:, None], 4)
    assert torch.equal(scaled, index)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 50))
def test_the_chunk_does_not_matter(T, V, m, seed, chunk):
    # few distinct profiles, so that many similarities are equal
    profile = attention(5, V, seed)[torch.randint(0, 5, (T,), generator=torch.Generator().manual_seed(seed))]
    whole, parts = top_neighbours(profile, m, chunk=10**6), top_neighbours(profile, m, chunk=chunk)
    for found, wanted, again in zip(parts, whole, top_neighbours(profile, m, chunk=10**6), strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(again, wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_permuted_tokens_have_permuted_neighbours(T, seed):
    profile = attention(T, 24, seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    ranked = top_neighbours(profile, 6)[1][:, : T - 1]
    assume((ranked.diff(dim=1) != 0).all())  # no ties: they go by index
    index, similarity = top_neighbours(profile, 5)
    permuted_index, permuted_similarity = top_neighbours(profile[order], 5)
    named = torch.where(permuted_index < 0, -1, order[permuted_index])
    assert torch.equal(named, index[order])
    assert torch.equal(permuted_similarity, similarity[order])
    dense = matrix(adjacency(index, similarity))
    assert torch.equal(matrix(adjacency(permuted_index, permuted_similarity)), dense[order][:, order])


def test_a_token_that_does_not_look_at_the_image_is_like_none():
    profile = attention(5, 8, 1)
    profile[2] = 0
    index, similarity = top_neighbours(profile, 4)
    assert index[2].tolist() == [0, 1, 3, 4]
    assert similarity[2].tolist() == [0.0] * 4
    assert (similarity[[0, 1, 3, 4], -1] == 0).all()
    assert (index[[0, 1, 3, 4], -1] == 2).all()
    assert (similarity[[0, 1, 3, 4], :-1] > 0).all()
    # no visual tokens at all
    index, similarity = top_neighbours(torch.zeros(3, 0), 2)
    assert index.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert (similarity == 0).all()
    # a faint profile is a profile
    assert (top_neighbours(torch.full((2, 3), 1e-40), 1)[1] == 1).all()


def test_fewer_tokens_than_neighbours():
    index, similarity = top_neighbours(attention(3, 8, 2), 5)
    assert (index[:, 2:] == -1).all()
    assert (similarity[:, 2:] == 0).all()
    assert index[:, :2].sort(1).values.tolist() == [[1, 2], [0, 2], [0, 1]]
    for T in (0, 1):
        index, similarity = top_neighbours(torch.ones(T, 4), 2)
        assert torch.equal(index, torch.full((T, 2), -1))
        assert torch.equal(similarity, torch.zeros(T, 2))


def test_memory_is_a_chunk_times_tokens():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.numbers = max(Largest.numbers, tensor.numel())
            return out

    T, V, chunk = 500, 40, 20
    profile = attention(T, V, 0)
    with Largest():
        top_neighbours(profile, 8, chunk=chunk)
    assert Largest.numbers == max(chunk * T, T * V)
    with Largest():
        top_neighbours(profile, 8, chunk=T)
    assert Largest.numbers == T * T  # the spy sees it


def test_inputs_of_any_floating_type_stay_as_they_are():
    profile = attention(20, 8, 3)
    wanted = top_neighbours(profile, 4)
    kept = profile.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = top_neighbours(profile.requires_grad_(), 4)
    assert torch.equal(profile, kept)
    assert not found[1].requires_grad
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    half = top_neighbours(profile.bfloat16(), 4)
    for a, b in zip(half, top_neighbours(profile.bfloat16().double(), 4), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------ graph


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 25), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from([1, 7, 1000, MAX_LEVELS]))
def test_the_graph_against_a_dense_union(T, m, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    # anything goes: none, itself, repetitions, negative similarities
    index = torch.randint(-1, max(T, 1), (T, m), generator=generator)
    similarity = torch.rand(T, m, generator=generator) * 2 - 1
    wanted = np.zeros((T, T), dtype=np.int64)
    for i, k in itertools.product(range(T), range(m)):
        j, weight = int(index[i, k]), round(levels * float(similarity[i, k]))
        if j >= 0 and j != i:
            wanted[i, j] = max(wanted[i, j], weight)
            wanted[j, i] = max(wanted[j, i], weight)
    graph = adjacency(index, similarity, levels=levels)
    assert torch.equal(matrix(graph), torch.from_numpy(wanted))
    for again, part in zip(adjacency(index, similarity, levels=levels), graph, strict=True):
        assert torch.equal(again, part)


def test_the_graph_by_hand():
    index = torch.tensor([[1, 2], [0, 3], [3, -1], [2, 0], [-1, -1]])
    similarity = torch.tensor([[0.5, 0.0004], [0.7, -0.2], [0.25, float("nan")], [0.25, 0.0006], [1.0, 1.0]])
    graph = adjacency(index, similarity)
    # 0-1 by the larger of two, 0-2 too faint, 1-3 negative, 2-3 once, 3-0 just seen, 4 alone
    assert graph.offsets.tolist() == [0, 2, 3, 4, 6, 6]
    assert graph.neighbours.tolist() == [1, 3, 0, 3, 0, 2]
    assert graph.weights.tolist() == [700, 1, 700, 250, 1, 250]


def test_isolated_tokens_and_empty_graphs():
    for T in (0, 1, 4):
        graph = adjacency(*top_neighbours(torch.zeros(T, 6), 3))
        assert graph.offsets.tolist() == [0] * (T + 1)
        assert graph.neighbours.numel() == graph.weights.numel() == 0
    profile = torch.eye(6)[[0, 0, 5, 1, 1, 1]]  # token 2 is like none
    dense = matrix(adjacency(*top_neighbours(profile, 2), levels=10))
    assert dense.bool().sum(1).tolist() == [1, 1, 0, 2, 2, 2]
    assert set(dense.flatten().tolist()) == {0, 10}


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("profile", "m", "chunk"),
    [(torch.ones(3), 1, 1), (torch.ones(3, 3).long(), 1, 1), (torch.ones(3, 3), 0, 1), (torch.ones(3, 3), 1, 0)],
    ids=["flat", "integers", "no neighbours", "no chunk"],
)
def test_profiles_that_do_not_fit_are_refused(profile, m, chunk):
    with refusal("P18", "profiles"):
        top_neighbours(profile, m, chunk=chunk)


@pytest.mark.parametrize(
    ("index", "similarity", "levels"),
    [
        (torch.zeros(3).long(), torch.zeros(3), 10),
        (torch.zeros(3, 2).long(), torch.zeros(3, 3), 10),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2), 10),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2).long(), 10),
        (torch.full((3, 2), 3), torch.zeros(3, 2), 10),
        (torch.full((3, 2), -2), torch.zeros(3, 2), 10),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), 0),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), MAX_LEVELS + 1),
        (torch.ones(3, 2).long(), torch.full((3, 2), 1.01), 10),
        (torch.ones(3, 2).long(), torch.full((3, 2), -1.01), 10),
    ],
    ids=[
        "flat",
        "shapes",
        "int32",
        "integers",
        "too high",
        "too low",
        "no levels",
        "many levels",
        "above a cosine",
        "below",
    ],
)
def test_neighbours_that_do_not_fit_are_refused(index, similarity, levels):
    with refusal("P18"):
        adjacency(index, similarity, levels=levels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value):
    profile = attention(4, 5, 0)
    profile[1, 2] = value
    with refusal("P25", "not finite"):
        top_neighbours(profile, 2)
    index, similarity = top_neighbours(attention(4, 5, 0), 2)
    similarity[3, 1] = value
    with refusal("P25", "not finite"):
        adjacency(index, similarity)
