"""The Triton kernels against dense float64 softmax: interpreted by Triton, compiled for a Hopper GPU, and on CUDA.

Shape suffixes: B rows of a tensor, S tokens of such a row, H query heads, G key heads, D head dimension, Q query rows
of all sequences, T of one, N keys of one sequence, K sets of keys, V chosen keys.
"""

import pytest
import torch
from support.fast_cases import NAN, Errors, compare, dense_masses, packed, padded, random_case

from sayo_verl.probe import fast, reference
from sayo_verl.probe.reference import Span

# a key after its row is no part of the log-sum-exp: its term may overflow before it is left out
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp2"), pytest.mark.usefixtures("interpreter")]


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_float32_against_dense_softmax_in_float64(group, quick):
    errors = Errors(f"float32, group {group}")
    sizes = (16, 32, 64, 80, 128)
    for i, D in enumerate((sizes[group % 5], sizes[(group + 2) % 5])):  # over all groups every size twice or more
        spans = (packed if (group + i) % 2 else padded)((9, 13), (40, 5), (0, 3), (33, 20))
        query, key, sets = random_case(spans, group, D, seed=group * 10 + i)
        compare(errors, query, key, spans, sets, 3, D**-0.5)
    errors.check(1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_against_float64_on_the_same_values(dtype):
    errors = Errors(str(dtype))
    cases = [(1, 64), (2, 16), (3, 96), (4, 128), (7, 80), (8, 32), (4, 256), (5, 10)]
    for i, (group, D) in enumerate(cases if dtype == torch.bfloat16 else cases[3:6]):
        spans = (padded if i % 2 else packed)((60, 20), (0, 1), (90, 30))  # of one tile of keys, and of two
        query, key, sets = random_case(spans, group, D, dtype=dtype, seed=i)
        compare(errors, query, key, spans, sets, 3, D**-0.5)
    errors.check(1e-4)


def test_float32_with_the_tiles_that_users_get():
    errors = Errors("float32, own tiles")
    spans = packed((20, 9), (70, 6))
    query, key, sets = random_case(spans, 7, 80, G=1)
    compare(errors, query, key, spans, sets, 3, 80**-0.5)
    errors.check(1e-5)


def test_both_paths_agree(quick):
    errors = Errors("fast against reference")
    for seed, group in enumerate((1, 3, 4)):
        spans = packed((17, 12), (60, 33))
        query, key, sets = random_case(spans, group, 64, seed=seed, n_sets=5)
        found = fast.attention_masses(query, key, spans, sets, 5, scale=0.125)
        wanted = reference.attention_masses(query, key, spans, sets, 5, scale=0.125)
        errors.add("mass", found.mass, wanted.mass)
        errors.add("log-sum-exp", found.lse, wanted.lse)
        columns = torch.tensor([0, 92, 16, 16, 80, 61])
        arguments = query, key, spans[1], wanted.lse[12:], columns
        profile = fast.attention_profile(*arguments, scale=0.125)
        errors.add("profile", profile, reference.attention_profile(*arguments, scale=0.125))
    errors.check(2e-6)


def test_logits_that_overflow_without_the_maximum_subtracted(quick):
    spans = packed((30, 40))
    for spread, shift in ((300.0, 0.0), (1.0, 3000.0), (1.0, -3000.0)):
        query, key, sets = random_case(spans, 2, 32, spread=spread)
        query[..., 0], key[..., 0] = shift, 10.0  # every logit moves by shift * 10 * scale
        wanted = dense_masses(query, key, spans, sets, 3, 32**-0.5)
        assert wanted.lse.abs().max() > 400  # exp of it is no float32
        found = fast.attention_masses(query, key, spans, sets, 3, scale=32**-0.5)
        error = (found.mass - wanted.mass).abs().max().item()
        relative = ((found.lse - wanted.lse) / wanted.lse.abs().clamp(min=1)).abs().max().item()
        size = wanted.lse.abs().max().item()
        print(f"log-sum-exp up to {size:.0f}: mass error {error:.1e}, relative log-sum-exp error {relative:.1e}")
        assert relative < 1e-6
        assert error < size * 1e-6  # a float32 logit of that size is rounded by about size * 6e-8


def test_tile_sizes_do_not_matter(monkeypatch):
    spans = packed((9, 13), (40, 25))
    query, key, sets = random_case(spans, 3, 32, dtype=torch.bfloat16)
    columns = torch.arange(50)
    results = []
    for lanes, keys in ((128, 64), (16, 16), (32, 128), (64, 32)):
        for name in ("_MASSES", "_PROFILE"):
            monkeypatch.setattr(fast, name, fast._Tiling(lanes, keys, 4, 1))
        mass, lse = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
        results.append((mass, lse, fast.attention_profile(query, key, spans[1], lse[13:], columns, scale=0.2)))
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            assert torch.allclose(found, wanted, atol=2e-6, rtol=0)


def test_more_query_heads_per_key_head_than_lanes(monkeypatch):
    spans = packed((5, 3))
    query, key, sets = random_case(spans, 19, 16, G=1)
    errors = Errors("group of 19 in 16 lanes")
    compare(errors, query, key, spans, sets, 3, 0.25)
    errors.check(1e-5)


# ------------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("poison", [NAN, 1e30])
@pytest.mark.parametrize("layout", [packed, padded])
def test_what_lies_outside_the_sequences_changes_no_bit(layout, poison):
    spans = layout((90, 30), (3, 1), (70, 40))  # more than a tile of keys, so that both loops run
    # gaps between the sequences, queries that are not asked for, keys after the last row asked for
    spans = [s._replace(n_queries=s.n_queries - s.n_queries // 4, query_start=s.query_start) for s in spans]
    spans = [s._replace(key_start=s.key_start + 7, query_start=s.query_start + 7) for s in spans]
    query, key, sets = random_case([s._replace(n_keys=s.n_keys + 9) for s in spans], 3, 80, dtype=torch.bfloat16)
    # D is padded in the kernel: what lies behind it in memory must not be read either
    wide_query, wide_key = (torch.full((*x.shape[:3], 128), poison, dtype=x.dtype) for x in (query, key))
    wide_query[..., :80], wide_key[..., :80] = query, key
    before = fast.attention_masses(query, key, spans, sets, 3, scale=0.1)
    columns = torch.arange(40)
    profile = fast.attention_profile(query, key, spans[2], before.lse[-30:], columns, scale=0.1)

    used_query, used_key = torch.zeros(query.shape[0], query.shape[2], dtype=torch.bool), torch.zeros_like(sets).bool()
    for s in spans:
        used_query[s.query_batch, s.query_start : s.query_start + s.n_queries] = True
        used_key[s.key_batch, s.key_start : s.key_start + s.position + s.n_queries] = True
    assert not used_query.all()
    assert not used_key.all()
    wide_query.transpose(1, 2)[~used_query] = poison
    wide_key.transpose(1, 2)[~used_key] = poison
    poisoned_query, poisoned_key = wide_query[..., :80], wide_key[..., :80]
    poisoned_sets = sets.masked_fill(~used_key, 7)
    after = fast.attention_masses(poisoned_query, poisoned_key, spans, poisoned_sets, 3, scale=0.1)
    assert before.mass.isfinite().all()
    assert torch.equal(after.mass, before.mass)
    assert torch.equal(after.lse, before.lse)
    again = fast.attention_profile(poisoned_query, poisoned_key, spans[2], after.lse[-30:], columns, scale=0.1)
    assert torch.equal(again, profile)


def test_a_key_matters_to_no_earlier_row():
    spans = packed((60, 60))
    query, key, sets = random_case(spans, 4, 64, dtype=torch.bfloat16)
    columns = torch.tensor([99, 100, 101, 3])
    before = fast.attention_masses(query, key, spans, sets, 3, scale=0.125)
    profile = fast.attention_profile(query, key, spans[0], before.lse, columns, scale=0.125)
    assert torch.equal(profile[:39, 0], torch.zeros(39))
    assert (profile[39:, 0] > 0).all()
    for poison in (NAN, 1e30):
        poisoned = key.clone()
        poisoned[:, :, 100] = poison
        after = fast.attention_masses(query, poisoned, spans, sets, 3, scale=0.125)
        assert torch.equal(after.mass[:, :40], before.mass[:, :40])  # row 40 is position 100
        assert torch.equal(after.lse[:40], before.lse[:40])
        assert not torch.equal(after.lse[40:], before.lse[40:])
        again = fast.attention_profile(query, poisoned, spans[0], before.lse, columns, scale=0.125)
        assert torch.equal(again[:40], profile[:40])
        assert torch.equal(again[:, [0, 2, 3]], profile[:, [0, 2, 3]])


def test_the_order_of_the_sequences_is_the_order_of_the_rows():
    spans = packed((9, 13), (40, 25), (0, 4), (2, 30))
    query, key, sets = random_case(spans, 2, 32, dtype=torch.float16)
    mass, lse = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
    parts = torch.arange(72).split([13, 25, 4, 30])
    order = [2, 0, 3, 1]
    rows = torch.cat([parts[i] for i in order])
    permuted = fast.attention_masses(query, key, [spans[i] for i in order], sets, 3, scale=0.2)
    assert torch.equal(permuted.mass, mass[:, rows])
    assert torch.equal(permuted.lse, lse[rows])


def test_a_shard_of_the_queries_against_all_keys():
    # As under sequence parallelism: a rank holds a slice of the queries and the keys of the whole pack.
    spans = packed((30, 40), (10, 50))
    query, key, sets = random_case(spans, 2, 32, dtype=torch.float16)
    whole = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
    halves = [
        ([Span(0, 30, 35, 30, 0, 0, 70)], slice(0, 65)),
        ([Span(0, 0, 5, 65, 0, 0, 70), Span(0, 15, 50, 10, 0, 70, 60)], slice(65, 130)),
    ]
    found = [fast.attention_masses(query[:, :, at], key, parts, sets, 3, scale=0.2) for parts, at in halves]
    assert torch.allclose(torch.cat([part.mass for part in found], 1), whole.mass, atol=1e-6, rtol=0)
    assert torch.allclose(torch.cat([part.lse for part in found]), whole.lse, atol=1e-6, rtol=0)


def test_strides_do_not_matter():
    spans = padded((9, 13), (20, 25))
    query, key, sets = random_case(spans, 3, 16, dtype=torch.bfloat16)
    mass, lse = fast.attention_masses(query, key, spans, sets, 3, scale=0.3)
    columns = torch.arange(30)
    profile = fast.attention_profile(query, key, spans[1], lse[13:], columns, scale=0.3)
    layouts = {
        "heads first": lambda x: x.contiguous(),
        "D first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "between others": lambda x: torch.stack([x, x + 1], 3).flatten(2, 3)[:, :, ::2],
    }
    for name, lay in layouts.items():
        laid_query, laid_key = lay(query), lay(key)
        assert laid_query.stride() != query.stride()
        laid_sets, laid_columns = sets.T.contiguous().T, columns.repeat_interleave(2)[::2]
        laid_lse = lse.T.contiguous().T
        found = fast.attention_masses(laid_query, laid_key, spans, laid_sets, 3, scale=0.3)
        assert torch.equal(found.mass, mass), name
        assert torch.equal(found.lse, lse), name
        laid = fast.attention_profile(laid_query, laid_key, spans[1], laid_lse[13:], laid_columns, scale=0.3)
        assert torch.equal(laid, profile), name


def test_addresses_beyond_32_bits():
    # 4.3 GB that are never touched but for three rows; row 2 lies 2**31 + 32 elements behind row 0.
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    far = storage.as_strided((1, 1, 3, 16), (16, 16, 2**30 + 16, 1))
    near = torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    sets, spans = torch.tensor([[1, 0, 2]], dtype=torch.int32), packed((0, 3))
    wanted = fast.attention_masses(near, near, spans, sets, 2, scale=1.0)
    found = fast.attention_masses(far, far, spans, sets, 2, scale=1.0)
    assert torch.equal(found.mass, wanted.mass)
    assert torch.equal(found.lse, wanted.lse)
    columns = torch.tensor([2, 0])
    profiles = [fast.attention_profile(x, x, spans[0], wanted.lse, columns, scale=1.0) for x in (far, near)]
    assert torch.equal(*profiles)


def test_every_run_gives_the_same_bits_and_inputs_stay_as_they_are():
    spans = packed((9, 13), (40, 25))
    query, key, sets = random_case(spans, 3, 32, dtype=torch.bfloat16)
    kept = [x.clone() for x in (query, key, sets)]
    first = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = fast.attention_masses(query.requires_grad_(), key.requires_grad_(), spans, sets, 3, scale=0.2)
    assert torch.equal(first.mass, second.mass)
    assert torch.equal(first.lse, second.lse)
    assert not second.mass.requires_grad
    assert not fast.attention_profile(query, key, spans[0], first.lse[:13], torch.arange(3), scale=0.2).requires_grad
    for now, before in zip((query, key, sets), kept, strict=True):
        assert torch.equal(now, before)


def test_every_element_is_written():
    spans = packed((9, 13), (40, 25), (0, 1))
    query, key, sets = random_case(spans, 7, 32, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        assert torch.empty(3).isnan().all()
        mass, lse = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
        profile = fast.attention_profile(query, key, spans[1], lse[13:38], torch.arange(65), scale=0.2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert mass.isfinite().all()
    assert lse.isfinite().all()
    assert profile.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- edge cases


def test_a_sequence_of_one_token():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    sets = torch.tensor([[0b101]], dtype=torch.int32)
    mass, lse = fast.attention_masses(query, key, packed((0, 1)), sets, 3, scale=0.5)
    assert torch.equal(mass[:, 0], torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4]))
    logits = (query[0, :, 0] * key[0, :, 0].repeat_interleave(2, 0)).sum(-1) * 0.5
    assert torch.allclose(lse[0], logits, atol=1e-5)


def test_sequences_without_rows_and_no_sequences_at_all():
    spans = [Span(0, 5, 0, 5, 0, 0, 9), *packed((9, 13)), Span(0, 0, 0, 0, 0, 0, 0)]
    query, key, sets = random_case(spans, 2, 16, dtype=torch.float16)
    found = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
    alone = fast.attention_masses(query, key, spans[1:2], sets, 3, scale=0.2)
    assert torch.equal(found.mass, alone.mass)
    for none in ([], [spans[0], spans[2]]):
        mass, lse = fast.attention_masses(query, key, none, sets, 3, scale=0.2)
        assert mass.shape == (3, 0, 4)
        assert lse.shape == (0, 4)
    assert fast.attention_profile(query, key, spans[0], lse, torch.arange(4), scale=0.2).shape == (0, 4)
    nothing = torch.empty(0, dtype=torch.int64)
    assert fast.attention_profile(query, key, spans[1], alone.lse, nothing, scale=0.2).shape == (13, 0)


def test_the_last_set_empty_sets_all_keys_and_overlap():
    spans = packed((90, 20))
    query, key, _ = random_case(spans, 2, 16, dtype=torch.float16)
    sets = torch.full((1, 110), 1 << 3, dtype=torch.int32)  # set 3: all keys
    sets[:, 10:20] |= 1 << 30  # the last set
    sets[:, 15:30] |= 1 << 7  # overlaps it
    mass, _ = fast.attention_masses(query, key, spans, sets, 31, scale=0.2)
    wanted = dense_masses(query, key, spans, sets, 31, 0.2).mass
    assert mass.shape == (31, 20, 4)
    assert torch.allclose(mass.double(), wanted, atol=1e-6, rtol=0)
    assert (mass[3] - 1).abs().max() < 1e-6
    empty = [k for k in range(31) if k not in (3, 7, 30)]
    assert torch.equal(mass[empty], torch.zeros(28, 20, 4))
    assert mass[30].min() > 0
    # bits beyond the sets that were asked for are not looked at
    few = fast.attention_masses(query, key, spans, sets, 4, scale=0.2).mass
    assert torch.allclose(few, mass[:4], atol=1e-6, rtol=0)


def test_profile_rows_over_all_columns_sum_to_one_and_agree_with_the_masses():
    spans = packed((30, 40))
    query, key, sets = random_case(spans, 3, 32, dtype=torch.bfloat16)
    mass, lse = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
    profile = fast.attention_profile(query, key, spans[0], lse, torch.arange(70), scale=0.2)
    assert torch.allclose(profile.sum(1), torch.ones(40), atol=1e-6)
    for k in range(3):
        assert torch.allclose(profile[:, (sets[0] >> k) & 1 == 1].sum(1), mass[k].mean(1), atol=1e-6)
    later = torch.arange(70) > torch.arange(30, 70)[:, None]
    assert (profile[later] == 0).all()
    assert (profile[~later] > 0).all()


def test_a_column_outside_the_sequence_is_told_by_nan():
    spans = packed((5, 5), (30, 40))
    query, key, sets = random_case(spans, 2, 16, dtype=torch.float16)
    _, lse = fast.attention_masses(query, key, spans, sets, 3, scale=0.2)
    columns = torch.tensor([3, 70, -1, 69, 10**12])
    profile = fast.attention_profile(query, key, spans[1], lse[5:], columns, scale=0.2)
    assert profile[:, [1, 2, 4]].isnan().all()
    inside = fast.attention_profile(query, key, spans[1], lse[5:], columns[[0, 3]], scale=0.2)
    assert torch.equal(profile[:, [0, 3]], inside)
