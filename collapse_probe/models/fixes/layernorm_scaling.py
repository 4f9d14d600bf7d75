"""LayerNorm scaling: deeper blocks read a smaller input, so that the residual stream grows more slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from collapse_probe.errors import ModelError
from collapse_probe.models.fixes.base import Fix, FixSite, Parts
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class LayerNormScaling(Fix):
    """x + attention(LN(x) / √(l + 1)), then x + mlp(LN(x) / √(l + 1)), in block l = 0, 1, …; the final norm stays.

    As in the official code (`NORM_TYPE=LNS`), for blocks that normalise before their branches. No parameters. No neutral
    setting: it changes every block but the first.
    """

    name = "layernorm-scaling"
    summary = "divides what the norms of block l give by the root of l + 1"
    source = "The Curse of Depth, arXiv 2502.05795"
    home = "block"

    def parts(self, site: FixSite) -> Parts:
        """None; ModelError for a block that normalises after its branches."""
        if type(site.home).__name__ == "ResPostBlock":
            raise ModelError(f"{self.name} needs blocks with a norm before attention and MLP; these have it behind them")
        return {}

    def normed(self, x_BND: Tensor, kind: Literal["attention", "mlp"], site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return x_BND * (1 / math.sqrt(site.block + 1))


FIXES.add(LayerNormScaling.name, LayerNormScaling)
