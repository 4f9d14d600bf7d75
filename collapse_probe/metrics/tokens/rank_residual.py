"""Have the tokens of an image become one and the same vector?"""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.metrics.metric import CURVE, Variant
from collapse_probe.metrics.token_metric import WITH_PREFIX, DepthMetric
from collapse_probe.registry import METRICS


def composite_norm(matrices: Tensor) -> Tensor:
    """√(‖M‖₁·‖M‖_∞), [..., n, d] -> [...]: largest absolute column sum times largest absolute row sum, under a root.

    The ℓ1,∞ norm of Dong et al. (arXiv 2103.03404). One of their two scripts leaves the root out, which squares the number.

    >>> composite_norm(torch.tensor([[1.0, -2.0], [3.0, 2.0]])).item()
    4.4721360206604
    """
    size = matrices.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt()


def frobenius_norm(matrices: Tensor) -> Tensor:
    """√(Σ M²), [..., n, d] -> [...]."""
    return matrices.square().sum((-2, -1)).sqrt()


def rank_residual(tokens_BND: Tensor, *, composite: bool = False) -> Tensor:
    """‖X − 1x̄ᵀ‖/‖X‖ with the mean token x̄, [B, N, D] -> [B], 0 … 1 (composite: 0 … 2); NaN for tokens that are all zero.

    In the Frobenius norm the mean is the best constant; in the composite norm it is what the official code takes, not the
    best (Dong et al., arXiv 2103.03404).

    >>> rank_residual(torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])).item()
    0.7071067690849304
    """
    norm = composite_norm if composite else frobenius_norm
    whole = norm(tokens_BND)
    residual = norm(tokens_BND - tokens_BND.mean(-2, keepdim=True))
    return torch.where(whole > 0, residual / torch.where(whole > 0, whole, 1.0), torch.nan)


class RankResidual(DepthMetric):
    """Relative distance of the token matrix from one vector repeated (Dong et al., arXiv 2103.03404)."""

    name = "rank-residual"
    summary = "relative distance of the token matrix from its best rank-one constant"
    collapsed = "low"
    title = "How far the tokens are from one repeated vector"
    seen = f"Distance of an image's patch embeddings from their mean, relative to their size: 0 is rank collapse. {CURVE}"
    limits = "The skip connections carry a common part along: a low value alone does not show that attention made it."
    failure_types = ("tokens",)
    formula = r"\frac{\|X - 1 \bar x^T\|}{\|X\|}"
    value_range = "0 (all tokens are one vector) to 1 in the Frobenius norm; the composite norm has no such end"
    source = "Dong et al., arXiv 2103.03404, and its code"
    traps = (
        "The paper's norm is the composite one (@composite) and counts all tokens (@all); one of its scripts leaves "
        "the root out. Below about 1e-7 it is rounding in float32."
    )
    panel = "Frobenius norm"
    unit = "relative distance"
    top = 1.0
    quantity_from = "norm"
    quantities = ("frobenius", "composite")
    defaults = {"norm": "frobenius", "prefix": False}
    variants = {"composite": Variant({"norm": "composite"}, "ℓ1,∞ norm, as in the paper's code"), "all": WITH_PREFIX}

    @property
    def definition(self) -> str:
        norms = {
            "frobenius": "the Frobenius norm, where it equals token-frequency@total",
            "composite": "√(‖M‖₁·‖M‖_∞), the root of the largest absolute column sum times the largest absolute row sum",
        }
        return (
            f"‖X − 1x̄ᵀ‖/‖X‖ in {norms[self.quantity]}; x̄ is the mean of {self.which_tokens()} (arXiv 2103.03404). "
            "0: all tokens are one vector."
        )

    def numbers(self, tokens_BND: Tensor) -> dict[str, Tensor]:
        return {"frobenius": rank_residual(tokens_BND), "composite": rank_residual(tokens_BND, composite=True)}


METRICS.add(RankResidual.name, RankResidual)
