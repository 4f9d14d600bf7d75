"""How alike two sets of features tell images apart: Gram matrices, HSIC and linear CKA."""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.geometry import SMALLEST_SPREAD

FEWEST = 4
"""The unbiased estimate divides by n(n − 3)."""


def linear_gram(features: Tensor) -> Tensor:
    """Inner products of the rows less their mean, [n, F] -> [n, n] in float64.

    Neither HSIC changes when the mean is taken off; without it a large common part would cost all digits. Rows that are all
    the same (their spread below `SMALLEST_SPREAD` of their length) tell no image from another: a Gram matrix of zeros.

    >>> linear_gram(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    wide = (features.cpu() if features.device.type == "mps" else features).to(torch.float64)
    centred = wide - wide.mean(0, keepdim=True)
    if centred.norm() <= SMALLEST_SPREAD * wide.norm():
        centred = torch.zeros_like(centred)
    return centred @ centred.T


def u_centred(gram: Tensor) -> Tensor:
    """A Gram matrix without its diagonal and with rows that sum to zero, [..., n, n] -> [..., n, n], for n ≥ 4.

    Ã_ij = A_ij − Σ_k A_ik/(n−2) − Σ_k A_kj/(n−2) + Σ_kl A_kl/((n−1)(n−2)) for i ≠ j, all sums without the diagonal; Ã_ii = 0.
    Raises SettingError for n < 4.
    """
    n = gram.shape[-1]
    if n < FEWEST:
        raise SettingError(f"unbiased HSIC needs {FEWEST} images or more, not {n}")
    diagonal = torch.eye(n, dtype=torch.bool, device=gram.device)
    hollow = gram.masked_fill(diagonal, 0.0)
    rows, columns = hollow.sum(-1, keepdim=True), hollow.sum(-2, keepdim=True)
    whole = rows.sum(-2, keepdim=True)
    return (hollow - (rows + columns) / (n - 2) + whole / ((n - 1) * (n - 2))).masked_fill(diagonal, 0.0)


def hsic_unbiased(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC₁, the unbiased estimate, [..., n, n] and [..., n, n] -> [...]; negative values are possible; n ≥ 4.

    1/(n(n−3)) [tr K̃L̃ + (1ᵀK̃1)(1ᵀL̃1)/((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1], diagonals zeroed (Song et al. 2012; Nguyen et al.,
    arXiv 2010.15327, Eq. 3), computed as the mean product of the two U-centred matrices, which is the same number.
    """
    n = gram_x.shape[-1]
    return (u_centred(gram_x) * u_centred(gram_y)).sum((-2, -1)) / (n * (n - 3))


def alignment(across: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    """CKA = HSIC(X, Y)/√(HSIC(X, X)·HSIC(Y, Y)) elementwise; NaN where an own HSIC is not positive.

    >>> alignment(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(4.0)).item()
    0.5
    """
    defined = (own_x > 0) & (own_y > 0)
    return torch.where(defined, across / torch.where(defined, own_x * own_y, 1.0).sqrt(), torch.nan)


def hsic_without_groups(grams: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """HSIC₁ of every two of V Gram matrices, and without each group of images: [V, n, n] -> [V, V], [groups, V, V].

    Group g holds the images g, g + groups, … HSIC₁ is a U-statistic over the images; that of the images outside a group
    follows from sums over the group's rows. NaN where fewer than four images are left. Equal matrices give equal entries, bit
    for bit.
    """
    n = grams.shape[-1]
    hollow = grams.masked_fill(torch.eye(n, dtype=torch.bool, device=grams.device), 0.0)
    members = [slice(g, None, groups) for g in range(groups)]
    with_all = torch.stack([_products(hollow[:, inside]) for inside in members])
    within = torch.stack([_products(hollow[:, inside, inside]) for inside in members])
    total, rows = with_all.sum(0), hollow.sum(-1)
    without = torch.full_like(with_all, torch.nan)
    for g, inside in enumerate(members):
        rest = torch.ones(n, dtype=torch.bool, device=grams.device)
        rest[inside] = False
        if (left := int(rest.sum())) >= FEWEST:
            sums = (rows - hollow[:, inside].sum(1))[:, rest]
            without[g] = _hsic_of_sums(total - 2 * with_all[g] + within[g], sums, left)
    return _hsic_of_sums(total, rows, n), without


def _products(matrices: Tensor) -> Tensor:
    """Σ A_ij B_ij of every two of V matrices, [V, …] -> [V, V]."""
    flat = matrices.flatten(1)
    return torch.stack([(one * flat).sum(-1) for one in flat])


def _hsic_of_sums(products: Tensor, rows: Tensor, n: int) -> Tensor:
    """HSIC₁ [V, V] of n images from Σ_ij K_ij L_ij [V, V] and the row sums [V, n] of matrices without their diagonal."""
    whole = rows.sum(-1)
    product_of_sums = whole[:, None] * whole[None] / ((n - 1) * (n - 2))
    return (products + product_of_sums - 2 / (n - 2) * _products(rows)) / (n * (n - 3))
