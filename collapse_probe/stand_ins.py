"""Maps that can stand where an attention layer has its own: that very map as a copy, or a uniform one."""

from __future__ import annotations

import torch
from torch import Tensor

from collapse_probe.attention import Attention, maps_of


def own_map(heard: Attention) -> Tensor:
    """What multiplies V, [B, H, N, N] in float32, in memory of its own: the model may overwrite what was heard."""
    if heard.q is None:
        own = heard.probs if heard.weights is None else heard.weights
        assert own is not None
        return own.to(torch.float32, copy=True)
    return maps_of(heard, *(slice(None),) * 4)["weights"]


def uniform(heard: Attention) -> Tensor:
    """The same weight for every key that a query may see, to be broadcast to [B, H, N, N]; zeros where it may see none.

    Hidden are what a mask hides; in eager attention, where no mask is heard, the keys whose softmax is exactly 0.

    >>> probs = torch.tensor([[[[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]]])
    >>> uniform(Attention("attn", "softmax", probs=probs))[0, 0, 0].tolist()
    [0.5, 0.5, 0.0]
    """
    if heard.q is None:
        assert heard.probs is not None
        seen = heard.probs != 0
    else:
        seen = torch.ones(1, 1, *shape_of(heard)[-2:], dtype=torch.bool, device=heard.q.device)
        if heard.bias is not None:
            bias = heard.bias
            seen = seen & (bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2)
        if heard.causal:
            seen = seen.tril()
    return seen.float() / seen.sum(-1, keepdim=True).clamp_min(1)


def shape_of(heard: Attention) -> tuple[int, ...]:
    """The shape of a layer's map, [B, H, N, N]."""
    if heard.q is None or heard.k is None:
        assert heard.probs is not None
        return tuple(heard.probs.shape)
    return (*heard.q.shape[:3], heard.k.shape[2])


def device_of(heard: Attention) -> torch.device:
    """Where a layer's map is made."""
    held = heard.probs if heard.q is None else heard.q
    assert held is not None
    return held.device
