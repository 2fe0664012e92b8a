"""A micro-batch measured against dense float64: layout, conventions, layers, several statistics at once, ranks.

Shape suffixes: T response tokens, V visual tokens, k the asked size.
"""

import dataclasses

import pytest
import torch
from support.measured import BY_ROW, CONVENTIONS, compare, variants
from support.probe_rows import (
    ALL,
    NAN,
    PER_HEAD,
    ROW_OFFSET,
    SHAPES,
    Rows,
    largest_difference,
    same,
    statistic,
)

from sayo_verl.probe.statistics import CATALOGUE, Statistic

# ------------------------------------------------------------------------------------------------ against dense float64


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layers", [(-1,), (0, -1)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("query_row", CONVENTIONS)
@pytest.mark.parametrize("name", ALL)
def test_every_statistic_against_float64(name, query_row, layers, packed):
    if CATALOGUE[name].source == "hidden" and layers != (-1,):
        layers = (-1,)
    rows = Rows(SHAPES, seed=1, layers=3)
    found = rows.measure(variants([name], query_row=query_row, layers=layers), packed=packed, poison=NAN)
    assert compare(rows, found) <= (3e-6 if name == "lse" else 1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_values_are_of_response_tokens_only(packed):
    """So prompts and visual tokens add nothing to what travels; the exception is one value per visual token."""
    rows = Rows(SHAPES, seed=2)
    found = rows.measure([s for row in CONVENTIONS for s in variants(query_row=row)], packed=packed)
    for s, by_row in found.items():
        for n, values in by_row.items():
            _, visual, response = rows.shapes[n]
            assert values.shape[0] == (max(visual, 1) if s.name == "patch_sums" else response)


def test_the_conventions_are_one_row_apart():
    rows = Rows([(9, 4, 6)], seed=3)
    (by_input,), (predicting,) = (
        rows.measure([Statistic("image_mass", query_row=row)]).values() for row in ("input", "predicting")
    )
    a, b = by_input[0], predicting[0]
    assert largest_difference(a[:-1], b[1:]) <= 1e-6
    assert not torch.allclose(a, b, atol=1e-3)


def test_the_masses_of_sets_that_cover_everything_sum_to_one():
    rows = Rows(SHAPES, seed=5, layers=2)
    parts = ("sink", "system", "image", "question", "response")
    for plan in rows.plans:
        assert (torch.stack([plan.keys[part] for part in parts]).sum(0) == 1).all(), "each key in exactly one set"
    for query_row in CONVENTIONS:
        for per_head in (False, True):
            asked = [Statistic(f"{part}_mass", layers=(0, 1), query_row=query_row, per_head=per_head) for part in parts]
            found = rows.measure(asked)
            for n in range(len(rows.plans)):
                total = torch.stack([found[s][n] for s in asked]).sum(0)
                torch.testing.assert_close(total, torch.ones_like(total), atol=2e-6, rtol=0)


def test_the_boxes_of_the_region_sum_to_it():
    rows = Rows(SHAPES, seed=6)
    region, box = Statistic("region_mass"), Statistic("box_mass", size=3)
    found = rows.measure([region, box])
    for n in range(len(rows.plans)):
        columns = found[box][n]
        assert columns.shape == (rows.shapes[n][2], 3)
        torch.testing.assert_close(columns.sum(1), found[region][n], atol=1e-6, rtol=0)
        assert (columns[:, 2] == 0).all(), "there is no third box"
    assert (found[box][0][:, :2] > 0).all()


def test_top_patches_are_sorted_and_name_their_attention():
    rows = Rows(SHAPES, seed=7, layers=2)
    index, mass = (
        Statistic("top_patch_index", size=4, layers=(0, 1)),
        Statistic("top_patch_mass", size=4, layers=(0, 1)),
    )
    found = rows.measure([index, mass])
    for n, (_, visual, response) in enumerate(rows.shapes):
        index_Tk, mass_Tk, profile_TV = (
            found[index][n],
            found[mass][n],
            rows.profile(mass, n),
        )
        assert (mass_Tk[:, :-1] >= mass_Tk[:, 1:]).all()
        k = min(visual, 4)
        assert (index_Tk[:, k:] == -1).all()
        assert (mass_Tk[:, k:] == 0).all()
        assert ((index_Tk[:, :k] >= 0) & (index_Tk[:, :k] < visual)).all()
        for t in range(response):
            picked = index_Tk[t, :k].long()
            assert picked.unique().numel() == k
            torch.testing.assert_close(mass_Tk[t, :k].double(), profile_TV[t, picked], atol=1e-6, rtol=0)
            left_out = profile_TV[t, [v for v in range(visual) if v not in picked.tolist()]]
            assert left_out.numel() == 0 or mass_Tk[t, k - 1] >= left_out.max() - 1e-6


def test_patch_sums_are_the_profile_over_the_response_in_either_convention():
    rows = Rows(SHAPES, seed=8, layers=2)
    for asked in ([Statistic("patch_sums", query_row=row, layers=(0, 1)) for row in CONVENTIONS],):
        found = rows.measure(asked)
        for s in asked:
            for n, (_, visual, _) in enumerate(rows.shapes):
                if visual == 0:
                    assert found[s][n].shape == (1,)
                    assert found[s][n].isnan().all()
                else:
                    torch.testing.assert_close(found[s][n].double(), rows.profile(s, n).sum(0), atol=2e-6, rtol=0)
        image = rows.measure([dataclasses.replace(s, name="image_mass") for s in asked])
        for s, mass in zip(asked, image.values(), strict=True):
            total = mass[0].sum()
            torch.testing.assert_close(found[s][0].sum(), total, atol=2e-6, rtol=0)


def test_neighbours_are_those_of_the_graph_on_the_dense_profile():
    from sayo_verl.probe.neighbours import top_neighbours

    rows = Rows([(12, 7, 9), (9, 4, 6), (5, 2, 2)], seed=9, layers=2)
    for query_row in CONVENTIONS:
        index, similarity = (
            Statistic(name, size=3, layers=(0, 1), query_row=query_row)
            for name in ("neighbour_index", "neighbour_similarity")
        )
        found = rows.measure([index, similarity])
        for n in range(len(rows.plans)):
            profile_TV = rows.profile(index, n)
            wanted_index, wanted_similarity = top_neighbours(profile_TV.float(), 3)
            assert torch.equal(found[index][n], wanted_index.float())
            assert largest_difference(found[similarity][n], wanted_similarity.double()) <= 1e-5
            unit_TV = profile_TV / profile_TV.norm(dim=1, keepdim=True)
            cosine_TT = unit_TV @ unit_TV.T
            for t, row in enumerate(found[index][n].long().tolist()):
                for place, neighbour in enumerate(row):
                    if neighbour >= 0:
                        got = found[similarity][n][t, place].item()
                        assert got == pytest.approx(cosine_TT[t, neighbour].item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------- last hidden states


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("query_row", CONVENTIONS)
def test_image_cosine_is_that_of_the_mean_image_state(packed, query_row):
    """VGPO's prototype is the mean of the visual tokens' last hidden states; by hand for one token."""
    rows = Rows(SHAPES, seed=10)
    s = Statistic("image_cosine", query_row=query_row)
    found = rows.measure([s], packed=packed, poison=NAN)[s]
    prompt, _, _ = rows.shapes[0]
    state = rows.hidden[0][prompt + 2 + ROW_OFFSET[query_row]].double()
    prototype = torch.stack([rows.hidden[0][v] for v in rows.plans[0].image_columns.tolist()]).double().mean(0)
    by_hand = (state @ prototype / state.norm() / prototype.norm()).item()
    assert found[0][2].item() == pytest.approx(by_hand, abs=1e-6)
    assert compare(rows, {s: found}) <= 1e-6
    assert (found[1] == 0).all(), "without an image there is nothing to be alike to"


def test_image_cosine_of_bfloat16_states():
    rows = Rows(SHAPES, seed=10)
    rows.hidden = [hidden.bfloat16().float() for hidden in rows.hidden]
    s = Statistic("image_cosine")
    measurement = rows.measurement([s])
    measurement.read_hidden(rows.hidden_states(True).bfloat16())
    assert compare(rows, rows.by_row(measurement, [s])) <= 1e-6


@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_other_hidden_states_never_matter(poison):
    rows = Rows(SHAPES, seed=11)
    asked = [Statistic("image_cosine", query_row=row) for row in CONVENTIONS]
    before = rows.measure(asked)
    for n, plan in enumerate(rows.plans):
        prompt = plan.length - plan.response_length
        rows.hidden[n][: prompt - 1][~plan.keys["image"][: prompt - 1]] = poison
    after = rows.measure(asked, packed=False, poison=poison)
    for s in asked:
        for n in range(len(rows.plans)):
            assert largest_difference(after[s][n], before[s][n]) <= 1e-6


# ------------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("layers", [(-1,), (0, 2)], ids=["one layer", "two layers"])
def test_packed_and_padded_rows_measure_the_same(layers):
    rows = Rows(SHAPES, layers=3)
    asked = [s for row in CONVENTIONS for s in variants(BY_ROW, query_row=row, layers=layers)]
    asked += [Statistic("image_cosine", query_row=row) for row in CONVENTIONS]
    packed, padded = rows.measure(asked, packed=True), rows.measure(asked, packed=False)
    errors = [largest_difference(packed[s][n], padded[s][n]) for s in asked for n in range(len(rows.plans))]
    print(f"largest difference of packed from padded: {max(errors):.1e}")
    assert max(errors) <= 2e-6


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("poison", [NAN, 1e30, float("inf")])
def test_padding_never_matters(packed, poison):
    rows = Rows(SHAPES, layers=2)
    asked = variants(query_row="predicting")
    clean, poisoned = rows.measure(asked, packed=packed), rows.measure(asked, packed=packed, poison=poison)
    for s in asked:
        for n in range(len(rows.plans)):
            assert same(clean[s][n], poisoned[s][n])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_rows_in_another_order_give_the_same_values(packed):
    rows, order = Rows(SHAPES, layers=2), [2, 5, 0, 4, 3, 1]
    asked = variants()
    straight, turned = rows.measure(asked, packed=packed), rows.measure(asked, packed=packed, order=order)
    for s in asked:
        assert list(turned[s]) == order
        for n in range(len(rows.plans)):
            assert largest_difference(straight[s][n], turned[s][n]) <= 2e-6


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_row_alone_gives_the_same_values_as_among_others(packed):
    rows = Rows(SHAPES, layers=2)
    asked = variants()
    together = rows.measure(asked, packed=packed)
    for n in range(len(rows.plans)):
        alone = rows.measure(asked, packed=packed, order=[n])
        for s in asked:
            assert largest_difference(alone[s][n], together[s][n]) <= 2e-6


def test_both_conventions_at_once_give_what_each_gives_alone():
    rows = Rows([*SHAPES, (20, 9, 150)], layers=2)
    both = [s for row in CONVENTIONS for s in variants(query_row=row)]
    at_once, errors = rows.measure(both), []
    for row in CONVENTIONS:
        alone = rows.measure(variants(query_row=row))
        for s, by_row in alone.items():
            errors += [largest_difference(by_row[n], at_once[s][n]) for n in range(len(rows.plans))]
    print(f"largest difference of both conventions at once from each alone: {max(errors):.1e}")
    assert max(errors) == 0


@pytest.mark.parametrize("query_row", CONVENTIONS)
def test_several_statistics_at_once_give_the_bits_of_one_at_a_time(query_row):
    rows = Rows(SHAPES, layers=2)
    asked = variants(query_row=query_row) + variants(BY_ROW, query_row=query_row, layers=(0, 1))
    at_once = rows.measure(asked)
    for s in asked:
        alone = rows.measure([s])[s]
        for n in range(len(rows.plans)):
            assert same(alone[n], at_once[s][n]), f"{s.key} of row {n}"


def test_nothing_that_is_handed_over_is_changed_or_needs_a_gradient():
    rows = Rows(SHAPES)
    asked = variants()
    measurement = rows.measurement(asked)
    query, key = (x.requires_grad_() for x in rows.tensors(0, True))
    hidden = rows.hidden_states(True).requires_grad_()
    kept = [x.detach().clone() for x in (query, key, hidden)]
    measurement.read(0, query, key, rows.scale)
    measurement.read_hidden(hidden)
    for values, _ in measurement.finish().values():
        assert not values.requires_grad
        assert values.grad_fn is None
    for now, before in zip((query, key, hidden), kept, strict=True):
        assert torch.equal(now.detach(), before)


# ----------------------------------------------------------------------------------------------------- layers and heads


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_layers_are_averaged(packed):
    rows = Rows(SHAPES, seed=3, layers=3)
    linear = [s for s in variants(BY_ROW) if not s.name.startswith(("top_patch", "neighbour"))]
    for s in linear:
        mean = dataclasses.replace(s, layers=(0, 1, -1))
        alone = [dataclasses.replace(s, layers=(layer,)) for layer in (0, 1, 2)]
        found = rows.measure([mean, *alone], packed=packed)
        for n in range(len(rows.plans)):
            expected = torch.stack([found[one][n] for one in alone]).mean(0)
            assert largest_difference(found[mean][n], expected) <= 2e-6


def test_layers_may_be_named_in_any_order_and_from_either_end():
    rows = Rows(SHAPES, seed=3, layers=3)
    names = [(0, 2), (2, 0), (-3, -1), (0, -1)]
    for name in BY_ROW:
        asked = [statistic(name, layers=layers) for layers in names]
        found = rows.measure(asked)
        for n in range(len(rows.plans)):
            assert all(largest_difference(found[asked[0]][n], found[s][n]) <= 1e-6 for s in asked[1:])


@pytest.mark.parametrize("name", PER_HEAD)
def test_the_mean_over_heads_is_the_default(name):
    rows = Rows(SHAPES, layers=2)
    default, per_head = Statistic(name, layers=(0, 1)), Statistic(name, layers=(0, 1), per_head=True)
    found = rows.measure([default, per_head])
    for n in range(len(rows.plans)):
        assert found[per_head][n].shape == (rows.plans[n].response_length, Rows.H)
        assert largest_difference(found[per_head][n].mean(-1), found[default][n]) <= 1e-6
    assert found[per_head][0].std(-1).nan_to_num().max() > 1e-3, "heads differ"


# ------------------------------------------------------------------------------------------------------------- odd rows


def test_rows_without_an_image_attend_to_none():
    rows = Rows([(6, 0, 4), (9, 4, 5)])
    found = rows.measure(variants())
    for s, by_row in found.items():
        if s.name in ("image_mass", "region_mass", "box_mass", "top_patch_mass"):
            assert (by_row[0] == 0).all(), s.key
        if s.name == "top_patch_index":
            assert (by_row[0] == -1).all()
    assert compare(rows, found) <= 3e-6


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "shapes", [[(6, 2, 0), (9, 4, 5)], [(9, 4, 5), (6, 2, 0)], [(6, 2, 0)], [(6, 0, 0), (7, 2, 0)]], ids=str
)
def test_rows_without_a_response_hold_nothing(shapes, packed):
    rows = Rows(shapes)
    asked = [s for row in CONVENTIONS for s in variants(query_row=row)]
    found = rows.measure(asked, packed=packed)
    for s in asked:
        for n, (_, visual, response) in enumerate(shapes):
            if response == 0:
                if s.name == "patch_sums" and visual:
                    assert (found[s][n] == 0).all()
                else:
                    assert found[s][n].numel() == 0 or found[s][n].isnan().all()
    assert compare(rows, found) <= 3e-6


@pytest.mark.parametrize("bad_layer", [0, 1, 2])
def test_a_nan_of_any_layer_stays_a_nan(bad_layer):
    rows, (prompt, t) = Rows([(9, 4, 5)], layers=3), (9, 2)
    rows.query[0][bad_layer][:, prompt + t] = NAN
    for name in BY_ROW:
        s = statistic(name, layers=(0, 1, 2))
        if s.name.endswith("_index") or s.name == "neighbour_similarity":
            continue  # an index of what is NaN is no number
        values = rows.measure([s])[s][0]
        if name == "patch_sums":
            assert values.isnan().all()
            continue
        assert values[t].isnan().any()
        assert torch.cat([values[:t], values[t + 1 :]]).isfinite().all()


def test_a_nan_of_a_hidden_state_stays_a_nan():
    rows = Rows([(9, 4, 5), (9, 4, 5)])
    s = Statistic("image_cosine")
    rows.hidden[0][9 + 2, 3] = NAN
    rows.hidden[1][rows.plans[1].image_columns[0], 0] = NAN
    found = rows.measure([s])[s]
    assert found[0].isnan().tolist() == [False, False, True, False, False]
    assert found[1].isnan().all()
