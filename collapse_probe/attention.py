"""The attention of one layer for one batch as it was heard, and any part of its maps made from that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Attention:
    """The attention of one layer for one batch: q and k (a fused kernel) or the map itself (eager attention).

    q [B, H, N, K], k [B, H or fewer, N, K], `bias` broadcast to [B, H, N, N] or None (bool: True may be
    seen); `probs` [B, H, N, N] the softmax, `weights` what multiplies V where that is another map, else None.
    """

    owner: str
    operation: str
    q: Tensor | None = None
    k: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    logsumexp: Tensor | None = None
    probs: Tensor | None = None
    weights: Tensor | None = None

    @property
    def mixed(self) -> bool:
        """Whether the model changes the map between the softmax and V."""
        return self.weights is not None

    def logits(self, images: slice, rows: slice, columns: slice) -> Tensor:
        """The scaled, masked logits in float32 [b, H, R, C]; only where q and k were heard."""
        assert self.q is not None
        assert self.k is not None
        q_BHRK = self.q[images, :, rows].float() * self.scale
        k_BHCK = self.k[images, :, columns].float()
        if k_BHCK.shape[1] != q_BHRK.shape[1]:
            k_BHCK = k_BHCK.repeat_interleave(q_BHRK.shape[1] // k_BHCK.shape[1], dim=1)
        logits = q_BHRK @ k_BHCK.transpose(-1, -2)
        if self.bias is not None:
            logits = logits + additive(self.bias, images, rows, columns)
        if self.causal:
            logits = logits.masked_fill(_future(self.q.shape[2], self.k.shape[2], rows, columns, logits), -torch.inf)
        return logits


def additive(bias: Tensor, images: slice, rows: slice, columns: slice) -> Tensor:
    """The part of a mask or bias for some images, queries and keys, as a float32 term of the logits."""
    part = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    part = part[images if part.shape[0] > 1 else slice(None)]
    part = part[:, :, rows if part.shape[2] > 1 else slice(None), columns if part.shape[3] > 1 else slice(None)]
    if part.dtype == torch.bool:
        return torch.zeros(part.shape, device=part.device).masked_fill(~part, -torch.inf)
    return part.float()


def _future(queries: int, keys: int, rows: slice, columns: slice, like: Tensor) -> Tensor:
    r = torch.arange(queries, device=like.device)[rows]
    c = torch.arange(keys, device=like.device)[columns]
    return c[None, :] > r[:, None]


def maps_of(heard: Attention, images: slice, rows: slice, columns: slice, sums: list[Tensor] | None) -> dict[str, Tensor]:
    """probs and weights [b, H, R, C]. A sweep over queries leaves its logsumexp in `sums`."""
    if heard.q is None:
        assert heard.probs is not None
        probs = heard.probs[images, :, rows, columns].float()
    else:
        logits = heard.logits(images, rows, columns)
        if sums is None:
            probs = torch.softmax(logits, dim=-1)
        else:
            if columns == slice(0, heard.k.shape[2]):  # type: ignore[union-attr]
                sums.append(torch.logsumexp(logits, dim=-1, keepdim=True))
            probs = torch.exp(logits - sums[-1])
        if heard.bias is not None or heard.causal:
            probs = probs.nan_to_num(0.0)  # a query that may see nothing attends to nothing
    weights = probs if heard.weights is None else heard.weights[images, :, rows, columns].float()
    return {"probs": probs, "weights": weights}
