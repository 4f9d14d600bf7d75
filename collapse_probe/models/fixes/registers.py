"""Registers: extra learnable tokens in which a model can keep what would otherwise spoil patch tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class Registers(Fix):
    """`count` learnable tokens between the other prefix tokens and the patches, without position; no head reads them.

    They count as prefix tokens of the model from then on. That they have no position embedding, and start from a truncated
    normal of 0.02, is our choice. No neutral setting: any further key takes attention from the others.
    """

    count: Annotated[int, "[1, inf)"] = 4

    name = "registers"
    summary = "extra learnable tokens beside CLS that no head reads"
    source = "Registers, arXiv 2309.16588"
    home = "model"

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`count`, by the shape of `registers`."""
        return {"count": shapes["registers"][1]} if "registers" in shapes else None

    def parts(self, site: FixSite) -> Parts:
        """`registers`, [1, count, D]."""
        tokens = torch.empty(1, self.count, site.width)
        return {"registers": nn.Parameter(nn.init.trunc_normal_(tokens, std=0.02))}

    def enter(self, tokens_BND: Tensor, site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N + count, D]."""
        registers_BRD = site.home.registers.expand(tokens_BND.shape[0], -1, -1).to(tokens_BND.dtype)
        before, after = tokens_BND[:, : site.prefix], tokens_BND[:, site.prefix :]
        return torch.cat((before, registers_BRD, after), dim=1)

    def prefix_tokens(self, count: int) -> int:
        """`count` and the registers."""
        return count + self.count


FIXES.add(Registers.name, Registers)
