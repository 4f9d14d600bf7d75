"""Conditional orthogonality: draw rows towards an orthogonal set of any one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from collapse_probe.metrics.functional.orthogonality import orthogonality_gap, power_step_gap
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import RowPenalty


@dataclass(frozen=True)
class ConditionalOrthogonality(RowPenalty):
    """(λmax − λmin)² of R Rᵀ: the weights of query, key and value, tokens at unit length, or the heads' flattened maps.

    0 where rows are orthogonal and equally long. estimate="power" is the released computation of Diverse-ViT (arXiv
    2203.06345), one power step for each eigenvalue, here from a seeded start that changes from step to step; it is biased low,
    and its values are not the metric's. estimate="exact" decomposes the Gram matrix, slower and unbiased. The sum over the
    3 L matrices is the released term.
    """

    level: Literal["tokens", "attention", "weights"] = "weights"
    estimate: Literal["power", "exact"] = "power"

    name = "conditional-orthogonality"
    summary = "squared gap between the largest and smallest eigenvalue of the rows' Gram matrix"
    source = "Diverse-ViT, arXiv 2203.06345"
    metric = "weight-orthogonality"
    direction = "down"
    weight_metric = "weight-orthogonality"

    def of_rows(self, rows: Tensor, seed: int) -> Tensor:
        if self.estimate == "exact":
            return orthogonality_gap(rows).square()
        return power_step_gap(rows, seed, "uniform" if self.level == "weights" else "normal").square()


PENALTIES.add(ConditionalOrthogonality.name, ConditionalOrthogonality)
