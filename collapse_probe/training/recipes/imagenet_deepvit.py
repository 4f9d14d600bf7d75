"""ImageNet-1k as DeepViT's official code trains: the Re-attention models, and plain twins that differ in that alone.

Source: scripts/*.yaml of zhoudaquan/dvit_repo for arXiv 2103.11886. Not known there: on how many GPUs, each with
32 images; 8 are assumed (the code does not scale its learning rate by the batch). The official code re-estimates
BatchNorm on 50 training batches before it validates; so do these recipes, on the average of the weights too.
Costs: operations of one forward pass, a multiplication and an addition being two, and of the whole run at three
such passes a step; the time on a machine is told by --dry-run there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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


def deepvit_s() -> Recipe:
    """DeepViT-S: 16 blocks, Re-attention in the last 5, convolutional stem.

    27.3 M parameters, 12.7 GFLOP an image, 1.5e19 in all.
    """
    return _deepvit("imagenet-deepvit-s", "deepvit_s", "DeepViT-S, 16 blocks, the last 5 with Re-attention")


def deepvit_l() -> Recipe:
    """DeepViT-L: 32 blocks, Re-attention in the last 12, convolutional stem.

    58.9 M parameters, 26.3 GFLOP an image, 3.1e19 in all.
    """
    return _deepvit("imagenet-deepvit-l", "deepvit_l", "DeepViT-L, 32 blocks, the last 12 with Re-attention")


def _pure(depth: int, kind: str) -> Recipe:
    deep = kind == "deepvit"
    model = f"deepvit_patch16_224_{'re_attn' if deep else 'mhsa'}_{depth}b"
    about = f"{depth} blocks of width 384, " + ("all with Re-attention" if deep else "plain attention: the twin")
    made = _deepvit(f"imagenet-{kind}-{depth}b", model, about)
    if depth < 32:
        return made
    penalties = {"block-cosine": (0.1, {"pairs": 12, "axis": "head", "point": "weights"})}
    return replace(made, mixup=0.1, cutmix=0.0, amp="float16", penalties=penalties)


def deepvit_16b() -> Recipe:
    """16 blocks with Re-attention, width 384. 24.4 M parameters, 10.5 GFLOP an image, 1.3e19 in all."""
    return _pure(16, "deepvit")


def deepvit_24b() -> Recipe:
    """24 blocks with Re-attention, width 384. 36.3 M parameters, 15.8 GFLOP an image, 1.9e19 in all."""
    return _pure(24, "deepvit")


def deepvit_32b() -> Recipe:
    """32 blocks with Re-attention, width 384; less mixing, float16, cosine penalty on 12 pairs of blocks.

    48.1 M parameters, 21.0 GFLOP an image, 2.5e19 in all.
    """
    return _pure(32, "deepvit")


def mhsa_16b() -> Recipe:
    """The twin of 16b without Re-attention. 24.4 M parameters, 10.4 GFLOP an image, 1.2e19 in all."""
    return _pure(16, "mhsa")


def mhsa_24b() -> Recipe:
    """The twin of 24b without Re-attention. 36.3 M parameters, 15.5 GFLOP an image, 1.8e19 in all."""
    return _pure(24, "mhsa")


def mhsa_32b() -> Recipe:
    """The twin of 32b without Re-attention, with all else of its recipe.

    48.1 M parameters, 20.6 GFLOP an image, 2.5e19 in all.
    """
    return _pure(32, "mhsa")


ALL: tuple[Callable[[], Recipe], ...] = (
    deepvit_s,
    deepvit_l,
    deepvit_16b,
    deepvit_24b,
    deepvit_32b,
    mhsa_16b,
    mhsa_24b,
    mhsa_32b,
)
for _recipe in ALL:
    RECIPES.add(f"imagenet-{_recipe.__name__.replace('_', '-')}", _recipe)
