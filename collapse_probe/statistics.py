"""How sure means over images are: t intervals, the delta method for kappa, the bootstrap for counts, a paired t test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
UNDEFINED_KAPPA = 1e-5
"""Where the wrong-token null is nearer to one than this, kappa is a quotient of rounding errors."""
RESAMPLES = 1000
RESAMPLED_AT_ONCE = 200_000


def interval(mean: Array, stderr: Array, n: Array | float) -> Array:
    """The 95 % t interval of means over n images, [..., 2] (low, high); NaN where n < 2."""
    degrees = np.maximum(np.asarray(n, dtype=np.float64) - 1, 1)
    reach = stats.t.ppf(0.975, degrees) * stderr
    return np.stack([mean - reach, mean + reach], axis=-1)


def kappa(real: Array, other_token: Array) -> Array:
    """(real − other_token) / (1 − other_token): the share of what could agree beyond the null that does.

    1 where the same tokens agree wholly, 0 where no more than other tokens do, negative where less; NaN where the null is 1.
    """
    room = 1 - other_token
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(room > UNDEFINED_KAPPA, (real - other_token) / room, np.nan)


def kappa_stderr(real: tuple[Array, Array], null: tuple[Array, Array], covariance: Array) -> Array:
    """Standard error of kappa by the delta method, from (mean, stderr) of both and the covariance of the two means."""
    (r, r_error), (t, t_error) = real, null
    with np.errstate(divide="ignore", invalid="ignore"):
        by_real, by_null = 1 / (1 - t), -(1 - r) / (1 - t) ** 2
        variance = by_real**2 * r_error**2 + by_null**2 * t_error**2 + 2 * by_real * by_null * covariance
        return np.where(1 - t > UNDEFINED_KAPPA, np.sqrt(np.maximum(variance, 0.0)), np.nan)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], Array], images: int, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Array, Array]:
    """Standard error and 95 % percentile interval [..., 2] of a statistic of `images` images (two or more).

    `statistic(chosen)` takes indices of images, [..., images], drawn with replacement, and gives a value for each draw, [...]:
    whatever it reads of one image stays together.
    """
    result = stats.bootstrap(
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
    found: Array = np.where(np.isfinite(stderr) & np.isfinite(difference), stats.t.sf(t, degrees), np.nan)
    return found


def mean_parts(values: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Means over images of [images, places] -> [places], each image's part in them, and where images are defined.

    An image's part (x − mean)/n is what it moves the mean by: parts sum to 0; those of undefined values are 0. NaN means where
    nothing is defined.
    """
    defined = np.isfinite(values)
    count = defined.sum(0)
    safe = np.maximum(count, 1)
    means = np.where(count > 0, np.where(defined, values, 0.0).sum(0) / safe, np.nan)
    return means, np.where(defined, values - means, 0.0) / safe, defined


def kappa_parts(real: Array, null: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """`mean_parts` of kappa = (r − t)/(1 − t), r and t the means over images of two [images, places].

    An image's part is that of r less (1 − kappa) times that of t, over 1 − t: the delta method.
    """
    (r, r_parts, defined), (t, t_parts, also) = mean_parts(real), mean_parts(null)
    ratio = kappa(r, t)
    room = np.where(1 - t > UNDEFINED_KAPPA, 1 - t, 1.0)
    with np.errstate(invalid="ignore"):
        parts = (r_parts - (1 - ratio) * t_parts) / room
    return ratio, np.where(np.isfinite(parts), parts, 0.0), defined | also


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
    reach = stats.t.ppf(1 - 0.05 / known.sum(), np.maximum(np.asarray(n, dtype=np.float64) - 1, 1)) * stderr
    with np.errstate(invalid="ignore"):
        return np.array([(means - reach > above).sum(), (means + reach > above).sum()], dtype=np.float64)
