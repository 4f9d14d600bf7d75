"""How much of the tokens is not their mean: has attention filtered the high frequencies away?"""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.metrics.metric import CURVE, Variant
from collapse_probe.metrics.token_metric import WITH_PREFIX, DepthMetric
from collapse_probe.registry import METRICS


def frequency_ratio(tokens_BND: Tensor, *, total: bool = False) -> Tensor:
    """‖HC‖/‖DC‖ (or ‖HC‖/‖X‖), [B, N, D] -> [B], 0 … ∞ (or 0 … 1), in the Frobenius norm.

    DC = 1/N 11ᵀX is the mean token repeated, HC = X − DC (Wang et al., arXiv 2203.05962). NaN where the denominator is zero:
    tokens whose mean is zero (their ratio has no bound), or that are zero themselves.

    >>> frequency_ratio(torch.tensor([[[2.0, 1.0], [2.0, -1.0]]])).item()
    0.5
    """
    mean_B1D = tokens_BND.mean(-2, keepdim=True)
    high = (tokens_BND - mean_B1D).square().sum((-2, -1))
    whole = tokens_BND.square().sum((-2, -1)) if total else tokens_BND.shape[-2] * mean_B1D.square().sum((-2, -1))
    return torch.where(whole > 0, (high / torch.where(whole > 0, whole, 1.0)).sqrt(), torch.nan)


class TokenFrequency(DepthMetric):
    """The norm of what differs between tokens over that of what they share (Anti-Oversmoothing, arXiv 2203.05962)."""

    name = "token-frequency"
    summary = "high-frequency share: norm of the tokens minus their mean over the norm of the mean"
    collapsed = "low"
    title = "How much of the tokens is not their mean"
    seen = (
        "Norm of what differs between the patches of an image, over the norm of what they share: falling towards 0 is "
        f"over-smoothing, a low-pass filter. {CURVE}"
    )
    limits = "The ratio has no upper end and grows where the common part happens to be small."
    failure_types = ("tokens",)
    formula = r"\frac{\|HC\|_F}{\|DC\|_F}, \quad DC = \frac{1}{N} 1 1^T X, \quad HC = X - DC"
    value_range = "0 (only the mean token is left) upwards; @total stays within 0 and 1"
    source = "Anti-Oversmoothing, arXiv 2203.05962, and its code"
    traps = "The released code counts the class token in the mean (@all); its norm can move the ratio by itself."
    panel = "over the norm of the mean"
    unit = "ratio"
    quantity_from = "over"
    quantities = ("mean", "total")
    defaults = {"over": "mean", "prefix": False}
    variants = {"total": Variant({"over": "total"}, "over the norm of everything", unit="share"), "all": WITH_PREFIX}

    @property
    def definition(self) -> str:
        below = {"mean": "‖DC‖", "total": "‖X‖"}[self.quantity]
        return (
            f"‖HC‖/{below} in the Frobenius norm, DC = 1/N 11ᵀX the mean token repeated and HC = X − DC, over "
            f"{self.which_tokens()} (arXiv 2203.05962, whose code counts the class token: @all). 0: only the mean is left."
        )

    def numbers(self, tokens_BND: Tensor) -> dict[str, Tensor]:
        return {"mean": frequency_ratio(tokens_BND), "total": frequency_ratio(tokens_BND, total=True)}


METRICS.add(TokenFrequency.name, TokenFrequency)
