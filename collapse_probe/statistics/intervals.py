"""How sure numbers over images are: intervals and a test that mind skewness, sums of numbers, counts, quotients, jackknife."""

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
RESOLVED = 1e-4
"""The skewness of values whose spread is a smaller share of their size is lost in the rounding of their sums."""


def interval(mean: Array, stderr: Array, n: Array | float, skewness: Array | float = 0.0, tail: Array | float = 0.025) -> Array:
    """The interval [..., 2] of means over n images that errs with `tail` on each side (95 %); NaN where n < 2.

    All means that neither Student's t test nor Hall's skewness-corrected one rejects, so that it is never narrower than the t
    interval, and on the side of the longer tail wider. `skewness` is the sample's (0: the t interval). See docs/intervals.md.
    """
    images = np.asarray(n, dtype=np.float64)
    reach = scipy.special.stdtrit(np.maximum(images - 1, 1), 1 - np.asarray(tail))  # scipy.stats loads for half a second
    low, high = _uncorrected(reach, skewness, images), _uncorrected(-reach, skewness, images)
    return np.stack([mean - np.maximum(reach, low) * stderr, mean - np.minimum(-reach, high) * stderr], axis=-1)


def corrected(t: Array, skewness: Array | float, n: Array) -> Array:
    """Hall's t of a sample of this skewness, distributed more like Student's (P. Hall, J. R. Stat. Soc. B 54, 1992, 221–228).

    √n (u + γ u²/3 + γ² u³/27 + γ/(6n)) with u = t/√n: it grows with t.
    """
    root = np.sqrt(np.maximum(n, 1))
    u = t / root
    found: Array = root * (u + skewness * u**2 / 3 + skewness**2 * u**3 / 27 + skewness / (6 * root**2))
    return found


def _uncorrected(t: Array, skewness: Array | float, n: Array) -> Array:
    """What `corrected` makes t of."""
    root, skew = np.sqrt(np.maximum(n, 1)), np.asarray(skewness, dtype=np.float64)
    flat = np.abs(skew) < 1e-6
    skew = np.where(flat, 1.0, skew)
    u = (np.cbrt(1 + skew * (t / root - skew / (6 * root**2))) - 1) * 3 / skew
    return np.where(flat, t, root * u)


def closed(bounds: Array) -> Array:
    """Intervals [..., 2] with NaN for both ends where one is open."""
    return np.where(np.isfinite(bounds).all(-1, keepdims=True), bounds, np.nan)


def skewness_of(second: Array, third: Array, scale: Array, n: Array | float) -> Array:
    """Skewness from the second and third central moments (over n, not n − 1).

    0 where the spread is less than `RESOLVED` of `scale` (the size of the values): there the third moment is rounding.
    """
    images = np.asarray(n, dtype=np.float64)
    spread = np.sqrt(np.maximum(second, 0.0))
    resolved = spread > RESOLVED * np.abs(scale)
    most = np.where(
        images > 2, (images - 2) / np.sqrt(np.maximum(images - 1, 1)), 0.0
    )  # that of one image apart from all others
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(resolved, np.clip(third / np.where(resolved, spread, 1.0) ** 3, -most, most), 0.0)


def half_width(bounds: Array) -> Array:
    """Half the length of intervals, [..., 2] -> [...]."""
    reach: Array = (bounds[..., 1] - bounds[..., 0]) / 2
    return reach


