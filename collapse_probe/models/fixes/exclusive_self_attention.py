"""Exclusive self-attention: a token takes from attention nothing that lies along its own value."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from collapse_probe.models.fixes.base import Fix, FixSite
from collapse_probe.registry import FIXES


def without_own_value(out_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
    """y − (y · v̂) v̂ for each token, v̂ = v/‖v‖ its own value, [B, H, N, K] twice -> [B, H, N, K]; v = 0 takes nothing away.

    >>> import torch
    >>> without_own_value(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])).tolist()
    [0.0, 4.0]
    """
    unit_BHNK = F.normalize(v_BHNK, dim=-1)
    return out_BHNK - (out_BHNK * unit_BHNK).sum(dim=-1, keepdim=True) * unit_BHNK


@dataclass(frozen=True)
class ExclusiveSelfAttention(Fix):
    """z_i = y_i − (y_i · v̂_i) v̂_i for what each head gives, before the projection; v̂_i = v_i/‖v_i‖, no parameters.

    What is in effect is no map: the projection acts on channels and differs from token to token. A capture sees the softmax map
    A, and A v is what comes before the projection; a token's weight on itself is in A and has no effect, so entropy and sinks
    read it where the model does not. The paper has no released code known to us: the formula is the paper's, checked against no
    other code. No neutral setting. Attention stays fused.
    """

    name = "exclusive-self-attention"
    summary = "takes from each token's attention output what lies along its own value"
    source = "Exclusive Self Attention, arXiv 2603.09078"

    def heads(self, out_BHNK: Tensor, v_BHNK: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        return without_own_value(out_BHNK, v_BHNK)


FIXES.add(ExclusiveSelfAttention.name, ExclusiveSelfAttention)
