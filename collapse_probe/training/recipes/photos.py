"""Small recipes on tiles of the bundled photographs: from which photograph is this tile?

Twelve photographs; 1008 tiles are trained on, 432 held out. The control, Re-attention and the initial weights are as in the
recipes on digits.
"""

from __future__ import annotations

import math

from collapse_probe.models.vit import ViTSettings
from collapse_probe.registry import RECIPES
from collapse_probe.training.recipe import Augmentation, Recipe

WIDTH = 64
STD = 0.02 * math.sqrt(768 / WIDTH)
CLASSES = 12  # photographs that are large enough for a grid of crops


def _photos(name: str, about: str, *, tied: bool, fix: str | None) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        data="bundled:photos",
        model=ViTSettings(
            image_size=32, patch_size=4, classes=CLASSES, depth=12, width=WIDTH, heads=4, mlp_ratio=2.0, tied=tied, init_std=STD
        ),
        embedding_std=STD,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        clip=1.0,
        steps=800,
        warmup=80,
        label_smoothing=0.1,
        augmentation=Augmentation(shift=2, contrast=0.2, noise=0.05, flip=True),
        recalibrate=0 if fix is None else 20,
    ).vary(fix=fix)


def photos_tied_mhsa() -> Recipe:
    """41,740 parameters, 5.0e12 operations: minutes on one core."""
    return _photos("photos-tied-mhsa", "positive control on colour tiles: one block reused 12 times", tied=True, fix=None)


def photos_tied_re_attention() -> Recipe:
    """42,076 parameters, 5.1e12 operations: minutes on one core."""
    about = "the positive control on colour tiles with Re-attention"
    return _photos("photos-tied-re-attention", about, tied=True, fix="re-attention")


def photos_mhsa() -> Recipe:
    """409,932 parameters, 5.0e12 operations: minutes on one core."""
    return _photos("photos-mhsa", "an ordinary ViT of 12 blocks on colour tiles", tied=False, fix=None)


def photos_re_attention() -> Recipe:
    """410,268 parameters, 5.1e12 operations: minutes on one core."""
    return _photos("photos-re-attention", "the same with Re-attention", tied=False, fix="re-attention")


for _recipe in (photos_tied_mhsa, photos_tied_re_attention, photos_mhsa, photos_re_attention):
    RECIPES.add(_recipe.__name__.replace("_", "-"), _recipe)
