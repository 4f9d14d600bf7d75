"""Gated attention: a gate that each token opens or closes for what attention brings it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class GatedAttention(Fix):
    """o ← o ⊙ σ(W x + b), after the map has multiplied the values and before the projection; x is what entered attention.

    `gate` "elementwise" has a number for each channel of each head (also timm's `gated=True`), "headwise" one a head. In the
    official code W is part of the query projection, here it is `output_gate`. σ(0) = ½, so the published form has no neutral
    setting; `doubled` takes 2σ, which is ours: with `init="zero"` (W = b = 0) nothing changes at the start.
    """

    gate: Literal["elementwise", "headwise"] = "elementwise"
    doubled: bool = False
    init: Literal["random", "zero"] = "random"

    name = "gated-attention"
    summary = "a sigmoid gate, made from the token, on the output of attention"
    source = "Gated Attention, arXiv 2505.06708"
    failure_types = ("entropy",)
    unseen = ("doubled",)
    neutral = {"doubled": True, "init": "zero"}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`gate`, by the shape of `output_gate`."""
        if "output_gate.weight" not in shapes:
            return None
        gates, width = shapes["output_gate.weight"]
        return {"gate": "elementwise" if gates == width else "headwise"}

    def parts(self, site: FixSite) -> Parts:
        """`output_gate`, Linear(D, D) or Linear(D, H)."""
        gate = nn.Linear(site.width, site.width if self.gate == "elementwise" else site.heads)
        if self.init == "random":
            nn.init.trunc_normal_(gate.weight, std=0.02)
        else:
            nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        return {"output_gate": gate}

    def joined(self, out_BND: Tensor, x_BND: Tensor, site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N, D], each channel or head times its gate."""
        gate: Tensor = site.home.output_gate(x_BND).sigmoid()
        gate = 2 * gate if self.doubled else gate
        if self.gate == "headwise":
            gate = gate.repeat_interleave(site.width // site.heads, dim=-1)
        return out_BND * gate


FIXES.add(GatedAttention.name, GatedAttention)
