"""Tests and bounds over images against slow references."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from collapse_probe.statistics.intervals import (
    RESAMPLED_AT_ONCE,
    beyond,
    bootstrapped_error,
    combined,
    count_bounds,
    count_difference_bounds,
    interval,
    jackknife,
    mean_parts,
    parts_interval,
    parts_skewness,
    parts_stderr,
    quotient_bounds,
    skewness_of,
)
from collapse_probe.statistics.kappa import kappa_parts


def draws(images, places, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1.0, (images, places))


@pytest.mark.parametrize("images", [3, 5, 16, 60])
@pytest.mark.parametrize("tail", [0.025, 0.001])
def test_an_interval_ends_where_both_tests_stop_rejecting(images, tail):
    skewed = np.exp(draws(images, 5, seed=images))
    skewed[:, 1] *= -1
    numbers = mean_parts(skewed)
    for values, (low, high) in zip(skewed.T, parts_interval(numbers, tail), strict=True):
        assert (low, high) == pytest.approx(reference.interval_ends(values, tail))


def test_without_skewness_it_is_the_t_interval_and_never_narrower():
    values = draws(9, 40)
    means, parts, _ = numbers = mean_parts(values)
    plain = np.transpose(stats.t.interval(0.95, 8, means, stats.sem(values)))
    assert interval(means, parts_stderr(parts, 9), 9) == pytest.approx(plain)
    ours = parts_interval(numbers)
    assert (ours[:, 0] <= plain[:, 0] + 1e-12).all()
    assert (ours[:, 1] >= plain[:, 1] - 1e-12).all()
    left = stats.skew(values) < 0
    assert (ours[left, 0] < plain[left, 0]).all()
    assert (ours[~left, 1] > plain[~left, 1]).all()


def test_one_image_has_no_interval_and_two_have_the_t_interval():
    assert np.isnan(parts_interval(mean_parts(np.array([[1.0]])))).all()
    assert parts_interval(mean_parts(np.array([[1.0], [3.0]])))[0] == pytest.approx(stats.t.interval(0.95, 1, 2.0, 1.0))


def test_the_skewness_of_what_rounding_made_is_none():
    second, third = np.array([1e-10, 1e-2]), np.array([1e-15, 1e-3])
    assert skewness_of(second, third, np.ones(2), 100).tolist() == pytest.approx([0.0, 1.0])
    assert skewness_of(second, third, np.zeros(2), 100).tolist() == pytest.approx([1.0, 1.0])
    assert skewness_of(second, 1e9 * third, np.zeros(2), 5) == pytest.approx(3 / 2), "of one value apart from four equal ones"


def test_the_paired_test_rejects_just_where_the_interval_leaves_out_0():
    each = np.exp(draws(12, 300, seed=3)) - 1.2
    means, parts, defined = numbers = mean_parts(each)
    n = defined.sum(0)
    p = beyond(means, parts_stderr(parts, n), n, parts_skewness(parts, n))
    assert p[:20] == pytest.approx([reference.one_sided(values, 0) for values in each.T[:20]])
    assert 0 < (p <= 0.025).sum() < 300
    assert ((p <= 0.025) == (parts_interval(numbers)[:, 0] > 0)).all()


def test_a_sum_of_one_number_has_its_interval_and_one_of_independent_numbers_the_usual():
    values = draws(400, 2) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    numbers = mean_parts(values)
    n = np.full(2, 400)
    bounds = interval(numbers[0], parts_stderr(numbers[1], n), n)
    assert combined(numbers, bounds, np.array([0.0, 1.0])) == pytest.approx(bounds[1])
    for weights in (np.array([0.5, 0.5]), np.array([-1.0, 1.0]), np.array([-2.0, -1.0])):
        whole = values @ weights
        assert combined(numbers, bounds, weights) == pytest.approx(stats.t.interval(0.95, 399, whole.mean(), stats.sem(whole)))


def test_a_sum_reaches_as_far_as_the_ends_that_move_it():
    numbers = np.array([0.5, 0.3]), np.array([[1.0, 1.0], [-1.0, -1.0]]), np.ones((2, 2), dtype=bool)
    bounds = np.array([[0.1, 0.6], [0.2, 0.9]])  # wholly correlated: reaches add
    assert combined(numbers, bounds, np.array([1.0, 1.0])) == pytest.approx([0.3, 1.5])
    assert combined(numbers, bounds, np.array([-1.0, 1.0])) == pytest.approx([-0.2, 0.0])
    bounds[0, 0] = -np.inf
    assert np.isnan(combined(numbers, bounds, np.array([1.0, 1.0]))).all()
    assert combined(numbers, bounds, np.array([0.0, 1.0])) == pytest.approx([0.2, 0.9])


def test_the_paired_t_test_is_that_of_scipy():
    real, null = draws(20, 5, 0.3), draws(20, 5, seed=1)
    each = real - null
    ours = beyond(each.mean(0), each.std(0, ddof=1) / np.sqrt(20), 20)
    assert ours == pytest.approx(stats.ttest_rel(real, null, alternative="greater").pvalue)
    same = beyond(np.array([0.1, 0.0, -0.1]), np.zeros(3), 4)
    assert same.tolist() == [0.0, 0.5, 1.0]
    assert np.isnan(beyond(np.array(0.1), np.array(np.nan), 1))


def test_parts_give_the_standard_error_of_a_mean_place_by_place():
    values = draws(9, 3)
    values[2:5, 1] = np.nan
    means, parts, defined = mean_parts(values)
    for place in range(3):
        kept = values[np.isfinite(values[:, place]), place]
        assert means[place] == pytest.approx(kept.mean())
        assert parts_stderr(parts, defined.sum(0))[place] == pytest.approx(stats.sem(kept))
    assert parts.sum(0) == pytest.approx(0, abs=1e-12)
    assert np.isnan(parts_stderr(np.zeros((1, 2)), np.ones(2))).all()


def test_parts_say_what_leaving_an_image_out_does():
    real, null = 0.8 + 0.02 * draws(200, 1), 0.6 + 0.03 * draws(200, 1, seed=1)
    whole, parts, _ = kappa_parts(real, null)
    without = [kappa_parts(np.delete(real, i, 0), np.delete(null, i, 0))[0][0] for i in range(5)]
    assert whole[0] - np.array(without) == pytest.approx(parts[:5, 0], rel=0.05)


def test_kappa_next_to_a_null_of_one_has_no_part():
    value, parts, _ = kappa_parts(np.ones((3, 1)), np.ones((3, 1)))
    assert np.isnan(value).all()
    assert (parts == 0).all()


def counted(means, error, images, above=0.9):
    values = np.asarray(means)
    return count_bounds(values, lambda tail: interval(values, np.asarray(error), images, tail=tail), above)


def test_a_count_is_bounded_by_the_pairs_that_are_sure():
    means, error = [0.97, 0.905, 0.895, 0.5, np.nan], [0.005, 0.01, 0.01, 0.01, np.nan]
    assert counted(means, error, 100).tolist() == [1.0, 3.0]
    assert counted(means[:4], np.zeros(4), 100).tolist() == [2.0, 2.0]
    assert np.isnan(counted(means[:2], [np.nan] * 2, 1)).all()
    assert np.isnan(counted([np.nan] * 2, error[:2], 1)).all()
    ends = np.array([[-np.inf, 0.95], [0.91, 1.0]])
    assert count_bounds(np.array([0.7, 0.95]), lambda tail: ends, 0.9).tolist() == [1.0, 2.0], "an open end is no missing one"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=12), st.floats(0.0, 0.1), st.integers(2, 500))
def test_a_count_lies_within_its_bounds_which_widen_with_the_error(means, error, images):
    values = np.array(means)
    low, high = counted(values, np.full(len(means), error), images)
    wide_low, wide_high = counted(values, np.full(len(means), 2 * error), images)
    assert 0 <= wide_low <= low <= (values > 0.9).sum() <= high <= wide_high <= len(means)


def side(values):
    numbers = mean_parts(np.asarray(values))
    return numbers, lambda tail: parts_interval(numbers, tail)


def differing(first, second):
    return count_difference_bounds(side(first), side(second), 0.9).tolist()


def bounds_by_hand(first, second):
    """Place by place: every combination of sides that the three bounds leave open."""
    tail = 0.05 / (3 * first.shape[1])
    low = high = 0
    for one, other in zip(first.T, second.T, strict=True):
        ends, means = [reference.interval_ends(values, tail) for values in (one, other)], [one.mean(), other.mean()]
        sides = [{bool(end > 0.9) for end in each} for each in ends]
        combinations = [b - a for a, b in product(*sides)]
        together = np.corrcoef(one, other)[0, 1]
        down, up = (means[0] - ends[0][1], means[1] - ends[1][0]), (ends[0][0] - means[0], ends[1][1] - means[1])
        reach = [np.sqrt(a**2 + b**2 + 2 * together * a * b) for a, b in (down, up)]
        if means[1] - means[0] - reach[0] >= 0:
            combinations = [c for c in combinations if c >= 0]
        if means[1] - means[0] + reach[1] <= 0:
            combinations = [c for c in combinations if c <= 0]
        low, high = low + min(combinations), high + max(combinations)
    return [low, high]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [0.0, 0.99])
def test_the_difference_of_counts_is_bounded_by_what_three_bounds_leave_open(seed, together):
    first = 0.9 + 0.01 * draws(20, 6, seed=seed)
    second = 0.9 + 0.01 * (together * (first - 0.9) / 0.01 + (1 - together) * draws(20, 6, 0.3, seed + 50))
    low, high = bounds_by_hand(first, second)
    assert differing(first, second) == [low, high]
    assert differing(second, first) == [-high, -low]


def test_a_subject_differs_from_itself_by_nothing_and_a_sure_rise_loses_no_block():
    near = 0.9 + 0.01 * draws(20, 6)
    assert differing(near, near) == [0, 0]
    assert differing(near, near + 0.005 + 1e-5 * draws(20, 6, seed=1))[0] == 0
    assert differing(near, 0.9 + 0.01 * draws(20, 6, seed=1))[0] < 0
    few = near.copy()
    few[:, 1:] = 0.1
    other = few.copy()
    other[:, 1] = 0.99
    assert differing(few, other) == [1, 1]


def test_subjects_of_different_depth_are_counted_each_for_itself():
    low, high = 0.5 + 0.001 * draws(20, 3), 0.95 + 0.001 * draws(20, 5, seed=1)
    assert differing(low, high) == [5, 5]
    assert differing(high, low) == [-5, -5]
    undefined = np.full((20, 5), np.nan)
    assert differing(undefined, high) == [5, 5]
    assert np.isnan(differing(undefined, undefined)).all()
    assert np.isnan(differing(low[:1], high[:1])).all()


def test_fieller_ends_are_where_the_difference_is_no_longer_sure():
    a, a_reach, f, f_reach = 1.2, 0.3, 2.0, 0.7
    for q in quotient_bounds(np.array(a), np.array(a_reach), np.array(f), np.array(f_reach)):
        assert abs(a - q * f) == pytest.approx(np.hypot(a_reach, q * f_reach))
    exact = quotient_bounds(np.array([a, 0.0]), np.array([a_reach, 0.1]), np.full(2, f), np.zeros(2))
    assert exact == pytest.approx(np.array([[0.45, 0.75], [-0.05, 0.05]]))
    assert np.isnan(quotient_bounds(np.array(a), np.array(a_reach), np.array(f), np.array(2.1))).all()


def test_the_jackknife_of_a_mean_over_equal_groups_is_its_standard_error():
    values = draws(40, 3)
    groups = values.reshape(8, 5, 3)
    left_out = np.stack([np.delete(groups, g, 0).mean((0, 1)) for g in range(8)])
    error, used = jackknife(left_out)
    assert used == 8
    assert error == pytest.approx(stats.sem(groups.mean(1), axis=0))


def test_the_jackknife_leaves_out_empty_groups_and_tells_undefined_places():
    left_out = draws(6, 3)
    left_out[2] = np.nan
    left_out[4, 1] = np.nan
    error, used = jackknife(left_out)
    kept = np.delete(left_out, 2, 0)
    assert used == 5
    assert error[[0, 2]] == pytest.approx(np.sqrt(4 * kept.var(0))[[0, 2]])
    assert np.isnan(error[1])
    assert np.isnan(jackknife(left_out[:1])[0]).all()


@pytest.mark.parametrize(("images", "resamples"), [(2, 1000), (300, 1000), (RESAMPLED_AT_ONCE // 7, 24)])
def test_the_bootstrap_is_that_of_scipy(images, resamples):
    """To the last bit, also where the draws come in several batches."""
    values = np.random.default_rng(3).standard_exponential(images)
    found = bootstrapped_error(lambda chosen: values[chosen].mean(-1), images, seed=5, resamples=resamples)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=RESAMPLED_AT_ONCE // images,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    assert found == expected.standard_error
