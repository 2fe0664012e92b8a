"""What the reference path refuses, and its memory."""

import weakref

import pytest
import torch
from support.probe_calls import Case, simple_case
from support.probe_rows import NAN, same
from support.refusals import refusal
from torch.utils._python_dispatch import TorchDispatchMode

from sayo_verl.probe.reference import Span, attention_masses, attention_profile

# ---------------------------------------------------------------------------------------------------- what does not fit


FITTING = Span(0, 0, 3, 2, 0, 0, 5)


@pytest.mark.parametrize(
    "tensors",
    [
        {"query": torch.zeros(4, 3, 8)},
        {"key": torch.zeros(2, 5, 8)},
        {"key": torch.zeros(1, 2, 5, 4)},
        {"key": torch.zeros(1, 3, 5, 8)},
        {"key": torch.zeros(1, 8, 5, 8)},
        {"key": torch.zeros(1, 0, 5, 8)},
        {"key": torch.zeros(1, 2, 5, 8).bfloat16()},
        {"key": torch.zeros(1, 2, 5, 8, device="meta")},
    ],
    ids=["flat query", "flat key", "dimension", "heads", "more key heads", "no key head", "type", "device"],
)
def test_queries_and_keys_that_do_not_match_are_refused(tensors):
    both = {"query": torch.zeros(1, 4, 3, 8), "key": torch.zeros(1, 2, 5, 8), **tensors}
    for spans in ([FITTING], []):
        with refusal("P01", "do not match"):
            attention_masses(**both, spans=spans, sets=torch.zeros(1, 5, dtype=torch.int32), n_sets=1, scale=1.0)
    with refusal("P01", "do not match"):
        attention_profile(**both, span=FITTING, lse=torch.zeros(3, 4), columns=torch.tensor([0]), scale=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_batch": 1},
        {"query_batch": -1},
        {"key_batch": 1},
        {"key_batch": -1},
        {"query_start": 1},
        {"query_start": -1},
        {"n_queries": -1},
        {"n_queries": 4, "position": 1},
        {"position": 3},
        {"position": -1},
        {"key_start": 1},
        {"key_start": -1},
        {"n_keys": 6},
        {"n_keys": 4},
        {"n_keys": -1, "n_queries": 0, "position": 0},
    ],
    ids=lambda wrong: ",".join(f"{name}={value}" for name, value in wrong.items()),
)
def test_sequences_outside_of_the_tensors_are_refused(wrong):
    query, key, span = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8), FITTING._replace(**wrong)
    with refusal("P01", "do not match") as caught:
        attention_masses(query, key, [FITTING, span], torch.zeros(1, 5, dtype=torch.int32), 1, scale=1.0)
    assert str(span) in caught.value.got
    with refusal("P01", "do not match") as caught:
        attention_profile(query, key, span, torch.zeros(3, 4), torch.tensor([0]), scale=1.0)
    assert str(span) in caught.value.got


@pytest.mark.parametrize(
    ("sets", "n_sets"),
    [
        (torch.zeros(1, 6, dtype=torch.int32), 1),
        (torch.zeros(2, 5, dtype=torch.int32), 1),
        (torch.zeros(5, dtype=torch.int32), 1),
        (torch.zeros(1, 5, dtype=torch.int64), 1),
        (torch.zeros(1, 5, dtype=torch.bool), 1),
        (torch.zeros(1, 5, dtype=torch.int32), 0),
        (torch.zeros(1, 5, dtype=torch.int32), 32),
    ],
    ids=["too long", "too many rows", "flat", "int64", "bool", "no set", "32 sets"],
)
def test_sets_that_do_not_match_the_keys_are_refused(sets, n_sets):
    with refusal("P01", "do not match the keys"):
        attention_masses(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8), [FITTING], sets, n_sets, scale=1.0)


@pytest.mark.parametrize(
    ("lse", "columns"),
    [
        (torch.zeros(2, 4), torch.tensor([0])),
        (torch.zeros(3, 2), torch.tensor([0])),
        (torch.zeros(4, 3), torch.tensor([0])),
        (torch.zeros(3), torch.tensor([0])),
        (torch.zeros(3, 4), torch.tensor([[0]])),
        (torch.zeros(3, 4), torch.tensor([0.0])),
        (torch.zeros(3, 4), torch.tensor([0], dtype=torch.int32)),
        (torch.zeros(3, 4), torch.tensor([True] * 5)),
    ],
    ids=["rows", "heads", "transposed", "flat", "columns of two dimensions", "float", "int32", "bool"],
)
def test_a_log_sum_exp_or_columns_of_another_sequence_are_refused(lse, columns):
    with refusal("P01", "do not match the sequence"):
        attention_profile(torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8), FITTING, lse, columns, scale=1.0)


