"""Does a head choose among the keys, or take them all alike?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.map_metric import MapMetric, RowMeans, by_head, over_patches
from collapse_probe.metrics.metric import DOTS, Need, Variant, no_token_maps
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array


def from_uniform(probs: Tensor) -> Tensor:
    """Total variation between each row, scaled to sum 1, and the uniform distribution, [..., Q, N] -> [..., Q].

    ½ Σ_j |p_j − 1/N|: 0 for uniform rows, 1 − 1/N for one key alone. NaN for rows without mass.

    >>> from_uniform(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.0, 0.5]
    """
    mass = probs.sum(-1, keepdim=True)
    shares = probs / torch.where(mass > 0, mass, torch.nan)
    return shares.sub_(1 / probs.shape[-1]).abs_().sum(-1) / 2


def of_rows(plan: Plan, prefix: bool, trace: Trace, tile: MapTile) -> Tensor:
    """Distance of the queries of a tile from uniform attention, [b, h, L, R]; NaN for queries that do not count."""
    if prefix:
        return from_uniform(tile.probs)
    found = torch.full(tile.probs.shape[:-1], torch.nan, device=tile.probs.device)
    patches = over_patches(plan, plan.layers[plan.map_layers[tile.positions[0]]])
    if patches is not None:
        rows = [t - tile.rows.start for t in tile.tokens("row") if t in set(patches)]
        found[..., rows] = from_uniform(tile.probs[..., rows, :][..., patches])
    return found


class DistanceFromUniform(MapMetric):
    """Total variation distance of the attention distributions from uniform attention."""

    name = "distance-from-uniform"
    summary = "how far each head's attention is from uniform (total variation)"
    dims = ("block", "head")
    title = "How far attention is from uniform"
    seen = (
        f"Total variation distance of the softmax from 1/N: 0 where a head averages all tokens. {DOTS} Dotted: one key alone, "
        "the largest distance that there is."
    )
    limits = "Both ends can be ill: near 0 attention chooses nothing, near the dotted line it chooses a single token."
    panel = "all keys"
    unit = "total variation distance"
    top = 1.0
    reference = ("largest", "one key alone")
    defaults = {"prefix": True, "point": "probs"}
    variants = {"patches": Variant({"prefix": False}, "patch queries and keys alone")}

    def inapplicable(self) -> str:
        """There must be maps over tokens, and over the patches themselves where prefix tokens are left out."""
        if no_token_maps(self.plan) or self.settings["prefix"]:
            return no_token_maps(self.plan)
        fits = any(over_patches(self.plan, self.plan.layers[i]) for i in self.plan.token_layers)
        return "" if fits else "no block attends between the model's patches"

    @property
    def definition(self) -> str:
        """The definition in words."""
        tokens = "all keys" if self.settings["prefix"] else "patch keys (prefix queries and keys dropped, rows renormalised)"
        return (
            f"Mean over images and queries of ½ Σ_j |p_j − 1/N| over the N {tokens}, on the softmax (probs): the total "
            "variation distance from uniform attention. 0: the head averages all tokens; details.largest, 1 − 1/N: one key "
            "alone. Both ends can be ill, as with attention-entropy."
        )

    def needs(self) -> dict[str, Need]:
        """Distances by block and head."""
        values = partial(of_rows, self.plan, self.settings["prefix"])
        return {"distance": (("from-uniform", self.settings["prefix"]), lambda: RowMeans(self.plan, values))}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """Distances, with the largest that there could be."""
        layers = [self.plan.layers[i] for i in self.plan.map_layers]
        keys = [layer.keys if self.settings["prefix"] else len(over_patches(self.plan, layer) or ()) for layer in layers]
        largest = [1 - 1 / n if n and not layer.reason else np.nan for n, layer in zip(keys, layers, strict=True)]
        details = {"largest": np.array(largest)}
        return self.reading(**by_head(folds["distance"]), point="probs", details=details, nulls=untrained_only())

    def per_image(self, records: Mapping[str, Mapping[str, Array]]) -> Array | None:
        """Mean over heads, [images, blocks]."""
        return records["distance"]["value"]


METRICS.add(DistanceFromUniform.name, DistanceFromUniform)
