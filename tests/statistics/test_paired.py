"""Paired differences: against scipy and by hand, at their limits, and where numbers are missing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from collapse_probe.statistics.kappa import kappa
from collapse_probe.statistics.paired import Sides, compare_sides, controlled


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_the_numbers_are_those_of_scipy(rng):
    first, second = rng.normal(size=(2, 40, 3))
    second += np.array([0.0, 0.5, 1.5])
    found = compare_sides(Sides(first, second), seed=3)
    each = second - first
    np.testing.assert_allclose(found.difference, each.mean(0))
    for place in range(3):
        assert found.p[place] == pytest.approx(stats.wilcoxon(second[:, place], first[:, place]).pvalue)
        reference = stats.bootstrap((each[:, place],), np.mean, method="BCa", n_resamples=4000, rng=np.random.default_rng(1))
        ends = reference.confidence_interval
        np.testing.assert_allclose(found.ci95[place], (ends.low, ends.high), atol=0.03)
    np.testing.assert_allclose(found.q, stats.false_discovery_control(found.p))
    assert found.interval == ("BCa",) * 3
    assert found.images.tolist() == [40] * 3


def test_the_effect_is_the_matched_rank_biserial_correlation():
    first = np.zeros((4, 1))
    second = np.array([[1.0], [2.0], [-3.0], [4.0]])  # ranks 1 + 2 + 4 against 3, of 10
    assert compare_sides(Sides(first, second)).effect[0] == pytest.approx(0.4)
    assert compare_sides(Sides(first, np.abs(second))).effect[0] == 1.0
    assert compare_sides(Sides(np.abs(second), first)).effect[0] == -1.0


@pytest.mark.parametrize("images", [1, 2, 3, 50])
def test_the_same_on_both_sides_is_exactly_nothing(rng, images):
    values, null = rng.uniform(0.2, 0.9, (2, images, 4))
    values[0, 2] = np.nan
    for sides in (Sides(values, values.copy()), Sides(values, values.copy(), (null, null.copy()))):
        for pooled in (False, True):
            found = compare_sides(Sides(sides.first, sides.second, sides.nulls, pooled))
            there = found.images > 0
            assert (found.difference[there] == 0).all()
            assert (found.ci95[there] == 0).all()
            assert (found.p[there] == 1).all()
            assert (found.effect[there] == 0).all()
            assert set(np.array(found.interval)[there]) == {"exact"}


def test_kappa_is_of_the_means_and_not_a_mean_of_ratios(rng):
    first, second = rng.uniform(0.6, 0.9, (2, 30, 2))
    nulls = (first - 0.2, second - 0.05)
    found = compare_sides(Sides(first, second, nulls))
    expected = [kappa(a.mean(0), b.mean(0)) for a, b in ((first, nulls[0]), (second, nulls[1]))]
    np.testing.assert_allclose(found.first, expected[0])
    np.testing.assert_allclose(found.second, expected[1])
    np.testing.assert_allclose(found.difference, expected[1] - expected[0])
    assert (found.ci95[:, 1] < 0).all()
    assert (found.ci95[:, 0] < found.difference).all()


def test_undefined_images_are_left_out_of_their_place_alone(rng):
    first, second = rng.normal(size=(2, 12, 3))
    holed = first.copy()
    holed[:5, 1] = np.nan
    whole, found = compare_sides(Sides(first, second)), compare_sides(Sides(holed, second))
    assert found.images.tolist() == [12, 7, 12]
    assert found.left_out.tolist() == [0, 5, 0]
    assert found.difference[1] == pytest.approx((second - first)[5:, 1].mean())
    np.testing.assert_array_equal(found.difference[[0, 2]], whole.difference[[0, 2]])
    np.testing.assert_array_equal(found.p[[0, 2]], whole.p[[0, 2]])


def test_a_place_that_no_image_defines_is_undefined(rng):
    first, second = rng.normal(size=(2, 6, 2))
    first[:, 0] = np.nan
    found = compare_sides(Sides(first, second))
    assert np.isnan([found.difference[0], found.p[0], found.q[0], *found.ci95[0]]).all()
    assert found.q[1] == found.p[1]
    assert found.interval == ("none", "BCa")


def test_one_image_has_no_interval(rng):
    found = compare_sides(Sides(*rng.normal(size=(2, 1, 2))))
    assert np.isnan(found.ci95).all()
    assert found.interval == ("none", "none")
    assert (found.p == 1).all()


def test_a_constant_difference_has_an_interval_of_no_width_that_says_its_kind():
    found = compare_sides(Sides(np.zeros((9, 1)), np.full((9, 1), 0.5)))
    np.testing.assert_array_equal(found.ci95, [[0.5, 0.5]])
    assert found.interval[0] in ("BCa", "percentile")
    assert found.p[0] == pytest.approx(2 / 2**9)


def test_many_images_get_the_percentile_interval(rng):
    first = rng.normal(size=(5001, 1))
    found = compare_sides(Sides(first, first + rng.normal(0.1, 1, size=(5001, 1))), resamples=200)
    assert found.interval == ("percentile",)
    assert found.ci95[0, 0] < found.difference[0] < found.ci95[0, 1]


def test_the_pooled_place_is_the_mean_over_places(rng):
    first, second = rng.normal(size=(2, 25, 4))
    found = compare_sides(Sides(first, second, pooled=True))
    assert found.places == 1
    assert found.difference[0] == pytest.approx((second - first).mean())
    assert found.p[0] == pytest.approx(stats.wilcoxon((second - first).mean(1)).pvalue)


def test_seeds_repeat_and_swapping_turns_the_sign(rng):
    first, second = rng.normal(size=(2, 20, 2))
    one, again = (compare_sides(Sides(first, second), seed=5) for _ in range(2))
    back = compare_sides(Sides(second, first), seed=5)
    np.testing.assert_array_equal(one.ci95, again.ci95)
    np.testing.assert_allclose(back.difference, -one.difference)
    np.testing.assert_allclose(back.p, one.p)


def test_control_of_the_false_discovery_rate_skips_what_is_undefined():
    assert controlled(np.array([np.nan, np.nan])).tolist() == pytest.approx([np.nan, np.nan], nan_ok=True)
    np.testing.assert_allclose(controlled(np.array([0.01, np.nan, 0.02, 0.03])), [0.03, np.nan, 0.03, 0.03])