def bootstrapped_error(
    statistic: Callable[[NDArray[np.int64]], Array], images: int, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """The bootstrap's standard error of a statistic of `images` images (two or more), as scipy.stats.bootstrap has it.

    `statistic(chosen)` takes indices of images, [draws, images], drawn with replacement, and gives a value for each draw,
    [draws]: whatever it reads of one image stays together.
    """
    generator, at_once = np.random.default_rng(seed), max(1, RESAMPLED_AT_ONCE // images)
    counts = [min(at_once, resamples - first) for first in range(0, resamples, at_once)]
    values = [statistic(generator.integers(0, images, (count, images))) for count in counts]
    return float(np.std(np.concatenate(values), ddof=1))


def beyond(difference: Array, stderr: Array, n: Array | float, skewness: Array | float = 0.0) -> Array:
    """One-sided p-value of a paired test that a mean difference over n images is above 0; NaN where n < 2.

    The larger of Student's and of Hall's for a sample of this `skewness`: at most 0.025 just where `interval` is above 0.
    Differences that are the same in all images (a standard error of 0) give 0, 1/2 or 1 by their sign.
    """
    images = np.asarray(n, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(stderr > 0, difference / stderr, 0.0)
        least = np.minimum(t, corrected(t, skewness, images))
    least = np.where(stderr > 0, least, np.where(difference == 0, 0.0, np.copysign(np.inf, difference)))
    known = np.isfinite(stderr) & np.isfinite(difference)
    found: Array = np.where(known, scipy.special.stdtr(np.maximum(images - 1, 1), -least), np.nan)
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


def parts_skewness(parts: Array, n: Array | float) -> Array:
    """Skewness over images of the parts [images, ...] -> [...]."""
    images = np.maximum(np.asarray(n, dtype=np.float64), 1)
    found: Array = skewness_of(np.square(parts).sum(0) / images, (parts**3).sum(0) / images, np.zeros(parts.shape[1:]), n)
    return found


def parts_interval(numbers: Parts, tail: float = 0.025) -> Array:
    """`interval` of means over images from their parts, [places, 2]."""
    means, parts, defined = numbers
    n = defined.sum(0)
    return interval(means, parts_stderr(parts, n), n, parts_skewness(parts, n), tail)


def beside(one: Parts, other: Parts) -> Parts:
    """The places of two sets of numbers over the same images, one after the other."""
    means, parts, defined = (np.concatenate(each, axis=-1) for each in zip(one, other, strict=True))
    return means, parts, defined


def place_weights(values: Array, weights: Array | None = None) -> Array | None:
    """What each place has in the (weighted) mean over those that are defined; None where none is."""
    weight = np.where(np.isfinite(values), 1.0 if weights is None else weights, 0.0)
    return weight / weight.sum() if weight.any() else None


def pooled(numbers: Parts, weights: Array) -> Parts:
    """Σ w·x over places as one place."""
    means, parts, defined = numbers
    used = np.flatnonzero(weights)
    column = weights[used, None]
    return means[used] @ column, parts[:, used] @ column, np.asarray(defined[:, used].any(1, keepdims=True))


def combined(numbers: Parts, bounds: Array, weights: Array) -> Array:
    """The interval [2] of Σ w·x over places from the interval [places, 2] of each x and the correlation of their parts.

    Zou & Donner's method of variance estimates recovery (Stat. Med. 27, 2008): each place enters with how far its own
    interval reaches on the side that moves the sum that way. Places of weight 0 do not enter; NaN where one that does has no
    interval, or an end of it is open.
    """
    values, parts, _ = numbers
    used = np.flatnonzero(weights)
    values, bounds, weights, parts = values[used], bounds[used], weights[used], parts[:, used]
    if not np.isfinite(bounds).all():
        return np.full(2, np.nan)
    size = np.sqrt(np.square(parts).sum(0))
    unit = parts / np.where(size > 0, size, 1.0)
    ends = np.where(weights[:, None] > 0, bounds, bounds[:, ::-1])
    down, up = (unit @ (weights * np.abs(values - end)) for end in ends.T)
    total = values @ weights
    return np.array([total - np.sqrt(np.square(down).sum()), total + np.sqrt(np.square(up).sum())])


Bounds = Callable[[float], Array]
"""The intervals [places, 2] of some numbers that err with the given probability on each side."""


def count_bounds(values: Array, bounds: Bounds, above: float) -> Array:
    """A 95 % interval [2] of how many of the numbers over images, all [places], are truly above a threshold.

    From the places whose lower bound is above it to those whose upper bound is, each bound erring with 5 % over the number of
    places (Bonferroni): the truth is missed only where some place errs, and each can err on one side alone. So it
    covers at least 95 % however the places hang together, and more where few are near the threshold; a bootstrap of the count
    covers far less where many are. NaN where some place has no bounds (fewer than two images); places without a number count
    for nothing.

    >>> means, errors = np.array([0.95, 0.91, 0.5]), np.full(3, 0.01)
    >>> count_bounds(means, lambda tail: interval(means, errors, 50, tail=tail), 0.9).tolist()
    [1.0, 2.0]
    """
    known = np.isfinite(values)
    if not known.any():
        return np.full(2, np.nan)
    ends = bounds(0.05 / known.sum())[known]
    if np.isnan(ends).any():
        return np.full(2, np.nan)
    return np.asarray((ends > above).sum(0), dtype=np.float64)


Side = tuple[Parts, Bounds]
"""Numbers of one subject with their intervals."""


def count_difference_bounds(first: Side, second: Side, above: float) -> Array:
    """A 95 % interval [2] of how many more numbers of the second than of the first are truly above a threshold.

    Both from the same images, place by place. At a place the difference is −1, 0 or 1: what one-sided bounds of the first
    number, of the second and of second − first (`combined`: a number that is not lower cannot fall below) leave open.
    The ends are the sums over places. Each of the three bounds can err on one side alone, so that 5 % over three times the
    number of places (Bonferroni) covers at least 95 % however places and subjects hang together. A place where every image has
    the same numbers on both sides adds 0, exactly; one that only the longer side has counts for that side alone. NaN where
    some other place has no bounds (fewer than two images).
    """
    (one, one_bounds), (other, other_bounds) = first, second
    longer = max(len(one[0]), len(other[0]))
    one, other = _as_long(one, longer), _as_long(other, longer)
    same = _same(one, other)
    here, there, both = (np.isfinite(x) & ~same for x in (one[0], other[0], one[0] + other[0]))
    count = int(here.sum() + there.sum() + both.sum())
    if not count:
        return np.where((np.isfinite(one[0]) & same).any(), np.zeros(2), np.nan)
    tail = 0.05 / count
    ends = [_ends_as_long(bounds(tail), longer) for bounds in (one_bounds, other_bounds)]
    if np.isnan(ends[0][here]).any() or np.isnan(ends[1][there]).any():
        return np.full(2, np.nan)
    low = (there & (ends[1][:, 0] > above)).astype(np.int64) - (here & (ends[0][:, 1] > above))
    high = (there & (ends[1][:, 1] > above)).astype(np.int64) - (here & (ends[0][:, 0] > above))
    for place in np.flatnonzero(both).tolist():
        rise = combined(
            beside(_only(one, place), _only(other, place)), np.stack([ends[0][place], ends[1][place]]), np.array([-1.0, 1.0])
        )
        if rise[0] >= 0:
            low[place] = max(low[place], 0)
        if rise[1] <= 0:
            high[place] = min(high[place], 0)
    return np.array([low[~same].sum(), high[~same].sum()], dtype=np.float64)


def _same(first: Parts, second: Parts) -> NDArray[np.bool_]:
    """The places where both numbers and every image's part in them are the same."""
    (one, one_parts, _), (other, other_parts, _) = first, second
    equal: NDArray[np.bool_] = ((one == other) | (np.isnan(one) & np.isnan(other))) & (one_parts == other_parts).all(0)
    return equal


def _as_long(side: Parts, places: int) -> Parts:
    """The side with undefined places after its own, up to so many."""
    means, parts, defined = side
    more = places - len(means)
    return (
        np.pad(means, (0, more), constant_values=np.nan),
        np.pad(parts, ((0, 0), (0, more))),
        np.pad(defined, ((0, 0), (0, more))),
    )


def _only(side: Parts, place: int) -> Parts:
    means, parts, defined = side
    return means[[place]], parts[:, [place]], defined[:, [place]]


def _ends_as_long(bounds: Array, places: int) -> Array:
    return np.pad(bounds, ((0, places - len(bounds)), (0, 0)), constant_values=np.nan)


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
