"""The official DeepViT family, on timm's layers and the re-attention fix; importing this registers it with timm.

Numerically the models of zhoudaquan/dvit_repo, arXiv 2103.11886, with their parameter names, so that official checkpoints load
with no key missing and none left over. What those checkpoints do not say follows from the model's name (`FAMILY`): whether
mixed maps are scaled by head_dim^-0.5 (`transform_scale`, S alone), and by how much the residual stream is shrunk before each
LayerNorm and its branches enlarged after (`residual_scale`, 0.5 in S and L).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from collapse_probe.errors import CheckpointError, ModelError
from collapse_probe.models.fixes.apply import apply, open_sockets
from collapse_probe.models.fixes.re_attention import ReAttention


@dataclass(frozen=True)
class DeepViTSettings:
    """What makes a member of the family; `re_attention` holds the blocks whose maps are mixed, others are plain MHSA.

    All have patches of 16 pixels and an MLP ratio of 3.
    """

    width: int = 384
    depth: int = 16
    re_attention: tuple[int, ...] = ()
    stem: Literal["patch", "cnn"] = "patch"
    transform_scale: bool = False
    residual_scale: float = 1.0
    heads: int = 12
    image_size: int = 224
    classes: int = 1000


FAMILY: Mapping[str, DeepViTSettings] = {
    **{
        f"deepvit_patch16_224_re_attn_{depth}b": DeepViTSettings(depth=depth, re_attention=tuple(range(depth)))
        for depth in (16, 24, 32)
    },
    "deepvit_s": DeepViTSettings(396, 16, tuple(range(11, 16)), "cnn", transform_scale=True, residual_scale=0.5),
    "deepvit_l": DeepViTSettings(420, 32, tuple(range(20, 32)), "cnn", residual_scale=0.5),
    "deepvit_l_384": DeepViTSettings(420, 32, tuple(range(20, 32)), "cnn", residual_scale=0.5, image_size=384),
    **{f"deepvit_patch16_224_mhsa_{depth}b": DeepViTSettings(depth=depth) for depth in (12, 16, 24, 32)},
}


class ConvStem(PatchEmbed):
    """Two convolutions before the patches: [B, C, height, width] -> [B, P, D], patches of 16 pixels.

    7×7 with stride 2 to 64 channels, BatchNorm, ReLU; 3×3, BatchNorm, ReLU; 8×8 with stride 8 to the width.
    """

    def __init__(self, *, in_chans: int, embed_dim: int, **timm: Any) -> None:
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **timm)
        if self.patch_size != (16, 16) or not self.flatten:
            raise ModelError("the convolutional stem of DeepViT makes patches of 16 pixels, for one image size")
        like: Any = {"device": self.proj.weight.device, "dtype": self.proj.weight.dtype}
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False, **like)
        self.bn1 = nn.BatchNorm2d(64, **like)
        self.conv2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False, **like)
        self.bn2 = nn.BatchNorm2d(64, **like)
        self.proj = nn.Conv2d(64, embed_dim, 8, 8, **like)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """One token a patch, row by row; ModelError for images of another size."""
        if tuple(images_BCHW.shape[-2:]) != self.img_size:
            raise ModelError(f"this DeepViT takes images of {self.img_size}, not {tuple(images_BCHW.shape[-2:])}")
        x = F.relu(self.bn1(self.conv1(images_BCHW)))
        x = F.relu(self.bn2(self.conv2(x)))
        tokens_BPD: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens_BPD


class ScaledBlock(Block):
    """timm's block with a residual scale s: x ← x + f(LN(x·s))/s for both branches.

    LayerNorm undoes s up to its eps, so 1/s is the gain of the branches: 2 for s = 0.5.
    """

    def __init__(self, *, residual_scale: float, **timm: Any) -> None:
        super().__init__(**timm)
        self.residual_scale = residual_scale

    def forward(self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        s = self.residual_scale
        attended = self.attn(self.norm1(x_BND * s), attn_mask=attn_mask, is_causal=is_causal)
        x_BND = x_BND + self.drop_path1(self.ls1(attended)) / s
        out_BND: Tensor = x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND * s)))) / s
        return out_BND


class DeepViT(VisionTransformer):
    """timm's VisionTransformer with the residual scale, stem and re-attending blocks of `deepvit`.

    `timm` are further arguments of VisionTransformer (num_classes, drop_path_rate, …), which win over `deepvit`'s.
    """

    def __init__(self, deepvit: DeepViTSettings, **timm: Any) -> None:
        own: dict[str, Any] = {
            "img_size": deepvit.image_size,
            "num_classes": deepvit.classes,
            "embed_dim": deepvit.width,
            "depth": deepvit.depth,
            "num_heads": deepvit.heads,
            "mlp_ratio": 3.0,
            "patch_size": 16,
            "block_fn": partial(ScaledBlock, residual_scale=deepvit.residual_scale),
            "embed_layer": ConvStem if deepvit.stem == "cnn" else PatchEmbed,
        }
        super().__init__(**(own | timm))
        trunc_normal_(self.cls_token, std=0.02)
        open_sockets(self)
        if deepvit.re_attention:
            first: Any = self.blocks[0]
            scale = first.attn.scale if deepvit.transform_scale else 1.0
            apply(self, ReAttention(scale=scale), deepvit.re_attention)


default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": settings.classes,
            "input_size": (3, settings.image_size, settings.image_size),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0 if settings.image_size == 384 else 0.9,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.conv1" if settings.stem == "cnn" else "patch_embed.proj",
            "classifier": "head",
        }
        for name, settings in FAMILY.items()
    }
)


def _entrypoint(name: str) -> Callable[..., Any]:
    def make(pretrained: bool = False, **timm: Any) -> Any:
        features = {"out_indices": timm.pop("out_indices", 3), "feature_cls": "getter"}
        return build_model_with_cfg(DeepViT, name, pretrained, deepvit=FAMILY[name], feature_cfg=features, **timm)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}: {FAMILY[name]}"
    return make


for _name in FAMILY:  # registering is this module's table entry
    register_model(_entrypoint(_name))


def settings_from(state_dict: Mapping[str, Tensor], name: str | None = None) -> DeepViTSettings:
    """The settings of the DeepViT whose weights these are, read from keys and shapes; `module.` prefixes are allowed.

    `transform_scale` and `residual_scale` leave no trace in the weights. They follow from `name` where it is given (as timm or
    the official code spell it), else from the width, which tells the official models apart. Raises CheckpointError for weights
    of another architecture, of a width that no official model has, or where they contradict the name; ModelError for an unknown
    name.
    """
    shapes = {key.removeprefix("module."): tensor.shape for key, tensor in state_dict.items()}
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"):
        if key not in shapes:
            raise CheckpointError(f"these are no weights of a DeepViT: there is no {key!r}")
    blocks = [key.split(".") for key in shapes if key.startswith("blocks.")]
    mixing = {int(key[1]): shapes[".".join(key)] for key in blocks if key[2:] == ["attn", "reatten_matrix", "weight"]}
    heads = {shape[0] for shape in mixing.values()} or {DeepViTSettings.heads}
    side = math.isqrt(shapes["pos_embed"][1] - 1)
    if len(heads) > 1 or side**2 + 1 != shapes["pos_embed"][1]:
        raise CheckpointError("these are no weights of a DeepViT: heads differ, or patches fill no square")
    measured = DeepViTSettings(
        width=shapes["cls_token"][-1],
        depth=1 + max(int(key[1]) for key in blocks),
        re_attention=tuple(sorted(mixing)),
        stem="cnn" if "patch_embed.conv1.weight" in shapes else "patch",
        heads=heads.pop(),
        image_size=16 * side,
        classes=shapes["head.weight"][0],
    )
    if name is None:
        official = {each.width: each for each in FAMILY.values()}
        if measured.width not in official:
            widths = ", ".join(map(str, sorted(official)))
            raise CheckpointError(
                f"no official DeepViT is {measured.width} wide (they are {widths}), so its scales cannot be "
                "told: give the model's name"
            )
        like = official[measured.width]
        return replace(measured, transform_scale=like.transform_scale, residual_scale=like.residual_scale)
    if name.lower() not in FAMILY:
        raise ModelError(f"no DeepViT is called {name!r}; there are {', '.join(FAMILY)}")
    named = FAMILY[name.lower()]
    wrong = [
        f"{what} is {getattr(measured, what)} in the weights, {getattr(named, what)} in {name}"
        for what in ("width", "depth", "re_attention", "stem", "heads", "image_size")
        if getattr(measured, what) != getattr(named, what)
    ]
    if wrong:
        alike = [other for other, each in FAMILY.items() if (each.width, each.depth) == (measured.width, measured.depth)]
        hint = f"; they look like {' or '.join(alike)}" if alike else ""
        raise CheckpointError(f"these weights are not {name}: {'; '.join(wrong)}{hint}")
    return replace(named, classes=measured.classes)
