"""Our reading of AT-RL: connectivity, the graph of a response, weights of clusters, and the control.

Shape suffixes: B rows, T response tokens, m neighbours, V visual tokens, K parts.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.taken_rows import take

from sayo_verl.errors import SayoError
from sayo_verl.methods import AnchorMethod
from sayo_verl.methods.anchor import cluster_weights, connectivity, edges
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.metis import MAX_TOKENS, adjacency
from sayo_verl.probe.neighbours import top_neighbours
from sayo_verl.probe.statistics import Statistic

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")


def test_connectivity_is_the_share_of_what_the_sink_leaves():
    image, sink = torch.tensor([[0.2, 0.3, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.9, 1.0]])
    assert connectivity(image, sink)[0].tolist() == pytest.approx([0.4, 0.3, 0.0, 0.0])
    assert connectivity(torch.tensor([0.501]), torch.tensor([0.5])).item() == 1.0  # rounding of the probe


def test_the_graph_joins_likes_and_neighbours_in_the_text():
    index = torch.tensor([[2, -1], [-1, -1], [0, 3], [2, -1]])
    similarity = torch.tensor([[0.8, 0.0], [0.0, 0.0], [0.8, 0.5], [0.5, 0.0]])
    graph = adjacency(*edges(index, similarity))
    found = {}
    for i in range(4):
        for at in range(int(graph.offsets[i]), int(graph.offsets[i + 1])):
            found[i, int(graph.neighbours[at])] = int(graph.weights[at])
    assert found == {(0, 1): 1, (1, 0): 1, (0, 2): 800, (2, 0): 800, (1, 2): 1, (2, 1): 1, (2, 3): 500, (3, 2): 500}


def test_edges_are_whole_numbers_and_likeness_above_one_is_rounding():
    index, weight = edges(torch.tensor([[1], [0], [-1]]), torch.tensor([[1.0009], [-0.2], [0.7]]))
    assert index.dtype == weight.dtype == torch.int16
    assert index.tolist() == [[1, 1], [0, 2], [-1, -1]]
    assert weight.tolist() == [[1000, 1], [-200, 1], [700, 1]]
    assert adjacency(index, weight).weights.tolist() == [1000, 1000, 1, 1]


@pytest.mark.parametrize("value", [0.5, 40.0, 1e6])
def test_neighbours_that_are_no_tokens_stop_the_run(value):
    method, _, signals = planted()
    index = next(s for s in signals.statistics if s.name == "neighbour_index")
    wrong = signals.statistics[index].clone()
    wrong[0, 3, 1] = value
    with pytest.raises(SayoError, match=r"^SAYO-A03: a neighbour is no token"):
        method.credit(dataclasses.replace(signals, statistics={**signals.statistics, index: wrong}))


def oracle(density, labels, low, high):
    """Weights of one response, a token at a time, in Python floats."""
    on = [t for t, k in enumerate(labels) if k >= 0]
    if not on:
        return [1.0] * len(labels)
    mean = sum(density[t] for t in on) / len(on)
    weight = {}
    for k in {labels[t] for t in on}:
        members = [t for t in on if labels[t] == k]
        load = sum(density[t] for t in members) / len(members)
        weight[k] = min(max(load / max(mean, 1e-6), low), high)
    total = sum(weight[labels[t]] for t in on) / len(on)
    return [weight[k] / total if k >= 0 and total > 0 else 1.0 for k in labels]


@PROPERTY
@given(
    rows=st.integers(1, 12).flatmap(
        lambda T: st.lists(
            st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(-1, 4)), min_size=T, max_size=T),
            min_size=1,
            max_size=4,
        )
    ),
    low=st.sampled_from([0.0, 0.5, 1.0]),
    high=st.sampled_from([1.0, 2.0, 10.0]),
)
def test_weights_against_the_oracle(rows, low, high):
    density = torch.tensor([[d for d, _ in row] for row in rows], dtype=torch.float64)
    labels = torch.tensor([[k for _, k in row] for row in rows])
    given_ = torch.where(labels >= 0, density, torch.full_like(density, NAN))
    weight, load = cluster_weights(given_, labels, low, high)
    expected = [oracle([d for d, _ in row], [k for _, k in row], low, high) for row in rows]
    assert torch.allclose(weight, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert (weight >= 0).all()
    for row, on in zip(weight, labels >= 0, strict=True):
        if on.any():
            assert row[on].mean() == pytest.approx(1.0, abs=1e-9)
    assert torch.equal(load >= 0, torch.stack([(labels == k).any(-1) for k in range(load.shape[1])], -1))
    narrow, _ = cluster_weights(given_.float(), labels, low, high)
    assert torch.allclose(narrow.double(), weight, atol=1e-4)


def test_by_hand():
    density, labels = torch.tensor([[0.1, 0.1, 0.4, 0.4]]), torch.tensor([[0, 0, 1, 1]])
    weight, load = cluster_weights(density, labels, 0.5, 2.0)  # loads 0.1 and 0.4 over 0.25: 0.4 -> 0.5, 1.6
    assert load.tolist() == [pytest.approx([0.1, 0.4])]
    assert weight[0].tolist() == pytest.approx([0.5 / 1.05, 0.5 / 1.05, 1.6 / 1.05, 1.6 / 1.05])


def planted(n_image=10, n_text=30, V=16):
    """Signals of one response in which a third of the tokens look at one half of the image, much; the rest elsewhere,
    little."""
    g = torch.Generator().manual_seed(0)
    T = n_image + n_text
    looks = torch.zeros(T, dtype=torch.bool)
    looks[torch.randperm(T, generator=g)[:n_image]] = True
    profile = torch.rand(T, V, generator=g) * 0.05
    profile[:, : V // 2] += looks[:, None] * 1.0
    profile[:, V // 2 :] += (~looks)[:, None] * 1.0
    profile = profile / profile.sum(-1, keepdim=True) * torch.where(looks, 0.8, 0.05)[:, None]
    method = AnchorMethod(parts=4)
    index, similarity = top_neighbours(profile, method.neighbours)
    values = {
        "image_mass": profile.sum(-1),
        "sink_mass": torch.full((T,), 0.1),
        "neighbour_index": index.float(),
        "neighbour_similarity": similarity,
    }
    signals = random_signals(method.needs(), 0, 1, T)
    return (
        method,
        looks,
        dataclasses.replace(
            signals,
            response_mask=torch.ones(1, T, dtype=torch.long),
            image_tokens=torch.tensor([float(V)]),
            is_padding=torch.tensor([False]),
            statistics={s: values[s.name][None] for s in method.needs().statistics.statistics},
        ),
    )


def test_planted_anchors_get_the_larger_weight():
    method, looks, signals = planted()
    credit = method.credit(signals)
    weight = credit.token_weight[0]
    assert weight[looks].min() > 1.2
    assert weight[~looks].max() < weight[looks].min()
    assert weight.mean() == pytest.approx(1.0, abs=1e-6)
    assert credit.metrics["anchor_share"] == pytest.approx(0.25)  # one of four parts
    assert credit.metrics["anchor_share_of_density"] > 0.7
    assert credit.metrics["anchor_clusters/mean"] == 4
    assert credit.metrics["anchor_cluster_size/mean"] == 10
    assert credit.metrics["partition_failed_rows"] == 0
    assert credit.metrics["partition_seconds"] > 0
    assert credit.metrics["anchor_density/mean"] == pytest.approx((10 * 0.8 + 30 * 0.05) / 40 / 0.9, abs=1e-5)


def test_the_same_batch_gives_the_same_weights_twice():
    method, _, signals = planted()
    assert torch.equal(method.credit(signals).token_weight, method.credit(signals).token_weight)


def test_tokens_taken_out_of_the_mask_leave_the_graph():
    method, looks, signals = planted()
    mask = signals.response_mask.clone()
    mask[0, ::3] = 0
    credit = method.credit(dataclasses.replace(signals, response_mask=mask))
    kept = mask[0].bool()
    assert credit.token_weight[0][kept].mean() == pytest.approx(1.0, abs=1e-6)
    # METIS makes parts of equal size, so one part holds both kinds
    assert credit.token_weight[0][kept & looks].mean() > 2 * credit.token_weight[0][kept & ~looks].mean()
    assert (credit.token_weight[0][~kept] == 1).all()


def test_short_responses_are_not_cut():
    method = AnchorMethod()
    signals = random_signals(method.needs(), 3, 6, 3)  # three tokens at most, two parts: fewer than twice as many
    credit = method.credit(signals)
    assert (credit.token_weight == 1).all()
    assert credit.metrics["anchor_uncut_rows"] > 0


def test_responses_longer_than_metis_takes_are_left_uncut_and_counted():
    method, _, short = planted()
    T, n = MAX_TOKENS + 1, short.response_mask.shape[1]

    def two_rows(values):
        """The short response, padded, and one of T tokens that are all like its first."""
        padded = torch.full((1, T, *values.shape[2:]), NAN)
        padded[:, :n] = values
        return torch.cat([padded, values[:, :1].expand(1, T, *values.shape[2:])])

    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, n:] = 0
    both = dataclasses.replace(
        short,
        response_mask=mask,
        entropy=two_rows(short.entropy),
        log_probs=two_rows(short.log_probs),
        image_tokens=short.image_tokens.expand(2),
        region_tokens=short.region_tokens.expand(2),
        is_padding=torch.tensor([False, False]),
        uid=("a", "a"),
        statistics={s: two_rows(values) for s, values in short.statistics.items()},
    )
    credit = method.credit(both)
    assert (credit.token_weight[1] == 1).all()
    assert torch.equal(credit.token_weight[0, :n], method.credit(short).token_weight[0])
    assert credit.metrics["anchor_uncut_rows"] == 1
    assert credit.metrics["partition_failed_rows"] == 0


@pytest.mark.parametrize(("n", "parts"), [(4, 2), (24, 2), (72, 3), (400, 8)])
def test_the_number_of_parts_follows_the_length(n, parts, monkeypatch):
    asked = []

    def spy(responses, parts, **options):
        asked.extend(parts)
        assert options == {"seed": 0, "time_limit": 20.0, "processes": None}
        return [np.zeros(len(index), dtype=np.int64) for index, _ in responses]

    monkeypatch.setattr("sayo_verl.metis.partition_graphs", spy)
    method, _, signals = planted(n // 4, n - n // 4)
    dataclasses.replace(method, parts=0).credit(signals)
    assert asked == [parts]


@pytest.mark.parametrize(("failed", "stops"), [(1, False), (3, True)])
def test_failed_partitions_are_neutral_and_counted_until_there_are_too_many(failed, stops, monkeypatch):
    method, _, one = planted()
    B = 150
    many = dataclasses.replace(
        one,
        **{
            name: value.expand(B, *value.shape[1:])
            for name, value in vars(one).items()
            if isinstance(value, torch.Tensor)
        },
        statistics={s: value.expand(B, *value.shape[1:]) for s, value in one.statistics.items()},
        uid=("a",) * B,
    )
    labels = np.repeat(np.arange(4), 10)
    monkeypatch.setattr(
        "sayo_verl.metis.partition_graphs",
        lambda responses, parts, **options: [None] * failed + [labels] * (len(responses) - failed),
    )
    if stops:
        with pytest.raises(SayoError, match=r"^SAYO-A16: .*3 of 150"):
            method.credit(many)
        return
    credit = method.credit(many)
    assert (credit.token_weight[:failed] == 1).all()
    assert not (credit.token_weight[failed] == 1).all()
    assert credit.metrics["partition_failed_rows"] == failed


def test_tokens_of_equal_connectivity_have_weight_one():
    method, _, signals = planted()
    flat = {s: torch.full_like(v, 0.3) if s.name == "image_mass" else v for s, v in signals.statistics.items()}
    weight = method.credit(dataclasses.replace(signals, statistics=flat)).token_weight
    assert torch.allclose(weight, torch.ones_like(weight), atol=1e-6)


@pytest.mark.parametrize("weighting", ["clusters", "top", "rest"])
@pytest.mark.parametrize("strength", [0.0, 0.25])
def test_strength_draws_the_weights_towards_one(weighting, strength):
    method = AnchorMethod(weighting=weighting)
    signals = random_signals(method.needs(), 5, 8, 60)
    full = method.credit(signals)
    part = dataclasses.replace(method, strength=strength).credit(signals)
    assert (full.token_weight != 1).any()
    assert part.metrics.keys() == full.metrics.keys()
    if strength == 0:
        assert part.token_weight is None
    else:
        assert torch.allclose(part.token_weight, 1 + strength * (full.token_weight - 1), atol=1e-6)


@pytest.mark.parametrize("weighting", ["clusters", "top", "rest"])
def test_rows_may_come_in_any_order_and_neutral_ones_have_weight_one(weighting):
    method = AnchorMethod(weighting=weighting)
    signals = random_signals(method.needs(), 11, 12, 60)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = take(signals, order.tolist())
    weight = method.credit(signals).token_weight
    assert torch.equal(method.credit(shuffled).token_weight, weight[order])
    eligible = signals.eligible_rows(boxes=False)
    assert not eligible.all()
    assert (weight[~eligible] == 1).all()
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()


# --------------------------------------------------------------------------------------------------------- the control


def test_top_and_rest_share_the_response_between_them():
    top, rest = AnchorMethod(weighting="top"), AnchorMethod(weighting="rest")
    assert top.needs() == rest.needs()
    assert top.needs().packages == ()
    assert {s.name for s in top.needs().statistics.statistics} == {"image_mass", "sink_mass"}
    signals = random_signals(top.needs(), 8, 10, 40)
    a, b = top.credit(signals), rest.credit(signals)
    tokens = signals.response_mask.bool() & signals.eligible_rows(boxes=False)[:, None]
    assert ((a.token_weight + b.token_weight)[tokens] == 1).all()
    for row in tokens.any(-1).nonzero().flatten().tolist():
        n = int(tokens[row].sum())
        assert a.token_weight[row][tokens[row]].sum() == max(1, int(0.15 * n + 1e-9))
    density = connectivity(*(signals[Statistic(name, query_row="predicting")] for name in ("image_mass", "sink_mass")))
    anchors = tokens & (a.token_weight == 1)
    share = (density[anchors].sum() / density[tokens].sum()).item()
    assert a.metrics["anchor_share"] == pytest.approx((anchors.sum() / tokens.sum()).item())
    assert a.metrics["anchor_share_of_density"] == b.metrics["anchor_share_of_density"] == pytest.approx(share)
    assert (a.metrics["anchor_weight/min"], a.metrics["anchor_weight/max"]) == (0.0, 1.0)
    for row in tokens.any(-1).nonzero().flatten().tolist():
        kept = a.token_weight[row].bool() & tokens[row]
        left = b.token_weight[row].bool() & tokens[row]
        if left.any():
            assert density[row][kept].min() >= density[row][left].max()


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_at_the_ends_of_their_ranges_are_taken():
    AnchorMethod(strength=0.0, neighbours=1, parts=2, weight_min=0.0, weight_max=1.0, seed=0, time_limit=600.0)
    AnchorMethod(strength=1.0, parts=64, weight_min=1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strength", -0.1),
        ("strength", 1.1),
        ("layers", ()),
        ("layers", (1, 1)),
        ("neighbours", 0),
        ("parts", 1),
        ("parts", -2),
        ("weight_min", 1.5),
        ("weight_min", -0.1),
        ("weight_max", 0.5),
        ("weight_max", float("inf")),
        ("query_row", "output"),
        ("weighting", "soft"),
        ("anchor_share", 0.0),
        ("anchor_share", 1.0),
        ("seed", -1),
        ("time_limit", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(SayoError, match=r"^SAYO-A05: ") as caught:
        AnchorMethod(**{key: value})
    assert caught.value.where == f"algorithm.attn.anchor.{key}"


def test_it_asks_for_metis_only_where_it_cuts():
    needs = AnchorMethod(layers=(1, 2), neighbours=5).needs()
    assert [module for module, _ in needs.packages] == ["pymetis", "pebble"]
    assert all("sayo-verl[anchor]" in line for _, line in needs.packages)
    keys = {s.key for s in needs.statistics.statistics}
    assert keys == {
        "image_mass.predicting.L1,2",
        "sink_mass.predicting.L1,2",
        "neighbour_index.predicting.L1,2.5",
        "neighbour_similarity.predicting.L1,2.5",
    }
