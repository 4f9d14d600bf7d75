"""How many directions a matrix really uses: singular values, effective and stable rank, principal components; pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from collapse_probe.errors import SettingError

ROUNDING = 1e-9
"""Share of a total that is rounding: a sum of shares this close below a threshold has reached it."""
SMALL = 512
"""Sides of a Gram matrix up to which one thread is enough."""


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values in descending order, [..., n, d] -> [..., min(n, d)], float64, in the units of the matrix.

    Roots of the eigenvalues of the smaller Gram matrix, in float64 and after division by the largest entry, so that nothing
    overflows. This is several times cheaper than a singular value decomposition, at a price: a value below
    √(max(n, d)·2.2e-16) of the largest (8e-7 at 3072, 2e-7 at 197) cannot be told from zero and is given as exactly 0; the
    others have an absolute error of about 2e-13·σ₁²/σ. Matrices that came as float32 carry rounding of that size themselves.
    A matrix with an infinite or undefined entry gives NaN. For measuring, not for training: the root has no gradient at 0.

    >>> singular_values(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]])).tolist()
    [3.0, 2.0]
    """
    wide = (matrices.cpu() if matrices.device.type == "mps" else matrices).detach().double()
    n, d = wide.shape[-2:]
    if wide.numel() == 0:
        return wide.new_zeros((*wide.shape[:-2], min(n, d)))
    size = wide.abs().amax((-2, -1), keepdim=True)
    sound = size.isfinite()
    scaled = torch.where(sound, wide, 0.0) / torch.where(sound & (size > 0), size, 1.0)
    each = scaled.reshape(-1, n, d)
    eigenvalues = torch.stack(_each_of_one_thread(_eigenvalues, each)).view(*scaled.shape[:-2], min(n, d))
    floor = max(n, d) * torch.finfo(torch.float64).eps * eigenvalues[..., :1]
    roots = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    return torch.where(sound[..., 0], roots * size[..., 0], math.nan)


