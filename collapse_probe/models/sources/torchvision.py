"""Models of torchvision: `torchvision:NAME[.WEIGHTS]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.downloads import check_url, fetching
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, Request
from collapse_probe.registry import SOURCES

WAY_OUT = "use --no-pretrained for fresh weights, or --checkpoint FILE for your own"


class TorchvisionSource:
    """torchvision's image classifiers."""

    def names(self, pattern: str = "*") -> list[str]:
        """torchvision's names of classifiers, sorted."""
        from torchvision import models

        return sorted(models.list_models(module=models, include=pattern))

    def has(self, name: str) -> bool:
        """Whether torchvision has this classifier and, if the name carries a tag, those weights."""
        from torchvision import models

        base, _, tag = name.partition(".")
        return base in self.names() and (not tag or tag in models.get_model_weights(base).__members__)

    def blueprint(self, request: Request) -> Blueprint:
        """torchvision's constructor; preprocessing is that of the weights, also where they are not loaded."""
        from torchvision import models

        base, _, tag = request.name.partition(".")
        weights = models.get_model_weights(base)[tag or "DEFAULT"]
        settings: dict[str, Any] = dict(request.model_kwargs)
        native = int(weights.transforms().crop_size[0])
        size = request.img_size or settings.get("image_size") or native
        if base.startswith("vit_") or request.img_size is not None:
            settings["image_size"] = size

        def make(trained: bool) -> nn.Module:
            if not trained:
                model: nn.Module = models.get_model(base, weights=None, **settings)
                return model
            with fetching(f"weights of {request.address!r}", ModelError, WAY_OUT, hub=False):
                check_url(weights.url, _cached(weights.url))
                if size != native and base.startswith("vit_"):
                    return _interpolated(models.get_model(base, weights=None, **settings), weights)
                model = models.get_model(base, weights=weights, **settings)
                return model

        return Blueprint(request.name, make, lambda _: (_preprocess(weights, size), ()), weights.name)


def _cached(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _interpolated(model: Any, weights: Any) -> nn.Module:
    """Load weights made for another input size, their position embeddings resized bicubically."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    state = weights.get_state_dict(progress=False, check_hash=True)
    model.load_state_dict(interpolate_embeddings(model.image_size, model.patch_size, state))
    module: nn.Module = model
    return module


def _preprocess(weights: Any, size: int) -> Preprocess:
    """The weights' transform at `size` pixels; the crop keeps its share of the resized picture."""
    plain = weights.transforms()
    resize = round(plain.resize_size[0] * size / plain.crop_size[0])
    transform = weights.transforms(crop_size=size, resize_size=resize)
    description = {
        "size": [size, size],
        "resize": resize,
        "crop_mode": "center",
        "crop_pct": size / resize,
        "interpolation": transform.interpolation.value,
        "mean": list(transform.mean),
        "std": list(transform.std),
    }
    return Preprocess(transform, (size, size), description)


SOURCES.add("torchvision", TorchvisionSource())
