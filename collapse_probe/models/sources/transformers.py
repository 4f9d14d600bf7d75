"""Models of transformers: `hf:ORG/NAME`, or `hf:FOLDER` for one saved on disk."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL.Image import Image
from torch import Tensor, nn

from collapse_probe.data.preprocessing import Preprocess, from_callable, from_timm_config
from collapse_probe.downloads import fetching, first_line
from collapse_probe.errors import CollapseProbeError, ModelError
from collapse_probe.models.loading import Blueprint, ImageTower, Request, Source
from collapse_probe.registry import SOURCES

WAY_OUT = "--no-pretrained and --checkpoint FILE need its configuration too: fetch it once, or name a local folder"
FACTS = {"size": "resize", "crop_size": "crop", "image_mean": "mean", "image_std": "std"}  # their names: ours
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

T = TypeVar("T")


class TransformersSource(Source):
    """Image classifiers as they are, other vision models bare, and the vision tower of two-tower models."""

    def has(self, name: str) -> bool:
        """True for any name: only the hub can tell."""
        return bool(name)

    def blueprint(self, request: Request) -> Blueprint:
        """Fetches the configuration now; `model_kwargs` override its entries."""
        folder = Path(request.name).expanduser()
        if request.name.startswith(("/", ".", "~")) and not folder.is_dir():
            raise ModelError(f"there is no folder {folder}; 'hf:' takes ORG/NAME or a folder with a config.json")
        name = str(folder) if folder.is_dir() else request.name
        config = _fetched(request, lambda auto: auto.AutoConfig.from_pretrained(name, **request.model_kwargs))
        native = getattr(getattr(config, "vision_config", config), "image_size", None)

        def make(trained: bool) -> nn.Module:
            def load(library: Any) -> Any:
                classifier = "ForImageClassification" in " ".join(config.architectures or ())
                auto = library.AutoModelForImageClassification if classifier else library.AutoModel
                return auto.from_pretrained(name, config=config) if trained else auto.from_config(config)

            model = _fetched(request, load)
            tower = getattr(model, "vision_model", model)
            resized = request.img_size not in (None, native)
            if resized and "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
                raise ModelError(f"{type(tower).__name__} takes images of {native} pixels only, not {request.img_size}")
            return ImageTower(tower.float(), answer, {"interpolate_pos_encoding": True} if resized else None)

        return Blueprint(request.name, make, lambda _: _preprocess(request, name, native), trained=name)


def answer(output: Any) -> Tensor:
    """The logits, else the pooled output, else the last hidden state of a transformers model's output."""
    for key in ("logits", "pooler_output", "last_hidden_state"):
        if isinstance(tensor := getattr(output, key, None), Tensor):
            return tensor
    raise ModelError(f"the model answers with a {type(output).__name__} without logits or hidden state")


def _fetched(request: Request, load: Callable[[Any], T]) -> T:
    """Run `load(transformers)` and turn whatever it raises into one line."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{request.address!r} needs transformers ({error}); pip install transformers") from error
    try:
        with fetching(repr(request.address), ModelError, WAY_OUT, hub=not Path(request.name).expanduser().is_dir()):
            return load(transformers)
    except CollapseProbeError:
        raise
    except Exception as error:  # configurations of other kinds of model fail in many ways
        raise ModelError(f"transformers cannot make {request.address!r}: {first_line(error)}") from error


def _processed(processor: Any, picture: Image) -> Tensor:
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def _preprocess(request: Request, name: str, native: object) -> tuple[Preprocess, tuple[str, ...]]:
    size = request.img_size or (native if isinstance(native, int) else 224)
    try:
        processor = _fetched(request, lambda library: library.AutoImageProcessor.from_pretrained(name))
    except ModelError:
        config: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
        note = f"preprocessing assumed: mean and std 0.5 at {size} pixels (no image processor was found)"
        return from_timm_config(config, size), (note,)
    values = processor.to_dict()
    facts: dict[str, Any] = {ours: values[theirs] for theirs, ours in FACTS.items() if values.get(theirs) is not None}
    for key, value in facts.items():  # as plain values
        facts[key] = dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
    facts["interpolation"] = RESAMPLING.get(values.get("resample", 3), "bicubic")
    if request.img_size is None:
        return from_callable(partial(_processed, processor), facts), ()
    config = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
    config.update({key: facts[key] for key in ("mean", "std", "interpolation") if key in facts})
    return from_timm_config(config, size), (f"the processor's own size was replaced by {size} pixels",)


SOURCES.add("hf", TransformersSource())
