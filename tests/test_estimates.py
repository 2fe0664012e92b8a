"""Estimates that compare different numbers of tokens, and their intervals."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sayo_verl import estimates as e
from sayo_verl.methods.faithful import FaithfulMethod, causal_effect
from sayo_verl.methods.region import target_attention, token_ratio

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
positive = st.floats(1e-6, 1.0)


def heavy_tailed(responses: int, tokens: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """a(t), v(t) of invented responses: log-normal attention on the target and on the rest."""
    random = np.random.default_rng(seed)
    target, rest = np.exp(random.normal([[[-6.0]], [[-5.0]]], [[[2.0]], [[0.7]]], (2, responses, tokens)))
    return list(zip(target, 0.1 * target + 0.9 * rest, strict=True))


# -------------------------------------------------------------------------------------- the number of pooled tokens


def random_token_test(responses: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, list[e.Estimate]]:
    values = e.random_tokens(responses, (1, 2, 4, 8, 16, 0))
    return {name: [e.mean(column, range(len(responses))) for column in rows.T] for name, rows in values.items()}


def test_pooled_score_of_random_tokens_rises_and_that_of_single_tokens_is_flat():
    found = random_token_test(heavy_tailed(400, 24))
    pooled, single = ([estimate.value for estimate in found[name]] for name in ("pooled", "single"))
    print("pooled", np.round(pooled, 3), "single", np.round(single, 3))
    assert pooled == sorted(pooled)
    assert found["pooled"][-1].low > found["pooled"][0].high + 0.1
    assert all(estimate.low <= single[-1] <= estimate.high for estimate in found["single"])
    assert max(single) - min(single) < 0.01


@given(st.integers(1, 5), st.lists(st.tuples(positive, positive), min_size=6, max_size=6))
@PROPERTY
def test_over_all_choices_of_k_tokens_the_mean_is_that_of_the_response(k, pairs):
    target, image = np.array(pairs).T
    score = e.token_scores(target, image)
    chosen = [score[list(choice)].mean() for choice in itertools.combinations(range(6), k)]
    assert np.mean(chosen) == pytest.approx(score.mean(), abs=1e-12)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=8))
@PROPERTY
def test_scores_are_those_of_the_region_method(pairs):
    target, image = np.array(pairs).T
    a, v = (torch.from_numpy(part)[None] for part in (target, image))
    of_method = 0.5 * (1 + token_ratio(a, v))[0].numpy()
    assert e.token_scores(target, image) == pytest.approx(of_method, abs=1e-9)
    assert e.pooled_score(target, image) == pytest.approx(float(target_attention(a, v, torch.ones_like(a).bool())))


@given(st.integers(1, 40), st.integers(0, 1000))
@PROPERTY
def test_lift_of_a_random_region_is_one_whatever_its_size(size, seed):
    random = np.random.default_rng(seed)
    attention = np.exp(random.normal(0, 2, 40))
    lifts = [
        e.lift(np.array(attention[random.permutation(40)[:size]].sum()), np.array(attention.sum()), size / 40)
        for _ in range(400)
    ]
    assert np.mean(lifts) == pytest.approx(1.0, abs=5 * np.std(lifts) / 20 + 1e-9)


def test_lift_without_attention_to_the_image_is_not_a_number():
    assert np.isnan(e.lift(np.zeros(1), np.zeros(1), 0.1)).all()


# ------------------------------------------------------------------------------------------------------------ bins


@given(st.integers(1, 30), st.integers(1, 6))
@PROPERTY
def test_rank_bins_are_as_equal_as_can_be_and_ordered(n, bins):
    values = np.random.default_rng(n).normal(size=n)
    of = e.rank_bins(values, bins)
    counts = np.bincount(of, minlength=bins)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    assert (np.diff(of[np.argsort(values)]) >= 0).all()


def test_binned_means_leave_out_empty_bins_and_numbers_that_were_not_measured():
    values = np.array([1.0, 3.0, math.nan, 5.0])
    assert np.array_equal(e.binned(values, np.array([0, 0, 0, -1]), 2), [2.0, math.nan], equal_nan=True)


# ------------------------------------------------------------------------------------------------------- intervals


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random, covered = np.random.default_rng(0), 0
    prompts = np.repeat(np.arange(40), 4)
    for _ in range(100):
        values = 0.3 + np.repeat(random.normal(size=40), 4) + 0.5 * random.normal(size=160)
        estimate = e.mean(values, prompts)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize("prompts", [3, 4, 6, 9, 12])
def test_few_prompts_do_not_make_intervals_too_narrow(prompts):
    """5 % of 300 intervals may miss the null; 27 misses are three standard deviations more."""
    random, missed = np.random.default_rng(prompts), {"mean": 0, "ratio": 0, "rank correlation": 0}
    names = np.repeat(np.arange(prompts), 8)
    for _ in range(300):
        x, y = (np.repeat(random.normal(size=prompts), 8) + random.normal(size=8 * prompts) for _ in range(2))
        missed["mean"] += e.mean(x, names).excludes(0)
        missed["ratio"] += e.ratio(x, 2 + random.random(x.size), names).excludes(0)
        if prompts < e.FEW:
            missed["rank correlation"] += e.rank_correlation(x, y, names).excludes(0)
    assert max(missed.values()) <= (27 if prompts < e.FEW else 40), missed


@pytest.mark.parametrize("estimate", [e.mean([0.1, 0.9], [0, 1]), e.rank_correlation(range(8), range(8), [0, 1] * 4)])
def test_two_prompts_have_no_interval(estimate):
    assert math.isnan(estimate.low)


def test_responses_of_one_prompt_are_no_independent_evidence():
    values = np.random.default_rng(0).normal(size=20)
    once, copied = e.mean(values, range(20)), e.mean(np.repeat(values, 50), np.repeat(range(20), 50))
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.05)


def test_one_prompt_has_a_value_and_no_interval():
    estimate = e.mean([0.2, 0.4], ["a", "a"])
    assert estimate.value == pytest.approx(0.3)
    assert estimate.text(2) == "0.30 [no interval]"
    assert not estimate.excludes(0)


def test_values_that_all_agree_have_no_interval_of_no_width():
    assert e.mean(np.zeros(32), range(32)).text(1) == "0.0 [no interval]"


def test_nothing_to_average_says_so():
    assert e.mean([math.nan], ["a"]).text() == "not measured"
    assert e.mean([], []).text() == "not measured"
    assert math.isnan(e.rank_correlation([], [], []).value)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=30)
    assert e.mean(values, range(30), seed=1) == e.mean(values, range(30), seed=1)
    assert e.mean(values, range(30), seed=1) != e.mean(values, range(30), seed=2)


@given(st.lists(st.integers(0, 4), min_size=3, max_size=12, unique=False), st.integers(0, 100))
@PROPERTY
def test_rank_correlation_sees_order_alone(values, seed):
    x = np.array(values, float)
    y = np.random.default_rng(seed).permutation(x)
    found = e.spearman(x, y)
    if len(set(values)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(e.spearman(np.exp(x), 3 * y + 1))
        assert e.spearman(x, x) == pytest.approx(1)
        assert -1 - 1e-9 <= found <= 1 + 1e-9


def test_concordance_compares_within_a_prompt_so_difficulty_cannot_produce_it():
    # easy prompts have a high score and are often right; within a prompt the score says nothing
    prompts, covered = np.repeat(np.arange(60), 8), 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        easy = np.repeat(random.integers(0, 2, 60), 8)
        score = easy + 0.1 * random.normal(size=480)
        correct = (random.random(480) < np.where(easy, 0.8, 0.3)).astype(float)
        assert e.rank_correlation(score, correct, prompts).low > 0.2
        within = e.concordance(score, correct, prompts)
        covered += within.low <= 0.5 <= within.high
    assert covered >= 17


def test_concordance_of_what_decides_is_one_and_without_pairs_there_is_none():
    correct = np.array([1.0, 0.0, 1.0, 0.0])
    assert e.concordance(correct, correct, "aabb").value == 1
    assert math.isnan(e.concordance(correct, np.ones(4), "aabb").value)


def test_the_dependence_of_a_report_is_the_causal_effect_of_a_diagnosis():
    delta_T = np.linspace(-15, 15, 301)
    zeros_1T = torch.zeros(1, 301, dtype=torch.float64)
    wanted = causal_effect(torch.from_numpy(delta_T)[None], zeros_1T, zeros_1T == 0, FaithfulMethod.k_max)[0]
    np.testing.assert_allclose(e.dependence(delta_T), wanted.numpy())
    masses = [np.array([0.1, 0.2, 0.3, np.nan]), np.array([0.3, 0.2, 0.1])]
    effects = [np.array([0.0, -1.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0])]
    assert e.attention_by_effect(masses, effects, [0, 1]).value == pytest.approx(0)  # of 1 and -1, not of pooled tokens
