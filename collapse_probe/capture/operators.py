"""Which operators are attention, and how each one's arguments are read into an `Attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError

Operator = Any
Arguments = dict[str, Any]
Finish = Callable[[Tensor], Tensor]
"""What a kernel still does with A·V [B, H, N, K] before it returns."""
Read = tuple[Attention, Tensor, Tensor, Finish | None]
"""What was heard of one kernel: its Attention, its value [B, H, N, K], its output, how A·V becomes that."""

KEPT = ("q", "k", "bias", "probs", "weights", "logsumexp")

_FUSED = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
    "scaled_dot_product_attention",
)
_SOFTMAX = ("_softmax", "_safe_softmax", "softmax")
_CONTRACTIONS = ("bmm", "baddbmm", "matmul", "einsum")
_KEEPS_VALUES = (
    "_to_copy",
    "clone",
    "contiguous",
    "expand_copy",
    "view_copy",
    "_reshape_copy",
    "copy",
    "copy_",
)
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


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor lives in; 0 where it has no single one (sparse)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else 0


@cache
def opaque(operator: Operator) -> bool:
    """Whether an operator looks like attention that nobody here can look into."""
    name = str(operator).lower()
    if isinstance(operator, torch._ops.OpOverload) and operator.namespace in ("aten", "prim", "prims"):
        return "attention" in name
    return any(word in name for word in _OPAQUE_WORDS)


def read_fused(operator: Operator, bound: Arguments, out: Any) -> Read:
    """A scaled-dot-product kernel's call."""
    q, k, v = (_four(bound[name]).detach() for name in ("query", "key", "value"))
    bias, scale = bound.get("attn_mask", bound.get("attn_bias")), bound.get("scale")
    outputs = out if isinstance(out, tuple) else (out,)
    attention = Attention(
        owner="",
        operation=operator._schema.name,
        q=q,
        k=k,
        bias=None if bias is None else bias.detach(),
        causal=bool(bound.get("is_causal", False)),
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        logsumexp=_logsumexp(outputs, q),
    )
    return attention, v, _four(outputs[0]).detach(), None


def _four(x: Tensor) -> Tensor:
    return x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x


def _logsumexp(outputs: tuple[Any, ...], q: Tensor) -> Tensor | None:
    for candidate in outputs[1:2]:
        if isinstance(candidate, Tensor) and candidate.dtype == torch.float32 and candidate.ndim >= 3:
            if candidate.shape[:3] == q.shape[:3]:
                return candidate.reshape(q.shape[:3])
            if candidate.shape[:2] == q.shape[:2] and candidate.shape[2] > q.shape[2]:  # padded to the kernel's tile
                return candidate[:, :, : q.shape[2]].reshape(q.shape[:3])
    return None


def read_multi_head(operator: Operator, bound: Arguments, out: Any) -> Read:
    """The fast path of nn.MultiheadAttention: q, k, v recomputed from the layer's own input and weights."""
    x, width, heads = bound["query"], bound["embed_dim"], bound["num_head"]
    attention, value = _projected(operator, bound, x, width, heads)

    def finish(mixed: Tensor) -> Tensor:
        return _project_out(mixed, bound)

    return attention, value, out[0].detach(), finish


def read_encoder_layer(operator: Operator, bound: Arguments, out: Any) -> Read:
    """The fast path of nn.TransformerEncoderLayer, which is a whole block."""
    x, width, heads = bound["src"], bound["embed_dim"], bound["num_heads"]
    first = bound["norm_first"]

    def norm(tokens: Tensor, number: int) -> Tensor:
        return F.layer_norm(tokens, (width,), bound[f"norm_weight_{number}"], bound[f"norm_bias_{number}"], bound["eps"])

    def feed(tokens: Tensor) -> Tensor:
        activate = F.gelu if bound["use_gelu"] else F.relu
        hidden: Tensor = activate(F.linear(tokens, bound["ffn_weight_1"], bound["ffn_bias_1"]))
        return F.linear(hidden, bound["ffn_weight_2"], bound["ffn_bias_2"])

    def finish(mixed: Tensor) -> Tensor:
        attended: Tensor = x + _project_out(mixed, bound)
        if first:
            return attended + feed(norm(attended, 2))
        attended = norm(attended, 1)
        return norm(attended + feed(attended), 2)

    _refuse_nested(x)
    attention, value = _projected(operator, bound, norm(x, 1) if first else x, width, heads)
    return attention, value, out.detach(), finish


def _projected(operator: Operator, bound: Arguments, x: Tensor, width: int, heads: int) -> tuple[Attention, Tensor]:
    """Attention and value [B, H, N, K] of a fast path whose attention reads `x` [B, N, D]."""
    _refuse_nested(x)
    parts = F.linear(x, bound["qkv_weight"], bound["qkv_bias"]).reshape(*x.shape[:2], 3, heads, width // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).detach()
    attention = Attention(
        owner="",
        operation=operator._schema.name,
        q=q,
        k=k,
        bias=_fast_path_mask(bound.get("mask"), bound.get("mask_type")),
        scale=float((width // heads) ** -0.5),
    )
    return attention, v


def _project_out(mixed: Tensor, bound: Arguments) -> Tensor:
    """A·V [B, H, N, K] through the output projection."""
    return F.linear(mixed.transpose(1, 2).flatten(2), bound["proj_weight"], bound["proj_bias"])


def _refuse_nested(x: Tensor) -> None:
    if x.is_nested:
        raise CaptureError(
            "nested tensors cannot be listened to: give the model no padding mask, or build its "
            "nn.TransformerEncoder with enable_nested_tensor=False"
        )


def _fast_path_mask(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """The fast path hides where its mask is True; kind 0 is [N, N], 1 [B, N] over keys, 2 [B, H, N, N]."""
    if mask is None:
        return None
    seen = ~mask.detach().bool()
    return seen[:, None, None, :] if kind == 1 else seen


def read_softmax(bound: Arguments, out: Tensor) -> Attention | None:
    """A softmax over the last of three axes or more: attention, if it will multiply something."""
    if out.ndim < 3 or bound["dim"] not in (-1, out.ndim - 1):
        return None
    return Attention(owner="", operation="softmax", probs=out.detach())
