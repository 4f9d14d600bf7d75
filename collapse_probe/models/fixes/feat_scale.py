"""FeatScale: weigh the token mean and the deviation from it, in what attention adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


def scale_bands(x_BND: Tensor, dc_D: Tensor, hc_D: Tensor) -> Tensor:
    """X + s ⊙ DC + t ⊙ HC, [B, N, D] -> [B, N, D], with DC the mean over all tokens and HC = X − DC.

    >>> scale_bands(torch.tensor([[[1.0], [3.0]]]), torch.tensor([1.0]), torch.tensor([2.0])).tolist()
    [[[1.0], [7.0]]]
    """
    mean_B1D = x_BND.mean(dim=-2, keepdim=True)
    return x_BND + dc_D * mean_B1D + hc_D * (x_BND - mean_B1D)


@dataclass(frozen=True)
class FeatScale(Fix):
    """X̂ = X + m (s ⊙ DC + t ⊙ HC) on the output of attention after its projection, per channel.

    As in the official `featscale.py` s is `lamb1`, t is `lamb2`, both from `init` on; the mean runs over all tokens, CLS
    included. The paper and most of that repository's history have multiplicity m = 1; one commit (969b564) adds both terms
    twice, m = 2. The published checkpoints do not say which they were trained with.
    """

    init: Annotated[float, "(-inf, inf)"] = 0.0
    multiplicity: Literal[1, 2] = 1

    name = "feat-scale"
    summary = "learnable gains per channel on the mean and the rest of the attention output"
    source = "Anti-Oversmoothing, arXiv 2203.05962"
    failure_types = ("tokens",)
    unseen = ("multiplicity",)
    neutral = {"init": 0.0}
    home = "block"

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by `lamb1` and `lamb2`."""
        return {} if {"lamb1", "lamb2"} <= set(shapes) else None

    def parts(self, site: FixSite) -> Parts:
        """`lamb1` and `lamb2`, [D]."""
        return {name: nn.Parameter(torch.full((site.width,), float(self.init))) for name in ("lamb1", "lamb2")}

    def branch(self, x_BND: Tensor, kind: Literal["attention", "mlp"], site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N, D]; the MLP branch stays as it is."""
        if kind == "mlp":
            return x_BND
        return scale_bands(x_BND, self.multiplicity * site.home.lamb1, self.multiplicity * site.home.lamb2)


FIXES.add(FeatScale.name, FeatScale)
