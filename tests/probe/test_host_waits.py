"""How often the host waits for the device in a probed pass: never while the model runs, at most twice after it."""

import pytest
import torch
from support.probe_rows import ALL, SHAPES, Rows, same, statistic
from support.waits import DEVICE, Waits, counted, on_device

from sayo_verl.hooks.capture import wire_tensors
from sayo_verl.probe import neighbours
from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.reference import Span
from sayo_verl.probe.statistics import StatisticsRequest
from sayo_verl.probe.tiles import tiles_of
from sayo_verl.probe.transfer import to_device


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layers", [(0,), (0, 1, 2)], ids=["one layer", "three layers"])
def test_the_host_waits_once_for_all_statistics_of_a_micro_batch(layers, packed):
    rows = Rows(SHAPES, seed=1, layers=3)
    asked = [statistic(name, layers=layers if name != "image_cosine" else (-1,)) for name in ALL]
    request = StatisticsRequest(tuple(asked))
    plain = {s.key: torch.cat(list(by_row.values())) for s, by_row in rows.measure(asked, packed=packed).items()}
    tensors = [[on_device(x) for x in rows.tensors(layer, packed)] for layer in layers]
    hidden = on_device(rows.hidden_states(packed))
    numbers = {layer: layer % 3 for layer in request.layers}
    with counted() as waits:
        measurement = Measurement(request, rows.plans, numbers, packed=packed, device=DEVICE)
        for layer, (query, key) in zip(layers, tensors, strict=True):
            measurement.read(layer, query, key, rows.scale)
        measurement.read_hidden(hidden)
        assert not waits
        results = measurement.finish()
    assert len(waits) == 1
    assert sum(waits.values()) == 1
    for key, (values, _) in results.items():
        assert same(values.as_subclass(torch.Tensor), plain[key]), key


def test_the_results_go_to_the_device_in_one_copy():
    rows = Rows(SHAPES, seed=2)
    asked = [statistic("image_mass"), statistic("patch_sums")]
    measured = rows.measurement(asked)
    measured.read(0, *rows.tensors(0, True), rows.scale)
    results = measured.finish()
    with counted() as waits:
        out = wire_tensors(rows.plans, results, 1.2, DEVICE)
    assert not waits
    assert out["sayo_image_tokens"].values().tolist() == [plan.image_columns.numel() for plan in rows.plans]
    assert out["sayo_probe_seconds"].values().sum() == pytest.approx(1.2)


def test_the_table_of_tiles_is_copied_without_waiting():
    tiles_of.cache_clear()
    with counted() as waits:
        tiles, stretches, key_tiles = tiles_of(
            (Span(0, 5, 9, 5, 0, 0, 14), Span(0, 20, 40, 6, 0, 14, 46)), 8, 32, DEVICE
        )
    assert (tiles.shape, stretches.shape, key_tiles.shape) == ((2 + 5, 10), (2, 2), (1 + 2, 3))
    assert not waits


def test_small_tensors_of_any_type_arrive_as_they_were():
    sent = [torch.arange(5), torch.tensor([[1.5, -2.0]]), torch.zeros(0, dtype=torch.int64)]
    sent += [torch.ones(3, dtype=torch.int32), torch.tensor([True, False])]
    for device in (torch.device("cpu"), DEVICE):
        for found, wanted in zip(to_device(sent, device), sent, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_profiles_are_compared_once_for_index_and_similarity(monkeypatch):
    calls = []

    def spy(profile, m):
        calls.append(m)
        return neighbours.top_neighbours(profile, m)

    monkeypatch.setattr("sayo_verl.probe.profiles.top_neighbours", spy)
    rows = Rows([(9, 4, 5), (8, 7, 3)], layers=2)
    asked = [statistic(name, layers=(0, 1)) for name in ("neighbour_index", "neighbour_similarity")]
    rows.measure(asked)
    assert calls == [3, 3]  # a call for each row


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0])],
        lambda x: x + torch.ones(3),
        lambda x: torch.tensor([1.0], device=DEVICE),
        lambda x: torch.arange(3).to(DEVICE),
        lambda x: torch.arange(3).to(DEVICE, non_blocking=True),  # not pinned
    ],
)
def test_the_stand_in_counts_what_waits(wait):
    x = on_device(torch.arange(3.0))
    with Waits() as waits:
        wait(x)
    assert sum(waits.found.values()) >= 1


def test_the_stand_in_does_not_count_what_is_queued():
    x = on_device(torch.arange(6.0).view(2, 3))
    with Waits() as waits:
        y = x[:, 1:] * 2 + torch.ones(2, device=DEVICE)
        y[0] = 3.0
        y.sum(0).index_select(0, (x[0, :1] * 0).long())
        y[y.argmax(1)]
    assert not waits.found
