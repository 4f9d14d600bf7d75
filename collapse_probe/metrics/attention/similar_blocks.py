"""How many blocks attend like the block before: the count of DeepViT's Figure 3b, raw and corrected."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from collapse_probe.metrics.coverage import covered_pairs, no_pair
from collapse_probe.metrics.map_metric import BY_ROWS, CENTRED, OF_PROBS, MapMetric
from collapse_probe.metrics.metric import Need, Record
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.pairwise_cosine import MapPairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.results.rules import COUNT_THRESHOLDS, KAPPA_ABOVE
from collapse_probe.statistics.intervals import Array, bootstrapped_error, count_bounds
from collapse_probe.statistics.kappa import PairMoments, kappa, kappa_interval


def count_above(adjacent: Array, threshold: float) -> Array:
    """How many of the adjacent pairs have a mean over images above the threshold, [pairs, ..., images] -> [...].

    >>> float(count_above(np.array([[0.95, 0.91], [0.2, 0.99]]), 0.9))
    1.0
    """
    return np.asarray((_mean(adjacent) > threshold).sum(0), dtype=np.float64)


def _mean(values: Array) -> Array:
    defined = np.isfinite(values)
    n = defined.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(n > 0, np.where(defined, values, 0.0).sum(-1) / n, np.nan))


class SimilarBlocks(MapMetric):
    """The number of blocks whose mean similarity with the block before is above a threshold."""

    name = "similar-blocks"
    summary = "how many blocks attend like the block before (DeepViT Fig. 3b), at 0.8 / 0.9 / 0.95"
    dims = ("threshold",)
    collapsed = "high"
    title = "Similar blocks"
    seen = "Adjacent pairs whose mean similarity is above each threshold, and those whose κ is above 0.5."
    limits = "A count depends on its threshold, and a network with random weights can pass all of them."
    failure_types = ("depth",)
    formula = r"\#\{\, l : s_{l-1,l} > 0.9 \,\}"
    value_range = "0 to the number of adjacent pairs"
    source = "DeepViT, arXiv 2103.11886, Fig. 3b and the table in its README; the count is not defined there"
    traps = (
        "Our reading of the count: the published 5, 11 and 15 for 16, 24 and 32 blocks may stand for another. "
        "Untrained networks can pass every threshold."
    )
    panel = "by columns"
    unit = "adjacent pairs"
    windowed = True
    defaults = {"axis": "column", "centred": False, "point": "weights", "thresholds": list(COUNT_THRESHOLDS)}
    variants = {"row": BY_ROWS, "centred": CENTRED, "probs": OF_PROBS}

    def inapplicable(self) -> str:
        """There must be two neighbouring blocks with comparable maps."""
        return super().inapplicable() or no_pair(self.plan)

    @property
    def definition(self) -> str:
        return (
            "Number of blocks whose attention-similarity with the block before, averaged over images, heads and tokens, is "
            f"above the threshold ({self.settings['axis']}s, on {self.map_name}). DeepViT does not define its count; "
            f"this is our reading. The corrected count asks for kappa above {KAPPA_ABOVE:g} instead. Standard errors: "
            "bootstrap over the images whose values were kept. Intervals: from the pairs surely above the threshold to those "
            "not surely below it, by one-sided bounds at 5 % over the number of pairs (Bonferroni), which cover at least 95 %."
        )

    def accumulators(self) -> list[Need]:
        key = (self.point, self.settings["axis"], self.settings["centred"], ())
        return [(("maps", *key), lambda: MapPairwiseCosine(self.plan, *key))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Counts with their intervals; the corrected count and its interval stand in the details.

        They come from sums over all images. Only the standard errors come from the single images in `records`: times
        √(kept/all) where a sample of them was kept.
        """
        (cosines,) = accumulators
        (real, _, n), null, moments = cosines.mean("real"), cosines.mean("other_token")[0], cosines.moments()
        real, null, n, images = map(self._before, (real, null, n, moments.images))
        moments = PairMoments(np.nan_to_num(images), np.stack([self._before(part) for part in moments.central]))
        thresholds = self.settings["thresholds"]
        corrected = {
            "kappa_above": KAPPA_ABOVE,
            "value": float((kappa(real, null) > KAPPA_ABOVE).sum()),
            "ci95": count_bounds(kappa(real, null), partial(kappa_interval, moments), KAPPA_ABOVE).tolist(),
        }
        kept = records[0]["real"].T if records and records[0] else np.empty((len(real), 0))
        share = min(kept.shape[-1] / max(np.nan_to_num(n).max(initial=0.0), 1.0), 1.0)
        errors = [_error(kept, t) * np.sqrt(share) for t in thresholds]
        return self.result(
            np.array([float((real > t).sum()) for t in thresholds]),
            stderr=np.array(errors),
            ci95=np.array([count_bounds(real, lambda tail: self._before(cosines.bounds("real", tail)), t) for t in thresholds]),
            covers=covered_pairs(self.plan),
            details={"pairs": int(np.isfinite(real).sum()), "corrected": corrected},
            nulls=untrained_only(),
        )

    def _before(self, values: Array) -> Array:
        """Of numbers by two blocks those of each block with the block before, [blocks, blocks, …] -> [pairs, …]; NaN for those
        that are no neighbours.
        """
        pairs = np.moveaxis(np.diagonal(values, -1), -1, 0)
        neighbours = np.reshape(self.plan.adjacent, (-1, *[1] * (pairs.ndim - 1))).astype(np.bool_)
        return np.where(neighbours, pairs, np.nan)

    def per_image(self, records: Sequence[Record]) -> None:
        """None: a count over the mean of all images."""


def _error(real: Array, threshold: float) -> float:
    """The bootstrap's standard error of the count over the images of [pairs, images]; NaN with fewer than two."""
    if real.shape[-1] < 2:
        return float("nan")
    return bootstrapped_error(lambda images: count_above(real[:, images], threshold), real.shape[-1])


METRICS.add(SimilarBlocks.name, SimilarBlocks)
