"""Moments of parts joined are those of the whole, with all digits where values hardly vary."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.moments import ONE, joined, moments_of
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments


def exactly(values):
    """Mean, Σ(x − mean)² and Σ(x − mean)³ in fractions."""
    numbers = [Fraction(x) for x in values]
    mean = sum(numbers) / len(numbers)
    return [float(mean), float(sum((x - mean) ** 2 for x in numbers)), float(sum((x - mean) ** 3 for x in numbers))]


@pytest.mark.parametrize("spread", [1.0, 1e-7, 1e-12])
@pytest.mark.parametrize("cuts", [[40], [1, 2, 40], [13, 14, 30, 40], list(range(1, 41))])
def test_parts_joined_are_the_whole_in_fractions(spread, cuts):
    values = 0.7 + spread * np.random.default_rng(0).exponential(size=40)
    count, moments = torch.tensor(0.0).double(), torch.zeros(3).double()
    first = 0
    for last in cuts:
        count, moments = joined((count, moments), moments_of([torch.tensor(values[first:last])], ONE), ONE)
        first = last
    mean, square, cube = exactly(values.tolist())
    assert count == 40
    assert moments[0].item() == pytest.approx(mean, rel=1e-15)
    assert moments[1].item() == pytest.approx(square, rel=1e-3 if spread < 1e-9 else 1e-8)
    assert moments[2].item() == pytest.approx(cube, rel=1e-2 if spread < 1e-9 else 1e-7)


def test_equal_values_vary_by_exactly_nothing():
    means = Means()
    means.add_means(value=(2,))
    for size in (3, 1, 7):
        means.add_images("value", torch.tensor([0.1, 1 / 3], dtype=torch.float64).expand(size, 2))
    mean, stderr, n = means.mean()
    assert mean.tolist() == [0.1, 1 / 3]
    assert stderr.tolist() == [0.0, 0.0]
    assert n.tolist() == [11.0, 11.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_pairs_joined_are_those_of_single_images(first, second, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, first + second, 3)) + 1.5
    x[rng.random(x.shape) < 0.2] = np.nan
    parts = [moments_of([torch.tensor(x[at]), torch.tensor(y[at])], MONOMIALS) for at in (slice(first), slice(first, None))]
    count, moments = joined(*parts, MONOMIALS)
    whole, found = PairMoments.of(1 - x, 1 - y), PairMoments.of_sums(count.numpy(), moments.numpy())
    np.testing.assert_array_equal(found.images, whole.images)
    np.testing.assert_allclose(found.central, whole.central, rtol=1e-9, atol=1e-12)


def test_a_place_that_no_image_defines_has_no_mean():
    means = Means()
    means.add_means(value=(2,))
    means.add_images("value", torch.tensor([[1.0, torch.nan], [3.0, torch.nan]]))
    mean, stderr, n = means.mean()
    assert (mean[0], stderr[0], n.tolist()) == (2.0, 1.0, [2.0, 0.0])
    assert np.isnan([mean[1], stderr[1]]).all()
    assert np.isnan(means.bounds()[1]).all()
