"""Do patch embeddings still change from block to block?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collapse_probe.metrics.metric import Metric, Need, mean_over_images
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.metrics.pairwise_cosine import TokenPairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array


class FeatureSimilarity(Metric):
    """Cosine of the patch embeddings of the same token at two depths (DeepViT Fig. 4)."""

    name = "feature-similarity"
    summary = "cosine of the embedding of the same patch at two depths (DeepViT Fig. 4)"
    dims = ("depth", "depth")
    collapsed = "high"

    def inapplicable(self) -> str:
        """The patches must be read somewhere."""
        return "" if self.plan.width else "no token sequence was found at the first block's input"

    @property
    def definition(self) -> str:
        """The definition in words."""
        return (
            "Mean over images and patch tokens (prefix tokens out) of the cosine between the residual stream at two depths; "
            "depth 0 enters the first block, depth b leaves block b − 1, before any final norm. Depths of other shapes are "
            "not compared. DeepViT's Figure 4 does not state its averaging; this is our reading."
        )

    def needs(self) -> dict[str, Need]:
        """The agreement of the patches."""
        return {"agreement": (("patches",), lambda: TokenPairwiseCosine(self.plan, self.plan.patch_shapes))}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """The matrix with its intervals and nulls."""
        fold = folds["agreement"]
        details = {"prefix": False, "tokens_for_other_image": [len(sample) for sample in fold.samples]}
        nulls = between_blocks(fold, heads=False)
        return self.reading(**mean_over_images(fold, "real"), nulls=nulls, details=details)

    def per_image(self, records: Mapping[str, Mapping[str, Array]]) -> Array | None:
        """The similarity of each depth with the depth before, [images, blocks]."""
        return records["agreement"]["real"]


METRICS.add(FeatureSimilarity.name, FeatureSimilarity)
