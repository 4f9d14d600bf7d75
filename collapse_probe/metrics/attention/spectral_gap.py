"""How far is an attention map from the one map that gives all tokens the same?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collapse_probe.metrics.functional.spectra import RELATIVE, STEPS, two_largest
from collapse_probe.metrics.map_metric import OF_PROBS, WITHOUT_PREFIX, HeadMeans, HeadMetric, SampledMaps
from collapse_probe.metrics.metric import DOTS, Need, Record, Variant
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult

MEASURES = {
    "gap": "σ_1 − σ_2",
    "second": "σ_2·√N, N the number of keys",
    "first": "σ_1",
}
IMAGES = 32


def gap_of(maps: Tensor) -> dict[str, Tensor]:
    """MEASURES of maps [..., N, M] and how far their singular values may be from the true ones over σ₁, [...] each, float64.

    >>> {name: round(value.item(), 9) for name, value in gap_of(torch.full((4, 4), 0.25)).items()}
    {'gap': 1.0, 'second': 0.0, 'first': 1.0, 'bound': 0.0}
    """
    values, bounds = two_largest(maps)
    first, second = values.unbind(-1)
    if min(maps.shape[-2:]) < 2:  # there is no second one
        second = torch.full_like(first, torch.nan)
    bound = bounds.amax(-1) / torch.where(first > 0, first, 1.0)
    return {"gap": first - second, "second": second * math.sqrt(maps.shape[-1]), "first": first, "bound": bound}


class SpectralGap(HeadMetric):
    """The difference of the two largest singular values of each map, and the second one against random maps."""

    name = "spectral-gap"
    summary = "gap between the two largest singular values of each head's map; @second the second one times √N"
    collapsed = "high"
    title = "Gap between the two largest singular values"
    seen = (
        f"Difference of the two largest singular values of each head's map. {DOTS} At 1 every query attends alike and evenly, "
        "at 0 a map mixes nothing away."
    )
    limits = (
        "A gap near 1 is what random maps of many tokens have too: σ₂ of a map with independent entries falls as 1/√N. A sink "
        "makes σ₁ larger than 1, and the gap with it."
    )
    failure_types = ("tokens",)
    formula = r"\sigma_1(A) - \sigma_2(A)"
    value_range = "0 (a permutation) to 1 (uniform), to √N where one key receives all; @second 0 to N"
    source = "Nait Saada et al., arXiv 2410.07799, for the gap between these two; this project for the rest"
    traps = (
        "Other numbers of tokens are other scales: compare @second, σ₂·√N, which stays put for random maps. Prefix tokens "
        "are in the map (@patches leaves them out). Singular values, not eigenvalues: a softmax map has the eigenvalue 1."
    )
    panel = "what multiplies the values (weights)"
    unit = "σ₁ − σ₂"
    windowed = True
    defaults = {"measure": "gap", "prefix": True, "point": "weights"}
    choices = {"measure": MEASURES}
    quantity_from = "measure"
    variants = {
        "second": Variant({"measure": "second"}, "σ₂·√N", unit="σ₂·√N"),
        "first": Variant({"measure": "first"}, "σ₁", unit="σ₁"),
        "probs": OF_PROBS,
        "patches": WITHOUT_PREFIX,
    }

    @property
    def definition(self) -> str:
        tokens = "" if self.settings["prefix"] else ", prefix queries and keys dropped"
        return (
            f"Mean over images of {MEASURES[self.settings['measure']]} of the whole map of one head (N × N{tokens}) with "
            f"singular values σ, on {self.map_name}; not centred. Of at most {IMAGES} images, beyond that a random sample by a "
            "hash of their names: details.images is how many entered, details.of how many there were. Only the two largest "
            f"values are computed, by block Lanczos until residuals bound them to {RELATIVE:g} of themselves, and by the whole "
            f"spectrum where that takes more than {STEPS} steps; details.bound is the mean bound by block and head, which the "
            "true error lies far below."
        )

    def accumulators(self) -> list[Need]:
        key = (self.point, () if self.settings["prefix"] else self.plan.prefix)
        return [(("spectral-gap", *key), lambda: SampledMaps(self.plan, *key, (*MEASURES, "bound"), gap_of, IMAGES))]

    def compute(self, accumulators: Sequence[Any], records: Sequence[Record]) -> MetricResult:
        """Values by block and head, and their mean over heads, of the images of the sample; details say how many they are."""
        (maps,) = accumulators
        result = super().compute([maps.means()], records)
        return replace(result, details={**result.details, **maps.details()})

    def details(self, accumulator: HeadMeans) -> dict[str, Any]:
        return {"bound": accumulator.mean("bound")[0]}


METRICS.add(SpectralGap.name, SpectralGap)
