"""Do patch embeddings still change from block to block?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from collapse_probe.metrics.metric import Need, Record, Variant
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.metrics.pairwise_cosine import TokenPairwiseCosine
from collapse_probe.metrics.token_metric import TokenMetric
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult


class FeatureSimilarity(TokenMetric):
    """Cosine of the patch embeddings of the same token at two depths (DeepViT Fig. 4)."""

    name = "feature-similarity"
    summary = "cosine of the embedding of the same patch at two depths (DeepViT Fig. 4)"
    dims = ("depth", "depth")
    collapsed = "high"
    title = "Feature similarity"
    seen = "Cosine of the embeddings of the same patch at two depths, raw and beyond its chance level."
    limits = (
        "The residual stream carries each embedding on, so that neighbouring depths are close to 1 in nearly every deep "
        "network, healthy or not."
    )
    failure_types = ("depth",)
    formula = r"\cos(x^a_t,\, x^b_t)"
    value_range = "−1 to 1"
    source = "DeepViT, arXiv 2103.11886, Fig. 4, whose averaging is not stated; this is our reading"
    traps = (
        "Before the final norm; after it the cosine is another. It sees features that stop changing, which need not "
        "come from attention: the skip connection alone keeps them alike."
    )
    panel = "patch tokens"
    unit = "cosine"
    quantity = "real"
    variants = {"without-massive": Variant({"without": 3}, "without the image's three largest channels")}

    @property
    def definition(self) -> str:
        without = self.settings.get("without", 0)
        left_out = (
            f" The {without} channels of each image whose largest |x|, over the median |x| of the image at that depth, is "
            "highest at any depth are left out of all depths: what a few massive activations make alike is not seen."
        )
        return (
            "Mean over images and patch tokens (prefix tokens out) of the cosine between the residual stream at two depths; "
            "depth 0 enters the first block, depth b leaves block b − 1, before any final norm. Depths of other shapes are "
            "not compared. DeepViT's Figure 4 does not state its averaging; this is our reading."
        ) + (left_out if without else "")

    def accumulators(self) -> list[Need]:
        without = int(self.settings.get("without", 0))
        key = ("patches", without) if without else ("patches",)
        return [(key, lambda: TokenPairwiseCosine(self.plan, self.plan.patch_shapes, without))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        facts = between_blocks(accumulators[0], no_heads="patch embeddings have no heads")
        return self.result(**{**facts, "details": {"prefix": False, **facts["details"]}})


METRICS.add(FeatureSimilarity.name, FeatureSimilarity)
