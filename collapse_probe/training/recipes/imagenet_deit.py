"""ImageNet-1k as DeiT trains, and with the penalties of the two papers that build on it.

The settings are those of DeiT's public training script without its repeated augmentation; the penalties those of
the released code of Diverse-ViT (arXiv 2203.06345) and Patch Diversification (arXiv 2104.12753).
"""

from __future__ import annotations

import json
from dataclasses import replace

from collapse_probe.registry import RECIPES
from collapse_probe.training.penalties.presets import PRESETS
from collapse_probe.training.recipe import Augmentation, PenaltyTerm, Recipe


def _deit(name: str, about: str, model: str = "timm:deit_small_patch16_224", depth: int = 12, drop_path: float = 0.1) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        data="imagenet",
        model=model,
        model_kwargs={"drop_path_rate": drop_path, "depth": depth},
        lr=1e-3,  # 5e-4 for each 512 images of a batch
        weight_decay=0.05,
        epochs=300,
        warmup=5,
        warmup_lr=1e-6,
        min_lr=1e-5,
        batch_size=1024,
        augmentation=Augmentation(flip=True, crop=0.08, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erase=0.25),
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        amp="float16",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.9,
        workers=8,
        log_every=100,
        evaluate_every=1251,
        checkpoint_every=500,
    )


def _preset(name: str) -> dict[str, PenaltyTerm]:
    """A released preset as plain values: lists where it has tuples."""
    return {key: (weight, json.loads(json.dumps(dict(settings)))) for key, (settings, weight) in PRESETS[name].items()}


def deit_s() -> Recipe:
    """DeiT-S without distillation. 22.1 M parameters, 9.2 GFLOP an image, 1.1e19 in all."""
    return _deit("imagenet-deit-s", "DeiT-S, 12 blocks")


def deit_s_24() -> Recipe:
    """DeiT-S with 24 blocks. 43.3 M parameters, 18.3 GFLOP an image, 2.1e19 in all."""
    return _deit("imagenet-deit-s-24", "DeiT-S with 24 blocks", depth=24)


def diverse_vit_s() -> Recipe:
    """22.1 M parameters, 9.2 GFLOP an image, 1.1e19 in all without the penalties, one of which replaces the cross entropy."""
    made = _deit("imagenet-diverse-vit-s", "DeiT-S, 12 blocks, with the penalties of Diverse-ViT")
    return replace(made, penalties=_preset("diverse-vit"))


def diverse_vit_s_24() -> Recipe:
    """43.3 M parameters, 18.3 GFLOP an image, 2.1e19 in all without the penalties, one of which replaces the cross entropy."""
    made = _deit("imagenet-diverse-vit-s-24", "DeiT-S with 24 blocks and the penalties of Diverse-ViT", depth=24)
    return replace(made, penalties=_preset("diverse-vit"))


def patch_diversification_b() -> Recipe:
    """DeiT-B with talking heads, stochastic depth 0.5 and the penalties of Patch Diversification's released code.

    That code cuts along the patches, and its talking heads have no bias; here timm's CutMix cuts at any pixel,
    a patch on the cut counts to the second region, and the heads are mixed as in CaiT.
    86.6 M parameters, 35.4 GFLOP an image, 4.1e19 in all without the penalties.
    """
    about = "DeiT-B with talking heads and the penalties of Patch Diversification"
    made = _deit("imagenet-patch-diversification-b", about, "timm:deit_base_patch16_224", drop_path=0.5)
    return replace(made.vary(fix="talking-heads"), mixup=0.0, penalties=_preset("patch-diversification"))


for _recipe in (deit_s, deit_s_24, diverse_vit_s, diverse_vit_s_24, patch_diversification_b):
    RECIPES.add(f"imagenet-{_recipe.__name__.replace('_', '-')}", _recipe)
