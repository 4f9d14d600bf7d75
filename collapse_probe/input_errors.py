"""Says in one sentence why a model did not run on the images of the probe: from its signature and from the error."""

from __future__ import annotations

import inspect
import re

from torch import Tensor, nn

RECORD = "record a call of your own instead: with collapse_probe.record(model) as recording: model(…)"
OTHER_INPUT = re.compile(
    r"too many indices for tensor|only integers, slices|new\(\): invalid data type 'str'|string indices|unhashable"
    r"|'Tensor' object has no attribute|Tensor indices|must be (a )?(list|dict|tuple|Sequence)|KeyError"
    r"|argument #1 'indices'|Expected tensor for argument|iteration over a 0-d tensor",
    re.IGNORECASE,
)
DIMENSIONS = re.compile(r"values to unpack|conv3d|[35]D |dimension out of range|number of dims|einops", re.IGNORECASE)
CHANNELS = re.compile(r"to have \d+ channels|expected input.* channels|channel", re.IGNORECASE)
SIZES = re.compile(r"\bsizes?\b|shape|divisible|height|width|resolution|must match|broadcast", re.IGNORECASE)
TYPES = re.compile(r"dtype|scalar type|input type|same type|(Half|Float|Double|BFloat16)", re.IGNORECASE)
DEVICES = re.compile(r"same device|different device|is on cpu|is on cuda", re.IGNORECASE)


def why_failed(model: nn.Module, images: Tensor, error: Exception) -> str:
    """Why `model` raised `error` on noise `images` [B, C, height, width], and what to do about it."""
    name, text = type(model).__name__, " ".join(str(error).split())[:300]
    if type(model).forward is nn.Module.forward:
        parts = ", ".join(path for path, _ in model.named_children()) or "none"
        return f"{name} has no forward that could take images: pass the part of it that takes them (its parts: {parts})"
    arguments = _arguments(model)
    needed = [key for key, one in arguments.items() if one.default is one.empty and not key.startswith("*")]
    if len(needed) != 1 and arguments:
        takes = f"needs {', '.join(needed)}" if needed else f"takes {', '.join(arguments)}"
        if needed or "positional argument" in text:
            return f"{name}.forward {takes}, and the probe gives images alone; {RECORD}"
    shape = f"[{', '.join(map(str, images.shape))}]"
    what = f"{name}.forward({', '.join(arguments)}) failed on noise images {shape} ({type(error).__name__}: {text})"
    return f"{what}; {_advice(images, f'{type(error).__name__} {text}')}"


def _advice(images: Tensor, text: str) -> str:
    """What the error itself is about; nothing is guessed where it does not say."""
    height, width = images.shape[-2:]
    if OTHER_INPUT.search(text):
        return f"the probe gives a tensor of images, and the model treats it as something else; {RECORD}"
    if DEVICES.search(text):
        return "its tensors lie on several devices: move the whole model to one"
    if CHANNELS.search(text):
        return f"the images have {images.shape[1]} channels: give batches of as many as it takes (analyze(model, data=loader))"
    if DIMENSIONS.search(text):
        return f"the images have {images.ndim} dimensions [B, C, height, width]; for another layout {RECORD}"
    if SIZES.search(text):
        return f"the images have {height} × {width} pixels: for another size give img_size, or batches of that size"
    if TYPES.search(text):
        return f"the images are {images.dtype}, as the model's first floating-point parameter"
    return f"if it takes something else than images, {RECORD}"


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a model's forward by name, with their stars; none where they cannot be read."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {str(one).partition(":")[0].partition("=")[0]: one for one in parameters}