def _each_of_one_thread(function: Callable[[Tensor], Tensor], matrices: Tensor) -> list[Tensor]:
    """`function` of each matrix; of small ones on a CPU as many at a time as there are threads, each on one of them.

    Several threads for one small matrix wait for one another: on a machine that does something else besides, a hundred times
    as long as they work. So it is the same to the bit for any number of threads.
    """
    threads = torch.get_num_threads()
    if matrices.device.type != "cpu" or min(matrices.shape[-2:]) > SMALL:
        return [function(one) for one in matrices]
    torch.set_num_threads(1)  # for the threads of the pool too, which begin with what holds then
    try:
        with ThreadPoolExecutor(min(threads, len(matrices))) as pool:
            return list(pool.map(function, matrices))
    finally:
        torch.set_num_threads(threads)


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Those of the smaller Gram matrix, descending, [n, d] -> [min(n, d)]; by itself, so that other matrices do not matter."""
    matrix = matrix.clone()
    gram = matrix @ matrix.mT if len(matrix) <= matrix.shape[1] else matrix.mT @ matrix
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(-1)


RELATIVE, SMALLEST_SECOND = 1e-3, 1e-3
"""How far each of `two_largest` may be from a singular value, as a share of it, and the share of σ₁ below which σ₂ counts as so
much; where the error is known, it is less by orders."""
STEPS = 40
BLOCK = 6
LEAST_SIDE = 24


def two_largest(matrices: Tensor, tolerance: float = RELATIVE, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """The two largest singular values, [..., n, d] -> [..., 2] in float64, and how far each may be from a true one, [..., 2].

    Block Lanczos on AᵀA with six vectors and full reorthogonalisation, from a fixed random start, so that σ₁ of any
    multiplicity is found. A matrix is done where residuals of two orthonormal vectors bound each value to `tolerance` of itself
    (σ₂ below a thousandth of σ₁: of that); one that is not after `steps` steps gets its whole spectrum, whose bound is 0. So a
    value is never further from a singular value than is said; that it is one of the two largest holds with probability one over
    the start. A matrix with fewer than two rows or columns has σ₂ = 0; NaN for one with an infinite or undefined entry.

    >>> values, bounds = two_largest(torch.diag(torch.arange(1.0, 41.0)))
    >>> [round(value, 4) for value in values.tolist()], bool((bounds <= 1e-3 * 40).all())
    ([40.0, 39.0], True)
    """
    wide = (matrices.cpu() if matrices.device.type == "mps" else matrices).detach().double()
    n, d = wide.shape[-2:]
    each = wide.reshape(-1, n, d)
    each = each.mT if n < d else each
    values, bounds = wide.new_full((len(each), 2), math.nan), wide.new_zeros(len(each), 2)
    left = torch.where(each.isfinite().flatten(1).all(1))[0]
    if min(n, d) >= LEAST_SIDE:
        found, apart, done = _block_lanczos(each[left], tolerance, steps)
        values[left[done]], bounds[left[done]] = found[done], apart[done]
        left = left[~done]
    if len(left):
        whole = torch.cat([singular_values(each[left]), wide.new_zeros(len(left), 2)], -1)
        values[left] = whole[:, :2]
    return values.view(*wide.shape[:-2], 2), bounds.view(*wide.shape[:-2], 2)


def _block_lanczos(a: Tensor, tolerance: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest Ritz values [m, 2] of matrices [m, n, d], their bounds, and which of them are done, [m].

    The subspace, whose vectors are rows, is made in float32; values and bounds are of two vectors in it, in float64.
    """
    count, _, d = a.shape
    narrow = a.float()
    turned = narrow.mT.contiguous()
    start = torch.randn(d, BLOCK, generator=torch.Generator().manual_seed(0))
    start[:, 0] = 1.0  # near the first right singular vector of a map whose rows sum to 1
    basis = torch.linalg.qr(start)[0].mT.to(a.device).expand(count, BLOCK, d)
    image = basis @ turned
    for step in range(1, steps + 1):
        last = step == steps or basis.shape[1] + BLOCK > d
        if step == 1 or step % 2 == 0 or last:
            found, apart, done = _ritz(a, basis, image, tolerance)
            if last or bool(done.all()):
                break
        block = image[:, -BLOCK:] @ narrow
        for _ in range(3):  # once more than is enough, for the case that nothing is left but rounding
            block = torch.linalg.qr((block - (block @ basis.mT) @ basis).mT)[0].mT.contiguous()
        basis, image = torch.cat([basis, block], 1), torch.cat([image, block @ turned], 1)
    return found, apart, done


