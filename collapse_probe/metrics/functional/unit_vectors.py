"""Unit vectors of many blocks laid out for their products: made in place, multiplied in short spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collapse_probe.metrics.functional.geometry import SMALLEST_SPREAD, centred_unit, gram, outside_range, unit

SPAN = 1024
LINE = 16
"""Entries of float32 in a line of the cache."""


@dataclass(frozen=True)
class UnitVectors:
    """Unit vectors of some images, heads, blocks and tokens, and which of them are defined, [b, h, L, tokens].

    `flat` [L, b, h, D] holds the entries of a matrix of rows R and columns C one after the other, then zeros up to a multiple
    of the spans in which products are summed.
    """

    flat: Tensor
    valid: Tensor
    rows: int
    columns: int

    @classmethod
    def room(cls, shape: Sequence[int], device: torch.device) -> UnitVectors:
        """Room for vectors [b, h, L, R, C] in float32, with zeros behind them."""
        b, h, blocks, rows, columns = shape
        flat = torch.empty(blocks, b, h, spanned(rows * columns, device), device=device)
        flat[..., rows * columns :] = 0
        return cls(flat, torch.empty(0), rows, columns)

    @property
    def matrices(self) -> Tensor:
        """The same as [b, h, L, R, C], a view."""
        blocks, b, h, _ = self.flat.shape
        entries = self.flat[..., : self.rows * self.columns]
        return entries.view(blocks, b, h, self.rows, self.columns).permute(1, 2, 0, 3, 4)

    def pick(self, token_dim: int, places: list[int]) -> UnitVectors:
        """Those of some tokens."""
        index = torch.tensor(places, device=self.flat.device, dtype=torch.long)
        return UnitVectors.of(self.matrices.index_select(token_dim, index), self.valid[..., places])

    @classmethod
    def of(cls, vectors: Tensor, valid: Tensor) -> UnitVectors:
        """From vectors [b, h, L, R, C] that are of unit length already, in float32 or float64."""
        b, h, blocks, rows, columns = vectors.shape
        flat = vectors.new_zeros(blocks, b, h, spanned(rows * columns, vectors.device))
        made = cls(flat, valid, rows, columns)
        made.matrices.copy_(vectors)
        return made


def length_of(vectors: Tensor, dim: int) -> Tensor:
    """Lengths of the vectors along `dim` (−1 or −2) of [b, h, L, R, C] or [..., R, C], same shape and one entry along it.

    May be 0 or infinite where squares leave the dtype's range (see `unit_into`, which measures those again). Block by block:
    squares of all blocks at once would be memory that a CPU has to clear first.
    """
    if dim == -1:
        norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        return norm
    if vectors.ndim < 5 or vectors.device.type != "cpu":
        return (vectors * vectors).sum(dim, keepdim=True).sqrt()
    parts = [(one * one).sum(dim, keepdim=True) for one in vectors.unbind(2)]
    return torch.stack(parts, 2).sqrt_()


def unit_into(out: Tensor, vectors: Tensor, length: Tensor, dim: int, centred: bool = False) -> Tensor:
    """Write what `unit` gives, or `centred_unit`, into `out`; `length` is that of the vectors. Returns which are defined.

    Not differentiable, and without a copy of the vectors.
    """
    if outside_range(length).any():
        made, valid = (centred_unit if centred else unit)(vectors, dim)
        out.copy_(made)
        return valid
    if not centred:
        torch.div(vectors, length, out=out)
        return torch.ones_like(length, dtype=torch.bool).squeeze(dim)
    torch.sub(vectors, vectors.mean(dim, keepdim=True), out=out)
    spread = length_of(out, dim)
    valid = spread > SMALLEST_SPREAD * length
    out.div_(torch.where(valid, spread, torch.inf))
    return valid.squeeze(dim)


def spanned(entries: int, device: torch.device) -> int:
    """How long `entries` become with zeros behind them, so that they fall into spans of one length for `span_grams`."""
    if device.type != "cpu":
        return entries
    return _spans(entries) * -(-entries // (_spans(entries) * LINE)) * LINE


def _spans(entries: int) -> int:
    return max(1, -(-entries // SPAN))


def span_grams(flat: Tensor) -> Tensor:
    """Inner products between blocks with a float64 sum, [L, b, h, D] -> [b, h, L, L]; D as `spanned` gives it.

    On the CPU products of a span of at most `SPAN` entries are summed in the vectors' own precision and those sums in float64:
    the error of a cosine of 40 thousand float32 entries falls from 3e-7 to 2e-8, at the same cost. A GPU's kernels sum in such
    parts already.
    """
    wide = torch.float64 if flat.device.type != "mps" else torch.float32
    blocks, b, h, length = flat.shape
    spans = _spans(length) if flat.device.type == "cpu" else 1
    parts = flat.reshape(blocks, b * h * spans, length // spans).transpose(0, 1)
    total: Tensor = gram(parts).view(b, h, spans, blocks, blocks).sum(2, dtype=wide)
    return total
