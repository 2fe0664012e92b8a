"""Attention masses and profiles of the reference path against dense float64 softmax.

Shape suffixes: B batch rows of the tensors, S tokens of such a row, T query rows of one sequence, Q of all of them,
N keys of one sequence, H query heads, G key heads, D head dimension, K sets, V chosen keys.
"""

import itertools
import random
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from support.probe_rows import NAN, dense_attention, refusal, same
from torch.utils._python_dispatch import TorchDispatchMode

from sayo_verl.probe.reference import MAX_SETS, Masses, Span, attention_masses, attention_profile


@dataclass
class Case:
    """Sequences at random places of two tensors, with other numbers around them."""

    query: torch.Tensor
    key: torch.Tensor
    spans: list[Span]
    sets: torch.Tensor
    n_sets: int
    scale: float

    def masses(self, **options) -> Masses:
        return attention_masses(self.query, self.key, self.spans, self.sets, self.n_sets, scale=self.scale, **options)

    def rows(self) -> list[slice]:
        """Where each span's rows lie in the results."""
        ends = torch.tensor([0, *(span.n_queries for span in self.spans)]).cumsum(0).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def profile(self, n: int, columns: torch.Tensor, lse: torch.Tensor, **options) -> torch.Tensor:
        return attention_profile(self.query, self.key, self.spans[n], lse, columns, scale=self.scale, **options)

    def dense(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [H, T, N], lse [H, T]) in float64."""
        span = self.spans[n]
        query = self.query[span.query_batch, :, span.query_start : span.query_start + span.n_queries]
        key = self.key[span.key_batch, :, span.key_start : span.key_start + span.n_keys]
        return dense_attention(query, key, span.position, self.scale)

    def dense_masses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mass [K, Q, H], lse [Q, H]) in float64."""
        mass, lse = [], []
        for n, span in enumerate(self.spans):
            weights, lse_HT = self.dense(n)
            sets_N = self.sets[span.key_batch, span.key_start : span.key_start + span.n_keys].tolist()
            member = [[bool(bits & 1 << k) for bits in sets_N] for k in range(self.n_sets)]
            mass.append(torch.stack([weights[..., m].sum(-1).T for m in torch.tensor(member)]))
            lse.append(lse_HT.T)
        return torch.cat(mass, 1), torch.cat(lse)

    def outside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [B, S] of the query and key tensors: what no span names."""
        query, key = (torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) for x in (self.query, self.key))
        for span in self.spans:
            query[span.query_batch, span.query_start : span.query_start + span.n_queries] = False
            key[span.key_batch, span.key_start : span.key_start + span.n_keys] = False
        return query, key


def random_case(seed: int, dtype: torch.dtype = torch.float32, group: int | None = None, n_sets: int = 0) -> Case:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    G = choose.choice([1, 2, 3])
    H, D, B = G * (group or choose.choice([1, 2, 3, 4, 5, 7])), choose.choice([4, 8, 16]), choose.choice([1, 2, 3])
    used_q, used_k, spans = [0] * B, [0] * B, []
    for i in range(choose.randint(1, 4)):
        N = choose.randint(1, 24)
        T = choose.choice([0, 1, N, choose.randint(1, N)]) if i else choose.randint(1, N)
        batch_q, batch_k = choose.randrange(B), choose.randrange(B)
        start_q, start_k = used_q[batch_q] + choose.randint(0, 3), used_k[batch_k] + choose.randint(0, 3)
        spans.append(Span(batch_q, start_q, T, choose.randint(0, N - T), batch_k, start_k, N))
        used_q[batch_q], used_k[batch_k] = start_q + T, start_k + N
    sizes = max(used_q) + choose.randint(0, 3), max(used_k) + choose.randint(0, 3)
    query = torch.randn(B, H, sizes[0], D, generator=generator) * choose.choice([0.3, 1.0, 3.0])
    key = torch.randn(B, G, sizes[1], D, generator=generator)
    n_sets = n_sets or choose.randint(1, 6)
    sets = torch.randint(0, 2**n_sets, (B, sizes[1]), generator=generator, dtype=torch.int64).to(torch.int32)
    return Case(query.to(dtype), key.to(dtype), spans, sets, n_sets, D**-0.5)


def simple_case(T: int = 5, N: int = 12, H: int = 6, G: int = 2, D: int = 8, K: int = 3, seed: int = 0) -> Case:
    """One sequence that fills its tensors; the queries are its last tokens."""
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(1, H, T, D, generator=generator),
        torch.randn(1, G, N, D, generator=generator),
        [Span(0, 0, T, N - T, 0, 0, N)],
        torch.randint(0, 2**K, (1, N), generator=generator, dtype=torch.int32),
        K,
        D**-0.5,
    )


class Errors:
    """Largest and mean absolute difference over many comparisons."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        self.all.append((found.double() - expected).abs().flatten())

    def largest(self, what: str) -> float:
        errors = torch.cat(self.all)
        print(f"{what}: largest {errors.max():.1e}, mean {errors.mean():.1e} of {errors.numel()} values")
        return errors.max().item()


