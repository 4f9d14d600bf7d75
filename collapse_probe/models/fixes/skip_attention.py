"""Skip-attention: blocks in the middle do not attend, but derive their attention output from that of the block before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import ModelError, SettingError
from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


class ChannelGate(nn.Module):
    """Each channel times σ of a convolution over the channels' means, [B, P, D] -> [B, P, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """The gated channels."""
        gated: Tensor = x_BPD * self.conv(x_BPD.mean(1, keepdim=True)).sigmoid()
        return gated


class ParametricFunction(nn.Module):
    """Patches to patches, [B, P, D] -> [B, P, D]: Linear D → 2D and GELU, depthwise 5×5 over the grid and GELU, Linear back,
    and a gate of the channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 2 * width
        self.linear1 = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, width))
        self.eca = ChannelGate()

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """ModelError where the patches fill no square."""
        side = math.isqrt(patches_BPD.shape[1])
        if side**2 != patches_BPD.shape[1]:
            raise ModelError(f"skip-attention needs patches that fill a square, and these are {patches_BPD.shape[1]}")
        hidden = self.linear1(patches_BPD).mT.unflatten(-1, (side, side))
        derived: Tensor = self.eca(self.linear2(self.dwconv(hidden).flatten(2).mT))
        return derived


@dataclass(frozen=True)
class SkipAttention(Fix):
    """z_l = Φ_l(z_{l−1}) in the chosen blocks, z the patches of what attention adds; the prefix tokens keep the last z made.

    Φ is the official convolutional function, one a block (`skip`; officially `param_1` … on the model). The blocks must follow
    one another; by default they are those of the middle half, 3 to 8 of 12 as officially. They make no map: a capture lists
    them as blocks without one. No neutral setting.
    """

    name = "skip-attention"
    summary = "blocks in the middle derive their attention output from the block before"
    source = "SkipAt, arXiv 2301.02240"
    failure_types = ("depth",)

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by `skip`."""
        return {} if {"skip.linear1.0.weight", "skip.eca.conv.weight"} <= set(shapes) else None

    def reach(self, blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
        """The chosen blocks, and the block before them, which lends what its attention added."""
        first = max(1, depth // 4)
        skipped = tuple(range(first, max(first + 1, 3 * depth // 4))) if blocks is None else blocks
        if skipped[0] < 1 or skipped[-1] >= depth or len(skipped) != skipped[-1] - skipped[0] + 1:
            raise SettingError(f"{self.name}: blocks must follow one another and lie above 0, not {list(skipped)}")
        return (skipped[0] - 1, *skipped)

    def parts(self, site: FixSite) -> Parts:
        """`skip`, but for the block that lends."""
        return {} if site.block == site.blocks[0] else {"skip": ParametricFunction(site.width)}

    def around(self, x_BND: Tensor, attend: Callable[[], Tensor], site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N, D] without attending."""
        if site.block == site.blocks[0]:
            out_BND = attend()
        else:
            before_BND = site.take("attention output")
            patches_BPD = site.home.skip(before_BND[:, site.prefix :])
            out_BND = torch.cat((before_BND[:, : site.prefix], patches_BPD), dim=1)
        if site.block != site.blocks[-1]:
            site.memory["attention output"] = out_BND
        return out_BND


FIXES.add(SkipAttention.name, SkipAttention)
