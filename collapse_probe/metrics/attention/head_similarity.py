"""Do the heads of one block attend alike?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collapse_probe.metrics.map_metric import BY_ROWS, CENTRED, OF_PROBS, MapMetric
from collapse_probe.metrics.metric import CURVE, Need, Record
from collapse_probe.metrics.nulls import with_reasons
from collapse_probe.metrics.pairwise_cosine import MapPairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.kappa import kappa


class HeadSimilarity(MapMetric):
    """Cosine between the attention vectors of the same token in different heads of one block."""

    name = "head-similarity"
    summary = "cosine between the attention of different heads of one block"
    dims = ("block",)
    collapsed = "high"
    title = "Heads of one block"
    seen = f"Cosine between the heads of one block. {CURVE}"
    limits = "Near-uniform maps are alike in all heads, whatever these attend to."
    failure_types = ()
    formula = r"\cos(A[g,:,t],\, A[h,:,t]), \quad g \ne h"
    value_range = "0 to 1 for softmax maps, −1 to 1 for final maps with negative entries"
    source = "DeepViT, arXiv 2103.11886, Fig. 3, by this project's reading"
    traps = "It is of one block, and says nothing of depth. It rises to 1 for uniform maps as every raw similarity does."
    panel = "by columns"
    unit = "cosine"
    top = 1.0
    defaults = {"axis": "column", "centred": False, "point": "weights"}
    quantity = "within"
    windowed = True
    variants = {"row": BY_ROWS, "centred": CENTRED, "probs": OF_PROBS}

    def inapplicable(self) -> str:
        """One head has no other to be like; windows and channels have no map over tokens."""
        if missing := super().inapplicable():
            return missing
        return "" if any(self.layers[place].heads > 1 for place in self.measured) else "every block has one head"

    @property
    def definition(self) -> str:
        return (
            f"Mean over images, tokens t and pairs of different heads of the cosine between the {self.settings['axis']}s t of "
            f"their maps in the same block, on {self.map_name}. Its chance level (other tokens) compares different heads "
            "and different tokens; other_image different heads of different images."
        )

    def accumulators(self) -> list[Need]:
        key = (self.point, self.settings["axis"], self.settings["centred"], ())
        return [(("maps", *key), lambda: MapPairwiseCosine(self.plan, *key))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """The diagonal of the cosines with the wrong head."""
        (cosines,) = accumulators
        mean, stderr, n = (np.diagonal(a).copy() for a in cosines.mean("other_head"))
        token = np.diagonal(cosines.mean("other_both")[0]).copy()
        bounds, token_bounds = (np.diagonal(cosines.bounds(of)).T.copy() for of in ("other_head", "other_both"))
        values: dict[str, Array | None] = {
            "untrained": None,
            "other_token": token,
            "other_image": np.diagonal(cosines.across_images()["other_head"]).copy(),
            "other_head": None,
            "kappa": kappa(mean, token),
        }
        reasons = {"other_head": "the metric itself compares heads"}
        nulls = with_reasons(values, reasons, int(n.max(initial=0)), {"other_token": token_bounds})
        return self.result(mean, stderr=stderr, ci95=bounds, nulls=nulls)


METRICS.add(HeadSimilarity.name, HeadSimilarity)
