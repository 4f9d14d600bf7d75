"""What a metric of attention maps over tokens is: pools and channels have none, windows one each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Layer, Plan
from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.coverage import NO_PATCHES, covered, groups_of, has_patches
from collapse_probe.metrics.metric import Metric, Record, Variant, mean_over_images
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.sampled_images import SampledImages
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array

BY_ROWS = Variant({"axis": "row"}, "by rows: where one query looks")
CENTRED = Variant({"centred": True}, "centred: each vector's mean taken off")
OF_PROBS = Variant({"point": "probs"}, "softmax map")
WITHOUT_PREFIX = Variant({"prefix": False}, "without prefix tokens")
RowValues = Callable[[Trace, MapTile], Tensor]
"""Takes a tile with whole rows; gives a value for each of its queries, [b, h, L, R], NaN where it is undefined."""


class HeadMeans(Means):
    """Means over images of quantities that every head of every block has, and of their means over the block's heads.

    `shape` is blocks × heads; a block with fewer heads than others leaves its last places undefined.
    """

    windowed = True

    def __init__(self, plan: Plan, *names: str) -> None:
        super().__init__()
        self.shape = len(plan.map_layers), max((group.heads for group in plan.map_groups()), default=1)
        for name in names or ("value",):
            self.add_means(**{name: self.shape, f"{name}_over_heads": self.shape[:1]})

    def add_heads(self, **values: Tensor) -> dict[str, Tensor]:
        """Add quantities [B, blocks, heads] of a batch; returns their means over heads [B, blocks]."""
        over_heads = {name: quantity.nanmean(-1) for name, quantity in values.items()}
        for name, quantity in values.items():
            self.add_images(name, quantity)
            self.add_images(f"{name}_over_heads", over_heads[name])
        return over_heads


class RowMeans(HeadMeans):
    """Per image, block and head the mean over the queries (of all windows) for which `values` is defined."""

    def __init__(self, plan: Plan, values: RowValues) -> None:
        super().__init__(plan)
        self.values = values

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._trace = trace
        self._total = torch.zeros(trace.images, *self.shape, dtype=torch.float64, device=trace.wide_device)
        self._rows = torch.zeros_like(self._total)

    def add_tile(self, tile: MapTile) -> None:
        if tile.whole_rows:
            values_bhLR = self.values(self._trace, tile)
            defined = torch.isfinite(values_bhLR)
            place = torch.tensor(tile.positions)
            for target, part in ((self._total, torch.where(defined, values_bhLR, 0.0)), (self._rows, defined)):
                target[tile.images, place, tile.heads] += tile.over_windows(part.sum(-1)).transpose(1, 2).to(target.device)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        del self._trace
        return self.add_heads(value=torch.where(self._rows > 0, self._total / self._rows, torch.nan))


SPECTRUM_BYTES = 32 * 2**20
"""Bytes of float64 maps whose singular values are taken at a time."""


class SampledMaps(SampledImages):
    """Of a sample of images, block and head what `numbers` says of the whole map (mean over windows), by `names`.

    `numbers` takes maps [H, N, M] and gives values [H] for each name, NaN where undefined.
    """

    def __init__(
        self,
        plan: Plan,
        point: str,
        without: tuple[int, ...],
        names: Iterable[str],
        numbers: Callable[[Tensor], dict[str, Tensor]],
        most: int,
    ) -> None:
        self.names, self.numbers = tuple(names), numbers
        super().__init__(len(self.names), most, torch.float64)
        self.plan, self.point, self.without = plan, point, without
        self.windowed = not without
        self.shape = HeadMeans(plan).shape

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._images = names

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take a batch; returns the means over heads [B, blocks], NaN for images outside of the sample."""
        over_heads = {name: torch.full((trace.images, self.shape[0]), torch.nan, dtype=torch.float64) for name in self.names}

        def features(image: int) -> list[Tensor]:
            found = self._numbers(trace, image)
            for name, of_heads in found.items():
                over_heads[name][image] = of_heads.nanmean(-1)
            return [*found.values()]

        self.take_images(self._images, features)
        return over_heads

    def means(self) -> HeadMeans:
        """The means over the images of the sample."""
        means = HeadMeans(self.plan, *self.names)
        if self._kept:
            views = zip(*(features for _, features in self._kept), strict=True)
            values = [torch.stack([x for x in view if x is not None]).view(-1, *self.shape) for view in views]
            means.add_heads(**dict(zip(self.names, values, strict=True)))
        return means

    def _numbers(self, trace: Trace, image: int) -> dict[str, Tensor]:
        """The numbers of one image, [blocks, heads] by name; NaN where there is no head."""
        found = {name: torch.full(self.shape, torch.nan, dtype=torch.float64) for name in self.names}
        for group in groups_of(trace.plan, self.windowed):
            windows = range(image * group.windows, (image + 1) * group.windows)
            for position in group.positions:
                layer = trace.plan.map_layers[position]
                each = [self._of_map(trace, layer, window) for window in windows]
                for name, values in found.items():
                    values[position, : group.heads] = torch.stack([numbers[name] for numbers in each]).nanmean(0)
        return found

    def _of_map(self, trace: Trace, layer: int, image: int) -> dict[str, Tensor]:
        """The numbers of the maps of all heads of one layer and image (or window), [H] by name, on the CPU."""
        heads, queries, keys = trace.plan.layers[layer].signature
        rows, columns = ([t for t in range(size) if t not in self.without] for size in (queries, keys))
        step = max(1, SPECTRUM_BYTES // (queries * keys * 8))
        everything = slice(None)
        parts = []
        for first in range(0, heads, step):
            place = (slice(image, image + 1), slice(first, first + step), everything, everything)
            maps = trace.attention[layer].maps(*place)[self.point][0]
            if self.without:
                maps = maps[:, rows][:, :, columns]
            parts.append(self.numbers(maps))
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in self.names}


