"""One small plain Vision Transformer with sockets: the ground on which fixes are tried.

Pre-norm blocks, CLS, learned positions, fused attention unless a fix needs the map. Without fixes its
parameters have the names and shapes of timm's VisionTransformer, so weights can move between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from collapse_probe.errors import ModelError, SettingError
from collapse_probe.models.fixes.apply import open_block
from collapse_probe.models.fixes.base import AppliedFix, FixSettings, Sites, add_fix, apply_sites, fixes_in, plain_fixes
from collapse_probe.settings import Settings

AtLeastOne = Annotated[int, "[1, inf)"]


@dataclass(frozen=True, kw_only=True)
class ViTSettings(Settings):
    """What a ViT is made of.

    `tied` reuses the weights of block 0 in every block (what a fix adds is still one per block). `init`
    draws the Linear weights: "trunc_normal" with `init_std` (DeiT, DeepViT), "xavier" (uniform), or "torch"
    (as PyTorch makes them). `registers` extra prefix tokens are the fix of that name. `fixes` maps the names
    of fixes to their settings, `blocks` among them (default: all that a fix can act on), in the order in
    which they act::

        ViTSettings(depth=12, fixes={"re-attention": {"blocks": range(6, 12), "norm": "batch"},
        "layer-scale": {}})
    """

    name: ClassVar[str] = "ViT"

    image_size: AtLeastOne = 224
    patch_size: AtLeastOne = 16
    channels: AtLeastOne = 3
    classes: int = 1000
    depth: AtLeastOne = 12
    width: AtLeastOne = 384
    heads: AtLeastOne = 6
    mlp_ratio: float = 4.0
    registers: int = 0
    tied: bool = False
    init: Literal["trunc_normal", "xavier", "torch"] = "trunc_normal"
    init_std: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    fixes: FixSettings = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise SettingError(f"ViT: image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise SettingError(f"ViT: width {self.width} is no multiple of heads {self.heads}")
        if "registers" in self.fixes and self.registers:
            raise SettingError("ViT: give registers either as a number or as a fix, not as both")

    def plain(self) -> dict[str, Any]:
        """The settings as plain values, which JSON can hold and `ViTSettings(**…)` takes back."""
        return {**vars(self), "fixes": plain_fixes(self.fixes)}


class SquarePatchEmbed(PatchEmbed):
    """Patches to tokens: [B, C, height, width] -> [B, P, D]."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """One token a patch, row by row; ModelError for images of another size."""
        expected = (self.proj.in_channels, *self.img_size)
        if tuple(images_BCHW.shape[1:]) != expected:
            raise ModelError(f"this ViT takes images of {expected}, not of {tuple(images_BCHW.shape[1:])}")
        embed: Any = super().forward
        return embed(images_BCHW)  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth: in train mode a branch is left out for a whole image, with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BND: Tensor) -> Tensor:
        """The branch, scaled so that its mean stays."""
        if not (self.training and self.rate):
            return x_BND
        kept_B11 = torch.rand(x_BND.shape[0], 1, 1, device=x_BND.device) >= self.rate
        return x_BND * kept_B11 / (1 - self.rate)


class ViT(nn.Module):
    """A plain ViT: [B, C, height, width] -> logits [B, classes]; `ViT(depth=4, …)` or `ViT(ViTSettings(depth=4, …))`.

    `fixes` records what was put in, `num_prefix_tokens` counts the tokens before the patches inside the blocks. Raises
    SettingError for settings that cannot be, UnknownNameError for a fix that does not exist.
    """

    def __init__(self, settings: ViTSettings | None = None, **changes: Any) -> None:
        super().__init__()
        self.settings = s = replace(settings or ViTSettings(), **changes)
        self.embed_dim, self.num_classes, self.num_prefix_tokens = s.width, s.classes, 1
        self.sites: Sites = []
        self.fixes: tuple[AppliedFix, ...] = ()
        self.patch_embed = SquarePatchEmbed(s.image_size, s.patch_size, s.channels, s.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, s.width))
        like: Any = {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "qkv_bias": True}
        like |= {"proj_drop": s.dropout, "attn_drop": s.attention_dropout}
        made: list[Any] = [Block(s.width, s.heads, s.mlp_ratio, **like) for _ in range(s.depth)]
        self.blocks = nn.Sequential(*made)
        for i, block in enumerate(made):
            block.attn.fused_attn = True
            block.drop_path1 = block.drop_path2 = DropPath(s.drop_path * i / max(1, s.depth - 1))
            open_block(block)
        self.norm = nn.LayerNorm(s.width, eps=1e-6)
        self.head = nn.Linear(s.width, s.classes) if s.classes else nn.Identity()
        self._initialise()
        if s.tied:
            for name, parameter in self.blocks[0].named_parameters():
                owner, _, leaf = name.rpartition(".")
                for block in self.blocks[1:]:
                    setattr(block.get_submodule(owner), leaf, parameter)
        registers = {"registers": {"count": s.registers}} if s.registers else {}
        for fix, blocks in fixes_in({**registers, **s.fixes}):
            add_fix(self, fix, blocks)

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and self.settings.init != "torch":
                nn.init.zeros_(module.bias)
                if self.settings.init == "xavier":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=self.settings.init_std)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """The tokens after the final norm, [B, C, height, width] -> [B, N, D]; CLS is the first."""
        patches_BPD = self.patch_embed(images_BCHW)
        cls_B1D = self.cls_token.expand(patches_BPD.shape[0], -1, -1)
        tokens_BND = torch.cat((cls_B1D, patches_BPD), dim=1) + self.pos_embed
        tokens_BND = self.blocks(apply_sites(self.sites, "enter", tokens_BND))
        normed_BND: Tensor = self.norm(apply_sites(self.sites, "leave", tokens_BND))
        return normed_BND

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, read from CLS."""
        logits: Tensor = self.head(self.forward_features(images_BCHW)[:, 0])
        return logits
