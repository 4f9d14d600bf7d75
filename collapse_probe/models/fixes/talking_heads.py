"""Talking heads: linear mixing across heads, of the logits before the softmax and of the map after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


def mix_heads(map_BHNN: Tensor, mixing: nn.Linear) -> Tensor:
    """out_h = Σ_g W_hg · map_g + b_h, [B, H, N, N] -> [B, H, N, N]."""
    mixed_BHNN = torch.einsum("bgij,hg->bhij", map_BHNN, mixing.weight)
    return mixed_BHNN + mixing.bias[:, None, None]


def _mixing(heads: int, init: str) -> nn.Linear:
    mixing = nn.Linear(heads, heads)
    if init == "identity":
        nn.init.eye_(mixing.weight)
    else:
        nn.init.trunc_normal_(mixing.weight, std=0.02)
    nn.init.zeros_(mixing.bias)
    return mixing


@dataclass(frozen=True)
class TalkingHeads(Fix):
    """`proj_l` mixes the scaled logits of the heads, `proj_w` the maps after the softmax, before attention dropout.

    In the official code both are Linear(H, H) with bias, drawn like every Linear there (truncated normal, 0.02): that is
    `init="random"`. After `proj_w` the rows no longer sum to one.
    """

    where: Literal["both", "logits", "map"] = "both"
    init: Literal["identity", "random"] = "identity"

    name = "talking-heads"
    summary = "mixes the heads linearly before and after the softmax (CaiT)"
    source = "CaiT, arXiv 2103.17239"
    neutral = {"init": "identity"}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`where`, by which of the two matrices there are."""
        mixing = {"proj_l.weight": "logits", "proj_w.weight": "map"}
        places = [place for name, place in mixing.items() if name in shapes]
        return {"where": "both" if len(places) == 2 else places[0]} if places else None

    def parts(self, site: FixSite) -> Parts:
        """`proj_l` and `proj_w`, as `where` asks."""
        names = {"both": ("proj_l", "proj_w"), "logits": ("proj_l",), "map": ("proj_w",)}[self.where]
        return {name: _mixing(site.heads, self.init) for name in names}

    def logits(self, logits_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N], heads mixed by `proj_l`."""
        return logits_BHNN if self.where == "map" else mix_heads(logits_BHNN, site.home.proj_l)

    def probs(self, probs_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N], heads mixed by `proj_w`."""
        return probs_BHNN if self.where == "logits" else mix_heads(probs_BHNN, site.home.proj_w)


FIXES.add(TalkingHeads.name, TalkingHeads)
