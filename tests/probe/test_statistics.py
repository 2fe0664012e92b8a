"""How a method asks: what a statistic may be, its name on the wire, requests that travel, and the catalogue."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.probe_rows import ALL, PER_HEAD, ROW_OFFSET, SIZES, Rows, statistic
from support.refusals import refusal

from sayo_verl.probe.plan import RowPlan
from sayo_verl.probe.statistics import (
    CATALOGUE,
    PATHS,
    PER_ROW,
    QUERY_ROWS,
    SIZED,
    Statistic,
    StatisticsRequest,
    union,
)


@st.composite
def statistics(draw) -> Statistic:
    """Any that is allowed."""
    name = draw(st.sampled_from(ALL))
    layers = st.lists(st.integers(-40, 40), min_size=1, max_size=4, unique=True).map(tuple)
    return Statistic(
        name,
        layers=(-1,) if CATALOGUE[name].source == "hidden" else draw(layers),
        query_row=draw(st.sampled_from(sorted(QUERY_ROWS))),
        per_head=name in PER_HEAD and draw(st.booleans()),
        size=draw(st.integers(1, 16)) if name in SIZED else 0,
    )


@st.composite
def requests(draw) -> StatisticsRequest:
    chosen = draw(st.lists(statistics(), max_size=5, unique=True))
    return StatisticsRequest(tuple(chosen), draw(st.floats(0.01, 1)), draw(st.sampled_from(PATHS)))


# -------------------------------------------------------------------------------------------------------- one statistic


def test_the_defaults_are_the_last_layer_and_the_input_row():
    assert Statistic("image_mass") == Statistic("image_mass", (-1,), "input", False, 0)
    assert Statistic("image_mass").key == "image_mass.input.L-1"
    assert dict(QUERY_ROWS) == ROW_OFFSET


def test_an_unknown_statistic_is_refused_with_the_nearest_name():
    with refusal("P12", r"did you mean 'image_mass'\?") as caught:
        Statistic("image_mas")
    assert "region_mass" in str(caught.value)
    with refusal("P12", "unknown statistic"):
        Statistic("")


@pytest.mark.parametrize("row", ["output", "", None, "Input"])
def test_an_unknown_query_row_is_refused(row):
    with refusal("P08", "query row"):
        Statistic("image_mass", query_row=row)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("image_mass", {"layers": ()}, "layers"),
        ("image_mass", {"layers": (-1, 3, -1)}, "layers"),
        ("image_cosine", {"layers": (0,)}, "layers"),
        ("image_cosine", {"layers": (-1, 0)}, "layers"),
        ("image_cosine", {"per_head": True}, "per_head"),
        ("patch_sums", {"per_head": True}, "per_head"),
        ("top_patch_mass", {"per_head": True, "size": 2}, "per_head"),
        ("neighbour_index", {"per_head": True, "size": 2}, "per_head"),
        ("box_mass", {"per_head": True, "size": 2}, "per_head"),
        ("box_mass", {}, "size"),
        ("box_mass", {"size": 17}, "size"),
        ("box_mass", {"size": -1}, "size"),
        ("top_patch_index", {}, "size"),
        ("top_patch_mass", {"size": 0}, "size"),
        ("neighbour_similarity", {"size": -3}, "size"),
        ("image_mass", {"size": 1}, "size"),
        ("image_mass", {"size": -1}, "size"),
        ("patch_sums", {"size": 4}, "size"),
        ("image_cosine", {"size": 4}, "size"),
        ("lse", {"size": -2}, "size"),
    ],
    ids=str,
)
def test_an_option_that_does_not_apply_is_refused(name, options, what):
    with refusal("P13", f"{what} does not fit") as caught:
        Statistic(name, **options)
    assert name in caught.value.where


@pytest.mark.parametrize("name", ALL)
def test_every_option_that_applies_is_accepted(name):
    for row in QUERY_ROWS:
        assert statistic(name, query_row=row).query_row == row
    if CATALOGUE[name].source != "hidden":
        assert statistic(name, layers=(0, -1)).layers == (0, -1)
    if name in PER_HEAD:
        assert statistic(name, per_head=True).per_head
    if name in SIZED:
        assert Statistic(name, size=16).size == 16


@given(statistics(), statistics())
@settings(max_examples=150, deadline=None)
def test_keys_are_equal_exactly_for_equal_statistics(a, b):
    assert (a.key == b.key) == (a == b)
    assert a.key == dataclasses.replace(a).key
    assert a.key.startswith(a.name + ".")


@given(statistics(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_change_of_any_field_changes_the_key(a, data):
    changes = [{"query_row": "input" if a.query_row == "predicting" else "predicting"}]
    if a.spec.source != "hidden":
        changes.append({"layers": (*a.layers, 77)})
        changes.append({"layers": (a.layers[0] - 100, *a.layers[1:])})
    if a.name in PER_HEAD:
        changes.append({"per_head": not a.per_head})
    if a.name in SIZED:
        changes.append({"size": a.size % 16 + 1})
    changed = dataclasses.replace(a, **data.draw(st.sampled_from(changes)))
    assert changed != a
    assert changed.key != a.key


def test_layers_in_another_order_are_another_statistic_with_another_key():
    assert Statistic("lse", layers=(0, 1)).key != Statistic("lse", layers=(1, 0)).key


# ------------------------------------------------------------------------------------------------------------- requests


@given(requests())
@settings(max_examples=60, deadline=None)
def test_a_request_survives_its_travel(request):
    wire = request.to_wire()
    assert type(wire) is dict
    assert all(type(s) is dict for s in wire["statistics"])
    for arrived in (
        wire,
        json.loads(json.dumps(wire)),
        OmegaConf.create(wire),
        OmegaConf.to_container(OmegaConf.create(wire)),
    ):
        back = StatisticsRequest.from_wire(arrived)
        assert back == request
        assert [s.key for s in back.statistics] == [s.key for s in request.statistics]
        assert all(type(s.layers) is tuple for s in back.statistics)
        assert hash(back.statistics) == hash(request.statistics)


def test_what_arrives_broken_is_refused():
    wire = StatisticsRequest((Statistic("image_mass"),)).to_wire()
    with refusal("P12"):
        StatisticsRequest.from_wire({**wire, "statistics": [{"name": "imagemass", "layers": [-1]}]})
    with refusal("P14"):
        StatisticsRequest.from_wire({**wire, "path": "quick"})
    with pytest.raises(TypeError, match="colour"):
        StatisticsRequest.from_wire({**wire, "colour": "red"})
    with pytest.raises(KeyError, match="statistics"):
        StatisticsRequest.from_wire({"coverage": 0.5})


@pytest.mark.parametrize("path", ["triton", "", None, "Fast"])
def test_an_unknown_path_is_refused(path):
    with refusal("P14", "unknown path"):
        StatisticsRequest((), path=path)


def test_every_layer_of_a_request_stands_once():
    request = StatisticsRequest(
        (Statistic("lse", layers=(3, -1)), Statistic("image_mass"), Statistic("lse", layers=(3, 0)))
    )
    assert request.layers == (3, -1, 0)
    assert StatisticsRequest(()).layers == ()


@given(st.lists(st.lists(statistics(), max_size=4), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_union_holds_every_statistic_once(parts):
    joined = union([StatisticsRequest(tuple(part), 0.3, "reference") for part in parts])
    assert (joined.coverage, joined.path) == (0.3, "reference")
    assert set(joined.statistics) == {s for part in parts for s in part}
    assert len(set(joined.statistics)) == len(joined.statistics)
    assert len({s.key for s in joined.statistics}) == len(joined.statistics)


def test_a_union_of_one_is_itself():
    request = StatisticsRequest((Statistic("image_mass"), Statistic("region_mass")), 0.7, "fast")
    assert union([request]) == union([request, request]) == request


@pytest.mark.parametrize(
    "others",
    [
        [StatisticsRequest((), coverage=0.4)],
        [StatisticsRequest((), path="reference")],
        [StatisticsRequest(()), StatisticsRequest((), 0.4, "fast")],
    ],
    ids=["coverage", "path", "the third"],
)
def test_requests_that_differ_are_refused(others):
    with refusal("P15", "differ in"):
        union([StatisticsRequest((Statistic("image_mass"),)), *others])


def test_a_union_of_nothing_is_refused():
    with refusal("P15"):
        union([])


# -------------------------------------------------------------------------------------------------------- the catalogue


def test_the_catalogue_says_shape_unit_range_and_source():
    assert set(SIZED) <= set(CATALOGUE)
    assert set(SIZES) == set(SIZED), "the tests must give a size to what has one"
    for name, spec in CATALOGUE.items():
        assert spec.shape.startswith("["), name
        assert spec.unit, name
        assert spec.what, name
        assert spec.low < spec.high, name
        assert spec.source in ("mass", "lse", "profile", "hidden"), name
        assert (", k]" in spec.shape) == (name in SIZED), name
        assert ("H]" in spec.shape) == (name in PER_HEAD), name
        assert bool(spec.keys) == (spec.source == "mass"), name
    assert all(PER_ROW.values())
    assert not set(PER_ROW) & set(CATALOGUE)


@pytest.mark.parametrize("query_row", sorted(QUERY_ROWS))
@pytest.mark.parametrize("name", ALL)
def test_everything_in_the_catalogue_can_be_measured(name, query_row):
    rows = Rows([(9, 4, 6), (12, 7, 2), (5, 2, 9)], seed=4, layers=2)
    asked = [statistic(name, query_row=query_row)]
    if name in PER_HEAD:
        asked.append(statistic(name, query_row=query_row, per_head=True))
    if CATALOGUE[name].source != "hidden":
        asked.append(statistic(name, query_row=query_row, layers=(0, 1)))
    for s, by_row in rows.measure(asked).items():
        for n, values in by_row.items():
            plan: RowPlan = rows.plans[n]
            if s.name == "patch_sums":
                assert values.shape == (plan.image_columns.numel(),)
            else:
                wide = (Rows.H,) if s.per_head else (s.size,) if s.size else ()
                assert values.shape == (plan.response_length, *wide)
            assert values.isfinite().all()
            assert values.min() >= s.spec.low - 1e-6
            assert values.max() <= s.spec.high + 1e-6
            assert values.unique().numel() > 1 or s.name in ("box_mass", "neighbour_index")
            assert math.isfinite(values.sum().item())