class MapMetric(Metric):
    """A metric that compares maps token by token, at the setting `point`: `weights` (what multiplies V) or `probs`.

    One that is `windowed` takes attention inside windows as well, window by window.
    """

    level = "attention"
    windowed: ClassVar[bool] = False
    defaults = {"point": "weights"}
    variants = {"probs": OF_PROBS}

    @property
    def layers(self) -> list[Layer]:
        """The layers with maps, in their order."""
        return [self.plan.layers[i] for i in self.plan.map_layers]

    @property
    def point(self) -> str:
        """Where the maps are taken; "weights" also for the softmax of a model that multiplies V by it unchanged."""
        return self.settings["point"] if any(layer.mixed for layer in self.layers) else "weights"

    @property
    def map_name(self) -> str:
        """Which map a definition is of, in words."""
        return {"weights": "the final map (weights)", "probs": "the softmax map (probs)"}[self.settings["point"]]

    @property
    def measured(self) -> list[int]:
        """The places on the `block` axis whose maps are taken."""
        without = self.plan.prefix if self.settings.get("prefix") is False else ()
        groups = groups_of(self.plan, self.windowed, without)
        return sorted(place for group in groups for place in group.positions)

    def of_measured(self, values: Sequence[float | None]) -> Array:
        """Numbers of every block, [blocks], NaN for those whose maps are not taken."""
        return np.array([value if place in self.measured else np.nan for place, value in enumerate(values)], dtype=np.float64)

    def inapplicable(self) -> str:
        """Pooled and channel attention has no map over the image's tokens, and tokens of their own are no patches."""
        if not self.measured:
            reasons = dict.fromkeys(layer.reason for layer in self.layers)
            return "no block has maps between all of an image's tokens that can be taken: " + "; ".join(reasons)
        return NO_PATCHES if self.settings.get("prefix") is False and not has_patches(self.plan) else ""

    def result(self, values: Array | None, **facts: Any) -> MetricResult:
        """A result with the point at which the maps were taken, and of which blocks they are."""
        if values is None:
            return super().result(values, **facts)
        return super().result(values, point=self.settings["point"], **{"covers": covered(self.plan, self.measured), **facts})


class HeadMetric(MapMetric):
    """A metric with one value for each block and head, from `HeadMeans`; the mean over heads stands beside them."""

    dims = ("block", "head")

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Values by block and head, and their mean over heads."""
        (means,) = accumulators
        over_heads = mean_over_images(means, f"{self.quantity}_over_heads")
        facts = mean_over_images(means, self.quantity)
        head_mean = tuple(over_heads.values())
        return self.result(**facts, head_mean=head_mean, details=self.details(means), nulls=untrained_only())


def patch_places(plan: Plan, layer: Layer) -> list[int] | None:
    """Positions of the patches among the keys of a layer; None where there are fewer keys than the model's patches, or where
    others are among them at places that are not known.

    Tokens that a block adds of its own come first, as in `Trace.patches`. Tokens that do not come from the image are no
    patches; in windows of a model that has prefix tokens nobody knows which are.
    """
    tokens, patches = layer.keys, plan.tokens - len(plan.prefix)
    if layer.windows > 1:
        return None if plan.prefix or not has_patches(plan) else list(range(tokens))
    if patches < 1 or tokens < patches or not has_patches(plan):
        return None
    if tokens == plan.tokens:
        return [t for t in range(tokens) if t not in plan.prefix]
    if layer.queries != tokens or layer.block is None or plan.patch_shapes[layer.block + 1] is None:
        return None  # keys of its own, which may come first or last
    return list(range(tokens - patches, tokens))


def prefix_places(plan: Plan, layer: Layer) -> list[int]:
    """Positions of what is no patch among the keys of a layer; empty where the patches are not known there."""
    patches = patch_places(plan, layer)
    return [] if patches is None else [t for t in range(layer.keys) if t not in set(patches)]


def patch_size(plan: Plan) -> tuple[float, float] | None:
    """Height and width of a patch in pixels of the model's input: the input's sides over the grid's.

    None where the patches form no rectangle or the input's size is unknown.
    """
    if plan.grid is None or plan.image_size is None:
        return None
    return plan.image_size[0] / plan.grid[0], plan.image_size[1] / plan.grid[1]


def patch_distances(grid: tuple[int, int], size: tuple[float, float]) -> Tensor:
    """Distance in pixels between the centres of all patches of a grid (rows, columns), row by row: [P, P] in float64.

    d_ij = √((height · Δrow)² + (width · Δcolumn)²) with the patches' (height, width) `size`.

    >>> patch_distances((1, 3), (16, 16))[0].tolist()
    [0.0, 16.0, 32.0]
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) * side for n, side in zip(grid, size, strict=True))
    centres = torch.cartesian_prod(rows, columns)
    return (centres[:, None] - centres[None, :]).square().sum(-1).sqrt()


def over_patches(plan: Plan, layer: Layer) -> list[int] | None:
    """Positions of the patches among both the queries and the keys of a layer; None where these are not the same tokens."""
    return patch_places(plan, layer) if layer.queries == layer.keys else None
