"""Means over images by block and head, and what can be said of single queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from collapse_probe.measure import mean_over_images
from collapse_probe.sums import Means
from collapse_probe.trace import MapTile, Plan, Trace

RowValues = Callable[[Trace, MapTile], Tensor]
"""Takes a tile with whole rows; gives a value for each of its queries, [b, h, L, R], NaN where it is undefined."""


def block_by_head(plan: Plan) -> tuple[int, int]:
    """The shape of a block × head reading; a block with fewer heads than others leaves its last places undefined."""
    return len(plan.map_layers), max((heads for heads, _, _ in plan.groups()), default=1)


class HeadMeans(Means):
    """Means over images of quantities that every head of every block has, and of their means over the block's heads."""

    def __init__(self, plan: Plan, *names: str) -> None:
        super().__init__()
        self.shape = block_by_head(plan)
        for name in names or ("value",):
            self.means_of(**{name: self.shape, f"{name}_over_heads": self.shape[:1]})

    def taken(self, **values: Tensor) -> dict[str, Tensor]:
        """Add quantities [B, blocks, heads] of a batch; their means over heads [B, blocks] are what is kept of each image."""
        found = {name: quantity.nanmean(-1) for name, quantity in values.items()}
        for name, quantity in values.items():
            self.take(name, quantity)
            self.take(f"{name}_over_heads", found[name])
        return found


class RowMeans(HeadMeans):
    """Per image, block and head the mean over the queries for which `values` is defined."""

    def __init__(self, plan: Plan, values: RowValues) -> None:
        super().__init__(plan)
        self.values = values

    def begin(self, trace: Trace, names: Sequence[str]) -> None:
        """Make room for a batch."""
        self._trace = trace
        self._total = torch.zeros(trace.images, *self.shape, dtype=torch.float64)
        self._rows = torch.zeros_like(self._total)

    def tile(self, tile: MapTile) -> None:
        """Add the queries of a tile."""
        if tile.whole_rows:
            values_bhLR = self.values(self._trace, tile)
            defined = torch.isfinite(values_bhLR)
            place = torch.tensor(tile.positions)
            for target, part in ((self._total, torch.where(defined, values_bhLR, 0.0)), (self._rows, defined)):
                target[tile.images, place, tile.heads] += part.sum(-1).transpose(1, 2).cpu()

    def end(self, trace: Trace) -> dict[str, Tensor]:
        """Close the batch."""
        del self._trace
        return self.taken(value=torch.where(self._rows > 0, self._total / self._rows, torch.nan))


def by_head(fold: Means, name: str = "value") -> Mapping[str, Any]:
    """values, stderr, ci95 and head_mean of a quantity of a `HeadMeans`, as a Reading takes them."""
    means = mean_over_images(fold, f"{name}_over_heads")
    return {**mean_over_images(fold, name), "head_mean": (means["values"], means["stderr"], means["ci95"])}
