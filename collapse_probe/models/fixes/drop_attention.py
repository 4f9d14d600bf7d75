"""Drop-attention: while training, hide random keys or random entries of the map and renormalise its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from collapse_probe.models.fixes.base import Fix, FixSite
from collapse_probe.registry import FIXES


def drop_and_renormalise(probs_BHNN: Tensor, kept: Tensor) -> Tensor:
    """Zero where `kept` is False, then divide each row by its sum; a row that lost everything stays as it was.

    >>> drop_and_renormalise(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[True, True, False]])).tolist()
    [[0.6666666865348816, 0.3333333432674408, 0.0]]
    """
    left_BHNN = probs_BHNN * kept
    total_BHN1 = left_BHNN.sum(dim=-1, keepdim=True)
    empty_BHN1 = total_BHN1 == 0
    return torch.where(empty_BHN1, probs_BHNN, left_BHNN / total_BHN1.masked_fill(empty_BHN1, 1))


@dataclass(frozen=True)
class DropAttention(Fix):
    """In train mode each key (or each entry) of a map is dropped with probability p; rows again sum to one.

    The exact form, dropping after the softmax and dividing by what is left, is ours. Unlike attention dropout, which rescales
    by 1/(1 − p), it leaves every row a distribution. A "key" is a column, for all queries of one head.
    """

    p: Annotated[float, "[0, 1)"] = 0.1
    unit: Literal["key", "entry"] = "key"

    name = "drop-attention"
    summary = "drops random keys or entries of the map while training, rows renormalised"
    source = "after DropAttention, arXiv 1907.11065; compared in DeepViT, arXiv 2103.11886"
    failure_types = ("depth",)
    neutral = {"p": 0.0}

    def probs(self, probs_BHNN: Tensor, site: FixSite) -> Tensor:
        """[B, H, N, N] -> [B, H, N, N]."""
        if not (site.home.training and self.p):
            return probs_BHNN
        images, heads, queries, keys = probs_BHNN.shape
        rows = 1 if self.unit == "key" else queries
        kept = torch.rand(images, heads, rows, keys, device=probs_BHNN.device) >= self.p
        return drop_and_renormalise(probs_BHNN, kept)


FIXES.add(DropAttention.name, DropAttention)
