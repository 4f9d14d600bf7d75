"""Shaped attention: the map with the identity added and the uniform map taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES

GAINS = {"alpha": "attn_mat_resid_gain", "beta": "attn_mat_skip_gain", "gamma": "centre_attn_gain"}


def shape_map(probs_BHNN: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """α A + β I − γ J/N, [B, H, N, N] -> [B, H, N, N], gains of one number a head [1, H, 1, 1]; rows sum to α + β − γ.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> shape_map(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), one, one, one).tolist()
    [[[[1.5, -0.5], [0.0, 1.0]]]]
    """
    identity_NN = torch.eye(probs_BHNN.shape[-1], dtype=probs_BHNN.dtype, device=probs_BHNN.device)
    return alpha * probs_BHNN + (beta * identity_NN - gamma / probs_BHNN.shape[-1])


@dataclass(frozen=True)
class ShapedAttention(Fix):
    """Â = α A + β I − γ J/N, after the softmax, before attention dropout; α, β, γ learnable, one a head, under official names.

    `alpha`, `beta`, `gamma` are their starts. 1, 1, 1 is the official start of blocks without skip connection, which is kept
    here; 1, 0, 1 is centred attention (A − J/N, whose rows sum to zero), where `learnable=False` keeps the gains as they are.
    J/N is uniform over all keys: for masked or causal attention it is not the one of the official code.
    """

    alpha: Annotated[float, "(-inf, inf)"] = 1.0
    beta: Annotated[float, "(-inf, inf)"] = 1.0
    gamma: Annotated[float, "(-inf, inf)"] = 1.0
    learnable: bool = True

    name = "shaped-attention"
    summary = "adds the identity to the map and subtracts the uniform map; contains centred attention"
    source = (
        "Shaped Transformer, arXiv 2306.17759; Simplified blocks, arXiv 2311.01906; centred: Mind the Gap, arXiv 2410.07799"
    )
    failure_types = ("tokens",)
    neutral = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by its three gains; fixed ones leave no trace."""
        return {} if {*GAINS.values()} <= set(shapes) else None

    def parts(self, site: FixSite) -> Parts:
        """`attn_mat_resid_gain`, `attn_mat_skip_gain` and `centre_attn_gain`, [1, H, 1, 1], where they are learnable."""
        if not self.learnable:
            return {}
        return {name: nn.Parameter(torch.full((1, site.heads, 1, 1), float(getattr(self, own)))) for own, name in GAINS.items()}

    def probs(self, probs_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N]."""
        fixed = probs_BHNN.new_tensor([self.alpha, self.beta, self.gamma]).unbind() if not self.learnable else None
        return shape_map(probs_BHNN, *(fixed or (getattr(site.home, name) for name in GAINS.values())))


FIXES.add(ShapedAttention.name, ShapedAttention)
