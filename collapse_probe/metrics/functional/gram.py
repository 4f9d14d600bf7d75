"""How far the similarities between the patches of an image have moved: Gram matrices of two models; pure, differentiable."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from collapse_probe.metrics.functional.geometry import anchored, gram, unit

Negatives = Literal["zero", "keep"]


def patch_gram(patches: Tensor, negatives: Negatives = "zero") -> Tensor:
    """Cosines between the patches of an image, [..., P, D] -> [..., P, P]; negative ones as 0 unless they are to be kept.

    A zero patch has no direction and the cosine 0 with every other.
    """
    similarities = gram(unit(anchored(patches))[0])
    return similarities.clamp_min(0.0) if negatives == "zero" else similarities


def gram_drift(first: Tensor, second: Tensor, negatives: Negatives = "zero") -> Tensor:
    """mean_ij (S_ij − T_ij)² of the patch cosines S and T of one image in two models, [..., P, D], [..., P, E] -> [...].

    0 where the two tell the same patches apart in the same way, whatever rotation and scale is between them; at most 1 with
    negative cosines as 0, 4 with them. This is the Gram loss of DINOv3 (arXiv 2508.10104; `dinov3/loss/gram_loss.py` at
    6876159): its class sets negative cosines to 0 unless told otherwise, its training configurations keep them. The widths of
    the two models may differ.

    >>> import torch
    >>> gram_drift(torch.eye(2), torch.ones(2, 2)).item()
    0.4999999403953552
    """
    return (patch_gram(first, negatives) - patch_gram(second, negatives)).square().mean((-2, -1))
