"""Do deeper blocks still move information between tokens, or has the mixture settled?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.functional.geometry import unit
from collapse_probe.metrics.functional.pair_sums import Part, VectorGroup
from collapse_probe.metrics.functional.rollout import FUSIONS, fused, rollouts
from collapse_probe.metrics.functional.unit_vectors import UnitVectors
from collapse_probe.metrics.map_metric import WITHOUT_PREFIX, MapMetric
from collapse_probe.metrics.metric import MATRICES, Need, Record, Variant
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.metrics.pairwise_cosine import PairwiseCosine
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult


def rollouts_of(trace: Trace, image: int, fusion: str) -> Tensor:
    """The rollouts of one image after every block, [L, N, N] in float64 (float32 on MPS), from the softmax (probs)."""
    maps = torch.stack([fused(trace.map_of(layer, image), fusion) for layer in trace.plan.map_layers])
    return rollouts(maps if maps.device.type == "mps" else maps.double())


class RolloutCosine(PairwiseCosine):
    """Cosines of the rows or columns of the rollouts after two blocks; image by image, with whole maps."""

    def __init__(self, plan: Plan, axis: str, fusion: str, without: tuple[int, ...]) -> None:
        tokens = plan.layers[plan.map_layers[0]].keys
        self.axis, self.fusion = axis, fusion
        self.tokens = [t for t in range(tokens) if t not in without]
        blocks = len(plan.map_layers)
        super().__init__(plan.adjacent, [VectorGroup(1, len(self.tokens), self.tokens, list(range(blocks)))], axis)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        for image in range(trace.images):
            maps = rollouts_of(trace, image, self.fusion)[:, self.tokens][:, :, self.tokens]
            part = Part(slice(image, image + 1), self.groups[0].positions, slice(0, 1), last_heads=True, last_tokens=True)
            vectors = UnitVectors.of(*unit(maps[None, None], dim=-1 if self.axis == "row" else -2))
            self.absorb(part, self.tokens, vectors)
        return super().end_batch(trace)


class AttentionRollout(MapMetric):
    """Cosine between what a token has gathered after two blocks, by attention rollout (Abnar & Zuidema)."""

    name = "attention-rollout"
    summary = "cosine between the attention rollouts (Abnar & Zuidema) after two blocks"
    dims = ("block", "block")
    title = "How alike the attention rollouts after two blocks are"
    seen = (
        "Rollout multiplies the maps of all blocks up to one, with the skip connections as identity (Abnar & Zuidema). Left "
        f"the raw similarity of two rollouts, right κ, what is left of it beyond chance. {MATRICES}"
    )
    limits = (
        "Products of stochastic maps settle in every deep network, so that late blocks look alike without any illness. Rollout "
        "ignores values and MLPs."
    )
    failure_types = ()
    formula = r"\cos(R_a[t,:],\, R_b[t,:]), \quad R_l = \hat A_l R_{l-1}, \quad R_0 = I"
    value_range = "0 to 1: rollouts have no negative entry"
    source = "Abnar & Zuidema, arXiv 2005.00928"
    traps = (
        "Much-copied code divides columns in place of rows and leaves the weakest entries out by default; this does "
        "neither. It is of the softmax map, for products of signed maps are no rollout."
    )
    panel = "mean over heads, by rows"
    unit = "cosine"
    defaults = {"axis": "row", "heads": "mean", "prefix": True, "point": "probs"}
    choices = {"heads": FUSIONS}
    quantity = "real"
    variants = {
        "column": Variant({"axis": "column"}, "by columns"),
        "max": Variant({"heads": "max"}, "largest over heads"),
        "min": Variant({"heads": "min"}, "smallest over heads"),
        "patches": WITHOUT_PREFIX,
    }

    def inapplicable(self) -> str:
        """A rollout multiplies the maps of all blocks, which must be square and between the same tokens."""
        if missing := super().inapplicable():
            return missing
        if reasons := [layer.reason for layer in self.layers if layer.reason]:
            return "a rollout needs the maps of all blocks: " + reasons[0]
        if not all(self.plan.adjacent):
            return "a rollout multiplies the maps of all blocks, each of which must give its output to the next"
        sizes = {(layer.queries, layer.keys) for layer in self.layers}
        if len(sizes) > 1 or any(queries != keys for queries, keys in sizes):
            shown = ", ".join(f"{queries} × {keys}" for queries, keys in sorted(sizes))
            return f"a rollout multiplies the maps of all blocks, which must be between the same tokens, not {shown}"
        return ""

    @property
    def definition(self) -> str:
        tokens = "all tokens" if self.settings["prefix"] else "patch tokens (prefix tokens dropped from the finished rollouts)"
        which = "what token t holds of each input token" if self.settings["axis"] == "row" else "where input token t has gone"
        return (
            f"Mean over images and {tokens} t of the cosine between the {self.settings['axis']}s t of the rollouts after two "
            f"blocks ({which}). R_l = Â_l R_(l−1), Â = (A + I) with each row divided by its sum, A the "
            f"{self.settings['heads']} over heads of the softmax (probs), R_0 = I (Abnar & Zuidema, arXiv 2005.00928). "
            "Products of stochastic maps settle in every deep network: a high value late is no illness by itself. Compare with "
            "the untrained copy. Cost: the maps of one image at a time, fused over heads, are held about six times in float64 "
            "(48 L N² bytes)."
        )

    def accumulators(self) -> list[Need]:
        key = (self.settings["axis"], self.settings["heads"], () if self.settings["prefix"] else self.plan.prefix)
        return [(("rollout", *key), lambda: RolloutCosine(self.plan, *key))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        return self.result(**between_blocks(accumulators[0], no_heads="a rollout has fused its heads"))


METRICS.add(AttentionRollout.name, AttentionRollout)
