"""Hyperspherical separation: push the two nearest directions apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from collapse_probe.metrics.functional.orthogonality import hyperspherical_separation
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import RowPenalty


@dataclass(frozen=True)
class HypersphericalSeparation(RowPenalty):
    """Minus the smallest squared distance between two rows at unit length, −4 … 0.

    Source: maximum hyperspherical separation, arXiv 2103.01649; Diverse-ViT, arXiv 2203.06345, released code, which does not
    train with it. form="repository" multiplies the smallest by its ties and passes over exact duplicates; form="minimum" does
    neither. Between exact duplicates no direction leads apart, so that their gradient is 0 in either form.
    """

    form: Literal["minimum", "repository"] = "minimum"

    name = "hyperspherical-separation"
    summary = "minus the smallest squared distance between the rows' directions"
    source = "arXiv 2103.01649; Diverse-ViT, arXiv 2203.06345 (released code)"

    def of_rows(self, rows: Tensor, seed: int) -> Tensor:
        return -hyperspherical_separation(rows, self.form)


PENALTIES.add(HypersphericalSeparation.name, HypersphericalSeparation)
