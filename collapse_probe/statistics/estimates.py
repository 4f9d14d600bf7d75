"""The headline numbers of a run out of what was kept of its single images, each with what every image contributes to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.statistics.intervals import Array, Parts, combined, mean_parts, parts_interval, place_weights, pooled
from collapse_probe.statistics.kappa import PairMoments, kappa, kappa_interval, kappa_parts

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Headline:
    """One headline number: what it is in words, which end is collapse, and the half-width of an interval called narrow."""

    words: str
    collapsed: str | None
    tolerance: float
    unit: str = ""


HEADLINES = {
    "attention_similarity_adjacent": Headline("raw similarity of neighbouring blocks", "high", 0.01),
    "kappa_adjacent": Headline("kappa of neighbouring blocks", "high", 0.02),
    "patch_diversity_last": Headline("patch diversity after the last block", "low", 0.01),
    "attention_entropy_mean": Headline("attention entropy", None, 0.05, "nats"),
}
"""The headline numbers that are means over images, or functions of such means."""
SIMILARITY, NULL, DIVERSITY, ENTROPY = (
    "attention-similarity",
    "attention-similarity/other_token",
    "patch-diversity",
    "attention-entropy",
)
"""What the headline numbers are read off: keys of images.npz."""


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval `ci95` and `parts` [images]: what every image moves it by, to first order; they sum to 0.

    Images that define nothing (`defined` [images]) have a part of 0 and do not count. The interval is NaN with fewer than two
    images, and where they are too few for one. Where the parts are those of a sample, value and interval may be of all images,
    `times` as many.
    """

    value: float
    ci95: tuple[float, float]
    parts: Array
    defined: NDArray[np.bool_]
    times: float = 1.0

    @property
    def images(self) -> int:
        """How many images the parts are of."""
        return int(self.defined.sum())

    def of_all(self, times: float, value: float | None) -> Estimate:
        """The estimate of a random sample made that of `times` as many images, around their exact value where that is known.

        The interval is narrower by the root of `times`.
        """
        shift = 0.0 if value is None else value - self.value
        low, high = (self.value + shift + (end - self.value) / math.sqrt(times) for end in self.ci95)
        return replace(self, value=self.value + shift, ci95=(low, high), times=times)

    @property
    def shares(self) -> Array:
        """Each image's share [images] of the variance of the number over images; NaN where it does not vary."""
        squares = np.square(self.parts)
        with np.errstate(invalid="ignore"):
            return np.asarray(squares / squares.sum())

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        low, high = self.ci95
        return (high - low) / 2


@dataclass(frozen=True)
class PerImageValues:
    """What a run kept of its images: `values` [images, places] by key of images.npz; `heads` [blocks] weigh the entropies.

    Where these are a random sample, `of` is how many images there were in all, and `exact` holds headline numbers over all of
    them by name (and `similar_blocks` with its ends `similar_blocks_ci_low` and `_high`); None and {}: all are here.
    """

    names: tuple[str, ...]
    values: Mapping[str, Array]
    heads: Array | None = None
    of: int | None = None
    exact: Mapping[str, float | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def total(self) -> int:
        """How many images there were."""
        return len(self) if self.of is None else self.of

    @property
    def sampled(self) -> str:
        """That these are a random sample, in words; empty where they are all."""
        return "" if self.total == len(self) else f"a random sample of {len(self):,} of {self.total:,} images"

    def only(self, places: Indices | NDArray[np.bool_]) -> PerImageValues:
        """The same of some of the images, which then are all there are."""
        names = tuple(self.names[i] for i in np.arange(len(self))[places].tolist())
        return PerImageValues(names, {key: part[places] for key, part in self.values.items()}, self.heads)

    def estimates(self) -> dict[str, Estimate]:
        """The headline numbers that what was kept can give; those that are undefined are left out.

        Of a sample each is made that of all images, see `Estimate.of_all`.
        """
        numbers: dict[str, Estimate | None] = {}
        if SIMILARITY in self.values:
            numbers["attention_similarity_adjacent"] = mean_of(self.values[SIMILARITY])
        if NULL in self.values:
            numbers["kappa_adjacent"] = kappa_of(self.values[SIMILARITY], self.values[NULL])
        if DIVERSITY in self.values:
            numbers["patch_diversity_last"] = mean_of(self.values[DIVERSITY][:, -1:])
        if ENTROPY in self.values:
            numbers["attention_entropy_mean"] = mean_of(self.values[ENTROPY], self.heads)
        known = {name: estimate for name, estimate in numbers.items() if estimate is not None}
        if not self.sampled:
            return known
        times = self.total / len(self)
        return {name: estimate.of_all(times, self.exact.get(name)) for name, estimate in known.items()}

    def each(self) -> dict[str, Array]:
        """The headline numbers of every image by itself, [images]; NaN where an image defines none."""
        numbers = {}
        if SIMILARITY in self.values:
            numbers["attention_similarity_adjacent"] = _row_means(self.values[SIMILARITY])
        if NULL in self.values:
            numbers["kappa_adjacent"] = _row_means(kappa(self.values[SIMILARITY], self.values[NULL]))
        if DIVERSITY in self.values:
            numbers["patch_diversity_last"] = self.values[DIVERSITY][:, -1]
        if ENTROPY in self.values:
            numbers["attention_entropy_mean"] = _row_means(self.values[ENTROPY], self.heads)
        return numbers


def per_image_values(
    table: Mapping[str, NDArray[Any]],
    heads: Array | None = None,
    of: int | None = None,
    exact: Mapping[str, float | None] | None = None,
) -> PerImageValues:
    """What the headline numbers need out of a table of single images (the content of images.npz), all or a sample `of` many."""
    keys = [key for key in (SIMILARITY, NULL, DIVERSITY, ENTROPY) if key in table]
    values = {key: np.asarray(table[key], dtype=np.float64) for key in keys}
    return PerImageValues(tuple(map(str, table.get("names", ()))), values, heads, of, exact or {})


def mean_of(values: Array, weights: Array | None = None) -> Estimate | None:
    """The (weighted) mean over places of the means over images, [images, places]; None where nothing is defined.

    >>> mean_of(np.array([[1.0, 3.0], [3.0, 5.0]])).value
    3.0
    """
    numbers = mean_parts(values)
    return None if (weight := place_weights(numbers[0], weights)) is None else _estimate(pooled(numbers, weight))


def kappa_of(real: Array, null: Array) -> Estimate | None:
    """The mean over places of (r − t)/(1 − t), r and t the means over images of two [images, places]; None where undefined.

    Its interval comes from those of the places (`kappa_interval`) by `combined`.

    >>> kappa_of(np.array([[0.9], [0.7]]), np.array([[0.6], [0.6]])).value
    0.5000000000000001
    """
    numbers = kappa_parts(real, null)
    if (weight := place_weights(numbers[0])) is None:
        return None
    return _estimate(pooled(numbers, weight), combined(numbers, kappa_interval(PairMoments.of(real, null)), weight))


def _estimate(whole: Parts, ci95: Array | None = None) -> Estimate:
    (value,), parts, defined = whole
    low, high = parts_interval(whole)[0] if ci95 is None else ci95
    return Estimate(float(value), (float(low), float(high)), parts[:, 0], defined[:, 0])


def _row_means(values: Array, weights: Array | None = None) -> Array:
    defined = np.isfinite(values)
    weight = defined * (1.0 if weights is None else weights)
    total = weight.sum(1)
    return np.where(total > 0, (np.where(defined, values, 0.0) * weight).sum(1) / np.where(total > 0, total, 1.0), np.nan)
