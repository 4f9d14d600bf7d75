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
    return np.where(np.isfinite(stderr) & np.isfinite(difference), stats.t.sf(t, degrees), np.nan)


def means(values: Array) -> Array:
    """Means over images of what is defined, [images, places] -> [places]; NaN where nothing is."""
    return _weighted(values, np.ones((1, len(values))))[0]


def resampled_means(values: Array, resamples: int, seed: int = 0) -> Array:
    """`means` over images drawn with replacement, [images, places] -> [resamples, places]; an image's places stay together."""
    generator, images = np.random.default_rng(seed), len(values)
    step = max(1, RESAMPLED_AT_ONCE * 10 // images)
    found = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        chosen = generator.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
        found.append(
            _weighted(values, np.bincount(chosen.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64))
        )
    return np.concatenate(found)


def _weighted(values: Array, weights: Array) -> Array:
    defined = np.isfinite(values)
    total = weights @ defined
    return np.where(total > 0, weights @ np.where(defined, values, 0.0) / np.where(total > 0, total, 1.0), np.nan)
