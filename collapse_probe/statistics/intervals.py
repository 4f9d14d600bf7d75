"""How sure numbers over images are: t intervals, delta method, jackknife, bounds of counts and quotients, a paired t test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parts = tuple[Array, Array, NDArray[np.bool_]]
"""Numbers [places], what every image moves them by [images, places], and where images are defined [images, places]."""
RESAMPLES = 1000
RESAMPLED_AT_ONCE = 200_000


def interval(mean: Array, stderr: Array, n: Array | float) -> Array:
    """The 95 % t interval of means over n images, [..., 2] (low, high); NaN where n < 2."""
    degrees = np.maximum(np.asarray(n, dtype=np.float64) - 1, 1)
    reach = scipy.stats.t.ppf(0.975, degrees) * stderr
    return np.stack([mean - reach, mean + reach], axis=-1)


def half_width(bounds: Array) -> Array:
    """Half the length of intervals, [..., 2] -> [...]."""
    reach: Array = (bounds[..., 1] - bounds[..., 0]) / 2
    return reach


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], Array], images: int, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Array, Array]:
    """Standard error and 95 % percentile interval [..., 2] of a statistic of `images` images (two or more).

    `statistic(chosen)` takes indices of images, [..., images], drawn with replacement, and gives a value for each draw, [...]:
    whatever it reads of one image stays together.
    """
    result = scipy.stats.bootstrap(
        (np.arange(images),),
        lambda chosen, axis: statistic(chosen.astype(np.int64)),
        n_resamples=resamples,
        batch=max(1, RESAMPLED_AT_ONCE // images),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return np.asarray(result.standard_error), np.stack([low, high], axis=-1)


def beyond(difference: Array, stderr: Array, n: Array | float) -> Array:
    """One-sided p-value of a paired t test that a mean difference over n images is above 0; NaN where n < 2.

    Differences that are the same in all images (a standard error of 0) give 0, 1/2 or 1 by their sign.
    """
    degrees = np.maximum(np.asarray(n, dtype=np.float64) - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(stderr > 0, difference / stderr, np.where(difference == 0, 0.0, np.copysign(np.inf, difference)))
    found: Array = np.where(np.isfinite(stderr) & np.isfinite(difference), scipy.stats.t.sf(t, degrees), np.nan)
    return found


def mean_parts(values: Array) -> Parts:
    """Means over images of [images, places] -> [places], each image's part in them, and where images are defined.

    An image's part (x − mean)/n is what it moves the mean by: parts sum to 0; those of undefined values are 0. NaN means where
    nothing is defined.
    """
    defined = np.isfinite(values)
    count = defined.sum(0)
    safe = np.maximum(count, 1)
    means = np.where(count > 0, np.where(defined, values, 0.0).sum(0) / safe, np.nan)
    return means, np.where(defined, values - means, 0.0) / safe, defined


def parts_stderr(parts: Array, n: Array | float) -> Array:
    """Standard error √(n/(n − 1) · Σ parts²) over images of [images, ...] -> [...]; NaN where n < 2."""
    images = np.asarray(n, dtype=np.float64)
    found: Array = np.where(images > 1, np.sqrt(np.square(parts).sum(0) * images / np.maximum(images - 1, 1)), np.nan)
    return found


def count_bounds(means: Array, stderr: Array, n: Array, above: float) -> Array:
    """A 95 % interval [2] of how many of the means over n images, all [places], are truly above a threshold.

    From the places whose lower bound is above it to those whose upper bound is, each bound a one-sided t bound at 5 % over the
    number of places (Bonferroni): the truth is missed only where some place errs, and each can err on one side alone. So it
    covers at least 95 % however the places hang together, and more where few are near the threshold; a bootstrap of the count
    covers far less where many are. NaN where some place has fewer than two images; places without a mean count for nothing.

    >>> count_bounds(np.array([0.95, 0.91, 0.5]), np.full(3, 0.01), np.full(3, 50), 0.9).tolist()
    [1.0, 2.0]
    """
    known = np.isfinite(means)
    if not known.any() or not np.isfinite(stderr[known]).all():
        return np.full(2, np.nan)
    reach = scipy.stats.t.ppf(1 - 0.05 / known.sum(), np.maximum(np.asarray(n, dtype=np.float64) - 1, 1)) * stderr
    with np.errstate(invalid="ignore"):
        return np.array([(means - reach > above).sum(), (means + reach > above).sum()], dtype=np.float64)


def count_difference_bounds(first: Parts, second: Parts, above: float) -> Array:
    """A 95 % interval [2] of how many more numbers of the second than of the first are truly above a threshold.

    Both from the same images, place by place. At a place the difference is −1, 0 or 1: what one-sided t bounds of the first
    number, of the second and of second − first (paired by image: a number that is not lower cannot fall below) leave open.
    The ends are the sums over places. Each of the three bounds can err on one side alone, so that 5 % over three times the
    number of places (Bonferroni) covers at least 95 % however places and subjects hang together. A place where every image has
    the same numbers on both sides adds 0, exactly; one that only the longer side has counts for that side alone. NaN where
    some other place has fewer than two images.
    """
    first, second = _as_long(first, second), _as_long(second, first)
    same = _same(first, second)
    (one, one_parts, one_defined), (other, other_parts, other_defined) = (_only(side, ~same) for side in (first, second))
    apart: Parts = other - one, other_parts - one_parts, one_defined | other_defined
    each = ((one, one_parts, one_defined), (other, other_parts, other_defined), apart)
    known = [np.isfinite(means) for means, _, _ in each]
    bounds = int(sum(at.sum() for at in known))
    if not bounds:
        return np.where((np.isfinite(first[0]) & same).any(), np.zeros(2), np.nan)
    reaches = [_one_sided(parts, defined, bounds) for _, parts, defined in each]
    if not all(np.isfinite(reach[at]).all() for reach, at in zip(reaches, known, strict=True)):
        return np.full(2, np.nan)
    one_reach, other_reach, reach = reaches
    with np.errstate(invalid="ignore"):
        low = (other - other_reach > above).astype(np.int64) - (one + one_reach > above)
        high = (other + other_reach > above).astype(np.int64) - (one - one_reach > above)
        low = np.where(apart[0] - reach >= 0, np.maximum(low, 0), low)
        high = np.where(apart[0] + reach <= 0, np.minimum(high, 0), high)
    return np.array([low.sum(), high.sum()], dtype=np.float64)


def _same(first: Parts, second: Parts) -> NDArray[np.bool_]:
    """The places where both numbers and every image's part in them are the same."""
    (one, one_parts, _), (other, other_parts, _) = first, second
    equal: NDArray[np.bool_] = ((one == other) | (np.isnan(one) & np.isnan(other))) & (one_parts == other_parts).all(0)
    return equal


