"""Does a block attend alike whatever the image?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from collapse_probe.metrics.accumulators import GROUPS
from collapse_probe.metrics.map_metric import BY_ROWS, CENTRED, OF_PROBS, MapMetric
from collapse_probe.metrics.metric import CURVE, Need
from collapse_probe.metrics.nulls import finished
from collapse_probe.metrics.pairwise_cosine import JACKKNIFE_TOKENS, ImageSpread, MapPairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array, interval, kappa


class ImageSimilarity(MapMetric):
    """Cosine of one block's attention vectors across different images: how far attention ignores the input."""

    name = "image-similarity"
    summary = "cosine of one block's attention across different images: how far it ignores the input"
    dims = ("block",)
    collapsed = "high"
    title = "Maps of different images"
    seen = f"Cosine between a block's maps of two images. {CURVE}"
    limits = "Near 1 attention ignores the picture, or is close to uniform: the entropy tells these apart."
    panel = "by columns"
    unit = "cosine"
    top = 1.0
    defaults = {"axis": "column", "centred": False, "point": "weights"}
    variants = {"row": BY_ROWS, "centred": CENTRED, "probs": OF_PROBS}

    @property
    def definition(self) -> str:
        """The definition in words."""
        return (
            f"Mean over all pairs of different images, heads and tokens t of the cosine between the {self.settings['axis']}s t "
            f"of the same head of one block, at {self.settings['point']}; exact over all pairs, from sums over images. Its "
            f"standard error is a jackknife over {GROUPS} groups of images (by a hash of their names) on {JACKKNIFE_TOKENS} "
            "seeded tokens."
        )

    def needs(self) -> dict[str, Need]:
        """The agreement, whose vectors are summed over images, and their sums by group of images."""
        key = (self.settings["point"], self.settings["axis"], self.settings["centred"])
        return {
            "agreement": (("maps", *key, ()), lambda: MapPairwiseCosine(self.plan, *key)),
            "spread": (("spread", *key), lambda: ImageSpread(self.plan, *key)),
        }

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """The diagonal of the wrong-image agreement."""
        across = {name: np.diagonal(a).copy() for name, a in folds["agreement"].across_images().items()}
        mean, stderr = across["real"], folds["spread"].stderr()
        images = int(folds["agreement"].mean("real")[2].max(initial=0))
        if not np.isfinite(mean).any():
            return self.refused("needs two different images")
        values: dict[str, Array | None] = {
            "untrained": None,
            "other_token": across["other_token"],
            "other_image": None,
            "other_head": across["other_head"],
            "kappa": kappa(mean, across["other_token"]),
        }
        nulls = finished(values, {"other_image": "the metric itself compares images"}, images, None)
        details = {"tokens": [len(sample) for sample in folds["agreement"].samples]}
        bounds = interval(mean, stderr, min(images, GROUPS))
        facts = {"stderr": stderr, "ci95": bounds, "point": self.settings["point"]}
        return self.reading(mean, **facts, nulls=nulls, details=details)


METRICS.add(ImageSimilarity.name, ImageSimilarity)
