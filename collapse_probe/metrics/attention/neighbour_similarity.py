"""Do neighbouring blocks attend alike? The similarity of consecutive blocks alone, for very long inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import compared_pairs, covered_pairs, no_pair
from collapse_probe.metrics.functional.neighbours import chains, neighbour_cosines
from collapse_probe.metrics.map_metric import MapMetric
from collapse_probe.metrics.metric import CURVE, Need, Record
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array
from collapse_probe.statistics.kappa import MONOMIALS, PairMoments

NOT_HERE = "not measured by neighbour-similarity: attention-similarity does"


class NeighbourCosine(Means):
    """Mean cosines of the columns of each block and the one before it, over all heads and tokens, [blocks]: `real` of the same
    token, `other_token` of another. NaN for the first block and where two blocks are no neighbours.

    It asks for no tile of the maps: memory beside the trace grows with the number of tokens alone.
    """

    by_rows_of_maps = False
    windowed = True

    def __init__(self, plan: Plan, point: str) -> None:
        super().__init__()
        self.plan, self.point, self.blocks = plan, point, len(plan.map_layers)
        self.samples: list[list[int]] = []
        self.add_means(real=(self.blocks,), other_token=(self.blocks,))
        self.add_moments("both", (self.blocks,), MONOMIALS)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take the whole batch; returns `real` and `other_token` [B, blocks]."""
        layers = [trace.attention[i] for i in self.plan.map_layers]
        means = torch.full((2, trace.images, self.blocks), torch.nan, dtype=torch.float64)
        for first, last in chains(compared_pairs(self.plan)):
            windows = self.plan.layers[self.plan.map_layers[first]].windows
            chain = layers[first : last + 1]
            means[..., first + 1 : last + 1] = neighbour_cosines(chain, self.point, trace.images, windows)
        found = dict(zip(("real", "other_token"), means, strict=True))
        for name, values in found.items():
            self.add_images(name, values)
        self.add_images("both", *(1 - means))
        return found

    def across_images(self) -> dict[str, Array]:
        """Nothing is kept over images: NaN."""
        return {"real": self.mean("real")[0] * float("nan")}

    def moments(self) -> PairMoments:
        """Those of real and other_token over images, for kappa."""
        return PairMoments.of_sums(self.array("both_count"), self.array("both_moments"))


class NeighbourSimilarity(MapMetric):
    """Attention similarity of each block with the one before, measured without the maps of all blocks."""

    name = "neighbour-similarity"
    summary = "attention-similarity with the block before alone: for very long inputs, memory linear in tokens"
    dims = ("block",)
    collapsed = "high"
    title = "Similarity with the block before"
    seen = f"What attention-similarity is for each block and the one before it, with kappa beside it. {CURVE}"
    limits = "Near-uniform maps have a raw similarity near 1 whatever they attend to; other pairs of blocks are not looked at."
    failure_types = ("depth",)
    formula = r"\cos(A^{l-1}[h,:,t],\, A^l[h,:,t])"
    value_range = "0 to 1 for softmax maps, −1 to 1 for final maps with negative entries"
    source = "DeepViT, arXiv 2103.11886, Eq. 2"
    traps = "Those of attention-similarity; and blocks that resemble one further away are not seen."
    panel = "raw similarity with the block before"
    unit = "cosine"
    top = 1.0
    quantity = "real"
    windowed = True

    def inapplicable(self) -> str:
        """There must be two neighbouring blocks with comparable maps."""
        return super().inapplicable() or no_pair(self.plan)

    @property
    def definition(self) -> str:
        return (
            "Mean over images, heads h and all tokens t of the cosine between the columns A[h, :, t] of a block and of the "
            f"block before it, on {self.map_name}: the values beside the diagonal of attention-similarity, with their "
            "chance level (other tokens) and κ. Two blocks' columns are held at a time, and a few tokens' of them, so that "
            "memory grows with the number of tokens and not with its square."
        )

    def accumulators(self) -> list[Need]:
        point = self.point
        return [(("neighbours", point), lambda: NeighbourCosine(self.plan, point))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Values by block, with the chance level (other tokens) and kappa."""
        (cosines,) = accumulators
        facts = between_blocks(cosines, NOT_HERE)
        nulls = replace(facts["nulls"], reasons={**facts["nulls"].reasons, "other_image": NOT_HERE})
        return self.result(**{**facts, "details": {}, "nulls": nulls}, covers=covered_pairs(self.plan))


METRICS.add(NeighbourSimilarity.name, NeighbourSimilarity)
