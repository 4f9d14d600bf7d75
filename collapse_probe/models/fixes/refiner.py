"""Refiner: refine the attention map with a small convolutional bottleneck over heads and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


class DistributedLocalAttention(nn.Module):
    """Expand the heads, convolve each over the N×N map, come back, add the input: [B, H, N, N] -> [B, H, N, N].

    1×1 convolution H → expansion·H, BatchNorm, ReLU6; depthwise 3×3 with zero padding, BatchNorm, ReLU6; 1×1 back to H,
    BatchNorm; plus the input. No convolution has a bias.
    """

    def __init__(self, heads: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = heads * expansion
        self.conv_exp = nn.Conv2d(heads, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depth_sep_conv = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv_pro = nn.Conv2d(hidden, heads, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(heads)

    def forward(self, map_BHNN: Tensor) -> Tensor:
        """The map with its refinement added."""
        hidden = F.relu6(self.bn1(self.conv_exp(map_BHNN)))
        hidden = F.relu6(self.bn2(self.depth_sep_conv(hidden)))
        refined: Tensor = self.bn3(self.conv_pro(hidden))
        return map_BHNN + refined


@dataclass(frozen=True)
class Refiner(Fix):
    """weights = adapt_bn(A + refinement(A)), after softmax and attention dropout; signed, like Re-attention's.

    As in the official code (zhoudaquan/Refiner_ViT), under its names `DLA` and `adapt_bn`. That code can also add the previous
    block's map, which is not done here. `adapt` keeps the last BatchNorm, which no setting makes harmless; `quiet` starts the
    refinement at 0 (the gain of `bn3`).
    """

    expansion: Annotated[int, "[1, inf)"] = 3
    kernel: Literal[1, 3, 5, 7] = 3
    adapt: bool = True
    quiet: bool = False

    name = "refiner"
    summary = "refines the map by convolutions over expanded heads and positions"
    source = "Refiner, arXiv 2106.03714"
    neutral = {"adapt": False, "quiet": True}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`expansion` and `kernel` by the shape of the depthwise convolution, `adapt` by `adapt_bn`."""
        if "DLA.depth_sep_conv.weight" not in shapes or "DLA.bn3.weight" not in shapes:
            return None
        hidden, _, kernel, _ = shapes["DLA.depth_sep_conv.weight"]
        return {"expansion": hidden // shapes["DLA.bn3.weight"][0], "kernel": kernel, "adapt": "adapt_bn.weight" in shapes}

    def parts(self, site: FixSite) -> Parts:
        """`DLA` and, where `adapt` says so, `adapt_bn`."""
        refinement = DistributedLocalAttention(site.heads, self.expansion, self.kernel)
        if self.quiet:
            nn.init.zeros_(refinement.bn3.weight)
        return {"DLA": refinement} | ({"adapt_bn": nn.BatchNorm2d(site.heads)} if self.adapt else {})

    def weights(self, weights_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N], refined."""
        refined_BHNN: Tensor = site.home.DLA(weights_BHNN)
        return site.home.adapt_bn(refined_BHNN) if self.adapt else refined_BHNN


FIXES.add(Refiner.name, Refiner)
