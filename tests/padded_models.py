"""Small models of four kinds, and their traces of a few images as a run makes them."""

from __future__ import annotations

from functools import cache

import timm
import torch
from factories import small_vit

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.models.deepvit import DeepViT, DeepViTSettings

SIZE = (48, 48)
PADDED = 16
KINDS = ("plain", "mixed", "windowed", "one-head")


@cache
def model_and_plan(kind):
    """A model of float32 with seeded random parameters, and what the probe finds in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "windowed":
            shape = {"img_size": 48, "patch_size": 4, "window_size": 3, "num_classes": 5}
            model = timm.models.SwinTransformer(embed_dim=12, depths=(2, 2), num_heads=(2, 2), **shape)
        elif kind == "mixed":
            model = DeepViT(DeepViTSettings(24, 3, (1, 2), heads=3, image_size=48, classes=5), patch_size=8)
        else:
            heads = 1 if kind == "one-head" else 3
            shape = {"img_size": 48, "embed_dim": 24, "depth": 3, "num_heads": heads, "num_classes": 5}
            model = small_vit(3, sharpness=4.0, **shape)
    model.eval()
    return model, discover_plan(model, SIZE)


def pixels_of(number):
    """The image of a number: noise of its own level and strength."""
    noise = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(number))
    return noise * (0.3 + number % 7 / 3) + number % 5 / 5


@torch.no_grad()
def trace_of(kind, numbers):
    """The trace of some images, which go through the model with others up to a multiple of sixteen."""
    model, plan = model_and_plan(kind)
    missing = -len(numbers) % PADDED
    images = torch.stack([*map(pixels_of, numbers), *[torch.zeros(3, *SIZE)] * missing])
    with record(model, plan, values=True, middles=True) as recordings:
        model(images)
    return recordings.take().first(len(numbers))
