"""Kappa: the share of what could agree beyond the wrong-token null that does, with its error over images."""

from __future__ import annotations

import numpy as np

from collapse_probe.statistics.intervals import Array, Parts, mean_parts

UNDEFINED_KAPPA = 1e-5
"""Where the wrong-token null is nearer to one than this, kappa is a quotient of rounding errors."""


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


def kappa_parts(real: Array, null: Array) -> Parts:
    """`mean_parts` of kappa = (r − t)/(1 − t), r and t the means over images of two [images, places].

    An image's part is that of r less (1 − kappa) times that of t, over 1 − t: the delta method.
    """
    (r, r_parts, defined), (t, t_parts, also) = mean_parts(real), mean_parts(null)
    ratio = kappa(r, t)
    room = np.where(1 - t > UNDEFINED_KAPPA, 1 - t, 1.0)
    with np.errstate(invalid="ignore"):
        parts = (r_parts - (1 - ratio) * t_parts) / room
    return ratio, np.where(np.isfinite(parts), parts, 0.0), defined | also
