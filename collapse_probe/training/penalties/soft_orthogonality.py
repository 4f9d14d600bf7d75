"""Soft orthogonality: draw rows towards an orthonormal set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collapse_probe.metrics.functional.orthogonality import soft_orthogonality
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import RowPenalty


@dataclass(frozen=True)
class SoftOrthogonality(RowPenalty):
    """‖R Rᵀ − I‖_F² of tokens at unit length, of the heads' flattened maps as they are, or of weight matrices.

    0 where rows are orthonormal; asks weights and maps for unit length too, unlike conditional-orthogonality. Source:
    Diverse-ViT, arXiv 2203.06345, released code, which does not train with it.
    """

    name = "soft-orthogonality"
    summary = "squared distance of the rows' Gram matrix from the identity"
    source = "Diverse-ViT, arXiv 2203.06345 (released code)"
    weight_metric = "weight-orthogonality"

    def of_rows(self, rows: Tensor, seed: int) -> Tensor:
        return soft_orthogonality(rows)


PENALTIES.add(SoftOrthogonality.name, SoftOrthogonality)
