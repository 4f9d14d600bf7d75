"""Two sets of numbers on the same images: the difference, its interval, a test and an effect size, place by place.

A place is a block, or a pair of neighbouring blocks. Images where either side is undefined are left out of that place.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.kappa import kappa

Indices = NDArray[np.int64]

RESAMPLES = 2000
BCA_IMAGES = 5000
"""Up to so many images the interval is BCa: its correction falls with their root, its cost grows with their square."""
AT_ONCE = 4_000_000  # image counts of resamples held at a time
Method = Literal["BCa", "percentile"]
SAME, NO_INTERVAL = "exact", "none"


@dataclass(frozen=True)
class Sides:
    """Per-image values [images, places] of the two subjects; with `nulls` (theirs, same shapes) the quantity is kappa.

    A plain quantity's difference is the mean over images of second − first. Kappa's is kappa of the mean values and nulls of
    the second less that of the first: the number that findings report, not a mean of ratios. `pooled` takes the mean over the
    places, as one place.
    """

    first: Array
    second: Array
    nulls: tuple[Array, Array] | None = None
    pooled: bool = False

    def each(self) -> Array:
        """The difference of every image by itself [images, places], NaN where undefined; what the test ranks."""
        one, other = self._single()
        return _averaged(other - one) if self.pooled else other - one

    def of_all(self, counts: Array) -> tuple[Array, Array]:
        """Both sides over images drawn `counts` times each, [draws, images] -> two of [draws, places]."""
        one, other = self._single()
        used = np.isfinite(other - one)
        total = counts @ used
        parts = [self.first, self.second, *(self.nulls or ())]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [(counts @ np.where(used, part, 0.0)) / total for part in parts]
        both = means if self.nulls is None else [kappa(means[i], means[i + 2]) for i in (0, 1)]
        if self.pooled:
            defined = np.isfinite(both[0] + both[1])
            both = [_averaged(np.where(defined, side, np.nan)) for side in both]
        return both[0], both[1]

    def same(self) -> NDArray[np.bool_]:
        """The places where every defined image has the same numbers on both sides, to the last bit; [places]."""
        sides = [(self.first, self.second), *([self.nulls] if self.nulls else [])]
        equal = np.all([(a == b) | np.isnan(a) | np.isnan(b) for a, b in sides], axis=(0, 1))
        return np.atleast_1d(equal.all()) if self.pooled else equal

    def _single(self) -> tuple[Array, Array]:
        if self.nulls is None:
            return self.first, self.second
        return kappa(self.first, self.nulls[0]), kappa(self.second, self.nulls[1])


def _averaged(values: Array) -> Array:
    """The mean over the defined places, [n, places] -> [n, 1]; NaN where there is none."""
    defined = np.isfinite(values)
    count = defined.sum(-1, keepdims=True)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(-1, keepdims=True) / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class Paired:
    """What the images say about second − first, each [places] unless said otherwise.

    `ci95` [places, 2] with its kind in `interval`; `p` of the Wilcoxon signed-rank test, `q` the same with the false discovery
    rate controlled over the places (Benjamini–Hochberg); `effect` the matched rank-biserial correlation, −1 … 1: the rank sum
    of the images that rise less that of those that fall, over the whole. `images` entered, `left_out` did not. Undefined
    numbers are NaN.
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


