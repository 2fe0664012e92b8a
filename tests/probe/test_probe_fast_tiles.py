"""Tiles and layers of the Triton kernels, what they refuse, the real compiler, and CUDA."""

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
from support.fast_cases import NAN, Errors, compare, packed, padded, random_case, with_marks
from support.refusals import refusal

from sayo_verl.probe import fast, reference
from sayo_verl.probe.reference import Span, stretches
from sayo_verl.probe.tiles import tiles_of, whole_tiles

# a key after its row is no part of the log-sum-exp: its term may overflow before it is left out
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered in exp2"), pytest.mark.usefixtures("interpreter")]


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


@pytest.mark.parametrize("seed", range(2))
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


def test_the_kernels_compile_for_hopper_without_spilling(repo, tmp_path, pytestconfig):
    cases = [("bfloat16", 128, 8, 4, 3), ("bfloat16", 80, 4, 7, 5), ("bfloat16", 8, 1, 2, 1), ("float32", 64, 2, 2, 2)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = getattr(pytestconfig, "cache", None)  # -p no:cacheprovider leaves none
    environment |= {"TRITON_CACHE_DIR": str(cache.mkdir("triton") if cache else tmp_path), "PYTHONPATH": str(repo)}
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
