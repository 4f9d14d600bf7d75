"""Makes a `Preprocess` out of what a model says about its own input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn

from collapse_probe.errors import ModelError
from collapse_probe.subject import Preprocess


def from_timm_config(config: Mapping[str, Any], img_size: int | None = None) -> Preprocess:
    """timm's evaluation transform for a pretrained_cfg; what it leaves out is timm's ImageNet default.

    `img_size` [pixels] replaces the config's input size; the crop keeps its share of the resized picture.
    """
    import timm.data

    factory: Any = timm.data  # untyped
    args = {} if img_size is None else {"img_size": img_size}
    settled = factory.resolve_data_config(args, pretrained_cfg=dict(config) or {"input_size": (3, 224, 224)})
    height, width = settled["input_size"][-2:]
    edge = [math.floor(side / settled["crop_pct"]) for side in (height, width)]
    description = {
        "size": [height, width],
        "resize": edge[0] if edge[0] == edge[1] else edge,
        "crop_mode": settled["crop_mode"],
        "crop_pct": settled["crop_pct"],
        "interpolation": settled["interpolation"],
        "mean": list(settled["mean"]),
        "std": list(settled["std"]),
    }
    return Preprocess(factory.create_transform(**settled, is_training=False), (height, width), description)


def from_callable(transform: Callable[[Image.Image], Tensor], description: Mapping[str, Any]) -> Preprocess:
    """A Preprocess around any transform; its size is read off a blank picture.

    Raises ModelError where the transform does not turn a picture into a tensor [3, height, width].
    """
    try:
        pixels = transform(Image.new("RGB", (320, 256)))
    except Exception as error:
        raise ModelError(f"the model's own preprocessing failed on an RGB picture: {error}") from error
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or not pixels.is_floating_point():
        came = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ModelError(f"the model's own preprocessing must give a float tensor [3, height, width], not {came}")
    size = (int(pixels.shape[1]), int(pixels.shape[2]))
    return Preprocess(transform, size, {**description, "size": list(size)})


def of_module(module: nn.Module, img_size: int | None = None) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocessing that a module brings along, and notes on what had to be assumed.

    In this order: the attribute `preprocess` (a Preprocess, or a transform from picture to tensor), a
    timm-style `pretrained_cfg` or `default_cfg`, and else ImageNet's mean and std. `img_size` [pixels]
    overrides what the module declares; without either it is 224.
    """
    own = getattr(module, "preprocess", None)
    if isinstance(own, Preprocess):
        return own, ()
    if callable(own):
        return from_callable(own, {"transform": repr(own)[:500]}), ()
    size = img_size or _declared_size(module)
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if config:
        return from_timm_config(config if isinstance(config, Mapping) else vars(config), size), ()
    note = f"preprocessing assumed: ImageNet mean and std at {size or 224} pixels (the module declares none)"
    return from_timm_config({}, size), (note,)


def _declared_size(module: nn.Module) -> int | None:
    holders = (module, getattr(module, "patch_embed", None), getattr(module, "config", None))
    for holder in holders:
        for name in ("image_size", "img_size"):
            size = getattr(holder, name, None)
            side = size[0] if isinstance(size, (tuple, list)) and len(set(size)) == 1 else size
            if isinstance(side, int) and not isinstance(side, bool) and side > 0:
                return side
    return None
