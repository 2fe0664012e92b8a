"""The Triton kernels against dense float64 softmax: interpreted by Triton, compiled for a Hopper GPU, and on CUDA.

Shape suffixes: B rows of a tensor, S tokens of such a row, H query heads, G key heads, D head dimension, Q query rows
of all sequences, T of one, N keys of one sequence, K sets of keys, V chosen keys.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sayo_verl.errors import SayoError
from sayo_verl.probe import fast, kernels, reference
from sayo_verl.probe.reference import Masses, Span, stretches
from sayo_verl.probe.tiles import tiles_of, whole_tiles

NAN = float("nan")
# a key after its row is no part of the log-sum-exp: its term may overflow before it is left out
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
QUICK = fast._Tiling(lanes=64, keys=32, warps=4, stages=1)  # the interpreter pays per tile


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Kernels that Triton's interpreter runs, whoever imported Triton before; not for tests that name `compiled`."""
    if "compiled" in request.fixturenames:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.reload(kernels)
    assert kernels.INTERPRETED is ("compiled" not in request.fixturenames)
    yield
    monkeypatch.undo()
    importlib.reload(kernels)


@pytest.fixture
def compiled():
    """Asks for kernels as they are without TRITON_INTERPRET."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast, "_FLOAT32", QUICK)


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def packed(*sequences: tuple[int, int]) -> list[Span]:
    """(prompt, response) lengths one behind another in one row, as verl's remove-padding does."""
    spans, start = [], 0
    for prompt, response in sequences:
        spans.append(Span(0, start + prompt, response, prompt, 0, start, prompt + response))
        start += prompt + response
    return spans


def padded(*sequences: tuple[int, int]) -> list[Span]:
    return [
        Span(b, prompt, response, prompt, b, 0, prompt + response) for b, (prompt, response) in enumerate(sequences)
    ]


