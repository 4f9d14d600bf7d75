"""How alike rows are to each other and to the rows of another set: the cosines and contrasts that penalties train on.

Rows are patch tokens or flattened attention maps, [..., n, d]. Every function is pure and differentiable; a row of zeros has
no direction: its cosines are 0 and it gets no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.geometry import unit
from collapse_probe.uniformity import anchored


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
    found = cosines(first, first if second is None else second)
    return (found.abs() if absolute else found).mean((-2, -1))


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
