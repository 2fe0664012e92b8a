"""The scores of credit against a known truth, with cases worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.yardstick import scores
from benchmarks.yardstick.scores import Truth


def a_truth(right, perceptual, correct=None, prompt=None, lengths=None):
    right, perceptual = np.array(right, bool), np.array(perceptual, bool)
    B, T = right.shape
    lengths = np.full(B, T) if lengths is None else np.array(lengths)
    mask = np.arange(T)[None] < lengths[:, None]
    correct = (right | ~mask).all(1) if correct is None else np.array(correct, bool)
    return Truth(mask, perceptual & mask, right, correct, prompt or list(range(B)))


def test_auc_is_the_share_of_pairs_that_are_in_order_and_ties_count_half():
    values, hit = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
    pairs = [(3 > 2), (3 > 1), (1 > 2), 0.5]
    assert scores.auc(values, hit) == pytest.approx(sum(pairs) / 4)


@given(arrays(float, 12, elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])), arrays(bool, 12))
def test_auc_equals_the_count_of_all_pairs(values, hit):
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(values[hit], values[~hit])]
    expected = np.mean(pairs) if pairs else math.nan
    assert scores.auc(values, hit) == pytest.approx(expected, nan_ok=True)


def test_average_precision_by_hand():
    # order: hit, miss, hit: precision 1 and 2/3
    assert scores.average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True])) == pytest.approx(5 / 6)


@given(arrays(bool, 9).filter(lambda hit: 0 < hit.sum() < 9))
def test_average_precision_of_equal_values_is_the_share_of_positives(hit):
    assert scores.average_precision(np.ones(9), hit) == pytest.approx(hit.mean())


def test_values_that_are_highest_at_perceptual_tokens_score_one_and_uniform_values_zero():
    truth = a_truth([[1, 1, 1, 1], [1, 0, 1, 1]], [[0, 1, 0, 1], [1, 0, 0, 0]])
    perfect, uniform = truth.perceptual.astype(float), np.ones((2, 4))
    for score in (scores.separation, scores.precision):
        assert score(perfect, truth).value == pytest.approx(1.0)
        assert score(uniform, truth).value == pytest.approx(0.0)
    assert scores.separation(-perfect, truth).value == pytest.approx(-1.0)


def test_values_of_different_responses_are_never_ranked_against_each_other():
    truth = a_truth([[1, 1], [1, 1]], [[0, 1], [0, 1]])
    assert scores.separation(np.array([[1.0, 2.0], [101.0, 102.0]]), truth).value == pytest.approx(1.0)


def test_padding_is_never_read():
    truth = a_truth([[1, 1, 0]], [[0, 1, 1]], lengths=[2])
    assert scores.separation(np.array([[1.0, 2.0, math.nan]]), truth).value == pytest.approx(1.0)
    assert truth.first_error.tolist() == [3]
    assert truth.right_looks.tolist() == [1.0]


def test_error_compares_the_first_error_with_the_other_perceptual_tokens():
    truth = a_truth([[1, 1, 0, 0, 1]], [[1, 0, 1, 1, 0]])
    #      perceptual: 0 right, 2 first error, 3 later error; the others must not count
    assert scores.error(np.array([[1.0, 9.0, 3.0, 2.0, 9.0]]), truth).value == pytest.approx(1.0)
    assert scores.error(np.array([[1.0, 9.0, 1.5, 2.0, 9.0]]), truth).value == pytest.approx(0.0)


def test_a_response_whose_first_error_is_not_perceptual_has_no_error_score():
    truth = a_truth([[1, 0, 0]], [[1, 0, 1]])
    assert math.isnan(scores.error(np.array([[1.0, 2.0, 3.0]]), truth).value)


def test_blame_on_the_first_error_alone_scores_one_and_uniform_blame_zero():
    truth = a_truth([[1, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0]] * 2)
    uniform = np.array([[-0.5] * 4, [0.5] * 4])
    assert scores.blame(uniform, truth).value == pytest.approx(0.0)
    assert scores.afterwards(uniform, truth).value == pytest.approx(0.0)
    alone = np.where(np.arange(4) == 1, -2.0, 0.0)[None].repeat(2, 0)
    assert scores.blame(alone, truth).value == pytest.approx(1.0)
    assert scores.afterwards(alone, truth).value == pytest.approx(-1.0)
    # half of the blame on the first error and half on the last token: shares 1/2 against 1/4 and 2/4
    half = np.array([[0.0, -1.0, 0.0, -1.0], [1.0] * 4])
    assert scores.blame(half, truth).value == pytest.approx((1 / 2 - 1 / 4) / (3 / 4))
    assert scores.afterwards(half, truth).value == pytest.approx(0.0)


def test_right_responses_and_groups_without_contrast_carry_no_blame():
    truth = a_truth([[1, 0], [1, 0]], [[1, 1]] * 2, correct=[True, False])
    score = scores.blame(np.array([[-1.0, -1.0], [0.0, 0.0]]), truth)
    assert math.isnan(score.value)


def test_trajectory_ranks_the_factor_with_the_share_of_right_looks():
    truth = a_truth([[1, 1], [1, 0], [0, 0]], [[1, 1]] * 3)
    assert scores.trajectory(np.array([1.1, 1.0, 0.9]), truth).value == pytest.approx(1.0)
    assert scores.trajectory(np.array([0.9, 1.0, 1.1]), truth).value == pytest.approx(-1.0)
    assert math.isnan(scores.trajectory(np.ones(3), truth).value)


def test_look_reads_the_attention_at_perceptual_tokens_alone():
    truth = a_truth([[1, 1, 1]] * 3, [[1, 0, 1]] * 3)
    attention = np.array([[0.2, math.nan, 0.4], [0.1, math.nan, 0.1], [0.9, math.nan, 0.7]])
    assert scores.look(np.array([0.5, 0.1, 0.6]), attention, truth).value == pytest.approx(1.0)


def test_seeing_compares_right_and_wrong_looks_and_nothing_else():
    truth = a_truth([[1, 1, 0, 0]], [[1, 0, 1, 0]])
    attention = np.array([[0.6, math.nan, 0.2, math.nan]])
    assert scores.seeing(attention, truth).value == pytest.approx(1.0)
    assert scores.seeing(-attention, truth).value == pytest.approx(-1.0)
    assert scores.own_share(attention, truth).value == pytest.approx(0.4)


def test_late_over_early_compares_thirds_of_each_response():
    truth = a_truth([[1] * 6], [[1] + [0] * 5], lengths=[6])
    assert scores.late_over_early(np.array([[1.0, 3.0, 9, 9, 3.0, 5.0]]), truth).value == pytest.approx(2.0)


def test_carriers_counts_the_fewest_tokens_that_hold_a_share():
    truth = a_truth([[1] * 5], [[1] + [0] * 4], lengths=[4])
    assert scores.carriers(np.array([[1.0, 6.0, 2.0, 1.0, 99.0]]), truth, 0.8).value == pytest.approx(2 / 4)


def test_permuted_values_score_nothing():
    random = np.random.default_rng(0)
    perceptual = np.tile([0, 0, 1, 0], 6)[None].repeat(256, 0)
    right = random.random(perceptual.shape) > 0.2 * perceptual
    truth = a_truth(right, perceptual, prompt=[row // 8 for row in range(256)])
    values = perceptual + 0.1 * random.random(perceptual.shape)
    assert scores.separation(values, truth).value == pytest.approx(1.0)
    control = scores.permuted(values, truth)
    assert np.array_equal(np.sort(control), np.sort(values))
    estimate = scores.separation(control, truth)
    assert estimate.low < 0 < estimate.high


def test_halves_share_the_tokens_between_them():
    truth = a_truth([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], lengths=[5, 3])
    early, late = (scores.half(truth, each).mask for each in (False, True))
    assert early.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert late.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]


def test_answers_compares_responses_of_one_prompt_only():
    truth = a_truth([[1], [0], [1], [0]], [[1]] * 4, prompt=["a", "a", "b", "b"])
    assert scores.answers(np.array([0.2, 0.1, 0.9, 0.8]), truth).value == pytest.approx(1.0)
    assert scores.answers(np.array([0.1, 0.2, 0.9, 0.8]), truth).value == pytest.approx(0.0)
    assert scores.answers(np.array([0.1, 0.2, 0.8, 0.9]), truth).value == pytest.approx(-1.0)


def test_two_sets_of_values_are_not_permuted_in_the_same_order():
    truth = Truth(*(np.ones((4, 30), bool) for _ in range(3)), np.zeros(4, bool), "abcd")
    values = np.arange(120.0).reshape(4, 30)
    once, again, other = (scores.permuted(each, truth) for each in (values, values, values + 1))
    assert (once == again).all()
    assert (once != other - 1).any()
    assert (np.sort(once, 1) == values).all()
