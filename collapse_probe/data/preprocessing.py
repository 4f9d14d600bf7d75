"""Makes a `Preprocess` out of what a model says about its own input."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from PIL import Image
from torch import Tensor, nn

from collapse_probe.data.readers import Unreadable
from collapse_probe.errors import DataError, ModelError, SettingError


@dataclass(frozen=True)
class Preprocess:
    """How one picture becomes the model's input.

    `transform` maps a PIL image (RGB) to a float tensor [channels, height, width]; `size` is (height, width) in
    pixels; `description` holds the same facts as plain values (size, crop, interpolation, mean, std) for the findings.
    """

    transform: Callable[[Image.Image], Tensor]
    size: tuple[int, int]
    description: dict[str, Any]
    channels: int = 3

    def pixels_of(self, picture: Image.Image) -> Tensor:
        """A picture (RGB) as the model's input [channels, height, width], float32.

        Raises Unreadable for a picture so thin that resizing its shorter side to the input would take gigabytes, and where the
        transform gives another shape; and what the transform raises.
        """
        short, long = sorted(picture.size)
        if max(self.size) ** 2 * long / max(short, 1) > MOST_RESIZED:
            sides = f"{picture.width:,} × {picture.height:,} pixels (width × height)"
            raise Unreadable(f"it has {sides}: too thin to be resized to {shown(self.size)}")
        pixels = self.transform(picture)
        if tuple(pixels.shape) != (self.channels, *self.size):
            expected = [self.channels, *self.size]
            raise Unreadable(f"preprocessing gave {list(pixels.shape)} instead of {expected} (channels, height, width)")
        return pixels.float()


MOST_RESIZED = 2**26  # pixels of a picture whose shorter side is as long as the input's: a quarter of a gigabyte in Pillow
Size = int | tuple[int, int]
"""Pixels of a side, or of (height, width)."""
ASSUMED = "preprocessing assumed"
"""How a note begins that says which preprocessing was assumed."""


def from_timm_config(config: Mapping[str, Any], img_size: Size | None = None) -> Preprocess:
    """timm's evaluation transform for a pretrained_cfg; what it leaves out is timm's ImageNet default.

    `img_size` [pixels] replaces the config's input size; the crop keeps its share of the resized picture.
    """
    import timm.data

    factory: Any = timm.data  # untyped
    args = {} if img_size is None else {"input_size": (3, img_size, img_size) if isinstance(img_size, int) else (3, *img_size)}
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
    """A Preprocess around any transform; its size is read off two blank pictures, one wide and one high.

    Raises ModelError where the transform does not turn every picture into a tensor [channels, height, width] of one size.
    """
    shapes = []
    for sides in ((320, 256), (256, 320)):
        try:
            pixels = transform(Image.new("RGB", sides))
        except Exception as error:
            raise ModelError(f"the model's own preprocessing failed on an RGB picture: {error}") from error
        if not isinstance(pixels, Tensor) or pixels.ndim != 3 or not pixels.is_floating_point():
            came = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ModelError(f"the model's own preprocessing must give a float tensor [channels, height, width], not {came}")
        shapes.append((len(pixels), (int(pixels.shape[1]), int(pixels.shape[2]))))
    (channels, size), (_, other) = shapes
    if size != other:
        came = f"{shown(size)} of a wide picture and {shown(other)} of a high one"
        raise ModelError(f"the model's own preprocessing must give images of one size, not {came}")
    return Preprocess(transform, size, {**description, "size": list(size)}, channels)


def given_pixels(channels: int, size: tuple[int, int]) -> Preprocess:
    """The preprocessing of images [channels, *size] that the caller made ready."""
    return Preprocess(_no_pictures, size, {"size": list(size), "given": "pixels, made ready by the caller"}, channels)


def _no_pictures(picture: Image.Image) -> NoReturn:
    raise DataError("these images came as tensors; there is no preprocessing for pictures")


def for_channels(preprocess: Preprocess, channels: int | None) -> Preprocess:
    """The preprocessing for a model of `channels` input channels (None: not known, all stays as it is).

    One channel out of three: pictures become greyscale, and the three normalised channels are averaged. Pictures have no
    other number of channels: the transform then raises DataError.
    """
    if channels in (None, preprocess.channels):
        return preprocess
    facts = dict(preprocess.description)
    if (channels, preprocess.channels) != (1, 3):
        return replace(preprocess, transform=_Refused(channels), channels=channels, description=facts)
    if "mean" in facts and "std" in facts:  # of the average: grey · mean(1 / std) − mean(mean / std)
        scale = sum(1 / std for std in facts["std"]) / 3
        shift = sum(mean / std for mean, std in zip(facts["mean"], facts["std"], strict=True)) / 3
        facts |= {"mean": [shift / scale], "std": [1 / scale]}
    return replace(preprocess, transform=_Grey(preprocess.transform), channels=1, description={**facts, "greyscale": True})


@dataclass(frozen=True)
class _Grey:
    transform: Callable[[Image.Image], Tensor]

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.transform(picture.convert("L").convert("RGB")).mean(0, keepdim=True)


@dataclass(frozen=True)
class _Refused:
    channels: int | None

    def __call__(self, picture: Image.Image) -> Tensor:
        raise DataError(
            f"the model takes images of {self.channels} channels, and pictures have 3: "
            f"give batches [B, {self.channels}, height, width] of your own (Python: analyze(model, data=loader))"
        )


def input_channels(module: nn.Module) -> int | None:
    """The input channels of a model: `in_chans` or `num_channels` of it or its config, else those of its first convolution.

    None where a layer that mixes features comes before any convolution and nothing declares the number.
    """
    parts = [module, *(part for part in module.children() if part is getattr(module, "wrapped", None))]
    for holder in [holder for part in parts for holder in (part, getattr(part, "config", None))]:
        for name in ("in_chans", "num_channels"):
            declared = getattr(holder, name, None)
            if isinstance(declared, int) and not isinstance(declared, bool) and declared > 0:
                return declared
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d)):
            return part.in_channels
        if isinstance(part, nn.Linear):
            return None
    return None


def of_module(module: nn.Module, img_size: Size | None = None) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocessing that a module brings along, and notes on what had to be assumed.

    In this order: the attribute `preprocess` (a Preprocess, or a transform from picture to tensor; a method of that name that
    takes something else is passed over), a timm-style `pretrained_cfg` or `default_cfg`, and else ImageNet's mean and std.
    `img_size` [pixels] overrides what the module declares; without either it is 224.
    """
    own = getattr(module, "preprocess", None)
    if isinstance(own, Preprocess):
        return own, ()
    if callable(own):
        with contextlib.suppress(ModelError) if inspect.ismethod(own) else contextlib.nullcontext():
            return from_callable(own, {"transform": repr(own)[:500]}), ()
    size = img_size or _declared_size(module)
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if config:
        return from_timm_config(config if isinstance(config, Mapping) else vars(config), size), ()
    pixels = size or 224
    note = f"{ASSUMED}: ImageNet mean and std at {shown(pixels)} pixels (the module declares none)"
    return from_timm_config({}, size), (note,)


def _declared_size(module: nn.Module) -> Size | None:
    holders = (module, getattr(module, "patch_embed", None), getattr(module, "config", None))
    for holder in holders:
        for name in ("image_size", "img_size"):
            size = size_of(getattr(holder, name, None))
            if size is not None:
                return size
    return None


def size_of(declared: object) -> Size | None:
    """A declared input size as pixels of a side or (height, width); None for what is neither.

    >>> size_of([64, 96]), size_of((32, 32)), size_of("large")
    ((64, 96), 32, None)
    """
    sides = tuple(declared) if isinstance(declared, (tuple, list)) else (declared, declared)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return sides[0] if sides[0] == sides[1] else sides


def checked_size(img_size: object) -> Size:
    """A size as the caller gave it; SettingError where it is neither a number of pixels nor (height, width)."""
    size = size_of(img_size)
    if size is None:
        raise SettingError(f"img_size is a number of pixels above 0, or (height, width), not {img_size!r}")
    return size


def sides_of(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def shown(size: Size) -> str:
    """A size in words: 64, or 64 × 96."""
    return " × ".join(map(str, (size,) if isinstance(size, int) else size))
