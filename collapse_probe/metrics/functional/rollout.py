"""Attention followed through the blocks: what each token gathers from the first block's input, by attention alone."""

from __future__ import annotations

import torch
from torch import Tensor

FUSIONS = ("mean", "max", "min")
"""How the heads of a block become one map before they are followed."""


def fused(maps: Tensor, fusion: str = "mean") -> Tensor:
    """One map for all heads, [..., H, N, N] -> [..., N, N]: their mean, or the largest or smallest entry."""
    assert fusion in FUSIONS, fusion
    return maps.mean(-3) if fusion == "mean" else getattr(maps, f"a{fusion}")(-3)


def with_residual(maps: Tensor) -> Tensor:
    """A map with half the weight on the residual stream, [..., N, N] -> [..., N, N]: (A + I), each row over its sum.

    Rows sum to 1; a row of zeros becomes the token itself.

    >>> with_residual(torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist()
    [[0.5, 0.5], [0.25, 0.75]]
    """
    mixed = maps + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    return mixed / mixed.sum(-1, keepdim=True)


def rollouts(maps: Tensor) -> Tensor:
    """The rollout after every block, from one non-negative map a block, [L, N, N] -> [L, N, N].

    R_l = Â_l · R_{l−1}, Â_l = (A_l + I) with rows over their sums, R_0 = I (Abnar & Zuidema, arXiv 2005.00928, Sec. 3): row i
    of R_l says how much token i holds of each token of the input after block l. Rows sum to 1.

    >>> rollouts(torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))[1].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    steps = with_residual(maps).unbind(0)
    products = [steps[0]]
    for step in steps[1:]:
        products.append(step @ products[-1])
    return torch.stack(products)
