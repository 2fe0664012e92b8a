"""Every mode of verl's engine, on every family: log-probs against transformers, statistics against float64 attention.

The modes are a covering set and not the full product: for each family, every combination of values of any two settings
that verl can run occurs in at least one of them (``test_the_modes_cover_every_pair`` counts). Two ranks run with and
without Ulysses.
"""

import dataclasses
import itertools
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.eager_oracle import RowTruth, difference, eager_truth, reference_log_probs, signed_difference
from support.engine_rows import (
    free_port,
    fsdp1_on_cpu,
    log_prob_pass,
    make_rows,
    mixed_rows,
    model_config,
    single_process_group,
    worker,
)
from support.family_models import FULL_QWEN3_5, TINY, TinyFamily, patches_undone, trained_lora
from support.flash_stand_in import flash_attention_on_cpu, linear_attention_of_packed_rows
from support.sequence_parallel import Case, Outcome, run_on_two_ranks

from sayo_verl.probe import measure, reference
from sayo_verl.probe.statistics import WIRE_PREFIX, Statistic, StatisticsRequest

LOG_PROB_TOLERANCE = 1e-4  # float32 against float32, another order of sums
TOLERANCE = 1e-5  # float32 model and probe against float64


@dataclass(frozen=True)
class Mode:
    """One setting of everything that could change what the probe sees."""

    packed: bool
    dynamic: bool
    strategy: str
    fused: bool
    checkpointing: bool
    attention: str
    lora: bool
    bucket: bool

    def __str__(self) -> str:
        words = [
            "packed" if self.packed else "padded",
            "dynamic" if self.dynamic else "static",
            self.strategy,
            self.attention,
            *(name for name in ("fused", "checkpointing", "lora", "bucket") if getattr(self, name)),
        ]
        return "-".join(words)


CHOICES: dict[str, tuple] = {
    "packed": (True, False),
    "dynamic": (True, False),
    "strategy": ("fsdp2", "fsdp"),
    "fused": (False, True),
    "checkpointing": (True, False),
    "attention": ("sdpa", "flash_attention_2", "eager"),
    "lora": (False, True),
    "bucket": (False, True),  # verl's pad_to_length: the packed rows are rounded up to a multiple
}


def runs_in_verl(family: TinyFamily, mode: Mode) -> bool:
    """verl 0.9.1 cannot run the others; tests/models/test_families.py pins how they fail. Padded rows: no buckets."""
    if family.packed_needs_flash and mode.packed and mode.attention != "flash_attention_2":
        return False
    if mode.bucket and not mode.packed:
        return False
    return not mode.fused or mode.strategy in family.fused


def pairs(mode: Mode) -> set[tuple]:
    settings = [(field.name, getattr(mode, field.name)) for field in fields(mode)]
    return set(itertools.combinations(settings, 2))


def covering(family: TinyFamily) -> list[Mode]:
    """A small set of modes that holds every pair of settings; greedy, so always the same."""
    modes = [
        mode
        for mode in map(Mode, *zip(*itertools.product(*CHOICES.values()), strict=True))
        if runs_in_verl(family, mode)
    ]
    missing, chosen = set().union(*map(pairs, modes)), []
    while missing:
        best = max(modes, key=lambda mode: len(pairs(mode) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


# What is asked in every mode: every source, both conventions, one layer and several, heads apart and together.
ASKED = (
    Statistic("image_mass"),
    Statistic("region_mass"),
    Statistic("image_mass", layers=(0, -1), query_row="predicting"),
    Statistic("region_mass", layers=(1,), per_head=True),
    Statistic("box_mass", size=3),
    Statistic("sink_mass"),
    Statistic("system_mass"),
    Statistic("question_mass", query_row="predicting"),
    Statistic("response_mass"),
    Statistic("lse", layers=(0, 1), per_head=True),
    Statistic("top_patch_index", size=3),
    Statistic("top_patch_mass", size=3, layers=(0, -1)),
    Statistic("patch_sums"),
    Statistic("image_cosine"),
    Statistic("image_cosine", query_row="predicting"),
)
NEIGHBOURS = (Statistic("neighbour_index", size=2), Statistic("neighbour_similarity", size=2, layers=(0, 1)))


@dataclass(frozen=True)
class World:
    """A family's model with and without an adapter, rows, and what both must give."""

    family: TinyFamily
    model: Path
    adapter: Path
    rows: list[dict[str, Any]]
    log_probs: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]]  # by lora
    truth: dict[bool, list[RowTruth]]


