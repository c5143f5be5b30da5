"""Statistics over seeds against scipy and values computed by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from tuneforge.comparison.paired_tests import (
    ALPHA,
    ci_half_width,
    holm_correction,
    mean_and_std,
    paired_t_test,
    seeds_to_decide,
)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_paired_test_and_its_interval_equal_scipys(count):
    generator = np.random.default_rng(count)
    first, second = generator.normal(0.9, 0.02, count), generator.normal(0.89, 0.02, count)
    found, known = paired_t_test(first, second), stats.ttest_rel(first, second)
    low, high = known.confidence_interval(1 - ALPHA)
    assert found.num_pairs == count
    assert (found.p_value, found.ci_low, found.ci_high) == pytest.approx((known.pvalue, low, high), rel=1e-9)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert found.std == pytest.approx(np.std(first - second, ddof=1))


def test_a_textbook_case_equals_the_value_computed_by_hand():
    found = paired_t_test(
        [0.90, 0.92, 0.94], [0.88, 0.91, 0.91]
    )  # differences 0.02, 0.01, 0.03: t = 0.02 / (0.01 / sqrt(3))
    t = 2 * math.sqrt(3)
    assert found.mean == pytest.approx(0.02)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))  # the t distribution with 2 degrees of freedom
    assert found.ci_high - found.mean == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)


def test_one_seed_is_not_tested():
    found = paired_t_test([0.9], [0.8])
    assert (found.num_pairs, found.std, found.ci_low, found.p_value, found.reason_untested) == (
        1,
        None,
        None,
        None,
        "one seed",
    )
    assert found.mean == pytest.approx(0.1)


def test_differences_without_variance_are_not_tested_however_large():
    found = paired_t_test([0.9, 0.9, 0.9], [0.1, 0.1, 0.1])
    assert (found.p_value, found.ci_low, found.ci_high) == (None, None, None)
    assert found.reason_untested == "every seed gives the same difference"
    assert paired_t_test([0.3, 0.1 + 0.2, 0.3], [0.1, 0.1, 0.1]).p_value is None, "they differ by rounding only"


def test_equal_values_are_no_difference():
    found = paired_t_test([0.9, 0.8], [0.9, 0.8])
    assert (found.mean, found.ci_low, found.ci_high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_holms_correction_equals_known_values():
    assert holm_correction([0.01, 0.04, 0.03, 0.005], num_comparisons=4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.6, 0.7], num_comparisons=2) == pytest.approx([1.0, 1.0])
    assert holm_correction([], num_comparisons=0) == []


def test_comparisons_without_a_p_value_count_for_the_correction():
    assert holm_correction([None, 0.01, 0.02], num_comparisons=3) == [None, pytest.approx(0.03), pytest.approx(0.04)]
    assert holm_correction([0.01], num_comparisons=5) == pytest.approx([0.05])


@pytest.mark.parametrize(("pairs", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622)])
def test_the_half_width_of_the_confidence_interval_equals_known_values(pairs, quantile):
    assert ci_half_width(pairs) == pytest.approx(quantile / math.sqrt(pairs), rel=1e-4)


def test_the_standard_deviation_is_that_of_a_sample():
    assert mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_std([4.0]) == (4.0, None)


def test_the_correction_keeps_comparisons_of_equals_from_having_a_winner():
    """A baseline and three equals, 400 times: one differs significantly in 7 %; uncorrected: 14 %."""
    generator = np.random.default_rng(0)
    corrected, uncorrected = 0, 0
    for _ in range(400):
        base, *others = generator.normal(size=(4, 5))
        p_values = [paired_t_test(each, base).p_value for each in others]
        corrected += min(holm_correction(p_values, num_comparisons=3)) < ALPHA
        uncorrected += min(p_values) < ALPHA
    assert corrected / 400 < 0.075
    assert uncorrected / 400 > 0.1


def test_seeds_to_decide_are_the_fewest_at_which_this_difference_is_significant():
    test = paired_t_test([1.0, 1.2, 0.9, 1.4], [0.9, 0.8, 1.0, 1.0])
    needed = seeds_to_decide(test, num_comparisons=1)
    limits = [ci_half_width(count) * test.std for count in (needed - 1, needed)]
    assert limits[1] <= abs(test.mean) < limits[0]
    assert seeds_to_decide(test, num_comparisons=3) > needed
    assert seeds_to_decide(paired_t_test([1.0, 2.0], [2.0, 1.0]), num_comparisons=1) is None  # no difference
    assert seeds_to_decide(paired_t_test([1.0, 2.001], [2.0, 1.0]), num_comparisons=1) is None  # more than 1,000
