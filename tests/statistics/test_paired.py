"""Paired differences: against scipy and by hand, at their limits, and where numbers are missing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from collapse_probe.statistics.kappa import kappa
from collapse_probe.statistics.paired import Sides, compare_sides, controlled
from collapse_probe.statistics.proportions import paired_shares


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_the_numbers_are_those_of_the_paired_t_test_but_for_skewness(rng):
    first, second = rng.normal(size=(2, 40, 3))
    second += np.array([0.0, 0.5, 1.5])
    each = np.concatenate([second - first, first - second])  # no skewness
    found = compare_sides(Sides(np.zeros_like(each), each + 0.1))
    np.testing.assert_allclose(found.difference, 0.1)
    reference = stats.ttest_1samp(each + 0.1, 0)
    np.testing.assert_allclose(found.p, reference.pvalue)
    np.testing.assert_allclose(found.ci95.T, reference.confidence_interval())
    np.testing.assert_allclose(found.q, stats.false_discovery_control(found.p))
    assert found.interval == ("paired t",) * 3
    assert found.images.tolist() == [80] * 3
    skewed = compare_sides(Sides(np.zeros((40, 3)), np.exp(second)))
    plain = np.transpose(stats.ttest_1samp(np.exp(second), 0).confidence_interval())
    assert (skewed.ci95[:, 1] > plain[:, 1] + 1e-3).all(), "wider where the tail is"
    np.testing.assert_allclose(skewed.ci95[:, 0], plain[:, 0])


def some_sides(rng, images, nulls=False, pooled=False):
    one, other = rng.uniform(0.5, 0.9, (2, images, 6))
    other += rng.uniform(-0.1, 0.1, 6)
    of = (one - rng.uniform(0.1, 0.3, one.shape), other - rng.uniform(0.1, 0.3, one.shape)) if nulls else None
    return Sides(one, other, of, pooled)


@pytest.mark.parametrize("images", [2, 8, 30])
@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_p_is_below_a_twentieth_just_where_the_interval_leaves_out_0(rng, images, nulls, pooled):
    seen = set()
    for _ in range(6 if nulls else 12):
        found = compare_sides(some_sides(rng, images, nulls, pooled))
        known = np.isfinite(found.ci95).all(1)
        apart = (found.ci95[:, 0] > 0) | (found.ci95[:, 1] < 0)
        assert (apart[known] == (found.p < 0.05)[known]).all()
        assert (found.p[~known & np.isfinite(found.p)] >= 0.05).all(), "open: nothing is left out"
        seen |= set(apart[known].tolist())
    assert images < 8 or seen == {True, False}


def test_answers_right_and_wrong_have_the_interval_and_test_of_shares(rng):
    first, second = (rng.random((2, 30, 3)) < 0.8).astype(float)
    found = compare_sides(Sides(first, second, answers=True))
    ci95, p = paired_shares(first, second)
    np.testing.assert_array_equal(found.ci95, ci95)
    np.testing.assert_array_equal(found.p, p)
    assert found.interval == ("Tango",) * 3
    same = compare_sides(Sides(first, first, answers=True))
    assert (same.ci95[:, 0] < -0.1).all()
    assert (same.ci95[:, 1] > 0.1).all()
    assert (same.p == 1).all()
    assert same.interval == ("Tango",) * 3


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
            there, known = found.images > 0, found.images > 1
            assert (found.difference[there] == 0).all()
            assert (found.ci95[known] == 0).all()
            assert (found.p[known] == 1).all()
            assert np.isnan(found.ci95[~known]).all()
            assert np.isnan(found.p[~known]).all()
            assert (found.effect[there] == 0).all()
            assert found.interval == tuple("identical" if at else "none" for at in known)


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
    assert found.interval == ("none", "paired t")


def test_one_image_has_no_interval(rng):
    found = compare_sides(Sides(*rng.normal(size=(2, 1, 2))))
    assert np.isnan(found.ci95).all()
    assert found.interval == ("none", "none")
    assert np.isnan(found.p).all()


def test_a_difference_that_does_not_vary_has_no_interval(rng):
    """Nothing is known of how it would vary: a share of 0 against one of 1 in every image, or 0 on both sides."""
    for first, second in ((0.0, 0.5), (0.0, 0.0), (1.0, 1.0)):
        found = compare_sides(Sides(np.full((9, 1), first), np.full((9, 1), second)))
        assert found.difference == second - first
        assert np.isnan(found.ci95).all()
        assert np.isnan(found.p).all()
        assert found.interval == ("none",)
    values = rng.uniform(0.2, 0.9, (9, 1))
    assert compare_sides(Sides(values, values)).interval == ("identical",)


def test_the_pooled_place_is_the_mean_over_places(rng):
    first, second = rng.normal(size=(2, 25, 4))
    found = compare_sides(Sides(first, second, pooled=True))
    assert found.places == 1
    assert found.difference[0] == pytest.approx((second - first).mean())
    one = (second - first).mean(1)
    alone = compare_sides(Sides(np.zeros((25, 1)), one[:, None]))
    np.testing.assert_allclose(found.ci95, alone.ci95)
    np.testing.assert_allclose(found.p, alone.p)


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_swapping_turns_the_sign(rng, nulls, pooled):
    sides = some_sides(rng, 20, nulls, pooled)
    turned = Sides(sides.second, sides.first, sides.nulls and sides.nulls[::-1], pooled)
    one, back = compare_sides(sides), compare_sides(turned)
    np.testing.assert_allclose(back.difference, -one.difference)
    np.testing.assert_allclose(back.ci95, -one.ci95[:, ::-1])
    np.testing.assert_allclose(back.p, one.p)


@pytest.mark.parametrize("count", [1, 2, 11, 500])
def test_control_of_the_false_discovery_rate_is_that_of_scipy(count):
    p = np.random.default_rng(count).random(count) ** 3
    p[count // 2 :: 3] = p[0]  # ties
    np.testing.assert_array_equal(controlled(p), stats.false_discovery_control(p))


def test_control_of_the_false_discovery_rate_skips_what_is_undefined():
    assert controlled(np.array([np.nan, np.nan])).tolist() == pytest.approx([np.nan, np.nan], nan_ok=True)
    np.testing.assert_allclose(controlled(np.array([0.01, np.nan, 0.02, 0.03])), [0.03, np.nan, 0.03, 0.03])
