"""Where rows, their sets of keys and their visual tokens lie in the tensors of a micro-batch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.probe_rows import CPU, largest_difference

from sayo_verl.probe import reference
from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.place import place
from sayo_verl.probe.plan import RowPlan, plan_row
from sayo_verl.probe.statistics import FAST_LSE, Statistic, StatisticsRequest
from sayo_verl.vision.grids import Tile

IMAGE = 7
BOXES = [[0.0, 0.0, 0.6, 0.6]]


def row(images: list[int], gap: int, response: int) -> RowPlan:
    """A prompt with images of 1 x n cells, each after ``gap`` tokens of text."""
    ids = [1]
    for n in images:
        ids += [1] * gap + [IMAGE] * n
    ids += [1] * gap + [2] * response
    return plan_row(
        torch.tensor(ids),
        response,
        image_token_id=IMAGE,
        images=[(Tile(1, n),) for n in images],
        boxes=[BOXES for _ in images],
        coverage=0.5,
        where="row",
    )


ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 90), max_size=3), st.sampled_from([1, 40, 63, 64, 65, 200]), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.booleans(), st.lists(st.sampled_from(["image", "region", "sink", "response"]), min_size=1, unique=True))
def test_sets_stretches_and_columns_are_those_of_the_plans(shapes, packed, sets):
    plans = [row(*shape) for shape in shapes]
    lengths = [plan.length for plan in plans]
    B, S = (1, sum(lengths)) if packed else (len(plans), max(lengths))
    placed = place(plans, sets, B, S, packed=packed, shard=None, device=CPU, what="keys")
    assert placed.span_rows == [n for n, plan in enumerate(plans) if plan.response_length]
    done = 0
    for n, span in zip(placed.span_rows, placed.spans, strict=True):
        plan = plans[n]
        own = placed.key_sets[span.key_batch, span.key_start : span.key_start + span.n_keys]
        for bit, name in enumerate(sets):
            assert torch.equal((own >> bit) & 1 == 1, plan.keys[name])
        outside = torch.ones(span.n_keys, dtype=torch.bool)
        for first, end in span.marked:
            outside[first:end] = False
        assert not own[outside].any()
        assert span.position == plan.length - plan.response_length - 1
        start = sum(lengths[:n])
        at = slice(done, done + span.n_queries)
        assert placed.rows_at[at].tolist() == list(range(start + span.position, start + plan.length))
        if packed:
            assert torch.equal(placed.query_at[at], placed.rows_at[at])
        done += span.n_queries
    for plan, columns in zip(plans, placed.columns, strict=True):
        assert torch.equal(columns, plan.image_columns)


@pytest.mark.parametrize("names", [("image_mass",), ("region_mass", "sink_mass"), ("response_mass", "box_mass")])
def test_a_given_log_sum_exp_changes_no_statistic_of_rows_with_images_far_apart(names, monkeypatch):
    monkeypatch.setattr("sayo_verl.probe.measure.kernels", lambda path, device: reference)
    plans = [row([70, 3, 40], 100, 6), row([5], 30, 4), row([80, 80], 66, 5)]
    asked = tuple(Statistic(name, size=2 if name == "box_mass" else 0) for name in names)
    if "box_mass" in names:
        plans = [
            RowPlan(
                p.length,
                p.response_length,
                {**p.keys, "box0": p.keys["region"], "box1": p.keys["sink"]},
                p.image_columns,
                p.region_tokens,
            )
            for p in plans
        ]
    generator = torch.Generator().manual_seed(0)
    L = sum(plan.length for plan in plans)
    query, key = (torch.randn(1, heads, L, 16, generator=generator) for heads in (4, 2))
    starts = [0, plans[0].length, plans[0].length + plans[1].length, L]
    lse = torch.empty(4, L)
    for a, b in itertools.pairwise(starts):
        logits = query[0, :, a:b] @ key[0, :, a:b].repeat_interleave(2, 0).transpose(1, 2) * 0.5
        lse[:, a:b] = logits.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf")).logsumexp(-1)
    found = []
    for path, given_lse in (("reference", None), (FAST_LSE, lse)):
        measurement = Measurement(StatisticsRequest(asked, path=path), plans, {-1: 0}, packed=True, device=CPU)
        measurement.read(0, query, key, 0.5, given_lse)
        found.append(measurement.finish())
    for name, (values, _) in found[0].items():
        assert largest_difference(found[1][name][0], values) < 2e-6
