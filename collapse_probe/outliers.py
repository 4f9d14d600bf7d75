"""Which tokens of an image are far longer than the rest: one rule for what measures them and for what moves them."""

from __future__ import annotations

from torch import Tensor

DEVIATIONS = 6.0
"""Six median absolute deviations are four standard deviations of a normal distribution."""
ROUNDING = 1e-5
"""A deviation below this share of the median is rounding."""


def robust_threshold(norms_BP: Tensor, deviations: float = DEVIATIONS) -> Tensor:
    """median + deviations · MAD of each image's norms, [B, P] -> [B]; MAD is the median of |norm − median|.

    A MAD below `ROUNDING` of the median counts as that share, so that equal norms have no outliers.

    >>> import torch
    >>> robust_threshold(torch.tensor([[1.0, 2.0, 3.0, 90.0]]), 6.0).item()
    8.5
    """
    median = norms_BP.quantile(0.5, dim=-1, keepdim=True)
    deviation = (norms_BP - median).abs().quantile(0.5, dim=-1, keepdim=True)
    return (median + deviations * deviation.maximum(ROUNDING * median)).squeeze(-1)


def outliers(norms_BP: Tensor, deviations: float = DEVIATIONS, threshold: float | None = None) -> Tensor:
    """Which patches are longer than the robust threshold of their image (or than a fixed one), [B, P] -> bool [B, P]."""
    limit = robust_threshold(norms_BP, deviations)[:, None] if threshold is None else threshold
    return norms_BP > limit