# ------------------------------------------------------------------------------------------------ against dense float64


def test_masses_and_log_sum_exp_per_head_against_float64():
    mass, lse = Errors(), Errors()
    for seed in range(30):
        case = random_case(seed)
        expected_mass, expected_lse = case.dense_masses()
        for chunk in (1, 3, 128):
            found = case.masses(chunk=chunk)
            assert found.mass.min() >= 0
            assert found.mass.max() <= 1 + 1e-6
            mass.add(found.mass, expected_mass)
            lse.add(found.lse, expected_lse)
    assert mass.largest("float32 mass from float64") <= 1e-6
    assert lse.largest("float32 log-sum-exp from float64") <= 1e-5


def test_profile_against_float64():
    errors, later = Errors(), 0
    for seed in range(30):
        case = random_case(seed)
        lse = case.masses().lse
        for n, (span, rows) in enumerate(zip(case.spans, case.rows(), strict=True)):
            weights, _ = case.dense(n)
            columns = torch.randperm(span.n_keys, generator=torch.Generator().manual_seed(seed))[: seed % 7 + 1]
            for chunk in (1, 4, 128):
                found = case.profile(n, columns, lse[rows], chunk=chunk)
                errors.add(found, weights.mean(0)[:, columns])
            after = columns > torch.arange(span.position, span.position + span.n_queries)[:, None]
            assert (found[after] == 0).all()
            later += int(after.sum())
    assert later > 50, "the cases must hold columns that come after their row"
    assert errors.largest("float32 profile from float64") <= 1e-6


def test_the_profile_over_all_columns_sums_to_one_and_gives_the_masses():
    for seed in range(10):
        case = random_case(seed)
        masses = case.masses()
        for n, (span, rows) in enumerate(zip(case.spans, case.rows(), strict=True)):
            profile = case.profile(n, torch.arange(span.n_keys), masses.lse[rows])
            torch.testing.assert_close(profile.sum(1), torch.ones(span.n_queries), atol=2e-6, rtol=0)
            sets_N = case.sets[span.key_batch, span.key_start : span.key_start + span.n_keys]
            for k in range(case.n_sets):
                inside = (sets_N >> k) & 1 == 1
                torch.testing.assert_close(profile[:, inside].sum(1), masses.mass[k, rows].mean(1), atol=2e-6, rtol=0)


def test_bfloat16_inputs_against_float64_on_the_same_values():
    mass, lse, profile = Errors(), Errors(), Errors()
    for seed in range(100, 120):
        case = random_case(seed, torch.bfloat16)
        found = case.masses()
        expected_mass, expected_lse = case.dense_masses()
        mass.add(found.mass, expected_mass)
        lse.add(found.lse, expected_lse)
        columns = torch.arange(case.spans[0].n_keys)
        profile.add(case.profile(0, columns, found.lse[case.rows()[0]]), case.dense(0)[0].mean(0))
    assert mass.largest("mass of bfloat16 inputs") < 1e-4
    assert profile.largest("profile of bfloat16 inputs") < 1e-4
    assert lse.largest("log-sum-exp of bfloat16 inputs") < 1e-4