def _as_long(side: Parts, other: Parts) -> Parts:
    """The side with undefined places after its own, as many as the other has more."""
    means, parts, defined = side
    more = max(len(other[0]) - len(means), 0)
    return (
        np.pad(means, (0, more), constant_values=np.nan),
        np.pad(parts, ((0, 0), (0, more))),
        np.pad(defined, ((0, 0), (0, more))),
    )


def _only(side: Parts, places: NDArray[np.bool_]) -> Parts:
    means, parts, defined = side
    return means[places], parts[:, places], defined[:, places]


def _one_sided(parts: Array, defined: NDArray[np.bool_], bounds: int) -> Array:
    """How far one-sided t bounds at 5 % over their number reach, [places]; NaN with fewer than two images."""
    n = defined.sum(0)
    reach: Array = scipy.stats.t.ppf(1 - 0.05 / bounds, np.maximum(n - 1, 1)) * parts_stderr(parts, n)
    return reach


def quotient_bounds(above: Array, above_reach: Array, below: Array, below_reach: Array) -> Array:
    """The interval [..., 2] of a quotient of two independent numbers, from the half-widths of theirs (Fieller's theorem).

    All q with (above − q · below)² ≤ above_reach² + q² · below_reach². NaN where the interval of `below` holds 0: then no
    quotient is ruled out.

    >>> quotient_bounds(np.array(2.0), np.array(0.5), np.array(4.0), np.array(0.0)).tolist()
    [0.375, 0.625]
    """
    a, b, c = below**2 - below_reach**2, above * below, above**2 - above_reach**2
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(np.maximum(b**2 - a * c, 0.0))
        ends = np.stack([(b - root) / a, (b + root) / a], axis=-1)
    return np.where((a > 0)[..., None], ends, np.nan)


def jackknife(left_out: Array) -> tuple[Array, int]:
    """Standard error √((n − 1)/n · Σ_g (x_g − x̄)²) of a statistic from its values x_g without one of n groups of images each.

    [groups, ...] -> [...], and n. Groups that are NaN everywhere hold no images and are left out; a place where a used group
    is NaN, or with fewer than two groups every place, has no error (NaN).

    >>> error, groups = jackknife(np.array([1.0, 3.0, np.nan]))
    >>> error.item(), groups
    (1.0, 2)
    """
    used = np.isfinite(left_out).reshape(len(left_out), -1).any(1)
    values = left_out[used]
    n = len(values)
    if n < 2:
        return np.full(left_out.shape[1:], np.nan), n
    return np.sqrt((n - 1) / n * np.square(values - values.mean(0)).sum(0)), n
