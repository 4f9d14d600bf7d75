"""Does a head choose among the keys, or take them all alike?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.map_metric import HeadMetric, RowMeans, over_patches
from collapse_probe.metrics.metric import DOTS, Need, Variant
from collapse_probe.registry import METRICS


def from_uniform(probs: Tensor) -> Tensor:
    """Total variation between each row, scaled to sum 1, and the uniform distribution, [..., Q, N] -> [..., Q].

    ½ Σ_j |p_j − 1/N|: 0 for uniform rows, 1 − 1/N for one key alone. NaN for rows without mass.

    >>> from_uniform(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.0, 0.5]
    """
    mass = probs.sum(-1, keepdim=True)
    shares = probs / torch.where(mass > 0, mass, torch.nan)
    return shares.sub_(1 / probs.shape[-1]).abs_().sum(-1) / 2


def distances_of_rows(prefix: bool, trace: Trace, tile: MapTile) -> Tensor:
    """Distance of the queries of a tile from uniform attention, [b, h, L, R]; NaN for queries that do not count."""
    if prefix:
        return from_uniform(tile.probs)
    plan, distances = trace.plan, torch.full(tile.probs.shape[:-1], torch.nan, device=tile.probs.device)
    patches = over_patches(plan, plan.layers[plan.map_layers[tile.positions[0]]])
    if patches is not None:
        rows = [t - tile.rows.start for t in tile.tokens("row") if t in set(patches)]
        distances[..., rows] = from_uniform(tile.probs[..., rows, :][..., patches])
    return distances


class DistanceFromUniform(HeadMetric):
    """Total variation distance of the attention distributions from uniform attention."""

    name = "distance-from-uniform"
    summary = "how far each head's attention is from uniform (total variation)"
    title = "How far attention is from uniform"
    seen = (
        f"Total variation distance of the softmax from 1/N: 0 where a head averages all tokens. {DOTS} Dotted: one key alone, "
        "the largest distance that there is."
    )
    limits = "Both ends can be ill: near 0 attention chooses nothing, near the dotted line it chooses a single token."
    failure_types = ("entropy",)
    formula = r"\frac{1}{2} \sum_j \left| p_j - \frac{1}{N} \right|"
    value_range = "0 (uniform) to 1 − 1/N (one key alone)"
    source = "this project; total variation distance"
    traps = (
        "The failure that it sees lies at the upper end; near 0 attention is uniform, which is another matter and "
        "makes raw similarities high."
    )
    panel = "all keys"
    unit = "total variation distance"
    top = 1.0
    reference = ("largest", "one key alone")
    windowed = True
    defaults = {"prefix": True, "point": "probs"}
    variants = {"patches": Variant({"prefix": False}, "patch queries and keys alone")}

    def inapplicable(self) -> str:
        """There must be maps over tokens, and over the patches themselves where prefix tokens are left out."""
        missing = super().inapplicable()
        if missing or self.settings["prefix"]:
            return missing
        fits = any(over_patches(self.plan, self.layers[place]) for place in self.measured)
        return "" if fits else "no block attends between the model's patches"

    @property
    def definition(self) -> str:
        tokens = "all keys" if self.settings["prefix"] else "patch keys (prefix queries and keys dropped, rows renormalised)"
        return (
            f"Mean over images and queries of ½ Σ_j |p_j − 1/N| over the N {tokens}, on the softmax (probs): the total "
            "variation distance from uniform attention. 0: the head averages all tokens; details.largest, 1 − 1/N: one key "
            "alone. Both ends can be ill, as with attention-entropy."
        )

    def accumulators(self) -> list[Need]:
        prefix = self.settings["prefix"]
        values = partial(distances_of_rows, prefix)
        return [(("from-uniform", prefix), lambda: RowMeans(self.plan, values))]

    def details(self, accumulator: RowMeans) -> dict[str, Any]:
        """The largest distance that there could be in each block."""
        prefix = self.settings["prefix"]
        keys = [layer.keys if prefix else len(over_patches(self.plan, layer) or ()) for layer in self.layers]
        return {"largest": self.of_measured([1 - 1 / n if n else None for n in keys])}


METRICS.add(DistanceFromUniform.name, DistanceFromUniform)
