"""Class attention: keep CLS out of the blocks, and let it read the finished patches in a stage of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from collapse_probe.errors import ModelError
from collapse_probe.models.fixes.base import Fix, FixSite, Parts
from collapse_probe.registry import FIXES


class ClassAttention(nn.Module):
    """Attention whose only query is the first token: [B, N, D] -> [B, 1, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """What the first token reads from all."""
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q(tokens_BND[:, :1]), self.k(tokens_BND), self.v(tokens_BND))
        )
        read: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return read


class ClassBlock(nn.Module):
    """Class attention and an MLP for CLS alone, each behind a LayerNorm and scaled by γ: [B, 1, D] -> [B, 1, D]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, init: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = ClassAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((width,), init))
        self.gamma_2 = nn.Parameter(torch.full((width,), init))

    def forward(self, cls_B1D: Tensor, patches_BPD: Tensor) -> Tensor:
        """CLS after reading the patches; these stay as they are."""
        tokens_BND = torch.cat((cls_B1D, patches_BPD), dim=1)
        cls_B1D = cls_B1D + self.gamma_1 * self.attn(self.norm1(tokens_BND))
        updated: Tensor = cls_B1D + self.gamma_2 * self.mlp(self.norm2(cls_B1D))
        return updated


@dataclass(frozen=True)
class ClassAttentionStage(Fix):
    """The blocks see no CLS; after them CLS reads the tokens in `depth` blocks of its own, in which only it moves.

    Source: CaiT, arXiv 2103.17239, official code and key names (`blocks_token_only`): 2 such blocks with LayerScale. A model
    that gives CLS a position embedding keeps it. The model's head must read CLS alone.

    Settings: `depth`; `mlp_ratio`; `init` of γ (official 1e-5 or 1e-6). No neutral setting: CLS takes no part in the blocks.
    """

    depth: Annotated[int, "[1, inf)"] = 2
    mlp_ratio: Annotated[float, "(0, inf)"] = 4.0
    init: Annotated[float, "(0, inf)"] = 1e-5

    name = "class-attention"
    summary = "CLS leaves the blocks and reads the patches in a last stage (CaiT)"
    source = "CaiT, arXiv 2103.17239"
    home = "model"

    def parts(self, site: FixSite) -> Parts:
        """`blocks_token_only`; ModelError where the head reads something else than CLS."""
        model = site.home
        if getattr(model, "cls_token", None) is None or site.prefix < 1:
            raise ModelError(f"{self.name} needs a model with a CLS token, and this one has none")
        if hasattr(model, "dist_token") or getattr(model, "global_pool", "token") != "token":
            raise ModelError(f"{self.name} needs a head that reads CLS alone; this model's reads other tokens too")
        blocks = [ClassBlock(site.width, site.heads, self.mlp_ratio, float(self.init)) for _ in range(self.depth)]
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
            cls_B1D = block(cls_B1D, tokens_BND)
        return torch.cat((cls_B1D, tokens_BND), dim=1)

    def prefix_tokens(self, count: int) -> int:
        """One less: CLS."""
        return count - 1


FIXES.add(ClassAttentionStage.name, ClassAttentionStage)
