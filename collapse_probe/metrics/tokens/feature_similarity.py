"""Do patch embeddings still change from block to block?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collapse_probe.metrics.metric import Need, mean_over_images
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.metrics.pairwise_cosine import TokenPairwiseCosine
from collapse_probe.metrics.token_metric import TokenMetric
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array


class FeatureSimilarity(TokenMetric):
    """Cosine of the patch embeddings of the same token at two depths (DeepViT Fig. 4)."""

    name = "feature-similarity"
    summary = "cosine of the embedding of the same patch at two depths (DeepViT Fig. 4)"
    dims = ("depth", "depth")
    collapsed = "high"
    title = "Feature similarity"
    seen = "Cosine of the embeddings of the same patch at two depths, raw and corrected by its nulls."
    limits = (
        "The residual stream carries each embedding on, so that neighbouring depths are close to 1 in nearly every deep "
        "network, healthy or not."
    )
    panel = "patch tokens"
    unit = "cosine"

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
