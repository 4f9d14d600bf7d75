"""ContraNorm: push tokens apart just before they are normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix
from collapse_probe.registry import FIXES


def similarity_weights(x_BND: Tensor, tau: float, dual: bool) -> Tensor:
    """softmax over rows of the cosines divided by τ, [B, N, D] -> [B, N, N]; `dual` adds the softmax over columns.

    Cosines are bounded by 1, so exp((cos − 1)/τ) needs no row maximum; the softmax is spelt out because it is no attention, and
    should not be recorded as one.
    """
    unit_BND = F.normalize(x_BND, dim=-1)
    mass_BNN = torch.exp((unit_BND @ unit_BND.transpose(-2, -1) - 1) / tau)
    weights_BNN = mass_BNN / mass_BNN.sum(dim=-1, keepdim=True)
    return weights_BNN + mass_BNN / mass_BNN.sum(dim=-2, keepdim=True) if dual else weights_BNN


class ContraLayerNorm(nn.LayerNorm):
    """A LayerNorm that first subtracts from each token the mean of the tokens that resemble it."""

    contrast: ContraNorm

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        fix = self.contrast
        pulled_BND = similarity_weights(x_BND, fix.tau, fix.dual) @ x_BND
        kept_BND = (1 + fix.scale) * x_BND if fix.identity else x_BND
        return super().forward(kept_BND - fix.scale * pulled_BND)


@dataclass(frozen=True)
class ContraNorm(Fix):
    """LayerNorm(x − s·S x), S = softmax(x̂ x̂ᵀ/τ) over rows, x̂ the unit tokens, all tokens and the diagonal included.

    As in the official code for ViT every LayerNorm is replaced (here: those of the chosen blocks, or all of the model), default
    `scale` s = 0.1. `identity` takes (1 + s) x instead of x; `dual` adds the column softmax to S. No new state_dict keys.
    """

    scale: Annotated[float, "[0, inf)"] = 0.1
    tau: Annotated[float, "(0, inf)"] = 1.0
    identity: bool = False
    dual: bool = False

    name = "contra-norm"
    summary = "every LayerNorm first pushes similar tokens apart"
    source = "ContraNorm, arXiv 2303.06562"
    failure_types = ("tokens",)
    neutral = {"scale": 0.0}
    home = "modules"

    def convert(self, module: nn.Module, width: int) -> bool:
        """Make a LayerNorm over token width a ContraLayerNorm, with its own weight, bias and eps."""
        if not isinstance(module, nn.LayerNorm) or module.normalized_shape != (width,):
            return False
        converted: Any = module
        converted.__class__, converted.contrast = ContraLayerNorm, self
        return True


FIXES.add(ContraNorm.name, ContraNorm)
