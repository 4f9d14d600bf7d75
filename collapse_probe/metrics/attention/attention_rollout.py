"""Do deeper blocks still move information between tokens, or has the mixture settled?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.geometry import unit
from collapse_probe.metrics.functional.rollout import FUSIONS, fused, rollouts
from collapse_probe.metrics.map_metric import WITHOUT_PREFIX, MapMetric
from collapse_probe.metrics.metric import MATRICES, Need, Variant, mean_over_images, no_token_maps
from collapse_probe.metrics.nulls import between_blocks
from collapse_probe.metrics.pairwise_cosine import PairwiseCosine, Part, VectorGroup
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array


def rollouts_of(trace: Trace, image: int, fusion: str) -> Tensor:
    """The rollouts of one image after every block, [L, N, N] in float64 (float32 on MPS), from the softmax (probs)."""
    maps = torch.stack([fused(trace.map_of(layer, image), fusion) for layer in trace.plan.map_layers])
    return rollouts(maps if maps.device.type == "mps" else maps.double())


class RolloutAgreement(PairwiseCosine):
    """Agreement of the rows or columns of the rollouts after two blocks; image by image, with whole maps."""

    def __init__(self, plan: Plan, axis: str, fusion: str, without: tuple[int, ...]) -> None:
        tokens = plan.layers[plan.map_layers[0]].keys
        self.axis, self.fusion = axis, fusion
        self.kept = [t for t in range(tokens) if t not in without]
        blocks = len(plan.map_layers)
        super().__init__(blocks, [VectorGroup(1, len(self.kept), self.kept, list(range(blocks)))], axis)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take the whole batch, one image at a time."""
        for image in range(trace.images):
            found = rollouts_of(trace, image, self.fusion)[:, self.kept][:, :, self.kept]
            part = Part(slice(image, image + 1), self.groups[0].positions, slice(0, 1), last_heads=True, last_tokens=True)
            self.absorb(part, self.kept, unit(found[None, None], dim=-1 if self.axis == "row" else -2))
        return super().end_batch(trace)


class AttentionRollout(MapMetric):
    """Cosine between what a token has gathered after two blocks, by attention rollout (Abnar & Zuidema)."""

    name = "attention-rollout"
    summary = "cosine between the attention rollouts (Abnar & Zuidema) after two blocks"
    dims = ("block", "block")
    title = "How alike the attention rollouts after two blocks are"
    seen = (
        "Rollout multiplies the maps of all blocks up to one, with the skip connections as identity (Abnar & Zuidema). Left "
        f"the raw cosine of two rollouts, right κ, what the other-token null leaves of it. {MATRICES}"
    )
    limits = (
        "Products of stochastic maps settle in every deep network, so that late blocks look alike without any illness. Rollout "
        "ignores values and MLPs."
    )
    panel = "mean over heads, by rows"
    unit = "cosine"
    defaults = {"axis": "row", "heads": "mean", "prefix": True, "point": "probs"}
    variants = {
        "column": Variant({"axis": "column"}, "by columns"),
        "max": Variant({"heads": "max"}, "largest over heads"),
        "min": Variant({"heads": "min"}, "smallest over heads"),
        "patches": WITHOUT_PREFIX,
    }

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan, **settings)
        if self.settings["heads"] not in FUSIONS:
            raise SettingError(f"heads must be one of {', '.join(FUSIONS)}, not {self.settings['heads']!r}")

    def inapplicable(self) -> str:
        """A rollout multiplies the maps of all blocks, which must be square and between the same tokens."""
        if no_token_maps(self.plan):
            return no_token_maps(self.plan)
        layers = [self.plan.layers[i] for i in self.plan.map_layers]
        if any(layer.reason for layer in layers):
            return "a rollout needs the maps of all blocks: " + next(layer.reason for layer in layers if layer.reason)
        sizes = {(layer.queries, layer.keys) for layer in layers}
        if len(sizes) > 1 or any(queries != keys for queries, keys in sizes):
            shown = ", ".join(f"{queries} × {keys}" for queries, keys in sorted(sizes))
            return f"a rollout multiplies the maps of all blocks, which must be between the same tokens, not {shown}"
        return ""

    @property
    def definition(self) -> str:
        """The definition in words."""
        tokens = "all tokens" if self.settings["prefix"] else "patch tokens (prefix tokens dropped from the finished rollouts)"
        which = "what token t holds of each input token" if self.settings["axis"] == "row" else "where input token t has gone"
        return (
            f"Mean over images and {tokens} t of the cosine between the {self.settings['axis']}s t of the rollouts after two "
            f"blocks ({which}). R_l = Â_l R_(l−1), Â = (A + I) with each row divided by its sum, A the "
            f"{self.settings['heads']} over heads of the softmax (probs), R_0 = I (Abnar & Zuidema, arXiv 2005.00928). "
            "Products of stochastic maps settle in every deep network: a high value late is no illness by itself. Compare with "
            "the untrained twin. Cost: the maps of one image at a time, fused over heads, are held about six times in float64 "
            "(48 L N² bytes)."
        )

    def needs(self) -> dict[str, Need]:
        """The agreement of all blocks' rollouts."""
        key = (self.settings["axis"], self.settings["heads"], () if self.settings["prefix"] else self.plan.prefix)
        return {"agreement": (("rollout", *key), lambda: RolloutAgreement(self.plan, *key))}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """The matrix with its intervals and nulls."""
        fold = folds["agreement"]
        nulls = between_blocks(fold, heads=False)
        nulls = replace(nulls, reasons={**nulls.reasons, "other_head": "a rollout has fused its heads"})
        details = {"tokens_for_other_image": [len(sample) for sample in fold.samples]}
        return self.reading(**mean_over_images(fold, "real"), point="probs", nulls=nulls, details=details)

    def per_image(self, records: Mapping[str, Mapping[str, Array]]) -> Array | None:
        """The similarity of each block's rollout with that of the block before, [images, blocks − 1]."""
        return records["agreement"]["real"]


METRICS.add(AttentionRollout.name, AttentionRollout)
