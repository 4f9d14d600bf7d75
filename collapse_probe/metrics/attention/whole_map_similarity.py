"""Are the heads' maps, each taken as one long vector, alike within a block and across blocks?"""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.functional.unit_vectors import span_grams, spanned
from collapse_probe.metrics.map_metric import MapMetric
from collapse_probe.metrics.metric import MATRICES, Need
from collapse_probe.registry import METRICS

MAP_BYTES = 32 * 2**20
"""Bytes of float32 maps, of all blocks and heads, that are alive at a time."""


def head_cosine(products_LHLH: Tensor) -> Tensor:
    """Mean |cosine| over the head pairs of two blocks, from inner products of flat maps, [L, H, L, H] -> [L, L], 0 … 1.

    1/H² Σ_gh |<A_g, B_h>| / (‖A_g‖‖B_h‖), a head with itself included (Diverse-ViT, arXiv 2203.06345). Zero maps have no
    direction and do not count; NaN where no pair is left.

    >>> head_cosine(torch.eye(2).view(1, 2, 1, 2)).item()
    0.5
    """
    blocks, heads = products_LHLH.shape[:2]
    flat = products_LHLH.reshape(blocks * heads, blocks * heads)
    lengths = flat.diagonal().clamp_min(0).sqrt()
    defined = lengths > 0
    scale = torch.where(defined, 1 / torch.where(defined, lengths, 1.0), 0.0)
    cosines = (flat * scale[:, None] * scale[None]).abs().view(blocks, heads, blocks, heads).sum((1, 3))
    count = defined.view(blocks, heads).sum(1).to(cosines.dtype)
    pairs = count[:, None] * count[None]
    return torch.where(pairs > 0, cosines / pairs.clamp_min(1), torch.nan)


class WholeMaps(Means):
    """Per image the mean absolute cosine between the flat maps of any two heads, by two blocks."""

    def __init__(self, plan: Plan, point: str) -> None:
        super().__init__()
        self.point, self.blocks, self.neighbours = point, len(plan.map_layers), torch.tensor(plan.adjacent, dtype=torch.bool)
        self.add_means(value=(self.blocks, self.blocks))

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take the batch image by image; each block with the block before is kept by image."""
        values = torch.full((trace.images, self.blocks, self.blocks), torch.nan, dtype=torch.float64)
        for (heads, queries, keys), positions in trace.plan.groups().items():
            layers = [trace.plan.map_layers[position] for position in positions]
            place = torch.tensor(positions)
            for image in range(trace.images):
                products = self._products(trace, layers, image, (heads, queries, keys))
                cosines = head_cosine(products.view(len(layers), heads, len(layers), heads))
                values[image, place[:, None], place[None]] = cosines.cpu().to(torch.float64)
        self.add_images("value", values)
        return {"value": torch.where(self.neighbours, values.diagonal(-1, 1, 2), torch.nan)}

    def _products(self, trace: Trace, layers: list[int], image: int, shape: tuple[int, int, int]) -> Tensor:
        """Inner products of all blocks' and heads' maps of one image, [L·H, L·H]; some queries at a time."""
        heads, queries, keys = shape
        step = max(1, MAP_BYTES // (len(layers) * heads * keys * 4))
        one, all_heads, all_keys = slice(image, image + 1), slice(0, heads), slice(0, keys)
        total: Tensor | None = None
        for first in range(0, queries, step):
            rows = slice(first, min(first + step, queries))
            maps = [trace.attention[i].maps(one, all_heads, rows, all_keys)[self.point][0].flatten(1) for i in layers]
            entries = maps[0].shape[1]
            flat = maps[0].new_zeros(len(layers) * heads, spanned(entries, maps[0].device))
            torch.cat(maps, out=flat[:, :entries])
            part = span_grams(flat[:, None, None])[0, 0]
            total = part if total is None else total + part
        assert total is not None
        return total


class WholeMapSimilarity(MapMetric):
    """Mean absolute cosine between the flattened maps of any two heads, in one block or two (Diverse-ViT)."""

    name = "whole-map-similarity"
    summary = "mean |cosine| between any two heads' whole maps, in one block or two (Diverse-ViT)"
    dims = ("block", "block")
    collapsed = "high"
    title = "How alike any two heads' whole maps are"
    seen = (
        "Mean absolute cosine between the whole maps of any two heads, in one block (diagonal) or in two (Diverse-ViT); "
        f"right, where there is one, the untrained copy. {MATRICES}"
    )
    limits = "Two maps that are both near uniform score near 1 whatever they attend to."
    failure_types = ("depth",)
    formula = r"\frac{1}{H^2} \sum_{g,h} |\cos(\mathrm{vec}\, A_g,\, \mathrm{vec}\, B_h)|"
    value_range = "0 to 1; within one block never below 1/H"
    source = "Diverse-ViT, arXiv 2203.06345, and its released code"
    traps = "It has no chance level of other tokens: compare with the untrained copy, for near-uniform maps score near 1."
    panel = "what multiplies the values (weights)"
    unit = "|cosine|"

    @property
    def definition(self) -> str:
        return (
            "1/H² Σ_gh |cos(A_g, B_h)| between the maps of head g of one block and head h of another (or the same), each "
            f"flattened to one vector, prefix tokens included, on {self.map_name}; per image, then averaged over "
            "images. A head with itself counts within a block, so that the diagonal never falls below 1/H. Diverse-ViT (arXiv "
            "2203.06345) and its released code. Near-uniform maps are alike without having learned it: see the untrained copy."
        )

    def accumulators(self) -> list[Need]:
        point = self.point
        return [(("whole-maps", point), lambda: WholeMaps(self.plan, point))]


METRICS.add(WholeMapSimilarity.name, WholeMapSimilarity)
