"""LayerScale: a learnable gain for each channel of what a branch adds to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class LayerScale(Fix):
    """x ← x + γ₁ ⊙ attention(…), x ← x + γ₂ ⊙ mlp(…), with γ of one number a channel.

    `init` is the start of γ, officially 1e-5 (24-layer models and XXS36) or 1e-6 (S36, M36, M48).
    """

    init: Annotated[float, "(0, inf)"] = 1e-5

    name = "layer-scale"
    summary = "a learnable gain per channel on both branches of a block (CaiT)"
    source = "CaiT, arXiv 2103.17239"
    neutral = {"init": 1.0}
    home = "block"

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by `gamma_1` and `gamma_2`."""
        return {} if {"gamma_1", "gamma_2"} <= set(shapes) else None

    def parts(self, site: FixSite) -> Parts:
        """`gamma_1` and `gamma_2`, [D]."""
        return {name: nn.Parameter(torch.full((site.width,), float(self.init))) for name in ("gamma_1", "gamma_2")}

    def branch(self, x_BND: Tensor, kind: Literal["attention", "mlp"], site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N, D], each channel times its gain."""
        gamma_D: Tensor = site.home.gamma_1 if kind == "attention" else site.home.gamma_2
        return x_BND * gamma_D


FIXES.add(LayerScale.name, LayerScale)
