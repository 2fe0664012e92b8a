"""Maps of words and of the whole response: how they belong together, what is kept, what it costs.

Shape suffixes: W words, V visual tokens.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_rows import RowShape
from support.looked import response_of, row_of
from torch.utils._python_dispatch import TorchDispatchMode

from sayo_verl.look import collect, observe
from sayo_verl.look.sinks import steady_mask

BOX = [[[0.0, 0.0, 0.5, 0.5]]]


@pytest.fixture(scope="module")
def observer(observer_of):
    return observer_of("qwen3_vl")


@pytest.fixture(scope="module")
def prompt(observer):
    return observer.prompt(row_of(RowShape(((128, 96),), 0, BOX)), "a row")


@settings(max_examples=12)
@given(ids=st.lists(st.integers(20, 200), min_size=1, max_size=30), chunk=st.integers(1, 40))
def test_the_total_map_is_the_mean_of_the_word_maps_by_their_tokens(observer, prompt, ids, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "CHUNK", chunk)
        seen = observer.observe(prompt, ids, maps=["mean", "L1", "L2H3"])
    assert seen.text == observer.processor.tokenizer.decode(ids)
    assert [t for first, end in seen.words for t in range(first, end)] == list(range(len(ids)))
    length_W = np.array([end - first for first, end in seen.words])
    for one in seen.maps[:3]:
        words_WV, total_V = one.words.unpack(), one.total.unpack()[0]
        # a code of 255 levels is within 1.9 %, and what is below the scale's end is 0
        np.testing.assert_allclose(length_W @ words_WV / len(ids), total_V, rtol=0.04, atol=2e-4)
    np.testing.assert_allclose(
        seen.maps[0].total.unpack().sum(), seen.values["image_mass"].mean(), rtol=0.02, atol=2e-3
    )


def test_a_special_token_is_a_word_of_its_own(observer, prompt):
    ids = [*observer.processor.tokenizer("red", add_special_tokens=False)["input_ids"], observer.ends[0]]
    assert observer.observe(prompt, ids).words[-1] == (len(ids) - 1, len(ids))


def test_without_a_choice_all_layers_are_kept_if_they_fit(observer, prompt):
    seen = observer.observe(prompt, response_of(20))
    assert [m.name for m in seen.maps if m.words is not None] == ["mean", "L0", "L1", "L2"]
    assert seen.maps[0].label == "all layers, mean over their heads"
    assert seen.notes == ()
    assert seen.facts["layers"] == "0, 1, 2"


@pytest.mark.parametrize("budget", [800, 2500, 5000, 9000, 20_000])
def test_what_is_kept_stays_within_the_budget_and_the_reader_is_told(observer, prompt, budget):
    seen = observer.observe(prompt, response_of(150), budget=budget, heads=True)
    kept = [m.words for m in seen.maps if m.words] + [m.total for m in seen.maps]
    totals = sum(observe._size(m.total) for m in seen.maps if "H" not in m.name)  # kept whatever the budget is
    assert sum(map(observe._size, kept)) <= max(budget, totals)
    complete = sum(m.words is not None for m in seen.maps) == 4
    all_heads = sum("H" in m.name for m in seen.maps) == 12
    assert bool(seen.notes) is not (complete and all_heads)
    assert budget not in (800, 20_000) or bool(seen.notes) is (budget == 800)


def test_the_mean_over_some_layers_is_that_of_these_layers(observer, folder_of, prompt):
    one = observe.Observer(str(folder_of("qwen3_vl")), device="cpu", layers=[-1])
    ids = response_of(9)
    last, full = one.observe(prompt, ids, maps=["mean", "L0"]), observer.observe(prompt, ids, maps=["L2"])
    assert last.maps[0].label == "last layer, mean over its heads"
    np.testing.assert_array_equal(last.maps[0].total.unpack(), full.maps[0].total.unpack())
    assert last.maps[1].name == "L0"  # a map may be of another layer
    assert last.heads.layers == (0, 2)


def test_a_token_is_steady_if_both_maps_exceed_the_multiple_of_their_median():
    response_V, neutral_V = np.array([1.0, 11, 11, 1, 1]), np.array([0.1, 1.1, 0.1, 9, 0.1])
    assert steady_mask(response_V, neutral_V).tolist() == [False, True, False, False, False]
    assert steady_mask(response_V, neutral_V, multiple=0.5).tolist() == [True, True, True, True, True]


def test_steady_tokens_are_those_of_the_neutral_question_and_the_response(observer, prompt, monkeypatch, unpacked):
    monkeypatch.setattr(observe.sinks.steady_mask, "__defaults__", (1.0,))
    seen = observer.observe(prompt, response_of(9), maps=["mean", "L1"], heads=True)
    neutral = observe.with_question(prompt, observe.sinks.NEUTRAL, **observer._own())
    before = dataclasses.replace(neutral, ids=neutral.ids[:-1])  # its last token, as a response of one token
    alone = observer.observe(before, neutral.ids[-1:].tolist(), maps=["mean", "L1"], steady=False, heads=True)
    assert len(seen.maps) == 1 + 3 + 12
    neutral_of = {other.name: unpacked(other.total)[0] for other in alone.maps}
    for got in seen.maps:
        response_V, neutral_V = unpacked(got.total)[0], neutral_of[got.name]
        wanted = (response_V > np.median(response_V)) & (neutral_V > np.median(neutral_V))
        np.testing.assert_array_equal(got.steady, wanted)
    assert any(got.steady.any() for got in seen.maps)
    assert observer.observe(prompt, response_of(9), steady=False).maps[0].steady is None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_memory_is_linear_in_the_response(observer, prompt):
    largest = {}
    for n in (300, 900):
        with Largest() as spy:
            observer.observe(prompt, response_of(n), maps=["mean"], steady=False)
        largest[n] = spy.elements
    assert largest[900] <= 3.5 * largest[300]  # of a matrix over all tokens it would be 9
