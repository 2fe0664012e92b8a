"""Attention mass against dense float64 softmax, plans of rows, and where the reader writes.

Shape suffixes: T query rows or response tokens, S keys, H query heads, G key heads, D head dimension, K marked sets,
L tokens of all rows together.
"""

import itertools
import math
import random

import pytest
import torch
from torch import nn

from sayo_verl.errors import SayoError
from sayo_verl.probe.plan import MassReader, RowPlan, plan_row
from sayo_verl.probe.reference import attention_mass
from sayo_verl.probe.taps import resolve_layers, text_attention_layers

NAN = float("nan")
CPU = torch.device("cpu")


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def dense_mass(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, marked: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same [K, T] in float64, one head and one query row at a time, nothing shared with the code under test."""
    T, H, _ = query.shape
    G = key.shape[1]
    out = torch.zeros(marked.shape[0], T, dtype=torch.float64)
    for t, h in itertools.product(range(T), range(H)):
        seen = key[: int(positions[t]) + 1, h // (H // G)].double()
        weight = torch.exp(seen @ query[t, h].double() * scale)
        weight = weight / weight.sum()
        for k in range(marked.shape[0]):
            out[k, t] += weight[marked[k, : len(weight)]].sum() / H
    return out


def random_case(seed: int, dtype: torch.dtype = torch.float32):
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    G, ratio = choose.choice([1, 2, 3]), choose.choice([1, 2, 4, 5])
    S, D = choose.randint(1, 40), choose.choice([4, 8, 16])
    T = choose.randint(1, min(S, 10))
    query = (torch.randn(T, G * ratio, D, generator=generator) * choose.choice([0.3, 1.0, 3.0])).to(dtype)
    key = torch.randn(S, G, D, generator=generator).to(dtype)
    positions = torch.randperm(S, generator=generator)[:T]
    marked = torch.rand(choose.randint(1, 3), S, generator=generator) < choose.choice([0.2, 0.5, 0.9])
    return query, key, positions, marked, D**-0.5


# ------------------------------------------------------------------------------------------------------- attention mass


def test_mass_against_dense_softmax_in_float64():
    largest = 0.0
    for seed in range(30):
        query, key, positions, marked, scale = random_case(seed)
        expected = dense_mass(query, key, positions, marked, scale)
        for chunk in (1, 3, 128):
            found = attention_mass(query, key, positions, marked, scale=scale, chunk=chunk)
            assert found.dtype == torch.float32
            assert found.shape == expected.shape
            assert found.min() >= 0
            assert found.max() <= 1 + 1e-6
            largest = max(largest, (found.double() - expected).abs().max().item())
    print(f"largest difference of float32 mass from dense float64: {largest:.1e}")
    assert largest <= 1e-6


def test_mass_of_bfloat16_inputs_against_float64_on_the_same_values():
    largest = 0.0
    for seed in range(100, 120):
        query, key, positions, marked, scale = random_case(seed, torch.bfloat16)
        found = attention_mass(query, key, positions, marked, scale=scale)
        assert found.dtype == torch.float32
        largest = max(largest, (found.double() - dense_mass(query, key, positions, marked, scale)).abs().max().item())
    print(f"largest difference of bfloat16-input mass from dense float64: {largest:.1e}")
    assert largest <= 1e-4


def test_mass_of_a_long_row():
    generator = torch.Generator().manual_seed(7)
    query, key = torch.randn(12, 8, 32, generator=generator), torch.randn(3000, 2, 32, generator=generator)
    marked = torch.zeros(2, 3000, dtype=torch.bool)
    marked[0, 10:1500], marked[1, 700:760] = True, True
    positions = torch.arange(2988, 3000)
    found = attention_mass(query, key, positions, marked, scale=32**-0.5, chunk=5)
    error = (found.double() - dense_mass(query, key, positions, marked, 32**-0.5)).abs().max().item()
    print(f"largest difference over 3000 keys: {error:.1e}")
    assert error <= 1e-6


def test_the_chunk_does_not_matter():
    for seed in range(20):
        query, key, positions, marked, scale = random_case(seed)
        whole = attention_mass(query, key, positions, marked, scale=scale, chunk=10_000)
        for chunk in (1, 2, 7):
            parts = attention_mass(query, key, positions, marked, scale=scale, chunk=chunk)
            assert torch.allclose(parts, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_around_it_changes_no_bit(dtype):
    query, key, positions, marked, scale = random_case(5, dtype)
    outside = attention_mass(query, key, positions, marked, scale=scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (query.float() @ query.float().transpose(-1, -2)).dtype == torch.bfloat16  # autocast is really on
        inside = attention_mass(query, key, positions, marked, scale=scale)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_there_is_no_gradient_and_inputs_stay_as_they_are():
    query, key, positions, marked, scale = random_case(3)
    kept = query.clone(), key.clone(), positions.clone(), marked.clone()
    query.requires_grad_()
    key.requires_grad_()
    found = attention_mass(query, key, positions, marked, scale=scale)
    assert not found.requires_grad
    assert found.grad_fn is None
    for now, before in zip((query, key, positions, marked), kept, strict=True):
        assert torch.equal(now, before)


def test_mass_by_hand():
    # Equal logits: each of the keys 0..position gets the same share.
    query, key = torch.zeros(4, 2, 4), torch.randn(4, 1, 4)
    marked = torch.tensor([[True, False, True, False], [False, False, True, True], [False] * 4, [True] * 4])
    found = attention_mass(query, key, torch.arange(4), marked, scale=0.5)
    expected = torch.tensor([[1, 1 / 2, 2 / 3, 2 / 4], [0, 0, 1 / 3, 2 / 4], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.allclose(found, expected, atol=1e-6)


def test_query_heads_use_their_own_key_head():
    # Two key heads, four query heads: heads 0, 1 read key head 0, heads 2, 3 read key head 1 (as in HF's repeat_kv).
    key = torch.zeros(2, 2, 1)
    key[0, 0], key[1, 1] = 50.0, 50.0  # key head 0 points at token 0, key head 1 at token 1
    query = torch.tensor([1.0, 1.0, 1.0, -1.0]).view(1, 4, 1)
    found = attention_mass(query, key, torch.tensor([1]), torch.tensor([[True, False]]), scale=1.0)
    assert found.item() == pytest.approx((1 + 1 + 0 + 1) / 4)


def test_later_keys_do_not_matter_even_if_they_are_nan():
    query, key, _, marked, scale = random_case(11)
    T, S = query.shape[0], key.shape[0]
    assert S > 4
    positions = torch.arange(T).clamp(max=S // 2)
    before = attention_mass(query, key, positions, marked, scale=scale)
    poisoned = key.clone()
    poisoned[S // 2 + 1 :] = NAN
    assert torch.equal(attention_mass(query, poisoned, positions, marked, scale=scale), before)


def test_no_query_rows_give_an_empty_result():
    found = attention_mass(
        torch.zeros(0, 2, 4), torch.zeros(5, 1, 4), torch.zeros(0, dtype=torch.long), torch.ones(2, 5).bool(), scale=1.0
    )
    assert found.shape == (2, 0)


@pytest.mark.parametrize(
    ("query", "key", "positions", "marked"),
    [
        ((3, 4, 8), (5, 3, 8), 3, (2, 5)),
        ((3, 4, 8), (5, 2, 4), 3, (2, 5)),
        ((3, 4, 8), (5, 2, 8), 2, (2, 5)),
        ((3, 4, 8), (5, 2, 8), 3, (2, 6)),
        ((3, 4, 8), (5, 2, 8), 3, (5,)),
    ],
    ids=["heads", "dimension", "positions", "marked keys", "flat marks"],
)
def test_shapes_that_do_not_fit_are_refused(query, key, positions, marked):
    with refusal("P01"):
        attention_mass(
            torch.zeros(query),
            torch.zeros(key),
            torch.zeros(positions, dtype=torch.long),
            torch.zeros(marked, dtype=torch.bool),
            scale=1.0,
        )


# -------------------------------------------------------------------------------------------------------- plans of rows

IMAGE = 99


def plan(ids: list[int], response: int, grids=((1, 4, 4),), boxes=((),), coverage: float = 0.5) -> RowPlan:
    return plan_row(
        torch.tensor(ids),
        response,
        image_token_id=IMAGE,
        grids=grids,
        merge_size=2,
        boxes=boxes,
        coverage=coverage,
        where="row 3 of the batch",
    )


TWO_IMAGES = [1, *[IMAGE] * 4, 2, *[IMAGE] * 6, 3]  # 2 x 2 and 2 x 3 cells, at 1..4 and 6..11


def test_a_row_with_two_images():
    boxes = [[[0.5, 0.0, 1.0, 0.5]], [[0.67, 0.0, 1.0, 1.0], [0.0, 0.5, 0.33, 1.0]]]
    row = plan([*TWO_IMAGES, 7, 8], 2, grids=[(1, 4, 4), (1, 4, 6)], boxes=boxes)
    assert (row.length, row.response_length, row.image_tokens, row.region_tokens) == (15, 2, 10, 4)
    assert row.marked.dtype == torch.bool
    assert row.marked[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    # image 0: upper right cell; image 1: right column (cells 2 and 5) and lower left cell (3)
    assert row.marked[1].nonzero().flatten().tolist() == [2, 6 + 2, 6 + 3, 6 + 5]


def test_one_image_may_go_without_a_box():
    row = plan([*TWO_IMAGES, 7], 1, grids=[(1, 4, 4), (1, 4, 6)], boxes=[[], [[0.0, 0.0, 0.33, 0.5]]])
    assert row.marked[1].nonzero().flatten().tolist() == [6]


def test_a_placeholder_that_the_policy_sampled_is_not_an_image():
    row = plan([1, *[IMAGE] * 4, 2, 7, IMAGE, IMAGE, 8], 4, boxes=[[[0.0, 0.0, 1.0, 1.0]]])
    assert row.marked[0].nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert row.marked[1].nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert (row.image_tokens, row.region_tokens) == (4, 4)


@pytest.mark.parametrize("boxes", [[[]], [], [[], [], []]], ids=["none", "no lists", "only empty lists"])
def test_a_row_without_a_box_has_no_region(boxes):
    row = plan([1, *[IMAGE] * 4, 2, 7], 1, boxes=boxes)
    assert (row.image_tokens, row.region_tokens) == (4, 0)
    assert not row.marked[1].any()


@pytest.mark.parametrize("boxes", [[], [[[0.0, 0.0, 1.0, 1.0]]]], ids=["no boxes", "boxes of a padding row"])
def test_a_row_without_an_image_has_nothing_marked(boxes):
    row = plan([1, 2, 3, 7], 1, grids=(), boxes=boxes)
    assert (row.image_tokens, row.region_tokens) == (0, 0)
    assert not row.marked.any()


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([1, *[IMAGE] * 3, 2, 7], [(1, 4, 4)]),
        ([1, *[IMAGE] * 5, 2, 7], [(1, 4, 4)]),
        ([1, 2, 7], [(1, 4, 4)]),
        ([1, IMAGE, 2, 7], []),
    ],
    ids=["one cut off", "one too many", "no placeholder", "no grid"],
)
def test_placeholders_that_do_not_fit_the_grids_are_refused(ids, grids):
    with refusal("P05", "placeholders") as caught:
        plan(ids, 1, grids=grids)
    assert caught.value.where == "row 3 of the batch"
    assert "data.max_prompt_length" in caught.value.fix


@pytest.mark.parametrize(
    "boxes",
    [[[[0.0, 0.0, 1.0, 1.0]]], [[[0.0, 0.0, 1.0, 1.0]], [], []]],
    ids=["one list for two images", "three lists for two images"],
)
def test_boxes_that_are_not_nested_by_image_are_refused(boxes):
    with refusal("P06", "per image"):
        plan([*TWO_IMAGES, 7], 1, grids=[(1, 4, 4), (1, 4, 6)], boxes=boxes)


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 4, 5)], ids=["video", "odd height", "odd width"])
def test_a_grid_that_is_not_a_still_image_is_refused(grid):
    with refusal("P07", "still image"):
        plan([1, *[IMAGE] * 4, 2, 7], 1, grids=[grid])


def test_a_bad_box_is_refused():
    with refusal("V02"):
        plan([1, *[IMAGE] * 4, 2, 7], 1, boxes=[[[0.5, 0.5, 0.25, 0.25]]])


# ----------------------------------------------------------------------------------------------------------- the reader

H, G, D = 4, 2, 8


class Rows:
    """A micro-batch of random rows as the model would see it, packed and right-padded."""

    def __init__(self, shapes: list[tuple[int, int]], seed: int = 0, layers: int = 1) -> None:
        """``shapes``: (prompt, response) tokens of each row."""
        generator = torch.Generator().manual_seed(seed)
        self.plans, self.query, self.key = [], [], []
        for prompt, response in shapes:
            S = prompt + response
            marked = torch.zeros(2, S, dtype=torch.bool)
            marked[0, 1 : prompt - 1] = True
            marked[1, 2 : prompt - 1 : 2] = True
            self.plans.append(RowPlan(S, response, marked, int(marked[0].sum()), int(marked[1].sum())))
            self.query.append([torch.randn(H, S, D, generator=generator) for _ in range(layers)])
            self.key.append([torch.randn(G, S, D, generator=generator) for _ in range(layers)])

    def read(self, *, packed: bool, query_row: str = "input", poison: float = 0.0, order: list[int] | None = None):
        """mass_KL of the reader, after all layers."""
        order = list(range(len(self.plans))) if order is None else order
        n_layers = len(self.query[0])
        reader = MassReader(
            [self.plans[n] for n in order], n_layers=n_layers, query_row=query_row, packed=packed, device=CPU
        )
        for layer in range(n_layers):
            query, key = ([x[n][layer] for n in order] for x in (self.query, self.key))
            if packed:
                reader(layer, torch.cat(query, 1)[None], torch.cat(key, 1)[None], D**-0.5)
            else:
                S = max(x.shape[1] for x in query) + 3
                padded = [torch.full((len(order), x[0].shape[0], S, D), poison) for x in (query, key)]
                for into, rows in zip(padded, (query, key), strict=True):
                    for n, row in enumerate(rows):
                        into[n, :, : row.shape[1]] = row
                reader(layer, *padded, D**-0.5)
        return reader.mass_KL

    def by_row(self, mass_KL: torch.Tensor, order: list[int]) -> dict[int, torch.Tensor]:
        parts = mass_KL.split([self.plans[n].length for n in order], dim=1)
        return dict(zip(order, parts, strict=True))


SHAPES = [(6, 4), (9, 1), (5, 12), (4, 3)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN where NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@pytest.mark.parametrize("query_row", ["input", "predicting"])
@pytest.mark.parametrize("layers", [1, 2])
def test_packed_and_padded_rows_read_the_same(query_row, layers):
    rows = Rows(SHAPES, layers=layers)
    packed, padded = rows.read(packed=True, query_row=query_row), rows.read(packed=False, query_row=query_row)
    assert torch.equal(packed.isnan(), padded.isnan())
    error = (packed - padded)[~packed.isnan()].abs().max().item()
    print(f"largest difference of packed from padded: {error:.1e}")
    assert error <= 1e-6


@pytest.mark.parametrize("poison", [NAN, 1e30, float("inf")])
def test_padding_never_matters(poison):
    rows = Rows(SHAPES)
    assert same(rows.read(packed=False, poison=poison), rows.read(packed=False))


@pytest.mark.parametrize("packed", [True, False])
def test_rows_in_another_order_give_the_same_values(packed):
    rows, order = Rows(SHAPES), [2, 0, 3, 1]
    straight = rows.by_row(rows.read(packed=packed), [0, 1, 2, 3])
    turned = rows.by_row(rows.read(packed=packed, order=order), order)
    for n in range(len(SHAPES)):
        assert torch.equal(straight[n].isnan(), turned[n].isnan())
        assert torch.allclose(straight[n].nan_to_num(-1), turned[n].nan_to_num(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("query_row", "shift"), [("input", 0), ("predicting", -1)])
def test_the_value_of_token_t_lies_one_before_its_position(packed, query_row, shift):
    rows = Rows(SHAPES, seed=1)
    found = rows.by_row(rows.read(packed=packed, query_row=query_row), [0, 1, 2, 3])
    for n, (prompt, response) in enumerate(SHAPES):
        query, key, row = rows.query[n][0].transpose(0, 1), rows.key[n][0].transpose(0, 1), rows.plans[n]
        for t in range(response):
            read_at = torch.tensor([prompt + t + shift])
            expected = dense_mass(query[read_at], key, read_at, row.marked, D**-0.5)[:, 0]
            assert torch.allclose(found[n][:, prompt + t - 1].double(), expected, atol=1e-6)
        told = torch.zeros(row.length, dtype=torch.bool)
        told[prompt - 1 : prompt + response - 1] = True
        assert found[n][:, ~told].isnan().all()
        assert found[n][:, told].isfinite().all()


def test_verl_slices_the_values_back_token_by_token():
    from verl.workers.utils.padding import response_from_nested

    rows = Rows(SHAPES, seed=2)
    mass = rows.read(packed=True)
    lengths = torch.tensor([row.length for row in rows.plans])
    responses = torch.nested.nested_tensor([torch.ones(row.response_length) for row in rows.plans], layout=torch.jagged)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    for k in range(2):
        wire = torch.nested.nested_tensor_from_jagged(mass[k], offsets)
        sliced = response_from_nested(wire, responses)
        for n, (prompt, response) in enumerate(SHAPES):
            values = sliced[n][:response]
            positions = torch.arange(prompt, prompt + response)
            expected = dense_mass(
                rows.query[n][0].transpose(0, 1)[positions],
                rows.key[n][0].transpose(0, 1),
                positions,
                rows.plans[n].marked,
                D**-0.5,
            )[k]
            assert torch.allclose(values.double(), expected, atol=1e-6)


def test_layers_are_averaged():
    rows = Rows(SHAPES, seed=3, layers=3)
    found = rows.read(packed=True)
    alone = []
    for layer in range(3):
        one = Rows(SHAPES, seed=3, layers=3)
        one.query = [[q[layer]] for q in one.query]
        one.key = [[k[layer]] for k in one.key]
        alone.append(one.read(packed=True))
    mean = torch.stack(alone).mean(0)
    assert torch.equal(found.isnan(), mean.isnan())
    assert torch.allclose(found.nan_to_num(-1), mean.nan_to_num(-1), atol=1e-6)


@pytest.mark.parametrize("bad_layer", [0, 1, 2])
def test_a_nan_of_any_layer_stays_a_nan(bad_layer):
    rows = Rows([(6, 4)], layers=3)
    prompt, t = 6, 2
    rows.query[0][bad_layer][:, prompt + t] = NAN
    found = rows.read(packed=True)
    assert found[:, prompt + t - 1].isnan().all()
    assert found[:, prompt - 1 : prompt + t - 1].isfinite().all()


def test_the_whole_image_holds_at_least_the_region():
    mass = Rows(SHAPES).read(packed=True)
    told = ~mass[0].isnan()
    assert (mass[0] >= mass[1])[told].all()
    assert (mass[1][told] > 0).any()


def test_an_unknown_query_row_is_refused():
    with refusal("P08", "query row"):
        MassReader([], n_layers=1, query_row="output", packed=True, device=CPU)


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("asked", "given"), [((-1,), (35,)), ((0, -1), (0, 35)), ((35, 3), (35, 3)), ((-36,), (0,))], ids=str
)
def test_layer_numbers(asked, given):
    assert resolve_layers(asked, 36, where="algorithm.attn.region.layers") == given


@pytest.mark.parametrize("asked", [(36,), (-37,), (), (-1, 35), (3, 3)], ids=str)
def test_layers_that_do_not_exist_are_refused(asked):
    with refusal("P03", "36 decoder layers") as caught:
        resolve_layers(asked, 36, where="algorithm.attn.region.layers")
    assert caught.value.where == "algorithm.attn.region.layers"
    assert "-36..35" in str(caught.value)


def test_a_model_without_known_attention_is_refused():
    with refusal("P02") as caught:
        text_attention_layers(nn.Sequential(nn.Linear(2, 2)))
    assert "qwen3_vl" in caught.value.fix


def test_mass_of_one_key_is_one():
    # the first token sees only itself
    found = attention_mass(
        torch.randn(1, 2, 4), torch.randn(1, 1, 4), torch.tensor([0]), torch.tensor([[True]]), scale=1 / math.sqrt(4)
    )
    assert found.item() == 1.0
