"""What a measurement refuses, and measurements over several ranks."""

import threading

import pytest
import torch
from support.measured import BY_ROW, CONVENTIONS, compare, variants
from support.probe_rows import (
    ALL,
    CPU,
    NAN,
    SHAPES,
    Rows,
    largest_difference,
    same,
    statistic,
)
from support.refusals import refusal

from sayo_verl.probe import fast, profiles, reference
from sayo_verl.probe.measure import Measurement, kernels
from sayo_verl.probe.shard import Shard
from sayo_verl.probe.statistics import CATALOGUE, Statistic, StatisticsRequest

# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ALL)
def test_a_statistic_that_nothing_was_read_for_is_refused(name):
    rows = Rows([(9, 4, 5), (6, 2, 3)], layers=2)
    s = statistic(name)
    with refusal("P22") as caught:
        rows.measurement([s]).finish()
    assert s.key in caught.value.where


@pytest.mark.parametrize("name", BY_ROW)
def test_a_layer_that_was_never_read_is_refused(name):
    rows = Rows([(9, 4, 5), (6, 2, 3)], layers=2)
    s = statistic(name, layers=(0, 1))
    measurement = rows.measurement([s])
    measurement.read(0, *rows.tensors(0, True), rows.scale)
    with refusal("P22") as caught:
        measurement.finish()
    assert s.key in caught.value.where


@pytest.mark.parametrize("name", ALL)
def test_a_layer_that_was_read_twice_is_refused(name):
    rows = Rows([(9, 4, 5), (6, 2, 3)])
    measurement = rows.measurement([statistic(name)])
    for _ in range(2):
        if CATALOGUE[name].source == "hidden":
            measurement.read_hidden(rows.hidden_states(True))
        else:
            measurement.read(0, *rows.tensors(0, True), rows.scale)
    with refusal("P22"):
        measurement.finish()


@pytest.mark.parametrize("name", BY_ROW)
def test_one_layer_under_two_names_is_refused_and_not_halved(name):
    """(-1, 1) is one layer of a model with two, and (-1, 35) of one with 36."""
    rows = Rows([(9, 4, 5)], layers=2)
    with refusal("P03") as caught:
        rows.measure([statistic(name, layers=(-1, 1))])
    assert caught.value.got == [-1, 1]


def test_reading_what_was_not_asked_changes_nothing():
    rows = Rows([(9, 4, 5)], layers=2)
    s = Statistic("image_mass", layers=(0,))
    measurement = rows.measurement([s])
    for layer in (0, 1):
        measurement.read(layer, *rows.tensors(layer, True), rows.scale)
    measurement.read_hidden(rows.hidden_states(True))
    assert compare(rows, rows.by_row(measurement, [s])) <= 1e-6


def test_the_results_may_be_taken_twice(monkeypatch):
    rows = Rows([(9, 4, 5), (6, 2, 3)])
    asked = variants(SHARDABLE)
    measurement = rows.measurement(asked)
    measurement.read(0, *rows.tensors(0, True), rows.scale)
    measurement.read_hidden(rows.hidden_states(True))
    first, second = (rows.by_row(measurement, asked) for _ in range(2))
    assert all(same(first[s][n], second[s][n]) for s in asked for n in range(2))
    once, twice = (sharded(rows, asked, 2, monkeypatch, finishes=n)[1] for n in (1, 2))
    assert all(same(once[s][n], twice[s][n]) for s in asked for n in range(2))


def test_a_request_for_nothing_gives_nothing():
    rows = Rows(SHAPES)
    measurement = rows.measurement([])
    assert measurement.finish() == {}
    measurement.read(0, *rows.tensors(0, True), rows.scale)
    assert measurement.finish() == {}


def test_profiles_of_many_layers_that_do_not_fit_are_refused(monkeypatch):
    rows = Rows([(9, 4, 5), (12, 7, 6)], layers=3)
    needed = 4 * (5 * 4 + 6 * 7)  # bytes that both rows hold between two layers
    s = Statistic("top_patch_mass", size=2, layers=(0, 1, 2))
    monkeypatch.setattr(profiles, "MAX_PROFILE_BYTES", needed)
    assert compare(rows, rows.measure([s])) <= 1e-6
    monkeypatch.setattr(profiles, "MAX_PROFILE_BYTES", needed - 1)
    with refusal("P23", "take too much memory") as caught:
        rows.measure([s])
    assert "MiB" in str(caught.value)
    one_layer, linear = Statistic("top_patch_mass", size=2), Statistic("patch_sums", layers=(0, 1, 2))
    assert compare(rows, rows.measure([one_layer, linear])) <= 2e-6