def build_world(name: str, folder: Path) -> World:
    family, model = {**TINY, "qwen3_5_full": FULL_QWEN3_5}[name], folder / name
    family.build(model)
    adapter, merged = trained_lora(model, folder / f"{name}-lora")
    with patches_undone():
        rows = make_rows(model_config(model, packed=False).processor, shapes=mixed_rows(family.cell))
    models = {False: model, True: merged}
    return World(
        family,
        model,
        adapter,
        rows,
        {lora: reference_log_probs(path, rows) for lora, path in models.items()},
        {lora: eager_truth(path, rows) for lora, path in models.items()},
    )


def log_prob_error(values: Any, expected: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest difference of log-probs and entropy over whole rows; the last position predicts nothing of the row."""
    worst = 0.0
    for which, name in enumerate(("log_probs", "entropy")):
        for got, want in zip(values[name], expected, strict=True):
            assert torch.isfinite(got[:-1]).all()
            worst = max(worst, (got[:-1] - want[which]).abs().max().item())
    return worst


def statistics_error(
    values: Any, request: StatisticsRequest, rows: list[dict[str, Any]], truth: list[RowTruth]
) -> tuple[float, float]:
    """(largest, mean) difference over all asked statistics and rows."""
    errors = []
    for statistic in request.statistics:
        per_row = values[WIRE_PREFIX + statistic.key]
        assert len(per_row) == len(rows)
        for got, row, want in zip(per_row, rows, truth, strict=True):
            errors.append(difference(statistic, got, row, want))
    together = torch.cat(errors)
    return together.max().item(), together.mean().item()


def signed_mean(values: Any, request: StatisticsRequest, truth: list[RowTruth]) -> float:
    """Mean signed difference over all attention masses that are asked for."""
    masses = [statistic for statistic in request.statistics if statistic.name.endswith("_mass")]
    found = [
        signed_difference(statistic, got, want)
        for statistic in masses
        for got, want in zip(values[WIRE_PREFIX + statistic.key], truth, strict=True)
    ]
    return torch.cat(found).mean().item()


def unbound(output: Any) -> dict[str, list[torch.Tensor]]:
    return {key: list(output[key].unbind()) for key in output.keys() if isinstance(output[key], torch.Tensor)}


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    single_process_group()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: build_world(name, folder) for name in (*TINY, "qwen3_5_full")}


def test_an_adapter_changes_what_is_measured(worlds):
    """Otherwise the modes with an adapter would prove nothing about it."""
    for world in worlds.values():
        without, with_adapter = (world.truth[lora][0] for lora in (False, True))
        assert (without.attention - with_adapter.attention)[-1].abs().max() > 0.01
        assert (world.log_probs[False][0][0] - world.log_probs[True][0][0]).abs().max() > 0.1


@pytest.mark.parametrize("name", TINY)
def test_the_modes_cover_every_pair(name):
    modes = covering(TINY[name])
    every = list(itertools.product(*CHOICES.values()))
    runnable = [mode for mode in (Mode(*values) for values in every) if runs_in_verl(TINY[name], mode)]
    wanted = set().union(*map(pairs, runnable))
    print(
        f"{name}: {len(modes)} modes for {len(wanted)} pairs of settings; {len(every) - len(runnable)} of "
        f"{len(every)} combinations mean nothing or do not run in verl"
    )
    assert set().union(*map(pairs, modes)) == wanted


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in TINY for mode in covering(TINY[name])], ids=str)
def test_a_mode(worlds, name, mode, record_property):
    world = worlds[name]
    with ExitStack() as stack:
        stack.enter_context(patches_undone())
        calls = stack.enter_context(flash_attention_on_cpu()) if "flash" in mode.attention else None
        if world.family.linear and mode.packed:  # padded rows use transformers' own function
            stack.enter_context(linear_attention_of_packed_rows())
        if mode.strategy == "fsdp":
            stack.enter_context(fsdp1_on_cpu())
        config = model_config(
            world.model,
            packed=mode.packed,
            attention=mode.attention,
            fused=mode.fused,
            checkpointing=mode.checkpointing,
            lora_rank=4 if mode.lora else 0,
            adapter=world.adapter if mode.lora else None,
        )
        built = worker(config, dynamic=mode.dynamic, strategy=mode.strategy, bucket=64 if mode.bucket else 0)
        request = StatisticsRequest((*ASKED, *NEIGHBOURS))
        plain = unbound(log_prob_pass(built, world.rows, None))
        probed = unbound(log_prob_pass(built, world.rows, request.to_wire()))
        with_lse = None
        if calls is not None and mode.packed:
            assert calls.lse == 0
            stack.enter_context(mock.patch.object(measure, "kernels", return_value=reference))
            given = dataclasses.replace(request, path="fast_lse")
            with_lse = unbound(log_prob_pass(built, world.rows, given.to_wire()))
            assert calls.lse > 0
            before, one_each = len(calls.dense), {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
            alone = unbound(log_prob_pass(built, world.rows[:2], given.to_wire(), **one_each))
            assert len(calls.dense) > before or mode.bucket, (
                "a row by itself does not go to flash-attn's other function"
            )

    if with_lse is not None:  # the kernel's own log-sum-exp, in the same pass
        assert all(torch.equal(a, b) for a, b in zip(plain["log_probs"], with_lse["log_probs"], strict=True))
        assert statistics_error(with_lse, request, world.rows, world.truth[mode.lora])[0] < TOLERANCE
        assert statistics_error(alone, request, world.rows[:2], world.truth[mode.lora][:2])[0] < TOLERANCE
    assert calls is None or calls.varlen, "the flash path was not taken"
    assert not [key for key in plain if key.startswith(WIRE_PREFIX)]
    for key in ("log_probs", "entropy"):
        for a, b in zip(plain[key], probed[key], strict=True):
            assert torch.equal(a, b), f"the probe changed {key}"
    log_probs = log_prob_error(plain, world.log_probs[mode.lora])
    largest, mean = statistics_error(probed, request, world.rows, world.truth[mode.lora])
    print(f"{name} {mode}: log-probs {log_probs:.1e}; statistics largest {largest:.1e}, mean {mean:.1e}")
    signed = signed_mean(probed, request, world.truth[mode.lora])
    record_property("numerics", [name, largest, signed])  # benchmarks/trust.py
    assert log_probs < LOG_PROB_TOLERANCE
    assert largest < TOLERANCE
    assert abs(signed) < TOLERANCE / 10


# ---- two ranks


@dataclass(frozen=True)
class TwoRanks:
    """A case of two ranks: ``plain`` passes ask for nothing, ``full`` ones for all that its mode can give."""

    family: str
    how: str
    passes: tuple[str, ...] = ("full",)
    lora: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family}-{self.how}"

    @property
    def request(self) -> StatisticsRequest:
        """Without what needs every row of a sequence on one rank."""
        ulysses = dict(self.settings).get("ulysses", True)
        return StatisticsRequest(ASKED if ulysses else (*ASKED, *NEIGHBOURS))


EVERY_PASS = ("plain", "full", "neighbours")
# a micro-batch for each row: some have no image, and the first rank often holds no token of the response
SINGLE_ROWS = (("dynamic", False), ("micro_batch", 1))
TWO_RANKS = (
    TwoRanks("qwen3_vl", "ulysses", EVERY_PASS),
    TwoRanks(
        "qwen3_vl",
        "ulysses-fsdp-fused-lora-single-rows",
        lora=True,
        settings=(("strategy", "fsdp"), ("fused", True), *SINGLE_ROWS),
    ),
    TwoRanks("qwen3_vl", "data-fsdp2", settings=(("ulysses", False),)),
    TwoRanks("qwen3_vl_moe", "ulysses-fused", EVERY_PASS, settings=(("fused", True),)),
    TwoRanks("qwen3_vl_moe", "data-fsdp-lora", lora=True, settings=(("ulysses", False), ("strategy", "fsdp"))),
    TwoRanks("qwen2_5_vl", "ulysses-single-rows", EVERY_PASS, settings=SINGLE_ROWS),
    TwoRanks("qwen2_5_vl", "ulysses-lora-bucket", lora=True, settings=(("bucket", 64),)),
    TwoRanks("qwen2_5_vl", "data-fsdp-fused", settings=(("ulysses", False), ("strategy", "fsdp"), ("fused", True))),
    TwoRanks("qwen3_5_full", "ulysses", EVERY_PASS),
    TwoRanks("qwen3_5_moe", "data-fsdp2", settings=(("ulysses", False),)),
    TwoRanks("internvl", "data-fsdp2", settings=(("ulysses", False),)),
)


@pytest.fixture(scope="module")
def two_ranks(worlds, tmp_path_factory) -> dict[str, Outcome]:
    """Every case in one pair of processes, by ``name/pass``."""
    cases = []
    for case in TWO_RANKS:
        world = worlds[case.family]
        requests = {
            "plain": None,
            "full": case.request.to_wire(),
            "neighbours": StatisticsRequest(NEIGHBOURS).to_wire(),
        }
        passes = {name: requests[name] for name in case.passes}
        adapter = world.adapter if case.lora else None
        cases.append(Case(case.name, world.model, world.rows, passes, adapter=adapter, **dict(case.settings)))
    world = worlds["qwen3_vl"]
    internvl = worlds["internvl"]
    requests = {"plain": None, "full": StatisticsRequest(ASKED).to_wire()}
    cases.append(Case("internvl-ulysses", internvl.model, internvl.rows, requests))
    cases.append(Case("qwen3_vl-sdpa", world.model, world.rows, {"plain": None}, attention="sdpa"))
    return run_on_two_ranks(cases, tmp_path_factory.mktemp("ranks"), free_port())


@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: case.name)
def test_two_ranks(worlds, two_ranks, case):
    world, outcome = worlds[case.family], two_ranks[f"{case.name}/full"]
    assert not outcome.error
    assert outcome.flash_calls > 0
    log_probs = log_prob_error(outcome.values, world.log_probs[case.lora])
    largest, mean = statistics_error(outcome.values, case.request, world.rows, world.truth[case.lora])
    print(f"two ranks, {case.name}: log-probs {log_probs:.1e}; statistics largest {largest:.1e}, mean {mean:.1e}")
    assert log_probs < LOG_PROB_TOLERANCE
    assert largest < TOLERANCE


@pytest.mark.parametrize("case", [case for case in TWO_RANKS if "plain" in case.passes], ids=lambda case: case.name)
def test_the_probe_changes_nothing_under_sequence_parallelism(two_ranks, case):
    plain, probed = two_ranks[f"{case.name}/plain"], two_ranks[f"{case.name}/full"]
    assert not [key for key in plain.values if key.startswith(WIRE_PREFIX)]
    for key in ("log_probs", "entropy"):
        for a, b in zip(plain.values[key], probed.values[key], strict=True):
            assert torch.equal(a, b), f"the probe changed {key}"


@pytest.mark.parametrize("case", [case for case in TWO_RANKS if "plain" in case.passes], ids=lambda case: case.name)
def test_neighbours_are_refused_under_sequence_parallelism(two_ranks, case):
    """On both ranks: one that went on alone would wait for the other for ever."""
    errors = two_ranks[f"{case.name}/neighbours"].error
    assert len(errors) == 2
    assert all(error.startswith("ProbeError: SAYO-P09") for error in errors)


def test_sequence_parallelism_of_internvl_is_refused(two_ranks):
    """verl would give every rank the whole sequence and take each for a part of it."""
    for name, raised in (("plain", "SetupError: SAYO-C08"), ("full", "ProbeError: SAYO-P09")):
        errors = two_ranks[f"internvl-ulysses/{name}"].error
        assert len(errors) == 2
        assert all(error.startswith(raised) for error in errors)


def test_sequence_parallelism_without_flash_attention_is_wrong_in_verl(worlds, two_ranks):
    """verl exchanges heads for tokens in its flash path only: with sdpa each rank attends to its own slice, and no
    error says so. A launch check must refuse it; this pins that it is still needed."""
    wrong = log_prob_error(two_ranks["qwen3_vl-sdpa/plain"].values, worlds["qwen3_vl"].log_probs[False])
    print(f"Qwen3-VL on two ranks with sdpa: log-probs off by {wrong:.1f} nats")
    assert wrong > 0.1
