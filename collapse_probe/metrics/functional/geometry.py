"""Angles between vectors: unit vectors, centring, cosine grams; pure, differentiable, safe at zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def anchored(rows: Tensor) -> Tensor:
    """The same rows, [..., d]; rows of zeros, which have no direction, give no gradient where others would give NaN."""
    return torch.where((rows == 0).all(-1, keepdim=True), rows.detach(), rows)


SMALLEST_SPREAD = 1e-5
"""A centred vector shorter than this share of the vector it came from is rounding, not direction."""


def unit(vectors: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Vectors along `dim` scaled to length one, and which of them have a length: same shape, and bool without `dim`.

    A zero vector has no direction: it becomes zero and is marked False, and so is one whose largest entry is subnormal, which
    holds only a few of its bits.

    >>> vectors, valid = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> vectors.tolist(), valid.tolist()
    ([[0.6000000238418579, 0.800000011920929], [0.0, 0.0]], [True, False])
    """
    vectors, length = _with_length(vectors, dim)
    valid = length > 0
    return vectors / torch.where(valid, length, 1.0), valid.squeeze(dim)


def centred_unit(vectors: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """As `unit`, after the mean along `dim` is subtracted, so that dot products are Pearson correlations.

    A constant vector (spread below `SMALLEST_SPREAD` of its length) has no direction left: zero, marked False.
    """
    vectors, whole = _with_length(vectors, dim)
    centred = vectors - vectors.mean(dim, keepdim=True)
    length = (centred * centred).sum(dim, keepdim=True).sqrt()
    valid = length > SMALLEST_SPREAD * whole
    scale = torch.where(valid, length, torch.inf)
    return centred / scale if centred.requires_grad else centred.div_(scale), valid.squeeze(dim)


def as_span(places: list[int]) -> list[int] | slice:
    """Places that follow one another as a slice, which selects without a copy."""
    first, last = places[0], places[-1] + 1
    return slice(first, last) if last - first == len(places) else places


def gram(vectors: Tensor) -> Tensor:
    """Inner products of the rows, [..., n, d] -> [..., n, n]."""
    return vectors @ vectors.transpose(-1, -2)


EVEN = 4


def padded(vectors: Tensor) -> Tensor:
    """The same contiguous vectors on the CPU with zeros behind them up to a multiple of four entries.

    The kernels of inner products round otherwise where a vector does not start at a multiple of 16 bytes in memory, so that a
    product would depend on how many others were computed with it.
    """
    odd = vectors.shape[-1] % EVEN
    return F.pad(vectors, (0, EVEN - odd)) if odd and vectors.device.type == "cpu" else vectors.contiguous()


def _with_length(vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Vectors along `dim` and their lengths, same shape and one entry along `dim`.

    Where squares would leave the range of the dtype the vector is divided by its largest entry first, which keeps its
    direction; where that entry is subnormal, it is zero and so is its length.
    """
    length = (vectors * vectors).sum(dim, keepdim=True).sqrt()
    outside = outside_range(length)
    if not outside.any():
        return vectors, length
    limits = torch.finfo(vectors.dtype)
    largest = vectors.detach().abs().amax(dim, keepdim=True)
    scaled = torch.where(outside, torch.where(largest < limits.tiny, 0.0, vectors / largest.clamp_min(limits.tiny)), vectors)
    return scaled, (scaled * scaled).sum(dim, keepdim=True).sqrt()


def outside_range(length: Tensor) -> Tensor:
    """Where squares, or squares of what is left after centring, could leave the range of the dtype; and zero vectors."""
    limits = torch.finfo(length.dtype)
    outside: Tensor = (length < limits.tiny**0.25) | (length > limits.max**0.25)
    return outside


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines between the rows of two sets, [..., n, d] and [..., m, d] -> [..., n, m], −1 … 1.

    >>> cosines(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    return unit(anchored(first))[0] @ unit(anchored(second))[0].mT


def mean_cosine(first: Tensor, second: Tensor | None = None, *, absolute: bool = False) -> Tensor:
    """Mean of the cosines of all pairs, [..., n, d] (and [..., m, d]) -> [...]; of a set with itself, diagonal included.

    1/n² Σ_ij cos(h_i, h_j), signed or absolute: the regularisers of Diverse-ViT's released code (arXiv 2203.06345). With
    itself the signed mean is ‖Σ_i ĥ_i‖²/n², which is never below 0 and holds a floor of 1/n where the absolute one is meant.

    >>> mean_cosine(torch.eye(4)).item()
    0.25
    """
    pairs = cosines(first, first if second is None else second)
    return (pairs.abs() if absolute else pairs).mean((-2, -1))


def contrast(first: Tensor, second: Tensor, *, directions: bool = True) -> Tensor:
    """How far rows are from being told apart by their own earlier selves, [..., n, d] twice -> [..., n], 0 … ∞.

    −log[e^{s_ii} / (e^{s_ii} + e^{m_i})], m_i the mean over j ≠ i of s_ij; s_ij the cosine between row i of `first` and row j
    of `second` (Diverse-ViT's released code), or with directions=False their inner product (Patch Diversification, arXiv
    2104.12753). log 2 where a row meets its own self as it meets the others; 0 where there is no other row.
    """
    n = first.shape[-2]
    scores = cosines(first, second) if directions else first @ second.mT
    own = scores.diagonal(dim1=-2, dim2=-1)
    if n < 2:
        return torch.zeros_like(own)
    return F.softplus((scores.sum(-1) - own) / (n - 1) - own)


def axis_cosine(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Cosine of the vectors along `dim` at the same place of two tensors, same shapes -> that shape without `dim`."""
    a, b = (unit(anchored(each.movedim(dim, -1)))[0] for each in (first, second))
    return (a * b).sum(-1)


def defined_mean(values: Tensor) -> Tensor:
    """The mean of the values that are numbers, of any shape -> []; 0 where none is."""
    known = ~values.isnan()
    return torch.where(known, values, 0.0).sum() / known.sum().clamp_min(1)


def own_and_other_cosines(x_BND: Tensor, y_BND: Tensor) -> dict[str, Tensor]:
    """Mean cosine of each token in x with itself in y, `same` [B], and with every other token, `other` [B]; in float64.

    Vectors of length zero have no direction: pairs with them are left out. NaN where no pair is left.

    >>> x = torch.eye(2, dtype=torch.float64)[None]
    >>> {name: value.item() for name, value in own_and_other_cosines(x, x).items()}
    {'same': 1.0, 'other': 0.0}
    """
    units, present = [], []
    for tokens in (x_BND, y_BND):
        length = tokens.norm(dim=-1, keepdim=True)
        present.append((length > 0).squeeze(-1).to(tokens.dtype))
        units.append(tokens / length.masked_fill(length == 0, 1.0))
    both = present[0] * present[1]
    own = both * (1 - (units[0] - units[1]).square().sum(-1) / 2)  # the cosine, and just 1 where nothing changed
    pairs = present[0].sum(1) * present[1].sum(1) - both.sum(1)
    others = (units[0].sum(1) * units[1].sum(1)).sum(-1) - own.sum(1)
    return {
        "same": torch.where(both.sum(1) > 0, own.sum(1) / both.sum(1), torch.nan),
        "other": torch.where(pairs > 0, others / pairs.clamp_min(1), torch.nan),
    }
