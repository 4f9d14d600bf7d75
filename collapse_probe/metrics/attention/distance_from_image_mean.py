"""How far are the maps of single images from the map that all images share?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.accumulators import GROUPS, Accumulator, group_of
from collapse_probe.metrics.coverage import groups_of
from collapse_probe.metrics.map_metric import MapMetric
from collapse_probe.metrics.metric import DOTS, Need, Record
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.metrics.pairwise_cosine import SAMPLED_TOKENS, STATE_BUDGET, seeded_sample
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array, interval, jackknife

JACKKNIFE_TOKENS = 4
ROUNDING = 1e-13
"""A smaller share of the maps' mean square is the rounding of its two sums, and no spread."""


def spread_about_mean(total_square: Tensor, square_of_sum: Tensor, images: Tensor) -> Tensor:
    """Root mean square distance of maps from their mean over images, over their root mean square norm.

    √( Σ_b ‖A_b − Ā‖² / (B − 1) ) / √( Σ_b ‖A_b‖² / B ), from Σ_b ‖A_b‖² and ‖Σ_b A_b‖² and B, all of one shape: 0 where all
    images have one map, 1 where no two maps overlap, whatever B. NaN below two images and for maps of zeros.

    >>> spread_about_mean(torch.tensor(2.0), torch.tensor(2.0), torch.tensor(2.0)).item()  # (1, 0) and (0, 1)
    1.0
    """
    variance = (total_square - square_of_sum / images.clamp_min(1)) / (images - 1).clamp_min(1)
    variance = torch.where(variance > ROUNDING * total_square / images.clamp_min(1), variance, 0.0)
    defined = (images > 1) & (total_square > 0)
    return torch.where(defined, (variance * images / total_square.clamp_min(1e-300)).sqrt(), torch.nan)


