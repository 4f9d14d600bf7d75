"""Shapes in place of tensors, for as long as a probe's forward pass runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a sketch keeps of a tensor while the model runs: no memory among the model's own, which would tear that apart."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


def sketch(value: Any) -> Any:
    """Shapes in place of tensors."""
    if isinstance(value, Tensor) and not value.is_nested:
        return Shape(value.dtype, tuple(value.shape))
    return [sketch(x) for x in value] if isinstance(value, tuple) else value


def unsketched(value: Any) -> Any:
    """Tensors of one element seen as their shapes, in place of the shapes."""
    if isinstance(value, Shape):
        return torch.empty((), dtype=value.dtype).expand(value.sizes)
    return tuple(unsketched(x) for x in value) if isinstance(value, list) else value
