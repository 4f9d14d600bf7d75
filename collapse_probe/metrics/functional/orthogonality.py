"""How evenly rows spread over directions: orthogonality and hyperspherical uniformity, pure, differentiable, never NaN.

Rows are tokens, flattened attention maps or the rows of a weight matrix, [..., n, d]; each function gives one number per
matrix, [...]. Metrics report these numbers, penalties train on them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.geometry import anchored, gram, unit

CLOSEST = 1e-6
"""Squared distance below which two unit rows count as this far apart in the energy."""


def soft_orthogonality(rows: Tensor) -> Tensor:
    """‖R Rᵀ − I‖_F², the squared distance of the rows' Gram matrix from the identity, [..., n, d] -> [...], 0 … ∞.

    0 where the rows are orthonormal, which needs n ≤ d; not invariant to scale (Diverse-ViT, arXiv 2203.06345; definition of
    its released code).

    >>> soft_orthogonality(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
    9.0
    """
    identity = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return (gram(rows) - identity).square().sum((-2, -1))


def orthogonality_gap(rows: Tensor) -> Tensor:
    """λmax − λmin of R Rᵀ, exact, [..., n, d] -> [...], 0 … ∞, in squared units of the rows.

    0 where the rows are orthogonal and equally long, at any length; the conditional orthogonality of Diverse-ViT (arXiv
    2203.06345) is its square. The smaller of the two Gram matrices is decomposed; with more rows than columns λmin is 0.
    The gradient is that of one extreme eigenvector each, finite also where eigenvalues coincide.

    >>> orthogonality_gap(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
    3.0
    """
    n, d = rows.shape[-2:]
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram(rows) if n <= d else gram(rows.mT))
    return eigenvalues[..., -1] - eigenvalues[..., 0] if n <= d else eigenvalues[..., -1].clamp_min(0)


def power_step_gap(rows: Tensor, seed: int, start: Literal["uniform", "normal"] = "uniform") -> Tensor:
    """The released code's estimate of `orthogonality_gap`, one power step each for λmax and λmin, [..., n, d] -> [...].

    With B = R Rᵀ and random x, x': λ = Rayleigh quotient of B at Bx, then |Rayleigh quotient of B − λI at (B − λI)x'|.
    Cheap, and **biased low**: one step seldom reaches the extreme eigenvectors (in Diverse-ViT's weight example the square is
    2.3 on average where 13.2 is exact), so it is for training, never for reporting. The starts are drawn from `seed`
    (released code: unseeded), uniform in [0, 1) as for weights or normal as for tokens and maps. Where a denominator
    vanishes (identity, zero rows) the quotient is 0; the released code gives NaN.
    """
    n = rows.shape[-2]
    generator = torch.Generator().manual_seed(seed)
    draw = {"uniform": torch.rand, "normal": torch.randn}[start]
    first, second = draw(2, n, 1, generator=generator, dtype=torch.float64).to(rows.device, rows.dtype)
    products = gram(rows)
    highest, _ = _rayleigh(products, first)
    identity = torch.eye(n, dtype=rows.dtype, device=rows.device)
    lowest, _ = _rayleigh(products - highest[..., None, None] * identity, second)
    return lowest.abs()


def _rayleigh(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotient after one power step, and whether it is defined."""
    step = matrix @ start
    below = step.square().sum((-2, -1))
    defined = below > torch.finfo(below.dtype).tiny
    above = (step * (matrix @ step)).sum((-2, -1))
    return torch.where(defined, above, 0.0) / torch.where(defined, below, 1.0), defined


def squared_distances(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances 2 − 2 cos between the pairs of different rows at unit length, and which pairs have two directions.

    [..., n, d] -> [..., n(n−1)/2] twice, 0 … 4.
    """
    directions, valid = unit(anchored(rows))
    n = rows.shape[-2]
    first, second = torch.triu_indices(n, n, offset=1, device=rows.device)
    products = gram(directions)
    own = products.diagonal(dim1=-2, dim2=-1)  # 1 but for rounding, without which duplicates would seem apart
    distances = own[..., first] + own[..., second] - 2 * products[..., first, second]
    return distances.clamp_min(0), valid[..., first] & valid[..., second]


def hyperspherical_separation(rows: Tensor, form: Literal["minimum", "repository"] = "minimum") -> Tensor:
    """The smallest squared distance between two different rows at unit length, [..., n, d] -> [...], 0 … 4.

    min_{i<j} ‖r̂_i − r̂_j‖² (maximum hyperspherical separation, arXiv 2103.01649; Diverse-ViT, arXiv 2203.06345). Duplicate
    rows give 0. form="repository" is the released computation: distances of exactly 0 are passed over, and the smallest is
    multiplied by the number of pairs that tie for it (12 for the 4×4 identity). Pairs with a zero row do not count; 0 where
    no pair is left. Raises SettingError for another form.

    >>> hyperspherical_separation(torch.eye(4)).item(), hyperspherical_separation(torch.eye(4), form="repository").item()
    (2.0, 12.0)
    """
    if form not in ("minimum", "repository"):
        raise SettingError(f"hyperspherical separation: form must be 'minimum' or 'repository', not {form!r}")
    distances, valid = squared_distances(rows)
    counted = valid & (distances > 0) if form == "repository" else valid
    if distances.shape[-1] == 0:
        return distances.sum(-1)
    smallest = torch.where(counted, distances, torch.inf).amin(-1, keepdim=True)
    nearest = counted & (distances == smallest.detach())
    total = torch.where(nearest, distances, 0.0).sum(-1)
    return total if form == "repository" else total / nearest.sum(-1).clamp_min(1)


def hyperspherical_energy(rows: Tensor, power: float = 1.0) -> Tensor:
    """Mean over pairs of 1 / ‖r̂_i − r̂_j‖^power, rows at unit length, [..., n, d] -> [...]; power 0: mean of −log distance.

    High where rows crowd together (minimum hyperspherical energy, arXiv 1805.09298). Two rows nearer than the root of
    `CLOSEST` count as that far apart, so duplicates give a large number and no gradient instead of infinity. Pairs with a zero
    row do not count; 0 where no pair is left. Raises SettingError for a negative power.

    >>> hyperspherical_energy(torch.eye(3), power=2).item()
    0.5
    """
    if power < 0:
        raise SettingError(f"hyperspherical energy: power must be 0 or more, not {power!r}")
    distances, valid = squared_distances(rows)
    apart = distances.clamp_min(CLOSEST)
    energies = -0.5 * apart.log() if power == 0 else apart.pow(-power / 2)
    return torch.where(valid, energies, 0.0).sum(-1) / valid.sum(-1).clamp_min(1)


def gram_log_determinant(rows: Tensor, epsilon: float = 1e-6) -> Tensor:
    """log det G with G_ij = exp(−‖r̂_i − r̂_j‖²) + ε·[i = j], rows at unit length, [..., n, d] -> [...].

    High (at most n·log(1 + ε)) where rows are far apart, n − 1 times about log ε lower where all are one (maximum Gram
    determinant, arXiv 2103.01649; Diverse-ViT, arXiv 2203.06345). Computed in float64, for G is nearly singular in collapse.
    A zero row is at cosine 0 from every other row. Raises SettingError where ε is not above 0.

    >>> round(gram_log_determinant(torch.eye(4)).item(), 6)
    -0.095483
    """
    if epsilon <= 0:
        raise SettingError(f"Gram determinant: epsilon must be above 0, not {epsilon!r}")
    wide = rows.double() if rows.device.type != "mps" else rows
    directions, _ = unit(anchored(wide))
    identity = torch.eye(rows.shape[-2], dtype=wide.dtype, device=rows.device)
    cosines = torch.where(identity.bool(), 1.0, gram(directions))
    determinant: Tensor = torch.linalg.slogdet(torch.exp(2 * cosines - 2) + epsilon * identity)[1]
    return determinant.to(rows.dtype)
