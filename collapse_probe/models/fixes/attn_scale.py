"""AttnScale: strengthen what an attention map holds beyond its uniform part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


def scale_contrast(probs_BHNN: Tensor, lamb_H: Tensor) -> Tensor:
    """J/N + (1 + λ_h)(A − J/N) = A + λ_h (A − J/N), [B, H, N, N] -> [B, H, N, N]; rows keep their sum of one.

    Entries may turn negative for λ > 0. Written in the second form, λ = 0 changes no bit.

    >>> scale_contrast(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), torch.tensor([1.0])).tolist()
    [[[[1.5, -0.5], [0.5, 0.5]]]]
    """
    return probs_BHNN + lamb_H[:, None, None] * (probs_BHNN - 1 / probs_BHNN.shape[-1])


@dataclass(frozen=True)
class AttnScale(Fix):
    """Â = J/N + (1 + λ_h)(A − J/N), after the softmax, before attention dropout; λ learnable, one a head, from `init` on."""

    init: Annotated[float, "(-inf, inf)"] = 0.0

    name = "attn-scale"
    summary = "a learnable gain per head on the non-uniform part of the map (Anti-Oversmoothing)"
    source = "Anti-Oversmoothing, arXiv 2203.05962, official attnscale.py"
    failure_types = ("tokens",)
    neutral = {"init": 0.0}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by `lamb`."""
        return {} if "lamb" in shapes else None

    def parts(self, site: FixSite) -> Parts:
        """`lamb`, [H]."""
        return {"lamb": nn.Parameter(torch.full((site.heads,), float(self.init)))}

    def probs(self, probs_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N]."""
        return scale_contrast(probs_BHNN, site.home.lamb)


FIXES.add(AttnScale.name, AttnScale)
