"""QK norm: queries and keys are normalised before they meet, so that attention logits stay bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from timm.layers import RmsNorm
from timm.models.vision_transformer import Attention
from torch import nn

from collapse_probe.models.fixes.base import Fix, Shapes
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class QKNorm(Fix):
    """q ← norm(q), k ← norm(k) in every head, over the head's width K, with a learnable gain (and bias) that all heads share.

    `norm` "layer" is LayerNorm as in ViT-22B, "rms" RMSNorm; timm's names (`q_norm`, `k_norm`) and eps (1e-6), so that a
    checkpoint of a timm model with `qk_norm=True` fits. With RMS no logit is above √K · max|g_q| · max|g_k|. No neutral
    setting: no gain gives back the lengths that a norm took away.
    """

    norm: Literal["layer", "rms"] = "layer"

    name = "qk-norm"
    summary = "normalises queries and keys in every head"
    source = "Query-Key Normalization, arXiv 2010.04245; ViT-22B, arXiv 2302.05442"
    failure_types = ("entropy",)
    home = "modules"

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`norm`, by whether `q_norm` has a bias."""
        if not {"attn.q_norm.weight", "attn.k_norm.weight"} <= set(shapes):
            return None
        return {"norm": "layer" if "attn.q_norm.bias" in shapes else "rms"}

    def convert(self, module: nn.Module, width: int) -> bool:
        """Give an attention without `q_norm` and `k_norm` its own."""
        if not isinstance(module, Attention) or not isinstance(module.q_norm, nn.Identity):
            return False
        attention: Any = module
        for name in ("q_norm", "k_norm"):
            norm = (nn.LayerNorm if self.norm == "layer" else RmsNorm)(attention.head_dim, eps=1e-6)
            setattr(attention, name, norm.to(attention.qkv.weight).train(attention.training))
        return True


FIXES.add(QKNorm.name, QKNorm)
