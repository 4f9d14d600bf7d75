"""How evenly do the rows of a weight matrix spread over directions?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.weights.matrices import Matrices
from collapse_probe.metrics.functional.orthogonality import (
    gram_log_determinant,
    hyperspherical_energy,
    hyperspherical_separation,
)
from collapse_probe.metrics.metric import Variant
from collapse_probe.metrics.weight_metric import ONE_HEAD, WeightMetric
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array

EPSILON = 1e-6


def where_two_rows(function: Any, rows: Tensor) -> Tensor:
    """`function(rows)`, [..., n, d] -> [...], and NaN where fewer than two rows have a direction."""
    directions = (rows != 0).any(-1).sum(-1)
    return torch.where(directions > 1, function(rows), torch.nan)


class HypersphericalEnergy(WeightMetric):
    """Energy of the rows as charges on a sphere, their smallest distance, or their kernel's determinant."""

    name = "hyperspherical-energy"
    summary = (
        "energy of the weights' rows on the sphere; @separation their smallest distance, @gram the determinant of their kernel"
    )
    collapsed = "high"
    title = "Rows of the weights on the sphere"
    seen = "How crowded the rows of each weight matrix of each block are on the sphere; dashed: the untrained copy."
    limits = "Random rows have an energy of their own: only the distance from the untrained copy is learned."
    failure_types = ()
    formula = r"\frac{1}{n(n-1)} \sum_{i \ne j} \frac{1}{\|\hat r_i - \hat r_j\|}"
    value_range = "1/2 upwards; about 0.71 for random directions in many dimensions"
    source = "Liu et al., arXiv 1805.09298; @separation and @gram after arXiv 2103.01649"
    traps = "The released code of Diverse-ViT passes over duplicate rows, which have the largest energy; here they count."
    panel = unit = "mean 1 / distance"
    defaults = {"measure": "energy", "power": 1.0, "by_head": False}
    variants = {
        "separation": Variant({"measure": "separation"}, "smallest squared distance of two rows", unit="squared distance"),
        "gram": Variant({"measure": "gram"}, "−log det of the rows' kernel", unit="nats"),
        "squared": Variant({"power": 2.0}, "mean 1 / distance²", unit="1 / distance²"),
        "log": Variant({"power": 0.0}, "mean −log distance", unit="nats"),
        "head": Variant({"by_head": True}, f"mean 1 / distance, {ONE_HEAD}"),
    }

    @property
    def definition(self) -> str:
        power = self.settings["power"]
        energy = "−log ‖r̂_i − r̂_j‖" if power == 0 else f"1 / ‖r̂_i − r̂_j‖{f'^{power:g}' if power != 1 else ''}"
        what = {
            "energy": f"Mean over pairs of rows of {energy}, rows at unit length (hyperspherical energy, arXiv 1805.09298). "
            "Independent random directions in many dimensions give about 1/√2 at power 1; crowded rows more",
            "separation": "Smallest squared distance between two rows at unit length, 0 (duplicates) … 4 (hyperspherical "
            "separation, arXiv 2103.01649; the released code of Diverse-ViT passes over duplicates, this does not)",
            "gram": f"−log det of exp(−‖r̂_i − r̂_j‖²) + {EPSILON:g}·I over the rows at unit length (Gram determinant, arXiv "
            "2103.01649, sign as in Diverse-ViT's loss): 0 where rows are far apart, high where they crowd",
        }[self.settings["measure"]]
        rows = (
            ", mean over the rows of each head (q, k, v)" if self.settings["by_head"] else ", over the whole matrix [out, in]"
        )
        return f"{what}{rows}; rows are output neurons. Undefined where fewer than two rows differ from zero."

    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        power, measure = self.settings["power"], self.settings["measure"]
        measures = {
            "energy": lambda rows: hyperspherical_energy(rows, power),
            "separation": hyperspherical_separation,
            "gram": lambda rows: -gram_log_determinant(rows, EPSILON),
        }
        values = matrices.over(lambda rows: where_two_rows(measures[measure], rows), self.settings["by_head"])
        return values, {"collapsed": "low"} if measure == "separation" else {}


METRICS.add(HypersphericalEnergy.name, HypersphericalEnergy)