def test_a_long_sequence():
    case = simple_case(T=12, N=3000, H=8, G=2, D=32, K=2)
    case.sets = torch.zeros(1, 3000, dtype=torch.int32)
    case.sets[0, 10:1500] |= 1
    case.sets[0, 700:760] |= 2
    found, (mass, lse), errors = case.masses(chunk=5), case.dense_masses(), Errors()
    errors.add(found.mass, mass)
    errors.add(found.lse, lse)
    assert errors.largest("over 3000 keys") <= 2e-6


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_query_heads_per_key_head(group):
    errors = Errors()
    for seed in range(4):
        case = random_case(seed, group=group)
        found = case.masses(chunk=3)
        for got, want in zip(found, case.dense_masses(), strict=True):
            errors.add(got, want)
        profile = case.profile(0, torch.arange(case.spans[0].n_keys), found.lse[case.rows()[0]], chunk=3)
        errors.add(profile, case.dense(0)[0].mean(0))
    assert errors.largest(f"{group} query heads per key head") <= 1e-5


def test_query_heads_use_their_own_key_head():
    # Two key heads, four query heads: heads 0, 1 read key head 0, heads 2, 3 read key head 1 (as in HF's repeat_kv).
    key = torch.zeros(1, 2, 2, 1)
    key[0, 0, 0], key[0, 1, 1] = 50.0, 50.0  # key head 0 points at token 0, key head 1 at token 1
    query = torch.tensor([1.0, 1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    case = Case(query, key, [Span(0, 0, 1, 1, 0, 0, 2)], torch.tensor([[1, 0]], dtype=torch.int32), 1, 1.0)
    found = case.masses()
    torch.testing.assert_close(found.mass[0, 0], torch.tensor([1.0, 1.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    profile = case.profile(0, torch.tensor([0, 1]), found.lse)
    torch.testing.assert_close(profile, torch.tensor([[3 / 4, 1 / 4]]), atol=1e-6, rtol=0)


def test_masses_by_hand():
    # Equal logits: each of the keys 0..position gets the same share, and the log-sum-exp is the log of their number.
    sets = torch.tensor([[0b1001, 0b1000, 0b1011, 0b1010]], dtype=torch.int32)
    case = Case(torch.zeros(1, 2, 4, 4), torch.randn(1, 1, 4, 4), [Span(0, 0, 4, 0, 0, 0, 4)], sets, 4, 0.5)
    found = case.masses()
    expected = torch.tensor([[1, 1 / 2, 2 / 3, 2 / 4], [0, 0, 1 / 3, 2 / 4], [0, 0, 0, 0], [1, 1, 1, 1]])
    for h in range(2):
        torch.testing.assert_close(found.mass[..., h], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.lse[:, h], torch.arange(1.0, 5.0).log(), atol=1e-6, rtol=0)


def test_the_mass_of_the_only_key_is_one():
    case = simple_case(T=1, N=1, H=2, G=1, D=4, K=1)
    case.sets[:] = 1
    assert (case.masses().mass == 1.0).all()
    assert case.profile(0, torch.tensor([0]), case.masses().lse).item() == pytest.approx(1.0, abs=1e-6)


def test_the_scale_is_a_factor_on_the_logits():
    case = simple_case()
    doubled = replace(case, query=case.query * 2, scale=case.scale / 2)
    torch.testing.assert_close(doubled.masses().mass, case.masses().mass, atol=1e-6, rtol=0)
    assert not torch.allclose(replace(case, scale=case.scale / 2).masses().mass, case.masses().mass, atol=1e-3)


# ------------------------------------------------------------------------------------------------- what must not matter


def test_the_chunk_does_not_matter():
    for seed in range(20):
        case = random_case(seed)
        whole = case.masses(chunk=10_000)
        for chunk in (1, 2, 7):
            parts = case.masses(chunk=chunk)
            torch.testing.assert_close(parts.mass, whole.mass, atol=1e-6, rtol=0)
            torch.testing.assert_close(parts.lse, whole.lse, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_it_changes_no_bit(dtype):
    case = random_case(5, dtype)
    columns = torch.arange(case.spans[0].n_keys)
    outside = case.masses()
    profile_outside = case.profile(0, columns, outside.lse[case.rows()[0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # autocast is really on
        assert (case.query.float() @ case.query.float().transpose(-1, -2)).dtype == torch.bfloat16
        inside = case.masses()
        profile_inside = case.profile(0, columns, outside.lse[case.rows()[0]])
    assert inside.mass.dtype == inside.lse.dtype == profile_inside.dtype == torch.float32
    assert torch.equal(inside.mass, outside.mass)
    assert torch.equal(inside.lse, outside.lse)
    assert torch.equal(profile_inside, profile_outside)


def test_there_is_no_gradient_and_inputs_stay_as_they_are():
    case = random_case(3)
    kept = case.query.clone(), case.key.clone(), case.sets.clone()
    case.query.requires_grad_()
    case.key.requires_grad_()
    found = case.masses()
    lse = found.lse[case.rows()[0]]
    lse_kept = lse.clone()
    profile = case.profile(0, torch.arange(case.spans[0].n_keys), lse)
    for result in (found.mass, found.lse, profile):
        assert not result.requires_grad
        assert result.grad_fn is None
    for now, before in zip((case.query, case.key, case.sets, lse), (*kept, lse_kept), strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("poison", [NAN, 1e30, float("inf")])
def test_numbers_outside_of_the_spans_never_matter(poison):
    touched = 0
    for seed in range(15):
        case = random_case(seed)
        before = case.masses(chunk=4)
        columns = torch.arange(case.spans[0].n_keys)
        profile = case.profile(0, columns, before.lse[case.rows()[0]])
        query_BS, key_BS = case.outside()
        case.query.transpose(1, 2)[query_BS] = poison
        case.key.transpose(1, 2)[key_BS] = poison
        case.sets[key_BS] = -1  # padding in every set
        after = case.masses(chunk=4)
        assert torch.equal(after.mass, before.mass)
        assert torch.equal(after.lse, before.lse)
        assert torch.equal(case.profile(0, columns, after.lse[case.rows()[0]]), profile)
        touched += int(key_BS.sum()) + int(query_BS.sum())
    assert touched > 100


@pytest.mark.parametrize("poison", [NAN, 1e30, float("inf")])
def test_other_sequences_never_matter(poison):
    cases = [case for case in map(random_case, range(20)) if len(case.spans) > 1]
    assert len(cases) > 5
    for case in cases:
        before = case.masses()
        for n, (span, rows) in enumerate(zip(case.spans, case.rows(), strict=True)):
            poisoned = replace(case, query=case.query.clone(), key=case.key.clone())
            for m, other in enumerate(case.spans):
                if m != n:
                    q, k = other.query_start, other.key_start
                    poisoned.query[other.query_batch, :, q : q + other.n_queries] = poison
                    poisoned.key[other.key_batch, :, k : k + other.n_keys] = poison
            after = poisoned.masses()
            assert torch.equal(after.mass[:, rows], before.mass[:, rows])
            assert torch.equal(after.lse[rows], before.lse[rows])
            assert span.n_queries == 0 or after.mass[:, rows].isfinite().all()


@pytest.mark.parametrize("poison", [NAN, 1e30, float("inf")])
@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_later_keys_never_matter(poison, chunk):
    """Also keys that a later row of the same chunk does read."""
    T, N = 6, 15
    case = simple_case(T, N)
    case.spans = [Span(0, 0, T, 5, 0, 0, N)]  # rows 5..10; keys 11..14 belong to no row
    columns = torch.arange(N)
    before = case.masses(chunk=chunk)
    profile = case.profile(0, columns, before.lse, chunk=chunk)
    for first_bad in range(6, N):
        poisoned = replace(case, key=case.key.clone())
        poisoned.key[:, :, first_bad:] = poison
        good = min(first_bad - 5, T)  # rows that see only keys before it
        after = poisoned.masses(chunk=chunk)
        assert torch.equal(after.mass[:, :good], before.mass[:, :good])
        assert torch.equal(after.lse[:good], before.lse[:good])
        assert torch.equal(poisoned.profile(0, columns, before.lse, chunk=chunk)[:good], profile[:good])
        if poison != poison:
            assert after.mass[:, good:].isnan().all(), "a NaN that a row does see must stay visible"


def test_any_strides():
    case = next(c for c in map(random_case, range(99)) if c.key.shape[0] > 1 and c.key.shape[1] > 1)
    expected = case.masses()
    columns = torch.arange(case.spans[0].n_keys)
    profile = case.profile(0, columns, expected.lse[case.rows()[0]])

    def laid_out(x: torch.Tensor, *order: int) -> torch.Tensor:
        back = [order.index(d) for d in range(4)]
        moved = x.permute(*order).contiguous().permute(*back)
        assert torch.equal(moved, x)
        return moved

    for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):  # [B, S, H, D] as models have it, and two others
        strange = replace(case, query=laid_out(case.query, *order), key=laid_out(case.key, *order))
        assert not strange.key.is_contiguous()
        found = strange.masses(chunk=3)
        torch.testing.assert_close(found.mass, expected.mass, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.lse, expected.lse, atol=2e-6, rtol=0)
        again = strange.profile(0, columns, expected.lse[case.rows()[0]])
        torch.testing.assert_close(again, profile, atol=1e-6, rtol=0)
    every_second = replace(
        case,
        query=torch.stack([case.query, case.query * 0], -1).flatten(-2)[..., ::2],
        sets=torch.stack([case.sets, case.sets * 0], -1).flatten(-2)[..., ::2],
    )
    assert every_second.sets.stride(-1) == 2
    torch.testing.assert_close(every_second.masses().mass, expected.mass, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------- sets


def test_sets_may_overlap_be_empty_and_hold_everything():
    case = simple_case(K=4)
    case.sets = torch.full((1, 12), 0b1000, dtype=torch.int32)  # 3: everything, 2: nothing
    case.sets[0, 1:8] |= 0b01
    case.sets[0, 4:10] |= 0b10
    found, (expected, _) = case.masses(), case.dense_masses()
    torch.testing.assert_close(found.mass.double(), expected, atol=1e-6, rtol=0)
    assert (found.mass[2] == 0).all()
    torch.testing.assert_close(found.mass[3], torch.ones(5, 6), atol=1e-6, rtol=0)
    assert (found.mass[0] + found.mass[1] > 1e-3).all()


def test_the_last_set_and_bits_beyond_the_asked_ones():
    case = simple_case(K=1)
    case.sets[0] = torch.tensor([k % 3 == 0 for k in range(12)])
    expected = case.masses().mass[0]
    last = replace(case, sets=case.sets << (MAX_SETS - 1), n_sets=MAX_SETS)
    found = last.masses().mass
    assert found.shape[0] == MAX_SETS == 31
    torch.testing.assert_close(found[30], expected, atol=1e-6, rtol=0)
    assert (found[:30] == 0).all()
    crowded = replace(case, sets=case.sets | -2)  # every other bit, and the sign
    torch.testing.assert_close(crowded.masses().mass[0], expected, atol=1e-6, rtol=0)


def test_no_sequences_and_sequences_without_query_rows():
    case = simple_case()
    nothing = replace(case, spans=[]).masses()
    assert (nothing.mass.shape, nothing.lse.shape) == ((3, 0, 6), (0, 6))
    empty = Span(0, 2, 0, 4, 0, 0, 12)
    mixed = replace(case, spans=[empty, case.spans[0], empty._replace(position=12, query_start=5)])
    assert torch.equal(mixed.masses().mass, case.masses().mass)
    assert torch.equal(mixed.masses().lse, case.masses().lse)
    assert mixed.profile(0, torch.tensor([1, 2]), torch.zeros(0, 6)).shape == (0, 2)
    no_columns = case.profile(0, torch.zeros(0, dtype=torch.int64), case.masses().lse)
    assert no_columns.shape == (5, 0)


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
