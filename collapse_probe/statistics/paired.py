"""Two sets of numbers on the same images: the difference, its interval, a test and an effect size, place by place.

A place is a block, or a pair of neighbouring blocks. Images where either side is undefined are left out of that place.
Interval and test are two readings of one calculation: p is below 0.05 just where the 95 % interval leaves out 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import (
    Array,
    beyond,
    combined,
    mean_parts,
    parts_interval,
    parts_skewness,
    parts_stderr,
    place_weights,
    pooled,
)
from collapse_probe.statistics.kappa import PairMoments, kappa, kappa_interval, kappa_parts
from collapse_probe.statistics.proportions import paired_shares

Indices = NDArray[np.int64]

OF_MEANS, OF_KAPPAS, OF_SHARES, SAME, NO_INTERVAL = "paired t", "Fieller", "Tango", "identical", "none"
"""Kinds of intervals; see `compare_sides`."""
SMALLEST_TAIL, HALVINGS = 1e-12, 24


@dataclass(frozen=True)
class Sides:
    """Per-image values [images, places] of the two subjects; with `nulls` (theirs, same shapes) the quantity is kappa.

    A plain quantity's difference is the mean over images of second − first. Kappa's is kappa of the mean values and nulls of
    the second less that of the first: the number that findings report, not a mean of ratios. `pooled` takes the mean over the
    places, as one place. `answers`: the values are 0 or 1, and the difference is that of two shares of images.
    """

    first: Array
    second: Array
    nulls: tuple[Array, Array] | None = None
    pooled: bool = False
    answers: bool = False

    def complete(self) -> Sides:
        """The same, NaN in every part wherever an image lacks one."""
        defined = np.all([np.isfinite(part) for part in self._parts()], axis=0)
        first, second, *nulls = (np.where(defined, part, np.nan) for part in self._parts())
        return replace(self, first=first, second=second, nulls=(nulls[0], nulls[1]) if nulls else None)

    def each(self) -> Array:
        """The difference of every image by itself [images, places], NaN where undefined; what the effect size ranks."""
        one, other = self.first, self.second
        if self.nulls is not None:
            one, other = kappa(one, self.nulls[0]), kappa(other, self.nulls[1])
        return _averaged(other - one) if self.pooled else other - one

    def same(self) -> NDArray[np.bool_]:
        """The places where every defined image has the same numbers on both sides, to the last bit, and they vary; [places].

        A number that is the same in all images (a share of 0, a cosine of 1) may be so on both sides by chance.
        """
        pairs = [(self.first, self.second), *([self.nulls] if self.nulls else [])]
        equal = np.all([(a == b) | np.isnan(a) | np.isnan(b) for a, b in pairs], axis=(0, 1))
        varies = np.any([_varies(part) for part in self._parts()], axis=0)
        return np.atleast_1d(equal.all() & varies.any()) if self.pooled else np.asarray(equal & varies)

    def _parts(self) -> list[Array]:
        return [self.first, self.second, *(self.nulls or ())]


def _averaged(values: Array) -> Array:
    """The mean over the defined places, [n, places] -> [n, 1]; NaN where there is none."""
    defined = np.isfinite(values)
    count = defined.sum(-1, keepdims=True)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(-1, keepdims=True) / np.maximum(count, 1), np.nan)


def _varies(values: Array) -> NDArray[np.bool_]:
    """Whether the defined values are not all the same, [images, places] -> [places]."""
    return np.asarray(np.fmax.reduce(values) > np.fmin.reduce(values))


@dataclass(frozen=True)
class Paired:
    """What the images say about second − first, each [places] unless said otherwise.

    `ci95` [places, 2] with its kind in `interval`, and `p` of the test that belongs to it, two-sided; `q` is p with the false
    discovery rate controlled over the places (Benjamini–Hochberg); `effect` the matched rank-biserial correlation, −1 … 1: the
    rank sum of the images that rise less that of those that fall, over the whole. `images` entered, `left_out` did not.
    Undefined numbers are NaN.
    """

    first: Array
    second: Array
    difference: Array
    ci95: Array
    interval: tuple[str, ...]
    p: Array
    q: Array
    effect: Array
    images: Indices
    left_out: Indices

    @property
    def places(self) -> int:
        """How many places there are."""
        return len(self.difference)


@dataclass(frozen=True)
class _Change:
    """Both sides, how sure their difference is, and the kind of its interval where that is defined."""

    first: Array
    second: Array
    ci95: Array
    p: Array
    kind: str


def compare_sides(sides: Sides) -> Paired:
    """All numbers of one quantity, with the interval and the test of its kind.

    `OF_MEANS`: a mean difference with its `interval` and `beyond`. `OF_KAPPAS`: a difference of kappas, `combined` out of the
    intervals of both. `OF_SHARES`: of answers, `paired_shares`. `SAME`: every image has the same value on both sides: 0,
    [0, 0] and p = 1. `NO_INTERVAL`: fewer than two images, too few for the interval of a kappa, or the same difference in
    all images, of which no sampling error can be taken.
    """
    sides = sides.complete()
    each = sides.each()
    defined = np.isfinite(sides.first)
    images = defined.any(1).sum(keepdims=True) if sides.pooled else defined.sum(0)
    change = _shares(sides) if sides.answers else _means(sides) if sides.nulls is None else _kappas(sides)
    same = sides.same() & (images > 0) & (not sides.answers)
    ci95, p = np.where(same[:, None], 0.0, change.ci95), np.where(same, 1.0, change.p)
    kinds = np.where(same, SAME, np.where(np.isfinite(ci95).all(1), change.kind, NO_INTERVAL))
    return Paired(
        first=change.first,
        second=np.where(same, change.first, change.second),
        difference=np.where(same, 0.0, change.second - change.first),
        ci95=ci95,
        interval=tuple(kinds.tolist()),
        p=p,
        q=controlled(p),
        effect=np.array([_rank_biserial(column[np.isfinite(column)]) for column in each.T]),
        images=images.astype(np.int64),
        left_out=(len(each) - images).astype(np.int64),
    )


def _means(sides: Sides) -> _Change:
    numbers, varies = mean_parts(sides.second - sides.first), _varies(sides.second - sides.first)
    one, other = (mean_parts(side)[0] for side in (sides.first, sides.second))
    if sides.pooled:
        weight = place_weights(numbers[0])
        if weight is None:
            return _nothing(OF_MEANS)
        numbers, varies = pooled(numbers, weight), np.atleast_1d(varies.any())
        one, other = (np.atleast_1d(np.nansum(side * weight)) for side in (one, other))
    difference, parts, defined = numbers
    n = defined.sum(0)
    stderr, skewness = np.where(varies, parts_stderr(parts, n), np.nan), parts_skewness(parts, n)
    p = 2 * np.minimum(beyond(difference, stderr, n, skewness), beyond(-difference, stderr, n, -skewness))
    ci95 = np.where(varies[:, None], parts_interval(numbers), np.nan)
    return _Change(one, other, ci95, np.minimum(p, 1.0), OF_MEANS)


def _shares(sides: Sides) -> _Change:
    ci95, p = paired_shares(sides.first, sides.second)
    return _Change(mean_parts(sides.first)[0], mean_parts(sides.second)[0], ci95, p, OF_SHARES)


def _kappas(sides: Sides) -> _Change:
    """p by halving: the error at which the interval just reaches 0."""
    assert sides.nulls is not None
    real, null = (np.concatenate(both, axis=1) for both in ((sides.first, sides.second), sides.nulls))
    numbers, moments = kappa_parts(real, null), PairMoments.of(real, null)
    one, other = np.split(numbers[0], 2)
    weights = np.eye(len(one))
    if sides.pooled:
        weight = place_weights(one + other)
        if weight is None:
            return _nothing(OF_KAPPAS)
        weights = weight[None]
        one, other = (np.atleast_1d(np.nansum(side * weight)) for side in (one, other))
    varies = (_varies(real) | _varies(null)).reshape(2, -1).any(0)
    known = ((weights != 0) @ varies) & np.isfinite(one + other)

    def ends(tail: Array) -> Array:
        """The interval of each difference that errs with its `tail` on each side."""
        bounds = kappa_interval(moments, np.tile(np.broadcast_to(tail, weights.shape[1]), 2))
        rows = zip(np.concatenate([-weights, weights], axis=1), known, strict=True)
        return np.array([combined(numbers, bounds, row) if at else np.full(2, np.nan) for row, at in rows])

    inside, out = np.full(len(weights), np.log(SMALLEST_TAIL)), np.full(len(weights), np.log(0.5))
    for _ in range(HALVINGS):
        half = (inside + out) / 2
        low, high = ends(np.exp(half)).T
        reached = ~((low > 0) | (high < 0))
        inside, out = np.where(reached, half, inside), np.where(reached, out, half)
    return _Change(one, other, ends(np.full(len(weights), 0.025)), np.where(known, 2 * np.exp(inside), np.nan), OF_KAPPAS)


def _nothing(kind: str) -> _Change:
    """What there is where no place is defined."""
    unknown = np.full(1, np.nan)
    return _Change(unknown, unknown, np.full((1, 2), np.nan), unknown, kind)


def controlled(p: Array) -> Array:
    """Benjamini–Hochberg over the defined p-values: the smallest false discovery rate at which each is a discovery.

    >>> controlled(np.array([0.01, np.nan, 0.04])).tolist()
    [0.02, nan, 0.04]
    """
    q = np.full(p.shape, np.nan)
    defined = np.isfinite(p)
    if defined.any():
        order = np.argsort(p[defined])  # as scipy.stats.false_discovery_control, whose import takes half a second
        count = len(order)
        rates = p[defined][order] * (count / np.arange(1, count + 1))
        smallest = np.minimum.accumulate(rates[::-1])[::-1]
        q[defined] = np.clip(smallest[np.argsort(order)], 0, 1)
    return q


def _rank_biserial(differences: Array) -> float:
    """The matched rank-biserial correlation; 0 where nothing differs."""
    if not len(differences):
        return float("nan")
    moved = differences[differences != 0]
    ranks = scipy.stats.rankdata(np.abs(moved))
    return float((ranks * np.sign(moved)).sum() / ranks.sum()) if len(moved) else 0.0
