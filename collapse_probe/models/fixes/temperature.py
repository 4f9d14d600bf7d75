"""Temperature: sharpen or flatten the softmax of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class Temperature(Fix):
    """softmax(q kᵀ / (√d · τ)): τ < 1 sharpens, τ > 1 flattens; the queries carry τ, so attention stays fused.

    `tau` is the temperature or its start. A learnable one is held as `log_temperature`, one number a head, so that it stays
    positive: our own form, without official keys.
    """

    tau: Annotated[float, "(0, inf)"] = 1.0
    learnable: bool = False

    name = "temperature"
    summary = "divides the attention logits by a temperature, fixed or learnable per head"
    source = "compared in DeepViT, arXiv 2103.11886"
    failure_types = ("depth",)
    neutral = {"tau": 1.0}

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """A learnable one, by `log_temperature`; a fixed one leaves no trace."""
        return {"learnable": True} if "log_temperature" in shapes else None

    def parts(self, site: FixSite) -> Parts:
        """`log_temperature`, [H], where it is learnable."""
        start = math.log(self.tau)
        return {"log_temperature": nn.Parameter(torch.full((site.heads,), start))} if self.learnable else {}

    def query(self, q_BHNK: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K], divided by the temperature; the dtype stays, as fused kernels ask."""
        if not self.learnable:
            return q_BHNK / self.tau
        gain_H11 = torch.exp(-site.home.log_temperature)[:, None, None]
        return q_BHNK * gain_H11.to(q_BHNK.dtype)


FIXES.add(Temperature.name, Temperature)
