"""Differential attention: the difference of two softmax maps, in which what both attend to cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from collapse_probe.errors import ModelError
from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def first_lambda(block: int) -> float:
    """λ_init = 0.8 − 0.6 e^(−0.3 l) of block l = 0, 1, ….

    >>> round(first_lambda(0), 6), round(first_lambda(11), 6)
    (0.2, 0.77787)
    """
    return 0.8 - 0.6 * math.exp(-0.3 * block)


@dataclass(frozen=True)
class Differential(Fix):
    """A = softmax(q₁k₁ᵀ/√d) − λ softmax(q₂k₂ᵀ/√d) in each head, o = (1 − λ_init) RMSNorm(A v), λ one number a block.

    q₁, q₂ are the halves of a head's queries, d = K/2, as in timm's `attn_layer="diff"`, whose parameter names these are: the
    number of heads stays (the paper halves it beside the same width). λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init, λ_init by
    `first_lambda`. The map is signed and its rows sum to 1 − λ: a capture has it as the final map, and the first softmax as the
    softmax map. No neutral setting: the halves of trained queries were not trained to be compared.
    """

    name = "differential"
    summary = "the difference of two softmax maps in each head (Differential Transformer)"
    source = "Differential Transformer, arXiv 2410.05258"
    beside_no = ("shared-attention",)

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """Known by its λ vectors."""
        return {} if {*LAMBDAS, "sub_norm.weight"} <= set(shapes) else None

    def parts(self, site: FixSite) -> Parts:
        """`lambda_q1` … `lambda_k2`, [K/2], from a normal of 0.1, and `sub_norm`; ModelError where a head cannot be halved."""
        width = site.width // site.heads
        if width % 2:
            raise ModelError(f"{self.name} halves the queries of each head, but this model's heads are {width} wide")
        vectors = {name: nn.Parameter(0.1 * torch.randn(width // 2)) for name in LAMBDAS}
        return {**vectors, "sub_norm": RmsNorm(width, eps=1e-5)}

    def maps(self, q_BHNK: Tensor, k_BHNK: Tensor, site: FixSite) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of both maps; the scale of the logits is that of whole heads, and is mended here."""
        return list(zip((q_BHNK * math.sqrt(2)).chunk(2, dim=-1), k_BHNK.chunk(2, dim=-1), strict=True))

    def merged(self, maps: list[Tensor], site: FixSite) -> Tensor:
        """[B, H, N, N] twice -> [B, H, N, N], signed."""
        q1, k1, q2, k2 = (getattr(site.home, name) for name in LAMBDAS)
        factor: Tensor = (q1 * k1).sum(-1).float().exp() - (q2 * k2).sum(-1).float().exp() + first_lambda(site.block)
        return maps[0] - factor.to(maps[1].dtype) * maps[1]

    def heads(self, out_BHNK: Tensor, v_BHNK: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K], normalised."""
        gain_K: Tensor = site.home.sub_norm.weight
        normed_BHNK: Tensor = site.home.sub_norm(out_BHNK.to(gain_K.dtype))  # RMSNorm warns where autocast lowered one of both
        return normed_BHNK * (1 - first_lambda(site.block))


FIXES.add(Differential.name, Differential)
