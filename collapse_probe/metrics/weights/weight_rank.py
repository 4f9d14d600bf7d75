"""How many directions does a weight matrix use?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from collapse_probe.capture.weights.matrices import BY_HEAD, NAMES, Matrices
from collapse_probe.metrics.functional.spectra import components_for, effective_rank_of, pca_error, stable_rank_of
from collapse_probe.metrics.metric import Variant
from collapse_probe.metrics.weight_metric import ONE_HEAD, WeightMetric, spectral
from collapse_probe.registry import METRICS
from collapse_probe.statistics.intervals import Array

PERCENT = (90, 95, 99)


class WeightRank(WeightMetric):
    """Effective rank of the weight matrices, its relatives, and what principal components leave over."""

    name = "weight-rank"
    summary = "effective rank of q, k, v, proj, fc1, fc2; stable rank; PCA reconstruction error"
    collapsed = "low"
    title = "Rank of the weights"
    seen = "Effective rank of each weight matrix of each block; dashed: the untrained copy."
    limits = "A random matrix has a rank below the full one: only the distance from the untrained copy is learned."
    failure_types = ()
    formula = r"\exp\left(-\sum_k p_k \log p_k\right), \quad p_k = \sigma_k / \sum_l \sigma_l"
    value_range = "1 to the smaller side of the matrix"
    source = "Diverse-ViT, arXiv 2203.06345, which gives no code for it; the rank after Roy & Vetterli 2007"
    traps = "Squared singular values give another rank under the same name (@squared)."
    panel = "effective rank"
    unit = "rank"
    defaults = {"measure": "effective", "by_head": False, "divided": False}
    variants = {
        "squared": Variant({"measure": "squared"}, "effective rank, squared singular values"),
        "stable": Variant({"measure": "stable"}, "stable rank"),
        "share": Variant({"divided": True}, "effective rank over the full one", unit="share"),
        "head": Variant({"by_head": True}, f"effective rank, {ONE_HEAD}"),
        **{
            f"pca{p}": Variant(
                {"measure": "pca", "share": p / 100}, f"left over by the leading {p} % of components", unit="share of variance"
            )
            for p in PERCENT
        },
        **{
            f"components{p}": Variant(
                {"measure": "components", "share": p / 100}, f"components that hold {p} % of the variance", unit="components"
            )
            for p in PERCENT
        },
    }

    @property
    def definition(self) -> str:
        share = f"{100 * self.settings.get('share', 0):g} %"
        what = {
            "effective": "Effective rank exp(−Σ p log p) with p = σ/Σσ (Roy & Vetterli 2007) of the weight matrix",
            "squared": "Effective rank exp(−Σ p log p) with p = σ²/Σσ², squared singular values, of the weight matrix",
            "stable": "Stable rank ‖W‖_F² / σ₁² of the weight matrix",
            "pca": f"PCA reconstruction error: share of the rows' variance that the leading {share} of the principal "
            "components leave over (rows are samples, their mean is subtracted) in the weight matrix",
            "components": f"Number of principal components that hold {share} of the rows' variance (rows are samples, their "
            "mean is subtracted) in the weight matrix",
        }[self.settings["measure"]]
        parts = ", mean over the rows of each head (q, k, v)" if self.settings["by_head"] else " [out, in], whole"
        divided = ", divided by the smaller of its sides" if self.settings["divided"] else ""
        return (
            f"{what}{parts}{divided}. From Diverse-ViT (arXiv 2203.06345), which names redundancy as a low rank and gives no "
            "code for it. A random matrix has a rank of its own below the full one: the untrained copy says which."
        )

    def values(self, matrices: Matrices) -> tuple[Array, dict[str, Any]]:
        measure, by_head, share = self.settings["measure"], self.settings["by_head"], self.settings.get("share", 0.0)
        full = matrices.over(lambda w: torch.full(w.shape[:-2], float(min(w.shape[-2:]))), by_head)
        if measure == "pca":
            values = matrices.over(lambda w: pca_error(w, share), by_head)
        elif measure == "components":
            values = matrices.over(lambda w: components_for(w, share), by_head)
        elif measure == "stable":
            values = spectral(matrices, stable_rank_of, by_head)
        else:
            values = spectral(matrices, lambda s: effective_rank_of(s, squared=measure == "squared"), by_head)
        if self.settings["divided"]:
            values = values / full
        facts: dict[str, Any] = {"full_rank": np.where(np.isfinite(full), full, np.nan)}
        if by_head:
            facts["undefined"] = f"{', '.join(n for n in NAMES if n not in BY_HEAD)} have no rows of a head"
        return values, {"details": facts}


METRICS.add(WeightRank.name, WeightRank)
