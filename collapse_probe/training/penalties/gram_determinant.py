"""Gram determinant: enlarge the volume that the rows' directions span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from collapse_probe.metrics.functional.orthogonality import gram_log_determinant
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import RowPenalty


@dataclass(frozen=True)
class GramDeterminant(RowPenalty):
    """−log det G, G_ij = exp(−‖r̂_i − r̂_j‖²) + ε·[i = j] of the rows at unit length; about 0 where all are far apart.

    Source: maximum Gram determinant, arXiv 2103.01649; Diverse-ViT, arXiv 2203.06345, released code (ε = 1e-6), which does not
    train with it.
    """

    epsilon: Annotated[float, "(0, inf)"] = 1e-6

    name = "gram-determinant"
    summary = "minus the log determinant of a Gaussian kernel of the rows' directions"
    source = "arXiv 2103.01649; Diverse-ViT, arXiv 2203.06345 (released code)"

    def of_rows(self, rows: Tensor, seed: int) -> Tensor:
        return -gram_log_determinant(rows, self.epsilon)


PENALTIES.add(GramDeterminant.name, GramDeterminant)
