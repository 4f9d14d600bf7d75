"""Models of transformers: `hf:ORG/NAME`, or `hf:FOLDER` for one saved on disk."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from collapse_probe.data.preprocessing import (
    ASSUMED,
    Preprocess,
    Size,
    from_callable,
    from_timm_config,
    input_channels,
    shown,
    sides_of,
    size_of,
)
from collapse_probe.downloads import fetching, first_line
from collapse_probe.errors import CollapseProbeError, ModelError
from collapse_probe.models.loading import Blueprint, ImageTower, Request, Source
from collapse_probe.registry import SOURCES

WAY_OUT = "--no-pretrained and --checkpoint FILE need its configuration too: fetch it once, or name a local folder"
FACTS = {"size": "resize", "crop_size": "crop", "image_mean": "mean", "image_std": "std"}  # their names: ours
CLASSIFIERS = ("ForImageClassification", "ForVideoClassification")
TOWERS = ("vision_model", "vision_tower", "vision_encoder", "image_encoder", "visual")
"""Where a model of pictures and words keeps the part that sees."""
PIXELS = ("pixel_values", "pixel_values_videos")
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

T = TypeVar("T")


class TransformersSource(Source):
    """Classifiers of images and films as they are, other vision models bare, and the vision tower of those that have one."""

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
        seeing = getattr(config, "vision_config", config)
        native = size_of(getattr(seeing, "image_size", None) or getattr(seeing, "crop_size", None))
        resized = request.img_size not in (None, native)

        def make(trained: bool) -> nn.Module:
            if "mask_ratio" not in request.model_kwargs and hasattr(config, "mask_ratio"):
                config.mask_ratio = 0.0
            return _fetched(request, lambda library: load(library, trained))

        def load(library: Any, trained: bool) -> ImageTower:
            kind = next((kind for kind in CLASSIFIERS if kind in " ".join(config.architectures or ())), "")
            auto = getattr(library, f"AutoModel{kind}")
            if trained:
                return _tower(auto.from_pretrained(name, config=config), resized)
            tower = _tower(auto.from_config(config), resized)
            if resized and native is not None and not _takes(tower, request.img_size):
                other = copy.deepcopy(config)  # fresh parameters may have any size from the start
                getattr(other, "vision_config", other).image_size = request.img_size
                with contextlib.suppress(Exception):  # a size that the model cannot have: the probe says why
                    another = _tower(auto.from_config(other), resized)
                    tower = another if _takes(another, request.img_size) else tower
            return tower

        def preprocess(model: Any) -> tuple[Preprocess, tuple[str, ...]]:
            made, said = _preprocess(request, name, native)
            return made, (*model.notes, *said)

        return Blueprint(request.name, make, preprocess, trained=name)


def _tower(model: Any, resized: bool) -> ImageTower:
    """The part of a model that sees: all of a classifier, and of a model that takes pictures alone; else its vision tower."""
    whole = any(kind in type(model).__name__ for kind in CLASSIFIERS)
    towers = [getattr(model, name, None) for name in TOWERS if not whole]
    tower = next((tower for tower in towers if isinstance(tower, nn.Module)), model)
    inputs, notes = _inputs(tower, getattr(tower, "config", model.config), resized)
    return ImageTower(tower.float(), answer, inputs, notes)


def _takes(tower: ImageTower, size: Size | None) -> bool:
    """Whether a model runs on an image of this size."""
    pixels = torch.zeros(1, input_channels(tower) or 3, *sides_of(size or 1))
    try:
        with torch.no_grad():
            tower.eval()(pixels)
    except Exception:  # the library's models refuse in many ways
        return False
    return True


def _inputs(tower: nn.Module, own: Any, resized: bool) -> tuple[Callable[[Tensor], Mapping[str, Any]] | None, tuple[str, ...]]:
    """How pictures become the arguments of a tower's forward (None: as they are), and notes; ModelError where they cannot."""
    arguments: Mapping[str, inspect.Parameter] = inspect.signature(tower.forward).parameters
    pixels = next((name for name in PIXELS if name in arguments), None)
    needed = [key for key, one in arguments.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if pixels is not None and {"spatial_shapes", "pixel_attention_mask"} <= set(arguments):
        return partial(_as_patches, int(own.patch_size)), ("pictures are cut into patches of one size, none of them padded",)
    if pixels is None or set(needed) - {pixels}:
        takes = ", ".join(needed) or ", ".join(list(arguments)[:3])
        raise ModelError(
            f"{type(tower).__name__} takes {takes} and not pictures alone: load it with transformers and record a batch of its "
            "own (collapse_probe.record)"
        )
    films = getattr(own, "num_frames", None) or getattr(own, "frames_per_clip", None)
    if isinstance(films, int):
        more = {"skip_predictor": True} if "skip_predictor" in arguments else {}
        return partial(_as_film, pixels, films, more), (f"each picture is shown as a film of {films} equal frames",)
    if "noise" in arguments and getattr(own, "mask_ratio", None) == 0:
        note = "config.mask_ratio was set to 0 and the patches keep their order: whole images are measured"
        return partial(_unmasked, own.patch_size, resized), (note,)
    if resized and "interpolate_pos_encoding" in arguments:
        return partial(_interpolated, pixels), ()
    return None, ()


def _interpolated(name: str, pixels: Tensor) -> dict[str, Any]:
    return {name: pixels, "interpolate_pos_encoding": True}


def _as_film(name: str, frames: int, more: Mapping[str, Any], pixels: Tensor) -> dict[str, Any]:
    """[B, C, height, width] as [B, frames, C, height, width]."""
    return {name: pixels[:, None].expand(-1, frames, -1, -1, -1), **more}


def _as_patches(side: int, pixels: Tensor) -> dict[str, Any]:
    """[B, C, height, width] as patches [B, N, side · side · C], row by row, with their grid; NaFlex models take these."""
    rows, columns = (size // side for size in pixels.shape[-2:])
    cut = pixels[..., : rows * side, : columns * side].reshape(*pixels.shape[:2], rows, side, columns, side)
    patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[rows, columns]] * len(pixels), device=pixels.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _unmasked(patch: Any, resized: bool, pixels: Tensor) -> dict[str, Any]:
    """A masked autoencoder keeps the patches with the lowest noise, in its order: a ramp keeps all of them in theirs."""
    rows, columns = (size // side for size, side in zip(pixels.shape[-2:], sides_of(patch), strict=True))
    ramp = torch.arange(rows * columns, device=pixels.device, dtype=torch.float32)
    return {"pixel_values": pixels, "noise": ramp.expand(len(pixels), -1), "interpolate_pos_encoding": resized}


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
        with (
            fetching(repr(request.address), ModelError, WAY_OUT, hub=not Path(request.name).expanduser().is_dir()),
            _bars_on_terminals(transformers.utils.logging),
        ):
            return load(transformers)
    except CollapseProbeError:
        raise
    except Exception as error:  # configurations of other kinds of model fail in many ways
        raise ModelError(f"transformers cannot make {request.address!r}: {first_line(error)}") from error


@contextlib.contextmanager
def _bars_on_terminals(logging: Any) -> Iterator[None]:
    """Without the library's progress bars where nobody watches them."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _processed(processor: Any, picture: Image) -> Tensor:
    """The picture as the processor makes it; of several tiles or frames the first."""
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels.flatten(0, -4)[0] if pixels.ndim > 3 else pixels


def _size_in(processor: Mapping[str, Any]) -> Size | None:
    """The size that a processor's settings name: of its crop, else of its resizing (the shorter side where it keeps shapes)."""
    size = processor.get("crop_size") or processor.get("size")
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if {"height", "width"} <= set(size) else size.get("shortest_edge")
    return size_of(size)


def _preprocess(request: Request, name: str, native: Size | None) -> tuple[Preprocess, tuple[str, ...]]:
    size = request.img_size or native or 224
    try:
        processor = _fetched(request, lambda library: library.AutoImageProcessor.from_pretrained(name))
    except ModelError:
        config: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
        note = f"{ASSUMED}: mean and std 0.5 at {shown(size)} pixels (no image processor was found)"
        return from_timm_config(config, size), (note,)
    values = processor.to_dict()
    size = request.img_size or native or _size_in(values) or 224
    facts: dict[str, Any] = {ours: values[theirs] for theirs, ours in FACTS.items() if values.get(theirs) is not None}
    for key, value in facts.items():  # as plain values
        facts[key] = dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
    facts["interpolation"] = RESAMPLING.get(values.get("resample", 3), "bicubic")
    note = f"the processor's own size was replaced by {shown(size)} pixels"
    if request.img_size is None:
        try:
            return from_callable(partial(_processed, processor), facts), ()
        except ModelError:  # it cuts pictures into patches, or keeps their shapes
            note = f"the processor gives no pictures of one size: they are cut to {shown(size)} pixels"
    config = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
    config.update({key: facts[key] for key in ("mean", "std", "interpolation") if key in facts})
    return from_timm_config(config, size), (note,)


SOURCES.add("hf", TransformersSource())