@pytest.mark.parametrize(
    ("packed", "cut"),
    [
        (True, lambda x: x[:, :, :-3]),  # two of the three are padding
        (True, lambda x: torch.cat([x, x])),
        (False, lambda x: x[:-1]),
        (False, lambda x: torch.cat([x, x[:1]])),
        (False, lambda x: x[:, :, : 14 - 1]),
    ],
    ids=["a token too few", "two packed rows", "a row too few", "a row too many", "shorter than the longest row"],
)
def test_a_batch_that_is_not_the_plans_is_refused(packed, cut):
    rows = Rows([(9, 4, 5), (6, 2, 3)])
    query, key = rows.tensors(0, packed)
    measurement = rows.measurement([Statistic("image_mass")], packed=packed)
    with refusal("P01"):
        measurement.read(0, cut(query), cut(key), rows.scale)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_second_layer_of_another_shape_is_refused(packed):
    rows = Rows([(9, 4, 5), (6, 2, 3)], layers=2)
    measurement = rows.measurement([Statistic("image_mass", layers=(0, 1))], packed=packed)
    query, key = rows.tensors(0, packed)
    measurement.read(0, query, key, rows.scale)
    with refusal("P01"):
        measurement.read(1, query[:, :, :-2], key[:, :, :-2], rows.scale)


@pytest.mark.parametrize(
    ("packed", "cut"),
    [
        (True, lambda x: x[:, :-3]),
        (True, lambda x: torch.cat([x, x])),
        (False, lambda x: x[:-1]),
        (False, lambda x: torch.cat([x, x[:1]])),
        (False, lambda x: x[:, : 14 - 1]),
    ],
    ids=["a token too few", "two packed rows", "a row too few", "a row too many", "shorter than the longest row"],
)
def test_hidden_states_of_another_batch_are_refused(packed, cut):
    rows = Rows([(9, 4, 5), (6, 2, 3)])
    measurement = rows.measurement([Statistic("image_cosine")], packed=packed)
    with refusal("P01", "does not match the plan"):
        measurement.read_hidden(cut(rows.hidden_states(packed)))


@pytest.mark.parametrize("name", ["neighbour_index", "neighbour_similarity"])
def test_neighbours_of_a_sequence_on_several_ranks_are_refused(name):
    rows = Rows(SHAPES)
    with refusal("P09", "neighbours") as caught:
        rows.measurement([Statistic("image_mass"), statistic(name)], shard=Shard(0, 2, None))
    assert "2" in caught.value.got


@pytest.mark.parametrize(
    ("path", "device", "module"),
    [
        ("auto", "cpu", reference),
        ("auto", "cuda", fast),
        ("reference", "cpu", reference),
        ("reference", "cuda", reference),
        ("fast", "cpu", fast),
        ("fast", "cuda", fast),
    ],
)
def test_the_path_names_the_kernels(path, device, module):
    assert kernels(path, torch.device(device)) is module


def test_the_request_chooses_the_path(monkeypatch):
    rows, called = Rows([(9, 4, 5)]), []

    def spying(*args, **kwargs):
        called.append("fast")
        return reference.attention_masses(*args, **kwargs)

    monkeypatch.setattr(fast, "attention_masses", spying)
    for path in ("auto", "reference", "fast"):
        request = StatisticsRequest((Statistic("image_mass"),), path=path)
        measurement = Measurement(request, rows.plans, {-1: 0}, packed=True, device=CPU)
        measurement.read(0, *rows.tensors(0, True), rows.scale)
        assert called == (["fast"] if path == "fast" else [])


# -------------------------------------------------------------------------------------------------------- several ranks


class Ring:
    """A process group whose ranks are threads: collectives wait for each other and fail when they do not match."""

    def __init__(self, size: int, lost: int | None = None) -> None:
        """``lost``: a rank whose sums arrive as zeros."""
        self.size, self._lost, self._here = size, lost, threading.local()
        self._barrier, self._slots = threading.Barrier(size, timeout=20), [None] * size
        self.gathered = 0

    def run(self, work):
        """Call ``work(rank)`` on every rank at once; the results in order of ranks."""
        results, errors = [None] * self.size, []

        def rank(r: int) -> None:
            self._here.rank = r
            try:
                results[r] = work(r)
            except Exception as error:  # noqa: BLE001 - handed to the test below
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors, "the ranks did not call the same collectives"
        return results

    def _exchange(self, kind: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self._here.rank] = (kind, tensor.clone())
        self._barrier.wait()
        given = list(self._slots)
        self._barrier.wait()
        assert {(k, t.shape, t.dtype) for k, t in given} == {(kind, tensor.shape, tensor.dtype)}
        return [t for _, t in given]

    def all_gather(self, outputs: list[torch.Tensor], tensor: torch.Tensor, group: "Ring") -> None:
        assert group is self
        assert tensor.is_contiguous()
        assert len(outputs) == self.size
        for output, given in zip(outputs, self._exchange("gather", tensor), strict=True):
            assert output.is_contiguous()
            output.copy_(given)
        self.gathered += tensor.numel()

    def all_reduce(self, tensor: torch.Tensor, group: "Ring") -> None:
        assert group is self
        parts = self._exchange("reduce", tensor)
        tensor.copy_(torch.stack([part * (r != self._lost) for r, part in enumerate(parts)]).sum(0))


