"""How far away does each head look?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.coverage import NO_PATCHES, has_patches
from collapse_probe.metrics.functional.geometry import as_span
from collapse_probe.metrics.map_metric import (
    HeadMetric,
    RowMeans,
    over_patches,
    patch_distances,
    patch_size,
)
from collapse_probe.metrics.metric import DOTS, Need, Variant
from collapse_probe.registry import METRICS

PREFIX = {
    "renormalise": "the patches' part of each row divided by its sum",
    "drop": "the patches' part of each row taken as it is, so that mass on prefix tokens counts as distance 0",
    "resoftmax": "the softmax taken anew over the logits of the patches alone",
}
"""The three ways in which prefix tokens are left out."""


def attended_distance(probs: Tensor, distances: Tensor, renormalise: bool = True) -> Tensor:
    """Mean attended distance of each query, probs [..., Q, K] and distances [Q, K] -> [..., Q], in the distances' unit.

    Σ_j p_j d_ij, over Σ_j p_j where `renormalise`; from 0 (each query looks at itself) to the largest distance. NaN where a
    query has no mass to renormalise. (Dosovitskiy et al., arXiv 2010.11929, Fig. 7; Raghu et al., arXiv 2108.08810.)

    >>> attended_distance(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.0, 16.0], [16.0, 0.0]])).tolist()
    [8.0, 0.0]
    """
    total = (probs * distances).sum(-1)
    if not renormalise:
        return total
    mass = probs.sum(-1)
    return torch.where(mass > 0, total / mass, torch.nan)


def uniform_distance(distances: Tensor, tokens: int, renormalise: bool = True) -> float:
    """What `attended_distance` is, in the mean over patches, where every query attends to all of `tokens` alike."""
    return float(distances.mean()) * (1.0 if renormalise else len(distances) / max(tokens, 1))


def distances_of_rows(prefix: str, trace: Trace, tile: MapTile) -> Tensor:
    """Attended distance of the queries of a tile, [b, h, L, R]; NaN for prefix tokens and for tokens that are no grid."""
    plan = trace.plan
    patches = None if tile.windows > 1 else over_patches(plan, plan.layers[plan.map_layers[tile.positions[0]]])
    size = patch_size(plan)
    values = torch.full(tile.probs.shape[:-1], torch.nan, device=tile.probs.device)
    rows = [] if patches is None else [t for t in tile.tokens("row") if t in set(patches)]
    if patches is None or not rows or size is None or plan.grid is None:
        return values
    inside = as_span([t - tile.rows.start for t in rows])
    maps = patches_anew(trace, tile, patches) if prefix == "resoftmax" else tile.probs[..., as_span(patches)]
    first = {token: place for place, token in enumerate(patches)}
    distances = patch_distances(plan.grid, size)[[first[t] for t in rows]].to(maps.device, maps.dtype)
    values[..., inside] = attended_distance(maps[..., inside, :], distances, prefix != "drop")
    return values


def patches_anew(trace: Trace, tile: MapTile, patches: list[int]) -> Tensor:
    """The softmax over the patches alone, [b, h, L, R, P]: from the logits, or from log p where the softmax alone is known."""
    softmaxes = []
    for place, position in enumerate(tile.positions):
        attention = trace.attention[trace.plan.map_layers[position]]
        if attention.q is None:
            logits = tile.probs[:, :, place].log()
        else:
            logits = attention.logits(tile.images, tile.heads, tile.rows, tile.columns)
        softmaxes.append(torch.softmax(logits[..., patches], -1).nan_to_num(0.0))
    return torch.stack(softmaxes, dim=2)


class AttentionDistance(HeadMetric):
    """Mean distance in pixels between a patch and the patches that it attends to (ViT Fig. 7)."""

    name = "attention-distance"
    summary = "how far each head looks: mean attended distance, in pixels of the input"
    title = "How far each head looks"
    seen = (
        f"Mean distance between a patch and the patches that it attends to, in pixels of the model's input. {DOTS} Dotted: "
        "what uniform attention gives."
    )
    limits = (
        "A head on the dotted line may attend uniformly, or to patches that lie as far away; only the entropy tells these "
        "apart. Nearness is not quality."
    )
    failure_types = ()
    formula = r"\frac{1}{n} \sum_i \sum_j p_{ij}\, d_{ij}"
    value_range = "0 (a patch attends to itself) to the diagonal of the input, in pixels"
    source = "ViT, Dosovitskiy et al., arXiv 2010.11929, Fig. 7"
    traps = (
        "Published code treats the class token in three ways, whose numbers differ: compare like with like. Uniform "
        "attention over 14 × 14 patches of 16 pixels gives 116.5 pixels, so that a large distance alone is no long "
        "range."
    )
    panel = "prefix tokens left out, rows renormalised"
    unit = "pixels"
    reference = ("uniform", "uniform attention")
    defaults = {"prefix": "renormalise", "point": "probs"}
    choices = {"prefix": PREFIX}
    variants = {
        "drop": Variant({"prefix": "drop"}, "attention to prefix tokens counts as 0 pixels"),
        "resoftmax": Variant({"prefix": "resoftmax"}, "softmax taken anew over the patches"),
    }

    def inapplicable(self) -> str:
        """Distances need maps over tokens, patches on a grid, and the input's size in pixels."""
        if missing := super().inapplicable():
            return missing
        if not has_patches(self.plan):
            return NO_PATCHES
        if self.plan.grid is None:
            return "the patches form no rectangle, so that nobody can say how far apart they are"
        if self.plan.image_size is None:
            return "the size of the input in pixels is unknown"
        fits = any(over_patches(self.plan, self.layers[place]) is not None for place in self.measured)
        return "" if fits else "no block attends between the patches of the grid"

    @property
    def definition(self) -> str:
        return (
            "Mean over images and patch queries i of Σ_j p_ij d_ij, d_ij the distance between the centres of patches i and j "
            "in pixels of the model's input (the input's sides over the grid's), on the softmax (probs). Prefix tokens are "
            f"left out as queries and as keys: {PREFIX[self.settings['prefix']]}. In exact arithmetic resoftmax equals "
            "renormalise. details.uniform is the value of uniform attention. (Dosovitskiy et al., arXiv 2010.11929, Fig. 7.)"
        )

    def accumulators(self) -> list[Need]:
        prefix = self.settings["prefix"]
        values = partial(distances_of_rows, prefix)
        return [(("attention-distance", prefix), lambda: RowMeans(self.plan, values))]

    def details(self, accumulator: RowMeans) -> dict[str, Any]:
        """The grid and its patches in pixels, and the distance that uniform attention would give in each block."""
        size, grid = patch_size(self.plan), self.plan.grid
        assert size is not None
        assert grid is not None
        distances, renormalise = patch_distances(grid, size), self.settings["prefix"] != "drop"
        uniform = [
            None if over_patches(self.plan, layer) is None else uniform_distance(distances, layer.keys, renormalise)
            for layer in self.layers
        ]
        return {"grid": list(grid), "patch_size": list(size), "uniform": self.of_measured(uniform)}


METRICS.add(AttentionDistance.name, AttentionDistance)