@pytest.mark.parametrize("column", [-1, 5])
def test_a_column_outside_of_the_sequence_is_never_attention(column):
    """NaN or a refusal, but not the attention to a neighbour's key."""
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 9, 8)
    span = FITTING._replace(key_start=2)
    found = attention_profile(query, key, span, torch.zeros(3, 4), torch.tensor([0, column]), scale=0.1)
    assert found[:, 0].isfinite().all()
    assert (found[:, 1].isnan() | (found[:, 1] == 0)).all()


# --------------------------------------------------------------------------------------------------------------- memory


class Spy(TorchDispatchMode):
    """Counts new storage, in bytes: the largest, and the most that lived at once beside the inputs."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self._inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self._owners: dict[int, int] = {}
        self.largest = self.peak = self._live = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            at, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if at in self._inputs or size == 0:
                continue
            if self._owners.get(at, 0) == 0:
                self._live += size
            self._owners[at] = self._owners.get(at, 0) + 1
            weakref.finalize(tensor, self._drop, at, size)
            self.largest, self.peak = max(self.largest, size), max(self.peak, self._live)
        return out

    def _drop(self, at: int, size: int) -> None:
        self._owners[at] -= 1
        if self._owners[at] == 0:
            self._live -= size


def spied(case: Case, chunk: int, columns: torch.Tensor | None = None) -> Spy:
    lse = None if columns is None else case.masses().lse
    with Spy(case.query, case.key, case.sets) as spy:
        if columns is None:
            case.masses(chunk=chunk)
        else:
            case.profile(0, columns, lse, chunk=chunk)
    return spy


def test_the_spy_sees_a_whole_matrix():
    """The measure itself: naive attention must be caught by it."""
    case = simple_case(T=32, N=64, H=8, G=2, D=8)
    with Spy(case.query, case.key) as spy:
        naive = (case.query @ case.key.repeat_interleave(4, 1).transpose(2, 3)).softmax(-1)
    assert spy.largest == naive.numel() * 4 == 32 * 64 * 8 * 4
    assert spy.peak >= 2 * spy.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_larger_than_a_chunk_and_keys_are_not_replicated(dtype):
    T, S, H, G, D, chunk = 96, 160, 12, 2, 64, 4
    case = simple_case(T, S, H, G, D, K=3)
    case.query, case.key = case.query.to(dtype), case.key.to(dtype)
    logits, key_copy, replicated = (4 * n for n in (chunk * H * S, G * S * D, H * S * D))
    assert logits < key_copy < replicated < 4 * T * S * H  # what follows can tell them apart
    masses, profile = spied(case, chunk), spied(case, chunk, torch.arange(0, S, 2))
    print(
        f"bytes: largest of masses {masses.largest}, of profile {profile.largest}; a chunk of logits {logits}, keys "
        f"{key_copy}; at once {masses.peak} and {profile.peak}; T x S x H would be {4 * T * S * H}"
    )
    assert masses.largest <= max(logits, key_copy)
    assert profile.largest <= max(logits, key_copy, 4 * T * S // 2)
    if dtype == torch.float32:
        assert masses.largest <= logits, "float32 keys need no copy"
    # beside the keys: logits and what softmax of them needs, the results, one chunk of queries
    results = 4 * (3 + 1) * T * H
    assert masses.peak <= key_copy + 3 * logits + results + 4 * chunk * H * D + 8 * 3 * 3 * S


def test_memory_grows_linearly_in_tokens():
    sizes = (128, 256, 512)
    peaks, largest = [], []
    for T in sizes:
        case = simple_case(T, T + T // 2, H=8, G=2, D=8, K=2)
        spy = spied(case, chunk=8)
        peaks.append(spy.peak)
        largest.append(spy.largest)
    print(f"bytes at once for {sizes} response tokens: {peaks}, largest tensor {largest}")
    for small, large in zip((*peaks, *largest), (*peaks[1:], 0, *largest[1:], 0), strict=True):
        assert large <= 2.05 * small


def test_a_chunk_is_128_rows_unless_told_otherwise():
    case = simple_case(T=200, N=220, H=4, G=2, D=4, K=1)
    with Spy(case.query, case.key, case.sets) as spy:
        case.masses()
    # the first chunk sees 20 + 128 keys, the second has 72 rows and sees all
    assert spy.largest == max(4 * 4 * 128 * (20 + 128), 4 * 4 * 72 * 220)


def test_same_helper_tells_bits_apart():
    a = torch.tensor([1.0, NAN])
    assert same(a, a.clone())
    assert not same(a, torch.tensor([1.0, 0.0]))
    assert not same(a, torch.tensor([1.0 + 1e-7, NAN]))
