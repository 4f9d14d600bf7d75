"""Re-attention: mix the heads of the attention map with a learnable matrix, then normalise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


class Permute(nn.Module):
    """Reorders the axes of its input."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """`x` with its axes in `order`."""
        return x.permute(self.order)


@dataclass(frozen=True)
class ReAttention(Fix):
    """weights_h = scale · Norm(Σ_g Θ_hg · A_g + bias_h), after softmax and attention dropout.

    Source: DeepViT, arXiv 2103.11886 (its Re-attention equation) and its official code: 1×1 convolution with bias
    (`reatten_matrix`, whose weight is the transpose of the paper's Θ), BatchNorm2d over the heads (`var_norm`), then `scale`.
    In train mode every row sums to N·β of its head, 0 at the start, and entries may be negative: the result is no distribution.
    `norm="layer"` is the vit-pytorch variant: `reattn_weights` without bias, whose LayerNorm runs over the heads at each
    (query, key). It cannot hold official weights.

    Settings: `norm` "batch", "layer" or "none"; `init` of Θ "random" (official: PyTorch's default convolution; "layer":
    standard normal) or "identity"; `scale` a number (official: 1, deepvit_S head_dim^-0.5). Neutral: the identity without a
    norm. No norm leaves maps as they are, so with one there is no neutral setting.
    """

    norm: Literal["batch", "layer", "none"] = "batch"
    init: Literal["random", "identity"] = "random"
    scale: Annotated[float, "(0, inf)"] = 1.0

    name = "re-attention"
    summary = "mixes the heads of the map with a learnable matrix, then normalises (DeepViT)"
    source = "DeepViT, arXiv 2103.11886"
    failure_types = ("depth",)
    unseen = ("scale",)
    neutral = {"norm": "none", "init": "identity"}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`norm`, by the names of the mixing matrix and of what follows it."""
        if "reattn_weights" in shapes:
            return {"norm": "layer"}
        if "reatten_matrix.weight" not in shapes:
            return None
        return {"norm": "batch" if "var_norm.weight" in shapes else "none"}

    def parts(self, site: FixSite) -> Parts:
        """`reatten_matrix` and `var_norm`, or `reattn_weights` and `reattn_norm` for the LayerNorm variant."""
        heads = site.heads
        if self.norm == "layer":
            theta = torch.eye(heads) if self.init == "identity" else torch.randn(heads, heads)
            norm = nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(heads), Permute(0, 3, 1, 2))
            return {"reattn_weights": nn.Parameter(theta), "reattn_norm": norm}
        conv = nn.Conv2d(heads, heads, kernel_size=1)
        if self.init == "identity":
            with torch.no_grad():
                conv.weight.copy_(torch.eye(heads)[:, :, None, None])
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        return {"reatten_matrix": conv} | ({"var_norm": nn.BatchNorm2d(heads)} if self.norm == "batch" else {})

    def weights(self, weights_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N], heads mixed."""
        home = site.home
        if self.norm == "layer":
            mixed_BHNN = torch.einsum("bgij,gh->bhij", weights_BHNN, home.reattn_weights)
            normed_BHNN: Tensor = home.reattn_norm(mixed_BHNN)
        else:
            normed_BHNN = home.reatten_matrix(weights_BHNN)
            if self.norm == "batch":
                normed_BHNN = home.var_norm(normed_BHNN)
        return normed_BHNN if self.scale == 1.0 else normed_BHNN * self.scale


FIXES.add(ReAttention.name, ReAttention)
