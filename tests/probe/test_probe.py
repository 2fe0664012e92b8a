"""Attention masses and profiles of the reference path against dense float64 softmax.

Shape suffixes: B batch rows of the tensors, S tokens of such a row, T query rows of one sequence, Q of all of them,
N keys of one sequence, H query heads, G key heads, D head dimension, K sets, V chosen keys.
"""

import random
from dataclasses import replace

import pytest
import torch
from support.probe_calls import Case, simple_case
from support.probe_rows import NAN

from sayo_verl.probe.reference import MAX_SETS, Span


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
