"""How sure shares of images are, and their change between two sides that answer the same images."""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array

Counts = NDArray[np.int64]
HALVINGS = 50


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share; trials must not be 0.

    >>> [round(end, 4) for end in wilson(10, 10)]
    [0.7225, 1.0]
    """
    ends = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def score(gained: Array, lost: Array, images: Array, difference: Array) -> Array:
    """Tango's score statistic of a paired difference of shares: about normal where that is the true (gained − lost)/images.

    `gained` images are right on the second side alone, `lost` on the first alone. (Tango, Stat. Med. 17, 1998, 891–908.) At a
    difference of 0 it is McNemar's (gained − lost)/√(gained + lost).

    >>> score(np.array(7.0), np.array(2.0), np.array(50.0), np.array(0.0)).round(6) == round(5 / 9**0.5, 6)
    np.True_
    """
    a = 2 * images
    b = (2 * images - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    only_first = (np.sqrt(np.maximum(b**2 - 4 * a * c, 0.0)) - b) / (2 * a)  # the likeliest share of lost at this difference
    variance = images * (2 * only_first + difference * (1 - difference))
    far = gained - lost - images * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(variance > 1e-12, far / np.sqrt(np.maximum(variance, 0.0)), np.sign(far) * np.inf)
    return np.where(np.abs(far) < 1e-12, 0.0, found)


def paired_shares(first: Array, second: Array) -> tuple[Array, Array]:
    """The 95 % interval [places, 2] of the change of a share, and its two-sided p, from answers 0 or 1 [images, places].

    Tango's interval and McNemar's test, both of `score`: p is below 0.05 just where the interval leaves out 0. Images where
    either side is undefined are left out; NaN where none is left.

    >>> interval, p = paired_shares(np.zeros((10, 1)), np.zeros((10, 1)))
    >>> interval.round(4).tolist(), p.tolist()
    ([[-0.2775, 0.2775]], [1.0])
    """
    images = np.isfinite(second - first).sum(0).astype(np.float64)
    gained, lost = ((side == 1.0).sum(0).astype(np.float64) for side in (second - first, first - second))
    known = images > 0
    images = np.where(known, images, 1.0)
    z = scipy.stats.norm.ppf(0.975)
    ends = []
    for sign in (-1.0, 1.0):
        near, out = (gained - lost) / images, np.full_like(images, sign)
        for _ in range(HALVINGS):
            half = (near + out) / 2
            held = np.abs(score(gained, lost, images, half)) <= z
            near, out = np.where(held, half, near), np.where(held, out, half)
        ends.append(np.where(known, near, np.nan))
    p = 2 * scipy.stats.norm.sf(np.abs(score(gained, lost, images, np.zeros_like(images))))
    return np.stack(ends, axis=-1), np.where(known, p, np.nan)
