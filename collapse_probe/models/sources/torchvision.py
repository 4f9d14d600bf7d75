"""Models of torchvision: `torchvision:NAME[.WEIGHTS]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from collapse_probe.data.preprocessing import Preprocess, Size, from_timm_config, shown, sides_of
from collapse_probe.downloads import check_url
from collapse_probe.errors import ModelError
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
        size: Size = request.img_size or settings.get("image_size") or native
        height, width = sides_of(size)
        vit = base.startswith("vit_")
        if vit and height != width:
            raise ModelError(f"torchvision's {base} takes square images, not {shown(size)}")
        if vit:
            settings["image_size"] = height
        elif base.startswith("maxvit") and request.img_size is not None:
            settings["input_size"] = (height, width)

        def make(trained: bool) -> nn.Module:
            resized = vit and height != native
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

        preprocess = _preprocess(weights.transforms, native, (height, width))
        return Blueprint(request.name, make, lambda _: (preprocess, ()), weights.name)


def _preprocess(transforms: Callable[..., Any], native: int, size: tuple[int, int]) -> Preprocess:
    """torchvision's transform of the weights at another size, at which the crop keeps its share of the picture.

    A rectangle is cut by timm's transform with the same facts, for torchvision's would distort the picture.
    """
    own = transforms()
    facts = {"interpolation": own.interpolation.value, "mean": list(own.mean), "std": list(own.std)}
    if size[0] != size[1]:
        return from_timm_config({**facts, "crop_pct": native / own.resize_size[0]}, size)
    resize = round(own.resize_size[0] * size[0] / native)
    transform = transforms(crop_size=size[0], resize_size=resize)
    facts |= {"size": list(size), "resize": resize, "crop_mode": "center", "crop_pct": size[0] / resize}
    return Preprocess(transform, size, facts)


SOURCES.add("torchvision", TorchvisionSource())
