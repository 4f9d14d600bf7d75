"""How many directions one embedding an image uses over a set of images: RankMe, α-ReQ, LiDAR; pure, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

RANKME_EPSILON = 1e-7
FIRST_RANK, LAST_RANK = 4, 100
FEWEST_RANKS = 5
LIDAR_DELTA, LIDAR_EPSILON = 1e-4, 1e-8


def spectrum(moments: Tensor, most: int) -> Tensor:
    """Eigenvalues of a sum of outer products in descending order, at most `most` of them, [D, D] -> [min(D, most)].

    Those below D·2.2e-16 of the largest are rounding and 0, so that a singular value below about 4e-7 (D = 768) of the largest
    cannot be told from 0.
    """
    eigenvalues = torch.linalg.eigvalsh(moments).flip(-1)[: max(most, 0)]
    floor = len(moments) * torch.finfo(moments.dtype).eps * eigenvalues[:1].clamp_min(0)
    return torch.where(eigenvalues > floor, eigenvalues, 0.0)


def rankme(singular: Tensor, epsilon: float = RANKME_EPSILON) -> Tensor:
    """exp(−Σ p log p) with p = σ/Σσ + ε, from all min(n, D) singular values [..., r] -> [...]; NaN where all are 0.

    RankMe (arXiv 2210.02885). ε stands in the paper's formula as it is told by implementations: 1e-7 in most, 1e-5 in
    rbalestr-lab/stable-pretraining; with ε = 0 it is the effective rank.

    >>> rankme(torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64), 0.0).item()
    2.0
    """
    total = singular.sum(-1, keepdim=True)
    shares = singular / torch.where(total > 0, total, 1.0) + epsilon
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), torch.nan)


def decay_exponent(eigenvalues: Tensor, first: int = FIRST_RANK, last: int = LAST_RANK) -> Tensor:
    """α of λ_j ∝ j^(−α): minus the slope of log λ_j on log j over the ranks j = first … last, weighted by 1/j; [r] -> [].

    Ranks beyond the positive eigenvalues are left out; NaN with fewer than five. α-ReQ, as its authors' code fits it
    (kumarkrishna/fastssl at 96dfa37, fastssl/utils/powerlaw.py), whose scripts take several ranges of ranks.

    >>> round(decay_exponent(torch.arange(1, 51, dtype=torch.float64) ** -1.5).item(), 12)
    1.5
    """
    last = min(last, int((eigenvalues > 0).sum()))
    if last - first + 1 < FEWEST_RANKS:
        return torch.tensor(torch.nan, dtype=torch.float64)
    ranks = torch.arange(first, last + 1, dtype=torch.float64)
    x, y = ranks.log(), eigenvalues[first - 1 : first - 1 + len(ranks)].double().log().cpu()
    weights = (1 / ranks) / (1 / ranks).sum()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    return -(weights * x * y).sum() / (weights * x * x).sum()


def lidar(views: Tensor, delta: float = LIDAR_DELTA, epsilon: float = LIDAR_EPSILON) -> Tensor:
    """LiDAR of q augmented views of each of n images, [n, q, D] -> [], 1 … min(D, n − 1) but for ε (arXiv 2312.04000).

    exp(−Σ p log p), p = (λ + ε)/Σ(λ + ε), λ the eigenvalues of Σ_w^(−½) Σ_b Σ_w^(−½) with Σ_b the covariance of the images'
    mean views and Σ_w the mean covariance of the views of an image, δ added to its diagonal; as
    rbalestr-lab/stable-pretraining computes it. One image's views are a class here: with the classes of a data set in their
    place it is another number. NaN with fewer than two images or two views.
    """
    images, count, width = views.shape
    if images < 2 or count < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    views = views.double()
    means = views.mean(1)
    apart, within = means - means.mean(0), (views - means[:, None]).flatten(0, 1)
    between = apart.mT @ apart / (images - 1)
    inside = within.mT @ within / (images * (count - 1)) + delta * torch.eye(width, dtype=views.dtype, device=views.device)
    values, vectors = torch.linalg.eigh(inside)
    whitening = (vectors / values.clamp_min(epsilon).sqrt()) @ vectors.mT
    shares = torch.linalg.eigvalsh(whitening @ between @ whitening).clamp_min(0.0) + epsilon
    rank: Tensor = torch.special.entr(shares / shares.sum()).sum().exp()
    return rank
