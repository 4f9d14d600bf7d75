"""Which operators are attention, and how each one's arguments are read into an `Attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.trace import Attention

Operator = Any
Arguments = dict[str, Any]

_FUSED = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
_SOFTMAX = ("_softmax", "_safe_softmax", "softmax")
_CONTRACTIONS = ("bmm", "baddbmm", "mm", "addmm", "matmul", "einsum")
_KEEPS_VALUES = ("_to_copy", "clone", "contiguous", "expand_copy", "view_copy", "_reshape_copy", "copy")
_OPAQUE_WORDS = ("attn", "attention", "flash", "xformers", "mha")


def operators(*names: str) -> frozenset[Operator]:
    """Every overload of the named ATen operators that this version of PyTorch has."""
    found: set[Operator] = set()
    for name in names:
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    return frozenset(found)


FUSED = operators(*_FUSED)
SOFTMAX = operators(*_SOFTMAX)
CONTRACTIONS = operators(*_CONTRACTIONS)
BATCHED_PRODUCTS = operators("bmm", "baddbmm")
KEEPS_VALUES = operators(*_KEEPS_VALUES)
MULTIPLY = operators("mul")
MULTI_HEAD = operators("_native_multi_head_attention")
ENCODER_LAYER = operators("_transformer_encoder_layer_fwd")


def arguments(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The call's arguments by the names of the operator's schema, defaults filled in."""
    found = {a.name: a.default_value for a in operator._schema.arguments if a.has_default_value()}
    found |= dict(zip((a.name for a in operator._schema.arguments), args, strict=False))
    return found | kwargs


def written(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a mutable operator is about to write."""
    bound = arguments(operator, args, kwargs)
    targets: list[Tensor] = []
    for argument in operator._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = bound.get(argument.name)
            targets += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
    return targets


def opaque(operator: Operator) -> bool:
    """Whether an operator from outside ATen looks like attention that nobody can look into."""
    if not isinstance(operator, torch._ops.OpOverload):
        return any(word in str(operator).lower() for word in _OPAQUE_WORDS)
    if operator.namespace in ("aten", "prim", "prims"):
        return False
    return any(word in str(operator).lower() for word in _OPAQUE_WORDS)


def read_fused(operator: Operator, bound: Arguments, out: Any) -> tuple[Attention, Tensor, Tensor]:
    """A scaled-dot-product kernel's call: its Attention, its value [B, H, N, K] and its output of that shape."""
    q, k, v = (_four(bound[name]) for name in ("query", "key", "value"))
    bias = bound.get("attn_mask", bound.get("attn_bias"))
    scale = bound.get("scale")
    attention = Attention(
        owner="",
        operation=operator._schema.name,
        q=q,
        k=k,
        bias=bias,
        causal=bool(bound.get("is_causal", False)),
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        logsumexp=_logsumexp(out, q),
    )
    return attention, v, _four(out[0])


def _four(x: Tensor) -> Tensor:
    return x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x


def _logsumexp(out: Any, q: Tensor) -> Tensor | None:
    for candidate in out[1:2]:
        if isinstance(candidate, Tensor) and candidate.dtype == torch.float32 and candidate.ndim >= 3:
            if candidate.shape[:3] == q.shape[:3]:
                return candidate.reshape(q.shape[:3])
            if candidate.shape[:2] == q.shape[:2] and candidate.shape[2] > q.shape[2]:  # padded to the kernel's tile
                return candidate[:, :, : q.shape[2]].reshape(q.shape[:3])
    return None


def read_multi_head(operator: Operator, bound: Arguments, out: Any) -> tuple[Attention, Tensor, Callable[[Tensor], Tensor]]:
    """The fast path of nn.MultiheadAttention: Attention, value, and what turns A·V [B, H, N, K] into its output."""
    x, width, heads = bound["query"], bound["embed_dim"], bound["num_head"]
    weight, bias = bound["qkv_weight"], bound["qkv_bias"]
    q, k, v = _split(x, weight, bias, width, heads)
    attention = Attention(
        owner="",
        operation=operator._schema.name,
        q=q,
        k=k,
        bias=_fast_path_mask(bound.get("mask"), bound.get("mask_type"), x.shape[0]),
        scale=float((width // heads) ** -0.5),
    )

    def finish(mixed: Tensor) -> Tensor:
        joined = mixed.transpose(1, 2).reshape(x.shape)
        return F.linear(joined, bound["proj_weight"], bound["proj_bias"])

    return attention, v, finish


def read_encoder_layer(operator: Operator, bound: Arguments) -> Attention:
    """The fast path of nn.TransformerEncoderLayer: q and k recomputed from the layer's own input and weights."""
    x, width, heads = bound["src"], bound["embed_dim"], bound["num_heads"]
    if bound["norm_first"]:
        x = F.layer_norm(x, (width,), bound["norm_weight_1"], bound["norm_bias_1"], bound["eps"])
    q, k, _ = _split(x, bound["qkv_weight"], bound["qkv_bias"], width, heads)
    return Attention(
        owner="",
        operation=operator._schema.name,
        q=q,
        k=k,
        bias=_fast_path_mask(bound.get("mask"), bound.get("mask_type"), x.shape[0]),
        scale=float((width // heads) ** -0.5),
    )


def _split(x: Tensor, weight: Tensor, bias: Tensor, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = F.linear(x, weight, bias).reshape(*x.shape[:2], 3, heads, width // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4)
    return q, k, v


def _fast_path_mask(mask: Tensor | None, kind: int | None, images: int) -> Tensor | None:
    """The fast path hides where its mask is True; kind 0 is [N, N], 1 is [B, N] over keys, 2 is [B, H, N, N]."""
    if mask is None:
        return None
    if mask.is_nested:
        raise TypeError("a nested tensor mask")
    seen = ~mask.bool()
    if kind == 1 and seen.shape[0] == images:
        return seen[:, None, None, :]
    return seen


def read_softmax(bound: Arguments, out: Tensor) -> Attention | None:
    """A softmax over the last axis of something with two axes or more: attention, if it will be contracted."""
    if out.ndim < 3 or bound["dim"] not in (-1, out.ndim - 1):
        return None
    return Attention(owner="", operation="softmax", probs=out)
