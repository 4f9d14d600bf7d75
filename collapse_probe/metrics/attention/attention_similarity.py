"""Do two blocks attend alike? DeepViT's cross-layer similarity, with what it would be by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from collapse_probe.metrics.map_metric import BY_ROWS, CENTRED, OF_PROBS, WITHOUT_PREFIX, MapMetric
from collapse_probe.metrics.metric import Need, Record
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.metrics.pairwise_cosine import MapPairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult


class AttentionSimilarity(MapMetric):
    """Cosine of the attention vectors of the same head and token in two blocks (DeepViT, arXiv 2103.11886, Eq. 2)."""

    name = "attention-similarity"
    summary = "cosine of the attention of the same head and token in two blocks (DeepViT Eq. 2)"
    dims = ("block", "block")
    collapsed = "high"
    title = "Attention similarity"
    seen = (
        "Mean cosine between the attention vectors of the same head and token in two blocks, raw and beyond its chance level."
    )
    limits = (
        "Near-uniform maps, and maps in which every query looks at the same keys, have a raw similarity near 1 whatever they "
        "attend to; κ and the other readings tell these apart."
    )
    failure_types = ("depth",)
    formula = r"\cos(A^p[h,:,t],\, A^q[h,:,t])"
    value_range = "0 to 1 for softmax maps, −1 to 1 for final maps with negative entries (Re-attention)"
    source = "DeepViT, arXiv 2103.11886, Eq. 2"
    traps = (
        "Columns (DeepViT) and rows (some later papers) are two numbers, and so are the mean of cosines and the "
        "cosine of mean maps. After Re-attention the final map is unlike from the first step on while the softmax map "
        "is not: read both. Heads are matched by index, though they have no order of their own."
    )
    panel = "raw cosine"
    unit = "cosine"
    defaults = {"axis": "column", "centred": False, "prefix": True, "point": "weights"}
    quantity = "real"
    windowed = True
    variants = {"row": BY_ROWS, "centred": CENTRED, "probs": OF_PROBS, "patches": WITHOUT_PREFIX}

    @property
    def definition(self) -> str:
        which = "columns A[h, :, t] (what key t gives to every query; DeepViT Eq. 2)"
        if self.settings["axis"] == "row":
            which = "rows A[h, t, :] (what query t attends to)"
        centred = ", each with its mean subtracted (Pearson correlation)" if self.settings["centred"] else ""
        tokens = "all tokens" if self.settings["prefix"] else "patch tokens only (prefix queries and keys dropped)"
        return (
            f"Mean over images, heads h and {tokens} t of the cosine between the {which}{centred} of two blocks, taken on "
            f"{self.map_name}: per image, head and token first, then averaged. Heads are matched by index."
        )

    def accumulators(self) -> list[Need]:
        without = () if self.settings["prefix"] else self.plan.prefix
        key = (self.point, self.settings["axis"], self.settings["centred"], without)
        return [(("maps", *key), lambda: MapPairwiseCosine(self.plan, *key))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Similarities with their nulls; the details say what the best order of heads gives and how many vectors are left out.

        `head_order_share` and `head_order` are those of `MapPairwiseCosine.best_order`; `left_out` [blocks] is the share of
        the vectors that have no direction.
        """
        (cosines,) = accumulators
        facts = between_blocks(cosines)
        if (left_out := cosines.left_out()).any():
            facts["details"] |= {"left_out": left_out}
        if (best := cosines.best_order()) is not None:
            facts["details"] |= dict(zip(("head_order_share", "head_order"), best, strict=True))
        return self.result(**facts)


METRICS.add(AttentionSimilarity.name, AttentionSimilarity)