def pad_to(x: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """verl fills a pack up to a multiple of the ranks; here with NaN, which must reach nothing."""
    shape = list(x.shape)
    shape[dim] = -shape[dim] % multiple
    return torch.cat([x, torch.full(shape, NAN)], dim)


def sharded(
    rows: Rows, asked: list[Statistic], size: int, monkeypatch, lost: int | None = None, finishes: int = 1
) -> list[dict[Statistic, dict[int, torch.Tensor]]]:
    """What each of the ranks ends up with."""
    ring = Ring(size, lost)
    monkeypatch.setattr(torch.distributed, "all_gather", ring.all_gather)
    monkeypatch.setattr(torch.distributed, "all_reduce", ring.all_reduce)
    numbers = sorted({layer % rows.layers for s in asked if s.spec.source != "hidden" for layer in s.layers})
    layers = {n: [pad_to(x, 2, size) for x in rows.tensors(n, True)] for n in numbers}
    hidden = pad_to(rows.hidden_states(True), 1, size)

    def rank(r: int):
        measurement = rows.measurement(asked, shard=Shard(r, size, ring))
        for number, (query, key) in layers.items():
            measurement.read(number, query.chunk(size, 2)[r], key.chunk(size, 2)[r], rows.scale)
        if any(s.spec.source == "hidden" for s in asked):
            measurement.read_hidden(hidden.chunk(size, 1)[r])
        for _ in range(finishes - 1):
            measurement.finish()
        return rows.by_row(measurement, asked)

    results = ring.run(rank)
    assert not layers or ring.gathered > 0, "the emulated collectives were not called"
    return results


SHARDABLE = [name for name in ALL if not name.startswith("neighbour_")]


# responses that straddle slices, many rows in one slice, one row in many, a slice without any response row
STRADDLING = {
    "usual": SHAPES,
    "one long row": [(5, 3, 40)],
    "long prompt": [(40, 30, 4)],
    "a slice in between without response": [(4, 2, 6), (60, 40, 3), (4, 1, 5)],
    "no response at the end": [(9, 4, 6), (30, 12, 0)],
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shapes", STRADDLING.values(), ids=STRADDLING)
@pytest.mark.parametrize("query_row", [*CONVENTIONS, "both"])
def test_ranks_together_measure_what_one_measures(shapes, size, query_row, monkeypatch):
    rows = Rows(shapes, seed=12, layers=2)
    conventions = CONVENTIONS if query_row == "both" else [query_row]
    asked = [s for row in conventions for s in variants(SHARDABLE, query_row=row)]
    asked += [
        s for row in conventions for s in variants([n for n in SHARDABLE if n in BY_ROW], query_row=row, layers=(0, 1))
    ]
    whole = rows.measure(asked)
    errors = []
    for results in sharded(rows, asked, size, monkeypatch):
        for s in asked:
            for n in range(len(rows.plans)):
                difference = largest_difference(results[s][n], whole[s][n])
                assert difference == 0 or not s.name.endswith("_index"), f"{s.key} of row {n}"
                errors.append(difference)
    print(f"{size} ranks from one: largest {max(errors):.1e}, mean {sum(errors) / len(errors):.1e}")
    assert max(errors) <= 2e-6


def test_the_emulated_ranks_do_have_a_slice_without_response_rows():
    """The cases above must be what they are called."""
    for name, size in (("a slice in between without response", 3), ("long prompt", 2), ("no response at the end", 3)):
        rows = Rows(STRADDLING[name])
        total = sum(plan.length for plan in rows.plans) + 2
        per_rank = -(-total // size)
        told = torch.cat([plan.keys["response"] for plan in rows.plans])
        assert any(not part.any() for part in told.split(per_rank)), name


def test_every_rank_gathers_keys_even_when_it_has_no_row(monkeypatch):
    rows = Rows([(40, 30, 4)])
    s = Statistic("image_mass")
    by_rank = sharded(rows, [s], 2, monkeypatch)
    assert same(by_rank[0][s][0], by_rank[1][s][0])
    assert compare(rows, by_rank[0]) <= 1e-6


def test_a_rank_whose_part_is_missing_is_noticed(monkeypatch):
    """Without the first rank's rows the sum is not whole: refused, not too small."""
    rows = Rows([(5, 3, 40)])
    for s in (Statistic("image_mass"), Statistic("top_patch_mass", size=2), Statistic("image_cosine")):
        assert compare(rows, sharded(rows, [s], 2, monkeypatch)[0]) <= 1e-6
        with refusal("P22"):
            sharded(rows, [s], 2, monkeypatch, lost=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_profiles_that_are_not_finite_are_refused_before_anybody_uses_their_neighbours(value):
    rows = Rows(SHAPES, seed=3)
    rows.query[0][0][:, -2] = value
    with refusal("P25", "not finite"):
        rows.measure([statistic("neighbour_index")])
    rows.measure([statistic("top_patch_mass")])  # its values are seen as they are
