"""Tests and bounds over images against slow references."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from collapse_probe.statistics.intervals import (
    beyond,
    count_bounds,
    count_difference_bounds,
    jackknife,
    mean_parts,
    parts_stderr,
    quotient_bounds,
)
from collapse_probe.statistics.kappa import kappa, kappa_parts, kappa_stderr
from collapse_probe.statistics.permutation import PERMUTATIONS, sign_flips


def draws(images, places, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1.0, (images, places))


def flipped_by_hand(differences):
    """The share of all sign patterns whose sum is at least the one seen, one image at a time."""
    seen, counted = sum(differences), 0
    for signs in product((1, -1), repeat=len(differences)):
        counted += sum(s * d for s, d in zip(signs, differences, strict=True)) >= seen - 1e-9
    return counted / 2 ** len(differences)


def test_few_images_are_flipped_in_every_way():
    differences = draws(7, 4, 0.5)
    found = sign_flips(differences)
    assert found.exact
    assert found.permutations == 128
    assert found.p == pytest.approx([flipped_by_hand(column) for column in differences.T])


@pytest.mark.parametrize("images", [6, 40])
def test_sign_flips_agree_with_scipy(images):
    differences = draws(images, 3, 0.2, seed=2)
    ours = sign_flips(differences, seed=1).p
    for place, p in enumerate(ours):
        result = stats.permutation_test(
            (differences[:, place],),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            alternative="greater",
            n_resamples=PERMUTATIONS,
            vectorized=True,
            rng=np.random.default_rng(3),
        )
        assert p == pytest.approx(result.pvalue, abs=1e-9 if images == 6 else 0.02)


def test_random_flips_are_seeded_and_never_zero():
    differences = draws(200, 2, 3.0)
    one, again, other = (sign_flips(differences, seed=s) for s in (5, 5, 6))
    assert not one.exact
    assert one.p.tolist() == again.p.tolist() == [1 / (1 + PERMUTATIONS)] * 2
    weak = draws(200, 2, 0.05)
    assert sign_flips(weak, seed=5).p.tolist() != sign_flips(weak, seed=6).p.tolist()
    assert (other.smallest == 1 / (1 + PERMUTATIONS)).all()


@pytest.mark.parametrize("images", [1, 3, 10])
def test_the_smallest_p_value_is_two_to_the_minus_images(images):
    found = sign_flips(np.ones((images, 1)))
    assert found.p == pytest.approx([2.0**-images])
    assert found.smallest == pytest.approx([2.0**-images])


def test_many_images_are_flipped_in_groups_which_changes_little():
    differences = draws(2500, 6, 0.02, seed=4)
    found = sign_flips(differences)
    assert found.permutations == PERMUTATIONS
    assert found.smallest.tolist() == [1 / (1 + PERMUTATIONS)] * 6
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0, alternative="greater").pvalue, abs=0.03)


def test_p_values_are_uniform_where_nothing_is_there():
    p = sign_flips(draws(12, 2000)).p
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.03)


def test_undefined_images_are_left_out_and_equal_ones_say_nothing():
    differences = np.array([[1.0, np.nan, 0.0], [2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [np.nan] * 3])
    found = sign_flips(np.concatenate([differences, np.full((4, 1), np.nan)], 1))
    assert found.p.tolist() == pytest.approx([1 / 8, 1 / 4, 1.0, np.nan], nan_ok=True)
    assert found.smallest.tolist() == pytest.approx([1 / 8, 1 / 4, 1.0, np.nan], nan_ok=True)


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


def test_parts_give_the_delta_method_error_of_kappa():
    real, null = 0.8 + 0.02 * draws(50, 4), 0.6 + 0.03 * draws(50, 4, seed=1)
    values, parts, defined = kappa_parts(real, null)
    errors = [x.std(0, ddof=1) / np.sqrt(50) for x in (real, null)]
    covariance = np.array([np.cov(real[:, p], null[:, p])[0, 1] for p in range(4)]) / 50
    slow = kappa_stderr((real.mean(0), errors[0]), (null.mean(0), errors[1]), covariance)
    assert values == pytest.approx(kappa(real.mean(0), null.mean(0)))
    assert parts_stderr(parts, defined.sum(0)) == pytest.approx(slow)


def test_parts_say_what_leaving_an_image_out_does():
    real, null = 0.8 + 0.02 * draws(200, 1), 0.6 + 0.03 * draws(200, 1, seed=1)
    whole, parts, _ = kappa_parts(real, null)
    without = [kappa_parts(np.delete(real, i, 0), np.delete(null, i, 0))[0][0] for i in range(5)]
    assert whole[0] - np.array(without) == pytest.approx(parts[:5, 0], rel=0.05)


def test_kappa_next_to_a_null_of_one_has_no_part():
    value, parts, _ = kappa_parts(np.ones((3, 1)), np.ones((3, 1)))
    assert np.isnan(value).all()
    assert (parts == 0).all()


def test_a_count_is_bounded_by_the_pairs_that_are_sure():
    means, error = np.array([0.97, 0.905, 0.895, 0.5, np.nan]), np.array([0.005, 0.01, 0.01, 0.01, np.nan])
    assert count_bounds(means, error, np.full(5, 100), 0.9).tolist() == [1.0, 3.0]
    assert count_bounds(means[:4], np.zeros(4), np.full(4, 100), 0.9).tolist() == [2.0, 2.0]
    assert np.isnan(count_bounds(means[:2], np.full(2, np.nan), np.ones(2), 0.9)).all()
    assert np.isnan(count_bounds(np.full(2, np.nan), error[:2], np.ones(2), 0.9)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=12), st.floats(0.0, 0.1), st.integers(2, 500))
def test_a_count_lies_within_its_bounds_which_widen_with_the_error(means, error, images):
    values, n = np.array(means), np.full(len(means), images)
    low, high = count_bounds(values, np.full(len(means), error), n, 0.9)
    wide_low, wide_high = count_bounds(values, np.full(len(means), 2 * error), n, 0.9)
    assert 0 <= wide_low <= low <= (values > 0.9).sum() <= high <= wide_high <= len(means)


def differing(first, second):
    return count_difference_bounds(mean_parts(np.asarray(first)), mean_parts(np.asarray(second)), 0.9).tolist()


def bounds_by_hand(first, second):
    """Place by place: every combination of sides that the three bounds leave open."""
    reach = stats.t.ppf(1 - 0.05 / (3 * first.shape[1]), len(first) - 1)
    low = high = 0
    for one, other in zip(first.T, second.T, strict=True):
        sides, (apart, error) = [], ((other - one).mean(), stats.sem(other - one))
        for values in (one, other):
            mean, stderr = values.mean(), stats.sem(values)
            sides.append({bool(mean + sign * reach * stderr > 0.9) for sign in (-1, 1)})
        combinations = [b - a for a, b in product(*sides)]
        if apart - reach * error >= 0:
            combinations = [c for c in combinations if c >= 0]
        if apart + reach * error <= 0:
            combinations = [c for c in combinations if c <= 0]
        low, high = low + min(combinations), high + max(combinations)
    return [low, high]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("together", [0.0, 0.99])
def test_the_difference_of_counts_is_bounded_by_what_three_bounds_leave_open(seed, together):
    first = 0.9 + 0.01 * draws(20, 6, seed=seed)
    second = 0.9 + 0.01 * (together * (first - 0.9) / 0.01 + (1 - together) * draws(20, 6, 0.3, seed + 50))
    assert differing(first, second) == bounds_by_hand(first, second)
    assert differing(second, first) == [-end for end in bounds_by_hand(first, second)[::-1]]


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
