"""Kappa's interval against slow references, from single images and from sums, and where it is open or undefined."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, special, stats

from collapse_probe.statistics.estimates import kappa_of
from collapse_probe.statistics.intervals import beyond
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments, kappa, kappa_interval, kappa_parts


def similarities(images, places=4, seed=0):
    """Real and wrong-token similarities, skewed, of which the room 1 − null varies much over images."""
    generator = np.random.default_rng(seed)
    room = 0.2 * np.exp(0.6 * generator.normal(size=(images, places)))
    kept = np.linspace(0.2, 1.1, places) * np.exp(0.4 * generator.normal(size=(images, places)))
    return 1 - kept * room, 1 - room


def more_extreme(values, sign):
    """p that the mean of a sample lies on the side `sign` of 0: the larger of Student's and Hall's."""
    x = sign * values
    n, skewness = len(x), stats.skew(x)
    u = x.mean() / x.std(ddof=1)
    hall = u + skewness * u**2 / 3 + skewness**2 * u**3 / 27 + skewness / (6 * n)
    return special.stdtr(n - 1, -np.sqrt(n) * min(u, hall))


def ends_by_hand(real, null, tail=0.025):
    """All k for which x − (1 − k) y is not told from 0, on a line of angles: the last kept one on either side."""
    x, y = 1 - real, 1 - null
    middle = np.arctan2(x.mean(), y.mean())

    def last(out, sign, open_end):
        def reached(angle):
            return more_extreme(np.cos(angle) * x - np.sin(angle) * y, sign) - tail

        return open_end if reached(out) > 0 else 1 - np.tan(optimize.brentq(reached, middle, out, xtol=1e-14))

    return last(np.pi / 2, -1, -np.inf), last(0.0, 1, 1.0)


@pytest.mark.parametrize("images", [8, 16, 60])
@pytest.mark.parametrize("tail", [0.025, 0.002])
def test_the_interval_is_what_the_tests_of_single_images_do_not_reject(images, tail):
    real, null = similarities(images, seed=images)
    ours = kappa_interval(PairMoments.of(real, null), tail)
    for place, (low, high) in enumerate(ours):
        assert (low, high) == pytest.approx(ends_by_hand(real[:, place], null[:, place], tail))


def test_sums_give_what_single_images_give():
    real, null = similarities(30)
    real[3, 1] = null[7, 2] = np.nan
    whole = PairMoments.of(real, null)
    defined = np.isfinite(real + null)
    sides = [np.where(defined, 1 - side, np.nan) for side in (real, null)]
    means = [np.nanmean(side, 0) for side in sides]
    x, y = (np.where(defined, side - mean, 0.0) for side, mean in zip(sides, means, strict=True))
    sums = np.stack([*means, *((x**a * y**b).sum(0) for a, b in MONOMIALS[2:])])
    parts = PairMoments.of_sums(defined.sum(0).astype(float), sums)
    assert whole.images.tolist() == [30, 29, 29, 30]
    assert parts.central == pytest.approx(whole.central)
    assert kappa_interval(parts) == pytest.approx(kappa_interval(whole))


def test_a_mean_along_a_direction_is_that_of_the_images():
    real, null = similarities(25)
    mean, error, skewness = PairMoments.of(real, null).along(-1.0, 1.0)
    assert mean == pytest.approx((real - null).mean(0))
    assert error == pytest.approx(stats.sem(real - null))
    assert skewness == pytest.approx(stats.skew(real - null))


def test_it_is_above_0_just_where_the_pair_is_found_above_its_null():
    real, null = similarities(20, 400, seed=5)
    moments = PairMoments.of(real, null)
    mean, error, skewness = moments.along(-1.0, 1.0)
    found, low = beyond(mean, error, moments.images, skewness) <= 0.025, kappa_interval(moments)[:, 0]
    assert 0 < found.sum() < 400
    assert (found == (low > 0)).all()


def test_a_room_that_a_few_images_cannot_tell_from_none_leaves_the_lower_end_open():
    null = 1 - np.array([1e-3, 0.3, 2e-3])
    low, high = kappa_interval(PairMoments.of(1 - 0.5 * (1 - null) ** 1.1, null))
    assert low == -np.inf
    assert 0 < high <= 1
    real, null = similarities(3, 1)
    assert kappa_of(np.column_stack([real, real]), np.column_stack([null, [0.9, 0.999, 0.5]])).ci95 == pytest.approx(
        (np.nan, np.nan), nan_ok=True
    )


def test_undefined_kappas_and_single_images_have_no_interval():
    assert np.isnan(kappa_interval(PairMoments.of(np.ones((5, 1)), np.ones((5, 1))))).all()
    assert np.isnan(kappa_interval(PairMoments.of(*similarities(1)))).all()
    assert np.isnan(kappa_interval(PairMoments.of(np.full((5, 1), np.nan), np.zeros((5, 1))))).all()


def test_identical_maps_have_a_kappa_of_1_and_constant_ones_no_width():
    _, null = similarities(9)
    assert kappa_interval(PairMoments.of(np.ones_like(null), null)) == pytest.approx(np.ones((4, 2)))
    low, high = kappa_interval(PairMoments.of(np.full((9, 1), 0.75), np.full((9, 1), 0.5)))[0]
    assert (low, high) == pytest.approx((0.5, 0.5))


def test_an_interval_holds_its_kappa_and_narrows_with_images():
    widths = []
    for images in (20, 80, 320):
        real, null = similarities(images, 1)
        low, high = kappa_interval(PairMoments.of(real, null))[0]
        assert low < kappa(real.mean(0), null.mean(0))[0] < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_a_headline_kappa_of_one_pair_has_the_interval_of_that_pair():
    real, null = similarities(40, 1)
    assert kappa_of(real, null).ci95 == pytest.approx(tuple(kappa_interval(PairMoments.of(real, null))[0]))


def test_the_interval_of_a_headline_kappa_is_narrower_than_the_mean_of_the_intervals():
    real, null = similarities(40, 6)
    low, high = kappa_of(real, null).ci95
    lows, highs = kappa_interval(PairMoments.of(real, null)).mean(0)
    value = kappa_parts(real, null)[0].mean()
    assert lows < low < value < high < highs
