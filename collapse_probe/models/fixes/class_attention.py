"""Class attention: keep CLS out of the blocks, and let it read the finished patches in a stage of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from timm.models.cait import LayerScaleBlockClassAttn
from torch import Tensor, nn

from collapse_probe.errors import ModelError
from collapse_probe.models.fixes.base import Fix, FixSite, Parts, Shapes
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class ClassAttentionStage(Fix):
    """The blocks see no CLS; after them CLS reads the tokens in `depth` blocks of its own, in which only it moves.

    Official key names (`blocks_token_only`): 2 such blocks with LayerScale, its γ from `init` on (1e-5 or 1e-6). A model that
    gives CLS a position embedding keeps it. The model's head must read CLS alone. No neutral setting.
    """

    depth: Annotated[int, "[1, inf)"] = 2
    mlp_ratio: Annotated[float, "(0, inf)"] = 4.0
    init: Annotated[float, "(0, inf)"] = 1e-5

    name = "class-attention"
    summary = "CLS leaves the blocks and reads the patches in a last stage (CaiT)"
    source = "CaiT, arXiv 2103.17239"
    home = "model"

    @classmethod
    def from_keys(cls, shapes: Shapes) -> Mapping[str, Any] | None:
        """`depth` and `mlp_ratio`, by the number and shapes of `blocks_token_only`."""
        layers = [shape for name, shape in shapes.items() if re.fullmatch(r"blocks_token_only\.\d+\.mlp\.fc1\.weight", name)]
        return {"depth": len(layers), "mlp_ratio": layers[0][0] / layers[0][1]} if layers else None

    def parts(self, site: FixSite) -> Parts:
        """`blocks_token_only`; ModelError where the head reads something else than CLS."""
        model = site.home
        if getattr(model, "cls_token", None) is None or site.prefix < 1:
            raise ModelError(f"{self.name} needs a model with a CLS token, and this one has none")
        if hasattr(model, "dist_token") or getattr(model, "global_pool", "token") != "token":
            raise ModelError(f"{self.name} needs a head that reads CLS alone; this model's reads other tokens too")
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        settings: Any = {"qkv_bias": True, "norm_layer": norm, "init_values": float(self.init)}
        blocks = [LayerScaleBlockClassAttn(site.width, site.heads, self.mlp_ratio, **settings) for _ in range(self.depth)]
        for module in (m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        return {"blocks_token_only": nn.ModuleList(blocks)}

    def enter(self, tokens_BND: Tensor, site: FixSite) -> Tensor:
        """[B, N, D] -> [B, N - 1, D]: CLS waits outside."""
        site.memory["CLS token"] = tokens_BND[:, :1]
        return tokens_BND[:, 1:]

    def leave(self, tokens_BND: Tensor, site: FixSite) -> Tensor:
        """[B, N - 1, D] -> [B, N, D]: CLS reads, and comes first again."""
        cls_B1D = site.take("CLS token")
        for block in site.home.blocks_token_only:
            cls_B1D = block(tokens_BND, cls_B1D)
        return torch.cat((cls_B1D, tokens_BND), dim=1)

    def prefix_tokens(self, count: int) -> int:
        """One less: CLS."""
        return count - 1


FIXES.add(ClassAttentionStage.name, ClassAttentionStage)