def compare_sides(sides: Sides, *, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """All numbers of one quantity; where every image has the same value on both sides: 0, [0, 0] and p = 1, exactly."""
    each = sides.each()
    used = np.isfinite(each)
    images = used.sum(0)
    same = sides.same() & (images > 0)
    first, second = (side[0] for side in sides.of_all(np.ones((1, len(each)))))
    difference = np.where(same, 0.0, second - first)
    ci95, kinds = _intervals(sides, difference, same, images, seed, resamples)
    tests = [_signed_ranks(each[used[:, place], place]) for place in range(each.shape[1])]
    p = np.array([p for p, _ in tests])
    return Paired(
        first=first,
        second=np.where(same, first, second),
        difference=difference,
        ci95=ci95,
        interval=kinds,
        p=p,
        q=controlled(p),
        effect=np.array([effect for _, effect in tests]),
        images=images.astype(np.int64),
        left_out=(len(each) - images).astype(np.int64),
    )


def controlled(p: Array) -> Array:
    """Benjamini–Hochberg over the defined p-values: the smallest false discovery rate at which each is a discovery.

    >>> controlled(np.array([0.01, np.nan, 0.04])).tolist()
    [0.02, nan, 0.04]
    """
    q = np.full(p.shape, np.nan)
    defined = np.isfinite(p)
    if defined.any():
        q[defined] = scipy.stats.false_discovery_control(p[defined], method="bh")
    return q


def _signed_ranks(differences: Array) -> tuple[float, float]:
    """The two-sided Wilcoxon p-value and the matched rank-biserial correlation; (1, 0) where nothing differs."""
    if not len(differences):
        return float("nan"), float("nan")
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0, 0.0
    ranks = scipy.stats.rankdata(np.abs(moved))
    effect = float((ranks * np.sign(moved)).sum() / ranks.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on ties and zeros in few images, where scipy takes the normal approximation
        p = float(scipy.stats.wilcoxon(moved, method="auto").pvalue)
    return p, effect


def _intervals(
    sides: Sides, difference: Array, same: NDArray[np.bool_], images: Indices, seed: int, resamples: int
) -> tuple[Array, tuple[str, ...]]:
    """Bootstrap intervals [places, 2] and the kind of each; all images stay together in a draw."""
    places = len(difference)
    ci95 = np.where(same[:, None], 0.0, np.full((places, 2), np.nan))
    kinds = [SAME if place else NO_INTERVAL for place in same]
    open_places = np.flatnonzero(~same & (images > 1) & np.isfinite(difference))
    if not len(open_places):
        return ci95, tuple(kinds)
    part = sides if sides.pooled else _only(sides, open_places)
    method: Method = "BCa" if len(sides.first) <= BCA_IMAGES else "percentile"
    bounds, drawn = _bootstrap(part, method, seed, resamples)
    plain = np.nanquantile(drawn, [0.025, 0.975], axis=-1).T
    for row, place in enumerate(open_places):
        sound = method == "BCa" and np.isfinite(bounds[row]).all()
        ci95[place] = bounds[row] if sound else plain[row]
        kinds[place] = "BCa" if sound else "percentile"
    return ci95, tuple(kinds)


def _only(sides: Sides, places: NDArray[np.intp]) -> Sides:
    nulls = None if sides.nulls is None else (sides.nulls[0][:, places], sides.nulls[1][:, places])
    return Sides(sides.first[:, places], sides.second[:, places], nulls)


def _bootstrap(sides: Sides, method: Method, seed: int, resamples: int) -> tuple[Array, Array]:
    """Bounds [places, 2] of `method` (NaN where it is undefined) and the drawn differences [places, resamples]."""
    count = len(sides.first)

    def statistic(drawn: Indices, axis: int) -> Array:
        first, second = sides.of_all(_counts(np.atleast_2d(drawn).astype(np.int64), count))
        differences = (second - first).T
        return differences[:, 0] if drawn.ndim == 1 else differences

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where BCa is undefined; the kind of interval says so
        result: Any = scipy.stats.bootstrap(
            (np.arange(count),),
            statistic,
            n_resamples=resamples,
            batch=max(1, AT_ONCE // count),
            vectorized=True,
            method=method,
            rng=np.random.default_rng(seed),
        )
    bounds = np.stack([result.confidence_interval.low, result.confidence_interval.high], axis=-1)
    return bounds, np.asarray(result.bootstrap_distribution)


def _counts(drawn: Indices, images: int) -> Array:
    """How often each image was drawn, [draws, drawn] -> [draws, images]."""
    rows = np.arange(len(drawn))[:, None] * images
    flat = np.bincount((drawn + rows).ravel(), minlength=len(drawn) * images)
    return flat.reshape(len(drawn), images).astype(np.float64)
