"""Models of torchvision: `torchvision:NAME[.WEIGHTS]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.downloads import check_url
from collapse_probe.models.loading import Blueprint, Request, Source, fetching_weights
from collapse_probe.registry import SOURCES


class TorchvisionSource(Source):
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
        from torchvision.models.vision_transformer import interpolate_embeddings

        base, _, tag = request.name.partition(".")
        weights = models.get_model_weights(base)[tag or "DEFAULT"]
        settings: dict[str, Any] = dict(request.model_kwargs)
        native = int(weights.transforms().crop_size[0])
        size = request.img_size or settings.get("image_size") or native
        if base.startswith("vit_") or request.img_size is not None:
            settings["image_size"] = size

        def make(trained: bool) -> nn.Module:
            resized = size != native and base.startswith("vit_")
            if not trained:
                return models.get_model(base, weights=None, **settings)  # type: ignore[no-any-return]
            with fetching_weights(request, hub=False):
                check_url(weights.url, Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2])
                model: Any = models.get_model(base, weights=None if resized else weights, **settings)
                if resized:  # position embeddings are interpolated bicubically
                    state = weights.get_state_dict(progress=False, check_hash=True)
                    state = interpolate_embeddings(model.image_size, model.patch_size, state)
                    model.load_state_dict(state)
                return model  # type: ignore[no-any-return]

        resize = round(weights.transforms().resize_size[0] * size / native)  # the crop keeps its share of the picture
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
        preprocess = Preprocess(transform, (size, size), description)
        return Blueprint(request.name, make, lambda _: (preprocess, ()), weights.name)


SOURCES.add("torchvision", TorchvisionSource())