class ImageMean(Accumulator):
    """Sums over images of the maps' rows and of their squares; and by group of images for a few rows, for a jackknife."""

    def __init__(self, plan: Plan, point: str) -> None:
        super().__init__()
        self.point, self.groups = point, groups_of(plan, self.windowed)
        self.shape = len(plan.map_layers), max((group.heads for group in self.groups), default=1)
        self.add_state("squares", *self.shape)
        self.add_state("images", 1)
        self.add_state("group_squares", GROUPS, *self.shape)
        self.add_state("group_images", GROUPS)
        self.samples, self.jackknifed = [], []  # queries by group of layers
        for g, group in enumerate(self.groups):
            heads, queries, keys, positions = group.heads, group.queries, group.keys, group.positions
            row = heads * len(positions) * keys * 8
            self.samples.append(
                seeded_sample(list(range(queries)), queries if row * queries <= STATE_BUDGET else SAMPLED_TOKENS)
            )
            most = min(JACKKNIFE_TOKENS, max(1, STATE_BUDGET // (row * GROUPS)))
            self.jackknifed.append(seeded_sample(list(range(queries)), most, seed=1))
            self.add_state(f"sum_{g}", heads, len(positions), len(self.samples[g]), keys)
            self.add_state(f"group_sum_{g}", GROUPS, heads, len(positions), len(self.jackknifed[g]), keys)

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._group = [group_of(name) for name in names]
        self.add("images", torch.tensor([float(trace.images)]))
        self.add("group_images", torch.bincount(torch.tensor(self._group), minlength=GROUPS))

    def add_tile(self, tile: MapTile) -> None:
        if not tile.whole_rows:
            return
        g = self.groups.index(tile.group)
        for place, maps_hLRC in enumerate(tile.maps(self.point)):
            group = self._group[tile.images.start + place]
            _add(tile, maps_hLRC, self.samples[g], self.state(f"sum_{g}"), self.state("squares"))
            _add(tile, maps_hLRC, self.jackknifed[g], self.state(f"group_sum_{g}")[group], self.state("group_squares")[group])

    def distance(self) -> Array:
        """[blocks, heads], over all images."""
        sums = [self.state(f"sum_{g}") for g in range(len(self.groups))]
        return np.asarray(self._spread(sums, self.state("squares"), self.state("images")).cpu().numpy())

    def left_out(self) -> Array:
        """[GROUPS, blocks, heads]: on the few rows, without one group of images each; NaN for groups without images."""
        own, counts = self.state("group_squares"), self.state("group_images")
        distances = torch.full(own.shape, torch.nan, dtype=torch.float64)
        sums = [self.state(f"group_sum_{g}") for g in range(len(self.groups))]
        for group in range(GROUPS):
            if counts[group] > 0:
                rest = [total.sum(0) - total[group] for total in sums]
                distances[group] = self._spread(rest, own.sum(0) - own[group], counts.sum() - counts[group]).cpu()
        return distances.numpy()

    def _spread(self, sums: Sequence[Tensor], squares: Tensor, images: Tensor) -> Tensor:
        distances = torch.full(self.shape, torch.nan, dtype=torch.float64, device=squares.device)
        for group, total in zip(self.groups, sums, strict=True):
            place = group.positions, slice(0, group.heads)
            square_of_sum = total.square().sum((-1, -2)).transpose(0, 1)
            distances[place] = spread_about_mean(squares[place], square_of_sum, images)
        return distances


def _add(tile: MapTile, maps_hLRC: Tensor, sample: list[int], total: Tensor, squares: Tensor) -> None:
    """Add the rows of one image's maps that are in `sample` to `total` [H, L, sample, C], their squares to [blocks, H]."""
    places = [i for i, t in enumerate(sample) if tile.rows.start <= t < tile.rows.stop]
    if places:
        inside = [sample[i] - tile.rows.start for i in places]
        rows = maps_hLRC if len(inside) == maps_hLRC.shape[2] else maps_hLRC[:, :, inside]
        rows = rows.to(total.device).double()
        total[tile.heads, :, places[0] : places[-1] + 1] += rows
        squares[tile.positions, tile.heads] += rows.square().sum((-1, -2)).transpose(0, 1)


class DistanceFromImageMean(MapMetric):
    """How far the maps of single images are from their mean map: 0 where attention ignores the input."""

    name = "distance-from-image-mean"
    summary = "how far the maps of single images are from the mean map of all images"
    dims = ("block", "head")
    collapsed = "low"
    title = "How much the maps depend on the image"
    seen = (
        "Spread of a head's maps over images, relative to their size: 0 where it attends alike whatever the picture, 1 where "
        f"the maps of two images do not overlap. {DOTS}"
    )
    limits = "A map that follows the picture need not follow what matters in it."
    failure_types = ()
    formula = r"\sqrt{\frac{\sum_b \|A_b - \bar A\|^2 / (B-1)}{\sum_b \|A_b\|^2 / B}}"
    value_range = "0 (one map for all images) to 1 (maps of two images do not overlap)"
    source = "this project"
    traps = "Needs many different images: repeated ones lower it."
    panel = "what multiplies the values (weights)"
    unit = "relative distance"
    top = 1.0

    @property
    def definition(self) -> str:
        return (
            "√(Σ_b ‖A_b − Ā‖²/(B − 1)) over √(Σ_b ‖A_b‖²/B) for the B images' maps A_b of one head, Ā their mean, Frobenius "
            "norms over all queries and keys (or over details.queries seeded queries where the sums would be too large), on "
            f"{self.map_name}. 0: one map for all images; 1: maps that do not overlap. With B − 1 the number of "
            f"images does not matter. Standard errors: a jackknife over {GROUPS} groups of images (by a hash of their names) "
            f"on {JACKKNIFE_TOKENS} seeded queries or fewer."
        )

    def accumulators(self) -> list[Need]:
        point = self.point
        return [(("image-mean", point), lambda: ImageMean(self.plan, point))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Distances by block and head, and their mean over heads."""
        (sums,) = accumulators
        if sums.state("images").item() < 2:
            return self.not_applicable("needs two different images")
        values, left_out = sums.distance(), sums.left_out()
        stderr, groups = jackknife(left_out)
        over_heads = _over_heads(values)
        error, _ = jackknife(_over_heads(left_out))
        return self.result(
            values,
            stderr=stderr,
            ci95=interval(values, stderr, groups),
            head_mean=(over_heads, error, interval(over_heads, error, groups)),
            details={"queries": [len(sample) for sample in sums.samples]},
            nulls=untrained_only(),
        )


def _over_heads(values: Array) -> Array:
    """Mean over the heads that are defined, [..., heads] -> [...]."""
    defined = np.isfinite(values)
    n = defined.sum(-1)
    return np.where(n > 0, np.where(defined, values, 0.0).sum(-1) / np.maximum(n, 1), np.nan)


METRICS.add(DistanceFromImageMean.name, DistanceFromImageMean)
