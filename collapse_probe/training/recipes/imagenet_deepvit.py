"""ImageNet-1k as DeepViT's official code trains: the Re-attention models, and plain twins that differ in that alone.

Source: scripts/*.yaml of zhoudaquan/dvit_repo for arXiv 2103.11886. Not known there: on how many GPUs, each with
32 images; 8 are assumed (the code does not scale its learning rate by the batch). The official code re-estimates
BatchNorm on 50 training batches before it validates; so do these recipes, on the average of the weights too.
Costs: operations of one forward pass, a multiplication and an addition being two, and of the whole run at three
such passes a step; --dry-run says the time on a machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from collapse_probe.registry import RECIPES
from collapse_probe.training.recipe import Augmentation, Recipe

ASSUMED_GPUS = 8


def _deepvit(name: str, model: str, about: str) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        data="imagenet",
        model=f"ours:{model}",
        model_kwargs={"drop_path_rate": 0.2},
        lr=5e-4,
        weight_decay=0.05,
        epochs=310,
        warmup=5,
        cooldown=10,
        warmup_lr=1e-6,
        min_lr=1e-5,
        batch_size=32 * ASSUMED_GPUS,
        augmentation=Augmentation(flip=True, crop=0.08, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erase=0.25),
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        ema=0.99996,
        recalibrate=0 if "mhsa" in model else 50,
        crop_pct=0.9,
        workers=8,
        log_every=100,
        evaluate_every=5004,
        checkpoint_every=1000,
    )


def _enter(name: str, model: str, about: str, costs: str, **changes: Any) -> None:
    def recipe() -> Recipe:
        return replace(_deepvit(f"imagenet-{name}", model, about), **changes)

    recipe.__doc__ = f"{about}. {costs} in all."
    RECIPES.add(f"imagenet-{name}", recipe)


S, L = "DeepViT-S, 16 blocks, the last 5 with Re-attention", "DeepViT-L, 32 blocks, the last 12 with Re-attention"
_enter("deepvit-s", "deepvit_s", S, "27.3 M parameters, 12.7 GFLOP an image, 1.5e19")
_enter("deepvit-l", "deepvit_l", L, "58.9 M parameters, 26.3 GFLOP an image, 3.1e19")
COSTS = {  # of width 384 by depth: with Re-attention and without
    16: ("24.4 M parameters, 10.5 GFLOP an image, 1.3e19", "24.4 M parameters, 10.4 GFLOP an image, 1.2e19"),
    24: ("36.3 M parameters, 15.8 GFLOP an image, 1.9e19", "36.3 M parameters, 15.5 GFLOP an image, 1.8e19"),
    32: ("48.1 M parameters, 21.0 GFLOP an image, 2.5e19", "48.1 M parameters, 20.6 GFLOP an image, 2.5e19"),
}
PENALTIES_32B = {"block-cosine": (0.1, {"pairs": 12, "axis": "head", "point": "weights"})}
for _depth, (_deep, _plain) in COSTS.items():
    _less_mixing: dict[str, Any] = {"mixup": 0.1, "cutmix": 0.0, "amp": "float16", "penalties": PENALTIES_32B}
    _changes = _less_mixing if _depth == 32 else {}
    _about, _model = f"{_depth} blocks of width 384, ", "deepvit_patch16_224_{}_" + f"{_depth}b"
    _enter(f"deepvit-{_depth}b", _model.format("re_attn"), _about + "all with Re-attention", _deep, **_changes)
    _enter(f"mhsa-{_depth}b", _model.format("mhsa"), _about + "plain attention: the twin", _plain, **_changes)
