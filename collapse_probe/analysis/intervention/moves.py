"""How far the last tokens move, and how much of that is the same for all patches.

Formulas of `vit_causal/common.py` in KempnerInstitute/attention_sink (arXiv 2606.08105), which takes them of the patch tokens
after the final norm, without the token that was edited.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_ENERGY = 1e-20
"""Below which nothing moved, so that no share of it is shared."""


def relative_rms_change(new: Tensor, base: Tensor, counted: Tensor) -> Tensor:
    """√(mean ‖new − base‖²) over √(mean ‖base‖²), means over the `counted` tokens [B, N]; [B, N, D] twice -> [B], float64.

    NaN where no token counts.
    """
    change, own = ((x.double().square().sum(2) * counted).sum(1) for x in (new - base, base))
    return torch.where(counted.any(1), (change / own.clamp_min(1e-24)).sqrt(), torch.nan)


def shared_energy_fraction(change: Tensor, counted: Tensor) -> Tensor:
    """n ‖mean change‖² / Σ ‖change‖² over the n `counted` tokens [B, N]: 1 where all move alike; [B, N, D] -> [B], float64.

    NaN where nothing moves.
    """
    change = change.double() * counted[..., None]
    number = counted.sum(1)
    total = change.square().sum((1, 2))
    alike = (change.sum(1) / number.clamp_min(1)[:, None]).square().sum(1) * number
    return torch.where(total > LEAST_ENERGY, alike / total.clamp_min(LEAST_ENERGY), torch.nan)