def _ritz(a: Tensor, basis: Tensor, image: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values, bounds and whether these are within the tolerance, of AᵀA on two vectors in the span of rows [m, k, d]."""
    inner = torch.linalg.eigh(image @ image.mT)[1][..., -2:]
    x = torch.linalg.qr((inner.mT @ basis).double().mT)[0].mT
    x = torch.linalg.qr((x @ a.mT @ a).mT)[0].mT  # once more in float64: what float32 left of the first in the second goes
    mapped = x @ a.mT
    theta, turn = torch.linalg.eigh(mapped @ mapped.mT)
    theta, turn = theta.flip(-1), turn.flip(-1).mT
    residual = (turn @ mapped @ a - theta[..., None] * (turn @ x)).norm(dim=-1)
    values = theta.clamp_min(0.0).sqrt()
    bounds = torch.minimum(residual / values.clamp_min(torch.finfo(values.dtype).tiny), residual.sqrt())
    wanted = torch.maximum(values, SMALLEST_SECOND * values[:, :1])
    return values, bounds, (bounds <= tolerance * wanted).all(-1)


def effective_rank_of(singular: Tensor, *, squared: bool = False) -> Tensor:
    """Effective rank from singular values (not negative, any order), [..., r] -> [...]; see `effective_rank`."""
    powers = singular.square() if squared else singular
    total = powers.sum(-1, keepdim=True)
    shares = powers / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), math.nan)


def stable_rank_of(singular: Tensor) -> Tensor:
    """Stable rank from singular values (not negative, any order), [..., r] -> [...]; see `stable_rank`."""
    if singular.shape[-1] == 0:
        return torch.full(singular.shape[:-1], math.nan, dtype=singular.dtype, device=singular.device)
    largest = singular.amax(-1, keepdim=True)
    return (singular / torch.where(largest == 0, math.nan, largest)).square().sum(-1)


def effective_rank(matrices: Tensor, *, squared: bool = False) -> Tensor:
    """exp(−Σ p log p) with p = σ/Σσ, [..., n, d] -> [...], float64, 1 … min(n, d); NaN for a zero matrix.

    1 for a rank-one matrix, n for n orthogonal rows of one length; invariant to scale and rotation. `squared` takes p =
    σ²/Σσ² instead, the entropy of the covariance's spectrum, which is smaller (Roy & Vetterli, The effective rank, 2007).

    >>> effective_rank(torch.eye(2)).item(), effective_rank(torch.ones(2, 2)).item()
    (2.0, 1.0)
    """
    return effective_rank_of(singular_values(matrices), squared=squared)


def stable_rank(matrices: Tensor) -> Tensor:
    """‖X‖_F² / σ₁², [..., n, d] -> [...], float64, 1 … min(n, d); NaN for a zero matrix.

    >>> stable_rank(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item()
    1.25
    """
    return stable_rank_of(singular_values(matrices))


def pca_error(matrices: Tensor, share: float) -> Tensor:
    """Share of the variance that is lost by keeping `share` of the principal components, [..., n, d] -> [...], 0 … 1.

    Rows are samples and their mean is subtracted; of the min(n − 1, d) components the leading ⌈share · min(n − 1, d)⌉ are
    kept: Σ_dropped σ² / Σ σ². 0 where the rows lie in the kept subspace; at most 1 − share, where every direction carries as
    much. NaN where all rows are the same. Raises SettingError for a share outside 0 … 1.

    >>> round(pca_error(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 0.5).item(), 6)
    0.2
    """
    _check(share)
    shares = _variance_shares(matrices)
    n, d = matrices.shape[-2:]
    leading = math.ceil(share * max(min(n - 1, d), 0) - ROUNDING)
    return torch.where(shares.isnan().any(-1), math.nan, shares[..., leading:].sum(-1))


def components_for(matrices: Tensor, share: float) -> Tensor:
    """The least number of principal components that hold `share` of the variance, [..., n, d] -> [...], 1 … min(n − 1, d).

    Rows are samples and their mean is subtracted. NaN where all rows are the same. Raises SettingError for a share outside
    0 … 1.

    >>> components_for(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 0.9).item()
    2.0
    """
    _check(share)
    shares = _variance_shares(matrices)
    short = (shares.cumsum(-1) < share - ROUNDING).sum(-1)
    return torch.where(shares.isnan().any(-1), math.nan, short + 1.0)


def _variance_shares(matrices: Tensor) -> Tensor:
    """Shares of the variance along the principal components, descending, [..., n, d] -> [..., max(min(n, d), 1)]; or NaN."""
    wide = (matrices.cpu() if matrices.device.type == "mps" else matrices).detach().double()
    if wide.numel() == 0:
        return wide.new_full((*wide.shape[:-2], 1), math.nan)
    centred = wide - wide.mean(-2, keepdim=True)
    rounding = torch.finfo(matrices.dtype).eps * wide.abs().amax((-2, -1), keepdim=True)
    same = centred.abs().amax((-2, -1), keepdim=True) <= rounding
    variances = singular_values(torch.where(same, 0.0, centred)).square()
    total = variances.sum(-1, keepdim=True)
    return variances / torch.where(total == 0, math.nan, total)


def _check(share: float) -> None:
    if not 0 <= share <= 1:
        raise SettingError(f"a share of components or of variance lies in 0 … 1, not {share!r}")
