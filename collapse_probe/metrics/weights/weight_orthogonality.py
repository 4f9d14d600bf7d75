"""How far are the rows of a weight matrix from orthogonal?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture.weights.matrices import Matrices
from collapse_probe.metrics.functional.geometry import gram
from collapse_probe.metrics.functional.orthogonality import orthogonality_gap, soft_orthogonality
from collapse_probe.metrics.metric import Variant
from collapse_probe.metrics.weight_metric import ONE_HEAD, WeightMetric
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array


def relative_gap(rows: Tensor) -> Tensor:
    """(λmax − λmin) / λmax of R Rᵀ, [..., n, d] -> [...], 0 … 1, at any scale; 1 where n > d, NaN for zeros.

    >>> relative_gap(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
    0.75
    """
    n, d = rows.shape[-2:]
    eigenvalues = torch.linalg.eigvalsh(gram(rows) if n <= d else gram(rows.mT))
    largest = eigenvalues[..., -1]
    smallest = eigenvalues[..., 0].clamp_min(0) if n <= d else torch.zeros_like(largest)
    return torch.where(largest > 0, (largest - smallest) / largest, torch.nan)


class WeightOrthogonality(WeightMetric):
    """The spread of the eigenvalues of W Wᵀ, or its distance from the identity (Diverse-ViT)."""

    name = "weight-orthogonality"
    summary = "exact conditional-orthogonality gap λmax − λmin of W Wᵀ; @soft its distance from the identity"
    collapsed = "high"
    title = "Orthogonality of the weights"
    seen = "Spread of the eigenvalues of W Wᵀ of each weight matrix of each block; dashed: the untrained copy."
    limits = "The gap follows the largest direction, so that one outlying entry, which some initialisations draw, raises it."
    failure_types = ()
    formula = r"\lambda_{\max}(W W^T) - \lambda_{\min}(W W^T)"
    value_range = "0 (rows orthogonal and equally long) upwards"
    source = "Diverse-ViT, arXiv 2203.06345, and its released code"
    traps = (
        "The released code estimates the squared gap by one random power step, which is biased low; this is exact. A "
        "matrix with more rows than columns cannot reach 0."
    )
    panel = "λmax − λmin of W Wᵀ"
    unit = "squared units"
    defaults = {"measure": "gap", "by_head": False}
    variants = {
        "squared": Variant({"measure": "squared"}, "(λmax − λmin)² of W Wᵀ", unit="fourth power of units"),
        "relative": Variant({"measure": "relative"}, "(λmax − λmin) / λmax", unit="share"),
        "soft": Variant({"measure": "soft"}, "‖W Wᵀ − I‖²", unit="squared norm"),
        "head": Variant({"by_head": True}, f"λmax − λmin, {ONE_HEAD}"),
    }

    @property
    def definition(self) -> str:
        what = {
            "gap": "λmax − λmin of W Wᵀ, exact",
            "squared": "(λmax − λmin)² of W Wᵀ, exact; Diverse-ViT's loss estimates it by one power step, biased low",
            "relative": "(λmax − λmin) / λmax of W Wᵀ, exact, which no scaling of W changes",
            "soft": "‖W Wᵀ − I‖_F²",
        }[self.settings["measure"]]
        rows = ", mean over the rows of each head (q, k, v)" if self.settings["by_head"] else ", the whole matrix [out, in]"
        ends = (
            "0 only where rows are orthogonal and of length one"
            if self.settings["measure"] == "soft"
            else "0 where rows are orthogonal and equally long; more rows than columns (fc1) cannot be, and have λmin = 0"
        )
        return f"{what}{rows}; rows are output neurons. {ends}. Source: Diverse-ViT, arXiv 2203.06345 and its released code."

    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        measures = {
            "gap": orthogonality_gap,
            "squared": lambda rows: orthogonality_gap(rows).square(),
            "relative": relative_gap,
            "soft": soft_orthogonality,
        }
        return matrices.over(measures[self.settings["measure"]], self.settings["by_head"]), {}


METRICS.add(WeightOrthogonality.name, WeightOrthogonality)
