"""Does a block attend alike whatever the image?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collapse_probe.metrics.accumulators import GROUPS
from collapse_probe.metrics.map_metric import BY_ROWS, CENTRED, OF_PROBS, MapMetric
from collapse_probe.metrics.metric import CURVE, Need, Record
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.metrics.pairwise_cosine import JACKKNIFE_TOKENS, ImageSpread, MapPairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array, interval
from collapse_probe.statistics.kappa import kappa


class ImageSimilarity(MapMetric):
    """Cosine of one block's attention vectors across different images: how far attention ignores the input."""

    name = "image-similarity"
    summary = "cosine of one block's attention across different images: how far it ignores the input"
    dims = ("block",)
    collapsed = "high"
    title = "Maps of different images"
    seen = f"Cosine between a block's maps of two images. {CURVE}"
    limits = "Near 1 attention ignores the picture, or is close to uniform: the entropy tells these apart."
    failure_types = ()
    formula = r"\cos(A_a[h,:,t],\, A_b[h,:,t]), \quad a \ne b"
    value_range = "0 to 1 for softmax maps, −1 to 1 for final maps with negative entries"
    source = "this project"
    traps = "Images that are alike raise it: measure on the images that the model is for."
    panel = "by columns"
    unit = "cosine"
    windowed = True
    top = 1.0
    defaults = {"axis": "column", "centred": False, "point": "weights"}
    variants = {"row": BY_ROWS, "centred": CENTRED, "probs": OF_PROBS}

    @property
    def definition(self) -> str:
        return (
            f"Mean over all pairs of different images, heads and tokens t of the cosine between the {self.settings['axis']}s t "
            f"of the same head of one block, on {self.map_name}; exact over all pairs, from sums over images. Its "
            f"standard error is a jackknife over {GROUPS} groups of images (by a hash of their names) on {JACKKNIFE_TOKENS} "
            "seeded tokens."
        )

    def accumulators(self) -> list[Need]:
        key = (self.point, self.settings["axis"], self.settings["centred"])
        return [
            (("maps", *key, ()), lambda: MapPairwiseCosine(self.plan, *key)),
            (("spread", *key), lambda: ImageSpread(self.plan, *key)),
        ]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """The diagonal of the cosines with the wrong image."""
        cosines, spread = accumulators
        across = {name: np.diagonal(a).copy() for name, a in cosines.across_images().items()}
        mean, stderr = across["real"], spread.stderr()
        images = int(cosines.mean("real")[2].max(initial=0))
        if not np.isfinite(mean).any():
            return self.not_applicable("needs two different images")
        values: dict[str, Array | None] = {
            "untrained": None,
            "other_token": across["other_token"],
            "other_image": None,
            "other_head": across["other_head"],
            "kappa": kappa(mean, across["other_token"]),
        }
        nulls = with_reasons(values, {"other_image": "the metric itself compares images"}, images)
        details = {"tokens": [len(sample) for sample in cosines.samples]}
        ci95 = interval(mean, stderr, min(images, GROUPS))
        return self.result(mean, stderr=stderr, ci95=ci95, nulls=nulls, details=details)

    def per_image(self, records: Sequence[Record]) -> None:
        """None: the metric compares images with one another."""


METRICS.add(ImageSimilarity.name, ImageSimilarity)