def random_case(spans, group, D, G=2, n_sets=3, dtype=torch.float32, seed=0, spread=1.5):
    """Queries, keys and sets for spans. A stretch of keys belongs to no set, as most text does."""
    generator = torch.Generator().manual_seed(seed)
    B = 1 + max(span.key_batch for span in spans)
    S = max(span.key_start + span.n_keys for span in spans)
    query = (torch.randn(B, S, G * group, D, generator=generator) * spread).to(dtype).transpose(1, 2)
    key = torch.randn(B, S, G, D, generator=generator).to(dtype).transpose(1, 2)
    sets = torch.randint(0, 2**n_sets, (B, S), generator=generator, dtype=torch.int32)
    sets[:, S // 3 :] *= torch.rand(B, S - S // 3, generator=generator) < 0.05
    return query, key, sets


def seen_rows(query, key, span, scale):
    """float64 logits [H, T, N] of one sequence, later keys at minus infinity; no code is shared with the kernels."""
    query_HTD = query[span.query_batch, :, span.query_start : span.query_start + span.n_queries].double()
    key_GND = key[span.key_batch, :, span.key_start : span.key_start + span.n_keys].double()
    key_HND = key_GND.repeat_interleave(query.shape[1] // key.shape[1], 0)
    logits = torch.einsum("htd,hnd->htn", query_HTD, key_HND) * scale
    later = torch.ones(span.n_queries, span.n_keys, device=query.device).triu(span.position + 1).bool()
    return logits.masked_fill(later, float("-inf"))


def dense_masses(query, key, spans, sets, n_sets, scale) -> Masses:
    masses, lses = [], []
    for span in spans:
        logits_HTN = seen_rows(query, key, span, scale)
        sets_N = sets[span.key_batch, span.key_start : span.key_start + span.n_keys]
        p_HTN = logits_HTN.softmax(-1)
        masses.append(torch.stack([p_HTN[..., (sets_N >> k) & 1 == 1].sum(-1).T for k in range(n_sets)]))
        lses.append(logits_HTN.logsumexp(-1).T)
    return Masses(torch.cat(masses, 1), torch.cat(lses))


def with_marks(spans, sets) -> list[Span]:
    """Spans that say where the keys of their sets lie, as the probe's own do."""
    rows = [sets[span.key_batch, span.key_start : span.key_start + span.n_keys].cpu() for span in spans]
    return [span._replace(marked=stretches(row != 0)) for span, row in zip(spans, rows, strict=True)]


class Errors:
    """Absolute errors of many comparisons, to be printed and bounded."""

    def __init__(self, what: str) -> None:
        self.what, self.found = what, {}

    def add(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        self.found.setdefault(name, []).append((found.double() - wanted.double()).abs().flatten())

    def check(self, limit: float) -> None:
        for name, parts in self.found.items():
            errors = torch.cat(parts)
            print(f"{self.what}, {name}: largest {errors.max():.1e}, mean {errors.mean():.1e} of {errors.numel()}")
            assert errors.max() <= limit, name


def compare(errors: Errors, query, key, spans, sets, n_sets, scale) -> None:
    found = fast.attention_masses(query, key, spans, sets, n_sets, scale=scale)
    wanted = dense_masses(query, key, spans, sets, n_sets, scale)
    errors.add("mass", found.mass, wanted.mass)
    errors.add("log-sum-exp", found.lse, wanted.lse)
    given = fast.attention_masses(
        query, key, with_marks(spans, sets), sets, n_sets, scale=scale, lse=wanted.lse.float()
    )
    errors.add("mass, log-sum-exp given", given.mass, wanted.mass)
    done = 0
    for span in spans:
        lse_TH = found.lse[done : done + span.n_queries]
        columns = torch.randperm(span.n_keys, generator=torch.Generator().manual_seed(done)).to(query.device)
        columns = columns[: 2 + span.n_keys // 2]
        profile = fast.attention_profile(query, key, span, lse_TH, columns, scale=scale)
        p_HTN = seen_rows(query, key, span, scale).softmax(-1)
        errors.add("profile", profile, p_HTN.mean(0)[:, columns])
        done += span.n_queries


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_float32_against_dense_softmax_in_float64(group, quick):
    errors = Errors(f"float32, group {group}")
    for i, D in enumerate((16, 32, 64, 80, 128)):
        spans = (packed if (group + i) % 2 else padded)((9, 13), (40, 5), (0, 3), (33, 20))
        query, key, sets = random_case(spans, group, D, seed=group * 10 + i)
        compare(errors, query, key, spans, sets, 3, D**-0.5)
    errors.check(1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_against_float64_on_the_same_values(dtype):
    errors = Errors(str(dtype))
    for i, (group, D) in enumerate([(1, 64), (2, 16), (3, 96), (4, 128), (7, 80), (8, 32), (4, 256), (5, 10)]):
        spans = (padded if i % 2 else packed)((100, 30), (0, 1), (150, 45))
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


# ----------------------------------------------------------------------------------------------------- tiles and layers


def test_tiles_cover_every_row_once_and_never_two_sequences():
    spans = (*packed((9, 13), (40, 25), (7, 0), (2, 1)), Span(3, 11, 8, 20, 2, 5, 30))
    for rows in (1, 4, 18, 128):
        tiles = tiles_of(spans, rows, 64, torch.device("cpu"))[0].tolist()
        covered = {}
        for query_batch, query_start, n, position, key_batch, key_start, out, *_ in tiles:
            assert 0 < n <= rows
            for i in range(n):
                assert out + i not in covered
                covered[out + i] = (query_batch, query_start + i, position + i, key_batch, key_start)
        wanted = [
            (s.query_batch, s.query_start + i, s.position + i, s.key_batch, s.key_start)
            for s in spans
            for i in range(s.n_queries)
        ]
        assert [covered[i] for i in range(len(wanted))] == wanted
        assert len(covered) == len(wanted)
        assert [tile[3] for tile in tiles] == sorted((tile[3] for tile in tiles), reverse=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=300), st.sampled_from([1, 16, 64]), st.integers(1, 80))
def test_stretches_cover_what_is_marked_in_whole_tiles_and_visit_no_key_twice(marks, keys, gap):
    marked_N = torch.tensor(marks, dtype=torch.bool)
    found = stretches(marked_N, gap=gap)
    tiles = whole_tiles(found, keys)
    for parts in (found, tiles):
        covered = [n for first, end in parts for n in range(first, end)]
        assert covered == sorted(set(covered))
        assert set(marked_N.nonzero().flatten().tolist()) <= set(covered)
    assert all(b[0] - a[1] >= gap for a, b in itertools.pairwise(found))
    assert all(first % keys == end % keys == 0 for first, end in tiles)
    assert all(marked_N[first] and marked_N[end - 1] for first, end in found)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_that_lie_in_a_set_wholly_in_part_or_not_at_all(seed, quick):
    # as images and boxes do: each set is a few long stretches
    spans = packed((250, 40), (97, 66))
    query, key, sets = random_case(spans, 2, 16, seed=seed)
    sets.zero_()
    generator = torch.Generator().manual_seed(seed)
    for k in range(3):
        for start in torch.randint(0, sets.shape[1], (3,), generator=generator).tolist():
            sets[0, start : start + int(torch.randint(1, 130, (1,), generator=generator))] |= 1 << k
    errors = Errors(f"sets of long stretches, {seed}")
    compare(errors, query, key, spans, sets, 3, 0.25)
    errors.check(1e-5)
    # the bits of a set's mass do not depend on which others are asked
    together = fast.attention_masses(query, key, spans, sets, 3, scale=0.25)
    for k in range(3):
        alone = fast.attention_masses(query, key, spans, (sets >> k) & 1, 1, scale=0.25)
        assert torch.equal(alone.mass[0], together.mass[k])


def test_with_the_log_sum_exp_given_keys_of_no_set_are_not_visited():
    spans = packed((300, 90))
    query, key, sets = random_case(spans, 4, 32, dtype=torch.bfloat16)
    sets.zero_()
    sets[0, 70:110], sets[0, 340:350] = 1, 2
    whole = fast.attention_masses(query, key, spans, sets, 2, scale=0.2)
    poisoned = key.clone()
    poisoned[:, :, :64] = poisoned[:, :, 128:320] = poisoned[:, :, 384:] = NAN  # tiles without a key of a set
    found = fast.attention_masses(query, poisoned, with_marks(spans, sets), sets, 2, scale=0.2, lse=whole.lse)
    assert torch.allclose(found.mass, whole.mass, atol=1e-6, rtol=0)
    assert torch.equal(found.lse, whole.lse)
    # nothing is marked: no key is visited at all
    sets.zero_()
    none = fast.attention_masses(query, key * NAN, with_marks(spans, sets), sets, 2, scale=0.2, lse=whole.lse)
    assert torch.equal(none.mass, torch.zeros_like(none.mass))
    # without marks all keys are
    every = fast.attention_masses(query, key, spans, sets + 1, 1, scale=0.2, lse=whole.lse)
    assert torch.allclose(every.mass, torch.ones_like(every.mass), atol=1e-5)


def test_both_paths_agree_with_the_log_sum_exp_given(quick):
    errors = Errors("fast against reference, log-sum-exp given")
    for seed, group in enumerate((1, 3, 4)):
        spans = packed((17, 12), (60, 33))
        query, key, sets = random_case(spans, group, 64, seed=seed, n_sets=5)
        lse = reference.attention_masses(query, key, spans, sets, 5, scale=0.125).lse
        spans = with_marks(spans, sets)
        found, wanted = (
            m.attention_masses(query, key, spans, sets, 5, scale=0.125, lse=lse) for m in (fast, reference)
        )
        computed = reference.attention_masses(query, key, spans, sets, 5, scale=0.125)
        errors.add("mass", found.mass, wanted.mass)
        errors.add("mass, computed", wanted.mass, computed.mass)
        assert torch.equal(found.lse, lse)
        assert torch.equal(wanted.lse, lse)
    errors.check(2e-6)


def test_layers_share_one_table_of_tiles():
    spans = packed((11, 3), (4, 2))
    query, key, sets = random_case(spans, 2, 16, dtype=torch.float16)
    tiles_of.cache_clear()
    for layer in range(3):
        fast.attention_masses(query + layer, key, list(spans), sets, 3, scale=0.2)
    assert tiles_of.cache_info().misses == 1
    assert tiles_of.cache_info().hits == 2


# ------------------------------------------------------------------------------------------------------------- refusals


def test_types_and_shapes_that_do_not_fit_are_refused():
    spans = packed((3, 4))
    query, key, sets = random_case(spans, 2, 16)
    lse, columns = torch.zeros(4, 4), torch.arange(2)
    with refusal("P01", "does not support"):
        fast.attention_masses(query.double(), key.double(), spans, sets, 3, scale=1.0)
    with refusal("P01", "does not support"):
        fast.attention_profile(query.double(), key.double(), spans[0], lse, columns, scale=1.0)
    wide = torch.zeros(1, 2, 7, 257)
    with refusal("P01", "does not support"):
        fast.attention_masses(wide, wide, spans, sets, 3, scale=1.0)
    with refusal("P01"):
        fast.attention_masses(query, key.half(), spans, sets, 3, scale=1.0)
    with refusal("P01"):
        fast.attention_masses(query, key, [spans[0]._replace(n_keys=8)], sets, 3, scale=1.0)
    with refusal("P01"):
        fast.attention_masses(query, key, spans, sets.long(), 3, scale=1.0)
    with refusal("P01"):
        fast.attention_masses(query, key, spans, sets, 32, scale=1.0)
    with refusal("P01"):
        fast.attention_profile(query, key, spans[0], lse[1:], columns, scale=1.0)
    for paths in (fast, reference):
        for wrong in (lse[1:], lse.T.contiguous()[:3], lse.half()):
            with refusal("P01", "log-sum-exp"):
                paths.attention_masses(query, key, spans, sets, 3, scale=1.0, lse=wrong)


def test_a_cpu_without_the_interpreter_is_refused(compiled):
    spans = packed((3, 4))
    query, key, sets = random_case(spans, 2, 16)
    with refusal("P16", "CUDA, or TRITON_INTERPRET=1"):
        fast.attention_masses(query, key, spans, sets, 3, scale=1.0)
    with refusal("P16"):
        fast.attention_profile(query, key, spans[0], torch.zeros(4, 4), torch.arange(2), scale=1.0)


def test_no_triton_is_refused(monkeypatch):
    spans = packed((3, 4))
    query, key, sets = random_case(spans, 2, 16)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "sayo_verl.probe.kernels")
        patch.setitem(sys.modules, "triton", None)
        with refusal("P17", "needs Triton") as caught:
            fast.attention_masses(query, key, spans, sets, 3, scale=1.0)
    assert "pip install triton" in str(caught.value)


# ---------------------------------------------------------------------------------------------------- the real compiler

COMPILE = """
    import json, re, subprocess, sys, tempfile
    from pathlib import Path
    from types import SimpleNamespace

    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from sayo_verl.probe import fast, kernels
    from sayo_verl.probe.reference import Span

    # A driver that names a GPU lets Triton compile what a launch with these arguments would run, with no GPU there.
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    ))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    report = []

    def only_compile(kernel):
        def launch(grid, *arguments, **constants):
            built = kernel.run(*arguments, grid=grid, warmup=True, **constants)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                said = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
            registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", said.stdout + said.stderr).groups())
            ptx = built.asm["ptx"]
            report.append(dict(kernel=built.metadata.name, shared=built.metadata.shared, registers=registers,
                               stack=stack, tensor_cores="mma.sync" in ptx or "wgmma" in ptx,
                               asynchronous="cp.async" in ptx))

        class Launcher:
            def __getitem__(self, grid):
                return lambda *arguments, **constants: launch(grid, *arguments, **constants)

        return Launcher()

    names = ("members_kernel", "masses_kernel", "profile_kernel")
    stand_in = SimpleNamespace(INTERPRETED=False, **{n: only_compile(getattr(kernels, n)) for n in names})
    fast._kernels = lambda query: stand_in
    for dtype, D, G, group, n_sets in json.loads(sys.argv[1]):
        query = torch.empty(1, 999, G * group, D, dtype=getattr(torch, dtype)).transpose(1, 2)
        span = Span(0, 100, 300, 100, 0, 0, 400)
        sets = torch.zeros(1, 999, dtype=torch.int32)
        fast.attention_masses(query, query[:, :G], [span], sets, n_sets, scale=0.1)
        fast.attention_masses(query, query[:, :G], [span], sets, n_sets, scale=0.1, lse=torch.zeros(300, G * group))
        fast.attention_profile(query, query[:, :G], span, torch.zeros(300, G * group), torch.arange(77), scale=0.1)
    print("REPORT" + json.dumps(report))
"""


def test_the_kernels_compile_for_hopper_without_spilling(repo, tmp_path):
    cases = [("bfloat16", 128, 8, 4, 3), ("bfloat16", 80, 4, 7, 5), ("bfloat16", 8, 1, 2, 1), ("float32", 64, 2, 2, 2)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(repo)}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), json.dumps(cases)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.split("REPORT")[1])
    assert {entry["kernel"] for entry in report} == {"members_kernel", "masses_kernel", "profile_kernel"}
    report = [entry for entry in report if entry["kernel"] != "members_kernel"]
    assert [entry["kernel"] for entry in report] == ["masses_kernel", "masses_kernel", "profile_kernel"] * 4
    for case, entry in zip([case for case in cases for _ in range(3)], report, strict=True):
        print(*case, entry)
        assert entry["stack"] == 0  # registers that did not fit would lie there
        assert entry["shared"] <= 227 * 1024  # of a Hopper multiprocessor
        assert entry["tensor_cores"] == (case[0] == "bfloat16")
        assert entry["asynchronous"] == (case[0] == "bfloat16" and case[1] % 16 == 0)


# ----------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; not run without one")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_cuda_against_dense_softmax_in_float64(dtype, compiled):
    errors = Errors(f"CUDA, {dtype}")
    for i, (group, D, n_sets) in enumerate(
        [(4, 128, 3), (7, 128, 4), (1, 64, 2), (8, 80, 9), (3, 256, 31), (2, 16, 1)]
    ):
        spans = (padded if i % 2 else packed)((700, 300), (0, 1), (1500, 411), (64, 64))
        query, key, sets = random_case(spans, group, D, dtype=dtype, seed=i, n_sets=min(n_sets, 30))
        compare(errors, query.cuda(), key.cuda(), spans, sets.cuda(), n_sets, D**-0.5)
    errors.check(1e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; not run without one")
def test_on_cuda_every_run_gives_the_same_bits_and_poison_outside_changes_none(compiled):
    spans = packed((700, 300), (1500, 411))
    query, key, sets = (x.cuda() for x in random_case(spans, 4, 128, dtype=torch.bfloat16))
    spans = [span._replace(n_queries=span.n_queries - 17) for span in spans]
    first = fast.attention_masses(query, key, spans, sets, 3, scale=0.1)
    second = fast.attention_masses(query, key, spans, sets, 3, scale=0.1)
    poisoned = key.clone()
    poisoned[:, :, 983:1000] = NAN
    third = fast.attention_masses(query, poisoned, spans, sets, 3, scale=0.1)
    for other in (second, third):
        assert torch.equal(other.mass, first.mass)
        assert torch.equal(other.lse, first.lse)
