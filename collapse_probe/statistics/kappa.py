"""Kappa: how much of the possible agreement beyond chance (other tokens) is reached, with its interval over images."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import numpy as np
import scipy
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array, Parts, corrected, mean_parts, skewness_of

UNDEFINED_KAPPA = 1e-5
"""Where the chance level is nearer to one than this, kappa is a quotient of rounding errors."""
MONOMIALS = tuple((order - power, power) for order in (1, 2, 3) for power in range(order + 1))
"""The powers of x = 1 − real and y = 1 − null whose sums over images the moments need: x, y, x², xy, y², x³, x²y, xy², y³."""
HALVINGS = 40


def kappa(real: Array, other_token: Array) -> Array:
    """(real − other_token) / (1 − other_token): the share of what could agree beyond the null that does.

    1 where the same tokens agree wholly, 0 where no more than other tokens do, negative where less; NaN where the null is 1.
    """
    room = 1 - other_token
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(room > UNDEFINED_KAPPA, (real - other_token) / room, np.nan)


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


@dataclass(frozen=True)
class PairMoments:
    """Moments over images of x = 1 − real and y = 1 − null, place by place: kappa = 1 − mean x / mean y.

    `images` [...] define both; `central` [9, ...] holds by `MONOMIALS` the means of x and y, then their second and third
    central moments (over n, not n − 1).
    """

    images: Array
    central: Array

    @classmethod
    def of(cls, real: Array, null: Array) -> PairMoments:
        """From the values of single images, two of [images, ...]."""
        defined = np.isfinite(real) & np.isfinite(null)
        n = defined.sum(0)
        x, y = (np.where(defined, 1 - side, 0.0) for side in (real, null))
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [x.sum(0) / n, y.sum(0) / n]
            x, y = (np.where(defined, side - mean, 0.0) for side, mean in zip((x, y), means, strict=True))
            return cls(n.astype(np.float64), np.stack([*means, *((x**a * y**b).sum(0) / n for a, b in MONOMIALS[2:])]))

    @classmethod
    def of_sums(cls, images: Array, sums: Array) -> PairMoments:
        """From means and sums over so many images of the central products, [9, ...] by `MONOMIALS`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return cls(images, np.concatenate([np.where(images > 0, sums[:2], np.nan), sums[2:] / images]))

    def along(self, by_x: Array | float, by_y: Array | float) -> tuple[Array, Array, Array]:
        """Mean, standard error and skewness of by_x · x + by_y · y."""
        x, y, xx, xy, yy, xxx, xxy, xyy, yyy = self.central
        squares, both = (by_x * by_x, by_y * by_y), by_x * by_y  # products, for powers of arrays are slow
        second: Array = squares[0] * xx + 2 * both * xy + squares[1] * yy
        cube = squares[0] * (by_x * xxx + 3 * by_y * xxy) + squares[1] * (3 * by_x * xyy + by_y * yyy)
        scale = np.abs(by_x * x) + np.abs(by_y * y)
        with np.errstate(invalid="ignore", divide="ignore"):
            stderr = np.where(self.images > 1, np.sqrt(np.maximum(second, 0.0) / (self.images - 1)), np.nan)
        return by_x * x + by_y * y, stderr, skewness_of(second, np.asarray(cube), scale, self.images)


def kappa_interval(moments: PairMoments, tail: Array | float = 0.025) -> Array:
    """The interval [..., 2] of kappa over images that errs with `tail` on each side (95 %): Fieller's, minding skewness.

    All k for which the tests of `interval` do not reject that x − (1 − k) y has the mean 0. So it holds however much the room
    1 − null varies over images, and is above 0 just where `beyond` finds the real similarity above its null. The lower end is
    −∞ where the images are too few to tell the room from 0; NaN where kappa is undefined or there are fewer than two images.
    """
    x, y = moments.central[:2]
    middle = np.arctan2(x, y)  # the quotient as an angle, so that an infinite one is a place like others
    far = np.stack([np.full_like(middle, pi / 2), np.minimum(middle, 0.0)])
    sign = np.array([-1.0, 1.0]).reshape(-1, *[1] * middle.ndim)
    reach = scipy.special.stdtrit(np.maximum(moments.images - 1, 1), 1 - np.asarray(tail))

    def inside(angle: Array) -> NDArray[np.bool_]:
        mean, stderr, skewness = moments.along(np.cos(angle), -np.sin(angle))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(stderr > 0, mean / stderr, np.copysign(np.inf, mean)) * sign
            held = np.minimum(t, corrected(t, sign * skewness, moments.images)) <= reach
        return np.asarray(np.where(stderr > 0, held, mean == 0))

    near, out, is_open = np.stack([middle, middle]), far, inside(far)
    for _ in range(HALVINGS):
        half = (near + out) / 2
        held = inside(half)
        near, out = np.where(held, half, near), np.where(held, out, half)
    ends = 1 - np.where(is_open, np.where(sign < 0, np.inf, np.tan(far)), np.tan(near))
    known = (y > UNDEFINED_KAPPA) & (moments.images > 1)
    found: Array = np.moveaxis(np.where(known, ends, np.nan), 0, -1)
    return found
