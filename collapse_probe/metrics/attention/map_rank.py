"""How many different rows does an attention map really have?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.metrics.functional.spectra import effective_rank_of, singular_values, stable_rank_of
from collapse_probe.metrics.map_metric import (
    OF_PROBS,
    SPECTRUM_BYTES,
    WITHOUT_PREFIX,
    HeadMeans,
    HeadMetric,
    SampledMaps,
)
from collapse_probe.metrics.metric import DOTS, Need, Record, Variant
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


def distance_to_rank_one(values: Tensor) -> Tensor:
    """‖A − σ_1 u_1 v_1ᵀ‖_F/‖A‖_F from singular values in descending order, [..., n] -> [...], 0 … √(1 − 1/n); NaN for zeros.

    >>> distance_to_rank_one(torch.tensor([4.0, 3.0])).item()
    0.6000000238418579
    """
    squares = values.square()
    whole = squares.sum(-1)
    return torch.where(whole > 0, (squares[..., 1:].sum(-1) / torch.where(whole > 0, whole, 1.0)).sqrt(), torch.nan)


def ranks_of(maps: Tensor) -> dict[str, Tensor]:
    """The measures of maps [H, N, M] by name, [H] each."""
    values = singular_values(maps)
    return {
        "effective": effective_rank_of(values),
        "stable": stable_rank_of(values),
        "residual": distance_to_rank_one(values),
    }


class MapSpectra(SampledMaps):
    """Of a sample of images, block and head what the singular values of the whole map say (mean over windows)."""

    def __init__(self, plan: Plan, point: str, without: tuple[int, ...]) -> None:
        super().__init__(plan, point, without, MEASURES, ranks_of, SPECTRA_IMAGES)


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
