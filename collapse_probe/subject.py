"""A model made ready to be listened to, together with the preprocessing that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocess:
    """How one picture becomes the model's input.

    `transform` maps a PIL image (RGB) to a float tensor [3, height, width]; `size` is (height, width) in
    pixels; `description` holds the same facts as plain values (size, crop, interpolation, mean, std) for the findings.
    """

    transform: Callable[[Image], Tensor]
    size: tuple[int, int]
    description: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model under analysis: in eval mode, with its provenance.

    `source` is the key of the table of sources, `name` the name there, `weights` says which weights it holds
    (a tag, or "random (seed 0)", or "checkpoint"). `fresh(seed)` makes the same architecture with fresh weights,
    in eval mode; None where nobody knows how.
    """

    address: str
    source: str
    name: str
    weights: str
    model: nn.Module
    preprocess: Preprocess
    fresh: Callable[[int], nn.Module] | None = None
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    notes: tuple[str, ...] = field(default=())


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile wrappers, however they are nested.

    Hooks registered on a compiled module after its first call are never called: the plain one can be listened to.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
