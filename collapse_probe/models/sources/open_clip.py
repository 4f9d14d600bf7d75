"""Vision towers of OpenCLIP: `open_clip:NAME[/TAG]`."""

from __future__ import annotations

import fnmatch
import importlib
from typing import Any

from torch import Tensor, nn

from collapse_probe.data.preprocessing import Preprocess, from_callable
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, ImageTower, Request, Source, fetching_weights
from collapse_probe.registry import SOURCES

FACTS = ("mode", "interpolation", "resize_mode", "mean", "std")


class OpenClipSource(Source):
    """OpenCLIP's registry; a tag names the published weights."""

    def names(self, pattern: str = "*") -> list[str]:
        """OpenCLIP's names without tags; none where it is not installed."""
        try:
            return sorted(fnmatch.filter(_library().list_models(), pattern))
        except ModelError:
            return []

    def has(self, name: str) -> bool:
        """Whether OpenCLIP has this architecture and, if given, this tag; ModelError without OpenCLIP."""
        base, _, tag = name.partition("/")
        library = _library()
        return base in library.list_models() and (not tag or tag in library.list_pretrained_tags_by_model(base))

    def blueprint(self, request: Request) -> Blueprint:
        """OpenCLIP's constructor and its own transform; the text tower is dropped."""
        base, _, tag = request.name.partition("/")
        library = _library()

        def make(trained: bool) -> nn.Module:
            if trained and not tag:
                tags = library.list_pretrained_tags_by_model(base)
                more = f" or {len(tags) - 3} more" if len(tags) > 3 else ""
                listed = ", ".join(f"open_clip:{base}/{known}" for known in tags[:3]) + more
                raise ModelError(f"{request.address!r} needs a tag: {listed}; or --no-pretrained")
            with fetching_weights(request, hub=trained):
                model = library.create_model(
                    base,
                    pretrained=tag if trained else None,
                    force_image_size=request.img_size,
                    pretrained_text=False,
                    **request.model_kwargs,
                )
            return ImageTower(model.visual, answer)

        def preprocess(model: Any) -> tuple[Preprocess, tuple[str, ...]]:
            config, clip = model.wrapped.preprocess_cfg, importlib.import_module("open_clip.transform")
            facts = {key: config[key] for key in FACTS if key in config}
            facts |= {key: list(value) for key, value in facts.items() if isinstance(value, tuple)}
            return from_callable(clip.image_transform_v2(clip.PreprocessCfg(**config), is_train=False), facts), ()

        return Blueprint(request.name, make, preprocess, trained=tag or "a tag")


def answer(output: Any) -> Tensor:
    """The pooled embedding; towers that also return tokens return a pair."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


def _library() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise ModelError(f"open_clip models need OpenCLIP ({error}); pip install open_clip_torch") from error


SOURCES.add("open_clip", OpenClipSource())
