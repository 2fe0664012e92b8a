"""Means over seeds and their intervals."""

import math

import numpy as np
import pytest

from sayo_verl.report.seeds import difference_of_means, over_seeds, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4.5, 2.6585), (9, 2.2622), (120, 1.9799)]
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-3)


def test_one_seed_has_no_interval_and_nan_is_no_seed():
    one = over_seeds([0.5, math.nan])
    assert (one.value, one.n) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(over_seeds([]).value)
    assert math.isnan(difference_of_means([], [1.0]).value)
    assert math.isnan(difference_of_means([1.0], [1.0, 2.0]).low)


def test_intervals_of_three_seeds_cover_the_truth_nineteen_times_in_twenty():
    random = np.random.default_rng(0)
    means = [over_seeds(random.normal(0, 1, 3)) for _ in range(2000)]
    differences = [difference_of_means(random.normal(0, 1, 3), random.normal(0, 2, 4)) for _ in range(2000)]
    for found in (means, differences):
        covered = np.mean([one.low <= 0 <= one.high for one in found])
        assert 0.935 <= covered <= 0.975


def test_seeds_that_agree_exactly_have_no_interval():
    same = difference_of_means([1.0, 1.0], [0.5, 0.5])
    assert same.value == 0.5
    assert not same.excludes(0)
    assert math.isnan(same.low)
    assert math.isnan(over_seeds([0.3, 0.3, 0.3]).low)
