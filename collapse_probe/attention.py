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

    def logits(self, images: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
        """The scaled, masked logits in float32 [b, h, R, C]; only where q and k were heard."""
        assert self.q is not None
        assert self.k is not None
        k_BHNK = self.k[images]
        if k_BHNK.shape[1] != self.q.shape[1]:
            k_BHNK = k_BHNK.repeat_interleave(self.q.shape[1] // k_BHNK.shape[1], dim=1)
        q_bhRK = self.q[images, heads, rows].float() * self.scale
        logits = q_bhRK @ k_BHNK[:, heads, columns].float().transpose(-1, -2)
        if self.bias is not None:
            logits = logits + additive(self.bias, images, heads, rows, columns)
        if self.causal:
            logits = logits.masked_fill(_future(self.q.shape[2], self.k.shape[2], rows, columns, logits), -torch.inf)
        return logits


def additive(bias: Tensor, images: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The part of a mask or bias for some images, heads, queries and keys, as a float32 term of the logits."""
    part = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    wanted = (images, heads, rows, columns)
    part = part[tuple(w if size > 1 else slice(None) for w, size in zip(wanted, part.shape, strict=True))]
    if part.dtype == torch.bool:
        return torch.zeros(part.shape, device=part.device).masked_fill(~part, -torch.inf)
    return part.float()


def _future(queries: int, keys: int, rows: slice, columns: slice, like: Tensor) -> Tensor:
    r = torch.arange(queries, device=like.device)[rows]
    c = torch.arange(keys, device=like.device)[columns]
    return c[None, :] > r[:, None]


def maps_of(
    heard: Attention, images: slice, heads: slice, rows: slice, columns: slice, sums: Tensor | None = None
) -> dict[str, Tensor]:
    """probs and weights [b, h, R, C]. `sums` [b, H, N, 1] takes each query's logsumexp where all keys are here, or gives it."""
    if heard.q is None:
        assert heard.probs is not None
        probs = heard.probs[images, heads, rows, columns].float()
    else:
        assert heard.k is not None
        logits = heard.logits(images, heads, rows, columns)
        if sums is None:
            probs = torch.softmax(logits, dim=-1)
        else:
            if columns == slice(0, heard.k.shape[2]):
                sums[:, heads, rows] = torch.logsumexp(logits, dim=-1, keepdim=True)
            probs = logits.sub_(sums[:, heads, rows]).exp_()
        if heard.bias is not None or heard.causal:
            probs = probs.nan_to_num(0.0)  # a query that may see nothing attends to nothing
    weights = probs if heard.weights is None else heard.weights[images, heads, rows, columns].float()
    return {"probs": probs, "weights": weights}
