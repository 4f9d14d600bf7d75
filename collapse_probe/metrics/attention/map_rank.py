"""How many different rows does an attention map really have?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.coverage import groups_of
from collapse_probe.metrics.functional.spectra import effective_rank_of, singular_values, stable_rank_of
from collapse_probe.metrics.map_metric import OF_PROBS, WITHOUT_PREFIX, HeadMeans, HeadMetric
from collapse_probe.metrics.metric import DOTS, Need, Record, Variant
from collapse_probe.metrics.sampled_images import SampledImages
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult

MEASURES = {
    "effective": "the effective rank exp(−Σ_i p_i log p_i), p = σ/Σσ (Roy & Vetterli 2007); 1 … N",
    "stable": "the stable rank ‖A‖_F²/σ_1²; 1 … N",
    "residual": "the distance to rank one ‖A − σ_1 u_1 v_1ᵀ‖_F/‖A‖_F; 0 (all rows parallel) … √(1 − 1/N)",
}
SPECTRA_IMAGES = 32
SAMPLE = (
    "beyond that a random sample by a hash of their names; details.images is how many entered, details.of how many there were"
)
SPECTRUM_BYTES = 32 * 2**20
"""Bytes of float64 maps whose singular values are taken at a time."""


def distance_to_rank_one(values: Tensor) -> Tensor:
    """‖A − σ_1 u_1 v_1ᵀ‖_F/‖A‖_F from singular values in descending order, [..., n] -> [...], 0 … √(1 − 1/n); NaN for zeros.

    >>> distance_to_rank_one(torch.tensor([4.0, 3.0])).item()
    0.6000000238418579
    """
    squares = values.square()
    whole = squares.sum(-1)
    return torch.where(whole > 0, (squares[..., 1:].sum(-1) / torch.where(whole > 0, whole, 1.0)).sqrt(), torch.nan)


class MapSpectra(SampledImages):
    """Of a sample of images, block and head what the singular values of the whole map say (mean over windows)."""

    def __init__(self, plan: Plan, point: str, without: tuple[int, ...]) -> None:
        super().__init__(len(MEASURES), SPECTRA_IMAGES, torch.float64)
        self.plan, self.point, self.without = plan, point, without
        self.windowed = not without
        self.shape = HeadMeans(plan).shape

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._names = names

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Take a batch; returns the means over heads [B, blocks], NaN for images outside of the sample."""
        over_heads = {name: torch.full((trace.images, self.shape[0]), torch.nan, dtype=torch.float64) for name in MEASURES}

        def ranks(image: int) -> list[Tensor]:
            ranks = self._ranks(trace, image)
            for name, of_heads in ranks.items():
                over_heads[name][image] = of_heads.nanmean(-1)
            return [*ranks.values()]

        self.take_images(self._names, ranks)
        return over_heads

    def means(self) -> HeadMeans:
        """The means over the images of the sample."""
        means = HeadMeans(self.plan, *MEASURES)
        if self._kept:
            views = zip(*(features for _, features in self._kept), strict=True)
            ranks = [torch.stack([x for x in view if x is not None]).view(-1, *self.shape) for view in views]
            means.add_heads(**dict(zip(MEASURES, ranks, strict=True)))
        return means

    def _ranks(self, trace: Trace, image: int) -> dict[str, Tensor]:
        """The measures of one image, [blocks, heads] by name; NaN where there is no head."""
        ranks = {name: torch.full(self.shape, torch.nan, dtype=torch.float64) for name in MEASURES}
        for group in groups_of(trace.plan, self.windowed):
            windows = range(image * group.windows, (image + 1) * group.windows)
            for position in group.positions:
                layer = trace.plan.map_layers[position]
                values = torch.stack([self._singular_values(trace, layer, window) for window in windows])
                ranks["effective"][position, : group.heads] = effective_rank_of(values).nanmean(0)
                ranks["stable"][position, : group.heads] = stable_rank_of(values).nanmean(0)
                ranks["residual"][position, : group.heads] = distance_to_rank_one(values).nanmean(0)
        return ranks

    def _singular_values(self, trace: Trace, layer: int, image: int) -> Tensor:
        """Singular values of the maps of all heads of one layer and image (or window), [H, min(N, M)] in float64 on the CPU."""
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
            parts.append(singular_values(maps).cpu())
        return torch.cat(parts)


class MapRank(HeadMetric):
    """Effective or stable rank of the attention maps, or their distance from rank one."""

    name = "map-rank"
    summary = "effective rank of each head's map; @stable rank, @residual: distance to rank one"
    collapsed = "low"
    title = "How many directions an attention map has"
    seen = (
        "Effective rank of the whole map of a head, on a logarithmic scale from 1: at 1 every query attends alike, up to a "
        f"factor. {DOTS} Dotted: the largest rank that the map could have."
    )
    limits = (
        "The rank is taken uncentred, so that a strong uniform part alone brings it near 1; a low rank is how "
        "query-independent attention looks, not how useless attention looks."
    )
    failure_types = ("tokens",)
    formula = r"\exp\left(-\sum_k p_k \log p_k\right), \quad p_k = \sigma_k / \sum_l \sigma_l"
    value_range = "1 (every query attends alike) to N"
    source = "Roy & Vetterli 2007 for the rank; Dong et al., arXiv 2103.03404 for rank one as collapse"
    traps = (
        "Squared singular values give another rank under the same name. A map of rank one gives all tokens one "
        "mixture, but the skip connection keeps them apart: read the token metrics beside it."
    )
    panel = "effective rank of what multiplies the values (weights)"
    unit = "rank"
    logarithmic = True
    reference = ("largest", "largest possible")
    windowed = True
    defaults = {"measure": "effective", "prefix": True, "point": "weights"}
    choices = {"measure": MEASURES}
    quantity_from = "measure"
    variants = {
        "stable": Variant({"measure": "stable"}, "stable rank ‖A‖²/σ₁²"),
        "residual": Variant({"measure": "residual"}, "distance to rank one", unit="relative distance"),
        "probs": OF_PROBS,
        "patches": WITHOUT_PREFIX,
    }

    @property
    def definition(self) -> str:
        tokens = "" if self.settings["prefix"] else ", prefix queries and keys dropped"
        return (
            f"Mean over images of {MEASURES[self.settings['measure']]}, of the whole map of one head A (N × N{tokens}) with "
            f"singular values σ, on {self.map_name}. Rank one is collapse: every query attends alike, up to a factor. "
            f"Not centred. Of at most {SPECTRA_IMAGES} images: {SAMPLE}. "
            "Cost: one spectrum in float64 for each of these, block and head, a few N³ each; "
            f"maps are taken {SPECTRUM_BYTES // 2**20} MiB at a time. Zero maps have no rank."
        )

    def accumulators(self) -> list[Need]:
        key = (self.point, () if self.settings["prefix"] else self.plan.prefix)
        return [(("map-rank", *key), lambda: MapSpectra(self.plan, *key))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Values by block and head, and their mean over heads, of the images of the sample; details say how many they are."""
        (spectra,) = accumulators
        result = super().compute([spectra.means()], records)
        return replace(result, details={**result.details, **spectra.details()})

    def details(self, accumulator: HeadMeans) -> dict[str, Any]:
        """The largest rank that the map of each block could have."""
        return {"largest": self.of_measured([min(layer.queries, layer.keys) for layer in self.layers])}


METRICS.add(MapRank.name, MapRank)
