"""Models of timm: `timm:NAME[.TAG]`, `hf-hub:ORG/NAME` and `local-dir:PATH`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from collapse_probe.data.preprocessing import Preprocess, from_timm_config, shown, sides_of, size_of
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, Request, Source, fetching_weights
from collapse_probe.registry import SOURCES


class TimmSource(Source):
    """timm's registry for the scheme `timm`; for its own two schemes, whatever lies at that place."""

    def __init__(self, scheme: str = "") -> None:
        self.scheme = scheme

    def names(self, pattern: str = "*") -> list[str]:
        """timm's names without tags; none for the schemes that cannot be listed."""
        import timm

        return [] if self.scheme else list(timm.list_models(pattern))

    def has(self, name: str) -> bool:
        """Whether architecture and tag are registered; True for any place of timm's own schemes."""
        if self.scheme:
            return bool(name)
        import timm
        from timm.models import split_model_name_tag

        arch, tag = split_model_name_tag(name)
        return bool(arch and timm.is_model(arch) and (not tag or name in timm.list_pretrained(f"{arch}.*")))

    def blueprint(self, request: Request) -> Blueprint:
        """timm's constructor, its weights and its evaluation transform."""
        import timm
        from timm.layers import PatchEmbed

        place = f"{self.scheme}:{request.name}" if self.scheme else request.name
        settings: dict[str, Any] = dict(request.model_kwargs)
        if request.img_size is not None:
            settings["img_size"] = request.img_size

        if self.scheme == "local-dir" and not Path(request.name).is_dir():
            raise ModelError(f"no folder {request.name}; 'local-dir:' takes one with a config.json")

        def create(trained: bool) -> nn.Module:
            try:
                return timm.create_model(place, pretrained=trained, **settings)
            except TypeError as error:  # a constructor without img_size belongs to a model that takes any size
                if request.img_size is None or "img_size" not in str(error):
                    raise
            return timm.create_model(place, pretrained=trained, **request.model_kwargs)

        def make(trained: bool) -> nn.Module:
            # "hf-hub" needs the hub even for fresh parameters: the configuration lies there
            hub = fetching_weights(request, hub=trained or self.scheme == "hf-hub")
            with contextlib.nullcontext() if self.scheme == "local-dir" else hub:
                model: nn.Module = create(trained)
            embed = getattr(model, "patch_embed", None)
            patch = embed.patch_size if isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad else (1, 1)
            if request.img_size and any(a % b for a, b in zip(sides_of(request.img_size), patch, strict=True)):
                raise ModelError(f"img_size {shown(request.img_size)} is not a multiple of the model's patch size {patch[0]}")
            return model

        def preprocess(model: nn.Module) -> tuple[Preprocess, tuple[str, ...]]:
            size = request.img_size or size_of(settings.get("img_size"))
            return from_timm_config(model.pretrained_cfg, size), ()  # type: ignore[arg-type]

        config = None if self.scheme else timm.models.get_pretrained_cfg(request.name)
        published = config is not None and (config.url or config.hf_hub_id or config.file)
        tag = (config.tag or "default") if config is not None and published else None
        return Blueprint(request.name, make, preprocess, trained=request.name if self.scheme else tag)


SOURCES.add("timm", TimmSource())
SOURCES.add("hf-hub", TimmSource("hf-hub"))
SOURCES.add("local-dir", TimmSource("local-dir"))
