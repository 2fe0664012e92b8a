"""Neighbours by attention profile, against dense float64.

Shape suffixes: T tokens, V visual tokens, m neighbours.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.refusals import refusal
from torch.utils._python_dispatch import TorchDispatchMode

from sayo_verl.probe.neighbours import top_neighbours


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


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("profile", "m", "chunk"),
    [(torch.ones(3), 1, 1), (torch.ones(3, 3).long(), 1, 1), (torch.ones(3, 3), 0, 1), (torch.ones(3, 3), 1, 0)],
    ids=["flat", "integers", "no neighbours", "no chunk"],
)
def test_profiles_that_do_not_fit_are_refused(profile, m, chunk):
    with refusal("P18", "profiles"):
        top_neighbours(profile, m, chunk=chunk)
