"""The default numbers of attention maps by another way: from queries and keys alone, in float64, never with two maps at a time.

With s the scaled and biased logits of a block and LSE_i their logsumexp over keys, the softmax is A_ij = exp(s_ij − LSE_i), and

    products of columns   Σ_i A_ij A'_ij = exp LSE_i(s_ij + s'_ij − LSE_i − LSE'_i)
    products of rows      Σ_j A_ij A'_ij = exp LSE_j(s_ij + s'_ij − LSE_i − LSE'_i)
    mass of a column      Σ_i A_ij       = exp LSE_i(s_ij − LSE_i)
    unit columns summed   Σ_t A_it / ‖column t‖, one attention whose values are 1 / ‖column‖
    entropy of a row      LSE_i − Σ_j A_ij s_ij = LSE_i − scale · q_i · Σ_j A_ij k_j (less the mean bias)

where s + s' is one attention with the heads of both put together: [scale·q, scale'·q'] · [k, k'].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """A softmax over queries q [M, H, N, K] and keys k [M, H, N', K] in float64; M maps a head, `bias` [.., N, N'] or None."""

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale: float

    @classmethod
    def of(cls, attention) -> Softmax:
        """What was captured of a layer; ValueError where its maps are no plain softmax of queries and keys."""
        if attention.q is None or attention.mixed:
            raise ValueError(f"{attention.owner} multiplies V by a map that is no softmax of queries and keys")
        q, k = attention.q.double(), attention.k.double()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        bias = attention.bias
        if bias is not None:
            hidden = torch.zeros(bias.shape, dtype=torch.float64)
            bias = hidden.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else bias.double()
            bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        if attention.causal:
            after = torch.full((q.shape[-2], k.shape[-2]), -math.inf, dtype=torch.float64).triu(1)
            bias = after[None, None] if bias is None else bias + after
        return cls(q, k, bias, attention.scale)

    @property
    def logsumexp(self) -> Tensor:
        """[M, H, N]; ∞ for a query that may see nothing, so that it attends to nothing."""
        found = torch.logsumexp(together(self), -1)
        return found.masked_fill(found == -math.inf, math.inf)


def together(*parts: Softmax) -> Tensor:
    """The sum of the logits of some softmaxes: one product, their heads put together."""
    q = torch.cat([part.q * part.scale for part in parts], -1)
    k = torch.cat([part.k for part in parts], -1)
    total = q @ k.mT
    for part in parts:
        total = total if part.bias is None else total + part.bias
    return total


def log_products(one: Softmax, other: Softmax, dim: int) -> Tensor:
    """Logarithms of the products of columns (dim −2) or rows (dim −1) of two blocks, [M, H, tokens]."""
    return torch.logsumexp(together(one, other) - (one.logsumexp + other.logsumexp)[..., None], dim)


def masses(one: Softmax) -> Tensor:
    """Sums of columns, [M, H, N']."""
    return torch.logsumexp(together(one) - one.logsumexp[..., None], -2).exp()


def weighted(one: Softmax, values: Tensor) -> Tensor:
    """Σ_j A_ij values_j, [M, H, N', V] -> [M, H, N, V]: an attention with these values."""
    return (together(one) - one.logsumexp[..., None]).exp() @ values


def entropies(one: Softmax) -> Tensor:
    """Entropies of the rows, [M, H, N], in nats."""
    mean = (one.q * one.scale * weighted(one, one.k)).sum(-1)
    if one.bias is not None:
        seen = one.bias.masked_fill(one.bias == -math.inf, 0.0)
        mean = mean + ((together(one) - one.logsumexp[..., None]).exp() * seen).sum(-1)
    found = one.logsumexp - mean
    return found.masked_fill(found == math.inf, 0.0)


def _per_image(x: Tensor, windows: int) -> Tensor:
    return x.reshape(-1, windows, *x.shape[1:]).sum(1)


def cosines(one: Softmax, other: Softmax, windows: int = 1, axis: str = "column", centred: bool = False) -> dict[str, Tensor]:
    """Mean cosines of an image [B] between two blocks: `real` of the same head and token, `other_token` of another token."""
    dim = -2 if axis == "column" else -1
    products, squares = log_products(one, other, dim), [log_products(x, x, dim) for x in (one, other)]
    if centred:
        assert axis == "column"
        means, length = [masses(x) / x.q.shape[-2] for x in (one, other)], one.q.shape[-2]
        norms = [(s.exp() - length * m.square()).clamp_min(0).sqrt() for s, m in zip(squares, means, strict=True)]
        each = (products.exp() - length * means[0] * means[1]) / (norms[0] * norms[1])
        defined = [norm > 0 for norm in norms]
    else:
        each = (products - (squares[0] + squares[1]) / 2).exp()
        defined = [s > -math.inf for s in squares]
    both = defined[0] & defined[1]
    real, pairs = _per_image(each.where(both, 0).sum((1, 2)), windows), _per_image(both.sum((1, 2)), windows)
    found = {"real": real / pairs}
    if axis == "column" and not centred:
        unit = [torch.exp(-s / 2).where(ok, 0)[..., None] for s, ok in zip(squares, defined, strict=True)]
        summed = [weighted(x, u) for x, u in zip((one, other), unit, strict=True)]
        of_all = _per_image((summed[0] * summed[1]).sum((1, 2, 3)), windows)
        every = _per_image((defined[0].sum(-1) * defined[1].sum(-1)).sum(1), windows)
        found["other_token"] = (of_all - real) / (every - pairs)
    return found
