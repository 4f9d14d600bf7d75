"""Which operators are attention, how each one's arguments are read into an `Attention`, products that look like it, and sums of
its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.capture.trace import Attention, expand_heads
from collapse_probe.errors import CaptureError

Operator = Any


def operators(*names: str) -> frozenset[Operator]:
    """Every overload of the named ATen operators that this version of PyTorch has."""
    packets = [packet for name in names if (packet := getattr(torch.ops.aten, name, None)) is not None]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


FUSED = operators(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
    "scaled_dot_product_attention",
)
SOFTMAX = operators("_softmax", "_safe_softmax", "softmax")
BATCHED_PRODUCTS = operators("bmm", "baddbmm")
MATRIX_PRODUCTS = operators("mm", "addmm")
PRODUCTS = BATCHED_PRODUCTS | MATRIX_PRODUCTS
SUM = operators("sum")
SUMS = operators("add", "sub", "rsub")
PADS = operators("constant_pad_nd")
JOINS = PADS | operators("cat", "stack")
MOVES = JOINS | operators("repeat", "index_select", "roll", "flip", "_reshape_copy", "index", "gather")
COPIES = operators("_to_copy", "clone", "contiguous", "expand_copy", "view_copy", "copy", "copy_")
MULTIPLY = operators("mul")
MULTI_HEAD = operators("_native_multi_head_attention")
ENCODER_LAYER = operators("_transformer_encoder_layer_fwd")
_OPAQUE_WORDS = ("attn", "attention", "flash", "xformers", "mha")


@dataclass(eq=False)
class OperatorCall:
    """One call of an operator. `out` is what it returned, and what the model will get."""

    func: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any = None

    @cached_property
    def bound(self) -> dict[str, Any]:
        """The arguments by the names of the operator's schema, defaults filled in."""
        schema = self.func._schema.arguments
        defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        return defaults | dict(zip((a.name for a in schema), self.args, strict=False)) | self.kwargs

    def written(self) -> Iterator[Tensor]:
        """The tensors that a mutable operator is about to write."""
        arguments = self.func._schema.arguments
        return tensors_in(self.bound.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write)


@dataclass(eq=False)
class KernelCall:
    """What a kernel's call says: its attention, its `value` [B, H, N, K] and its output.

    `finish` is what the kernel still does with A·V [B, H, N, K] before it returns, None where that is nothing.
    """

    attention: Attention
    value: Tensor
    out: Tensor
    finish: Callable[[Tensor], Tensor] | None = None

    def mixed(self, maps_BHNN: Tensor) -> Tensor:
        """A·V in float32 for other maps, [B, H, N, K]."""
        return maps_BHNN @ expand_heads(self.value, maps_BHNN.shape[1]).float()


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and in lists, tuples, dicts and dataclasses among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif is_dataclass(value):
            yield from tensors_in(getattr(value, field.name) for field in fields(value))


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor lives in, also inside a vmap; 0 where it has no single one (sparse)."""
    try:
        return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else 0
    except NotImplementedError:  # a batched tensor stands for the one that it wraps
        return storage_of(torch._C._functorch.get_unwrapped(tensor))


@cache
def opaque(operator: Operator) -> bool:
    """Whether an operator looks like attention that cannot be captured."""
    name = str(operator).lower()
    if isinstance(operator, torch._ops.OpOverload) and operator.namespace in ("aten", "prim", "prims"):
        return "attention" in name
    return any(word in name for word in _OPAQUE_WORDS)


def four_axes(x: Tensor) -> Tensor:
    """A tensor of at least four axes, the first ones of size one where it has fewer."""
    return (x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x).detach()


def values_of(attention: Attention, values: Tensor | None, call: OperatorCall) -> Tensor | None:
    """The values [B, H, N, K] that an eager product multiplied by a map; None where it cannot be told how they are laid out.

    A layout counts where the map times the values is what the product gave, for the first and last head and image.
    """
    own = attention.probs if attention.weights is None else attention.weights
    if values is None or own is None or values.ndim != 3 or len(values) != math.prod(own.shape[:-2]):
        return None
    *lead, queries, keys = own.shape
    ends = [(*(0 for _ in lead),), (*(0 for _ in lead[:-1]), -1), (-1, *(0 for _ in lead[1:]))]
    for turned, out in ((values, call.out), (values.mT, call.out.mT)):
        if turned.shape[1] != keys or out.shape[1] != queries:
            continue
        read, given = (x.detach().reshape(*lead, *x.shape[1:]) for x in (turned, out))
        if all(torch.allclose((own[i] @ read[i].to(own.dtype)).float(), given[i].float(), rtol=1e-2, atol=1e-3) for i in ends):
            return read
    return None


def read_fused(call: OperatorCall) -> KernelCall:
    """A scaled-dot-product kernel's call."""
    bound = call.bound
    q, k, v = (four_axes(bound[name]) for name in ("query", "key", "value"))
    bias, scale = bound.get("attn_mask", bound.get("attn_bias")), bound.get("scale")
    outputs = call.out if isinstance(call.out, tuple) else (call.out,)
    bias, causal = None if bias is None else bias.detach(), bool(bound.get("is_causal", False))
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    attention = Attention("", call.func._schema.name, q, k, bias, causal, scale)
    for sums in outputs[1:2]:
        if isinstance(sums, Tensor) and sums.dtype == torch.float32 and sums.ndim >= 3:
            if sums.shape[:3] == q.shape[:3]:
                attention.logsumexp = sums.reshape(q.shape[:3])
            elif sums.shape[:2] == q.shape[:2] and sums.shape[2] > q.shape[2]:  # padded to the kernel's tile
                attention.logsumexp = sums[:, :, : q.shape[2]].reshape(q.shape[:3])
    return KernelCall(attention, v, four_axes(outputs[0]))


def read_multi_head(call: OperatorCall) -> KernelCall:
    """The fast path of nn.MultiheadAttention: q, k, v recomputed from the layer's own input and weights."""
    bound = call.bound
    attention, value = _projected(call, bound["query"], bound["num_head"])
    return KernelCall(attention, value, call.out[0].detach(), lambda mixed: _project_out(mixed, bound))


def read_encoder_layer(call: OperatorCall) -> KernelCall:
    """The fast path of nn.TransformerEncoderLayer, which is a whole block."""
    bound = call.bound
    x, width, norm_first = bound["src"], bound["embed_dim"], bound["norm_first"]

    def norm(tokens: Tensor, number: int) -> Tensor:
        return F.layer_norm(tokens, (width,), bound[f"norm_weight_{number}"], bound[f"norm_bias_{number}"], bound["eps"])

    def mlp(tokens: Tensor) -> Tensor:
        activate = F.gelu if bound["use_gelu"] else F.relu
        hidden: Tensor = activate(F.linear(tokens, bound["ffn_weight_1"], bound["ffn_bias_1"]))
        return F.linear(hidden, bound["ffn_weight_2"], bound["ffn_bias_2"])

    def finish(mixed: Tensor) -> Tensor:
        attended: Tensor = x + _project_out(mixed, bound)
        if norm_first:
            return attended + mlp(norm(attended, 2))
        attended = norm(attended, 1)
        return norm(attended + mlp(attended), 2)

    attention, value = _projected(call, norm(x, 1) if norm_first else x, bound["num_heads"])
    return KernelCall(attention, value, call.out.detach(), finish)


READERS: dict[Operator, Callable[[OperatorCall], KernelCall]] = {
    **dict.fromkeys(FUSED, read_fused),
    **dict.fromkeys(MULTI_HEAD, read_multi_head),
    **dict.fromkeys(ENCODER_LAYER, read_encoder_layer),
}


def _projected(call: OperatorCall, x_BND: Tensor, heads: int) -> tuple[Attention, Tensor]:
    """Attention and value [B, H, N, K] of a fast path whose attention reads `x_BND`."""
    if x_BND.is_nested:
        raise CaptureError(
            "nested tensors cannot be captured: give the model no padding mask, or build its "
            "nn.TransformerEncoder with enable_nested_tensor=False"
        )
    bound = call.bound
    width, mask = bound["embed_dim"], bound.get("mask")
    parts = F.linear(x_BND, bound["qkv_weight"], bound["qkv_bias"]).reshape(*x_BND.shape[:2], 3, heads, width // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).detach()
    visible = None if mask is None else ~mask.detach().bool()  # the fast path hides where its mask is True
    if visible is not None and bound.get("mask_type") == 1:  # kind 0 is [N, N], 1 [B, N] over keys, 2 [B, H, N, N]
        visible = visible[:, None, None, :]
    scale = float((width // heads) ** -0.5)
    return Attention(owner="", operation=call.func._schema.name, q=q, k=k, bias=visible, scale=scale), v


def _project_out(mixed_BHNK: Tensor, bound: dict[str, Any]) -> Tensor:
    return F.linear(mixed_BHNK.transpose(1, 2).flatten(2), bound["proj_weight"], bound["proj_bias"])


# ---- products of products ----

LINEAR = "linear attention"
NO_SOFTMAX = "weights that are no softmax (their rows do not sum to one)"


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that a product of activations went into: in which module, whether changed since, and from which attention
    call."""

    holder: str
    changed: bool
    tensor: Tensor
    origin: int | None = None


class Products:
    """Batched products of activations, and those whose result is multiplied again in the same module without a softmax between.

    `fixed` are the storages of the model's weights: products with them are layers.
    """

    def __init__(self, fixed: frozenset[int] = frozenset()) -> None:
        self.fixed = fixed
        self.made: dict[int, Made] = {}
        self.again: set[int] = set()  # attention calls whose result multiplies something again

    def made_from(self, x: Tensor | None) -> bool:
        """Whether a tensor was made from a product of activations."""
        return x is not None and storage_of(x) in self.made

    def follow(self, call: OperatorCall, holder: str, origin: int | None = None) -> tuple[str, Tensor, int] | None:
        """An operator ran, for the attention call `origin` where its result is that one's.

        Says which kind of attention a product of products looks like, and gives the operand and its axis that is summed over.
        """
        inputs = list(tensors_in(call.args))
        touched = [(self.made[key], i) for i, x in enumerate(inputs) if (key := storage_of(x)) in self.made]
        if call.func in BATCHED_PRODUCTS and not any(storage_of(x) in self.fixed for x in inputs[-2:]):
            self.made[storage_of(call.out)] = Made(holder, False, call.out, origin)
            here = [(made, i) for made, i in touched if made.holder == holder]
            self.again |= {made.origin for made, _ in here if made.origin is not None}
            if not here:
                return None
            changed = [i for made, i in here if made.changed]
            place = changed[0] if changed else here[0][1]
            kind = NO_SOFTMAX if changed else LINEAR
            return kind, inputs[place], -1 if place == len(inputs) - 2 else -2
        for result in tensors_in((call.out,)) if touched else ():
            from_call = next((made.origin for made, _ in touched if made.origin is not None), None)
            self.made.setdefault(storage_of(result), Made(holder, True, result, from_call))
        return None

    def forget(self, holder: str) -> None:
        """A module ends."""
        self.made = {key: made for key, made in self.made.items() if made.holder != holder}


# ---- sums of attention results ----

SCALED_SUMS = MULTIPLY | SUMS


@dataclass(eq=False)
class Attended:
    """What an attention gave, times a `factor` since: its `event`, the `values` that its map multiplied, its layout in memory
    (`shape`, `stride`) and the `memory` itself, which is kept from being used again.
    """

    event: Any
    values: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    memory: Any
    factor: Tensor | float = 1.0

    def matches(self, other: Attended) -> bool:
        """Whether another map multiplied the same values, and its result lies in memory in the same way."""
        alike = (self.shape, self.stride) == (other.shape, other.stride) and self.values.shape == other.values.shape
        return alike and (self.values.data_ptr() == other.values.data_ptr() or torch.equal(self.values, other.values))


class AttendedSums:
    """Two attentions whose results are added or subtracted, each times a factor, after they multiplied the same values, are one
    map that the model never forms (differential attention).
    """

    def __init__(self) -> None:
        self.results: dict[int, Attended] = {}

    def begin(self, event: Any, values: Tensor, out: Tensor) -> None:
        """An attention gave `out`: follow it, and forget those of other modules."""
        owner = event.attention.owner
        self.results = {key: each for key, each in self.results.items() if each.event.attention.owner == owner}
        self.results[storage_of(out)] = Attended(event, values.detach(), out.shape, out.stride(), out.untyped_storage())

    def follow(self, call: OperatorCall, events: list[Any]) -> None:
        """An operator ran: where it adds two results, the first of both events gets the map of both, and the other, the newest
        of `events`, leaves them.
        """
        if not self.results or call.func not in SCALED_SUMS or len(call.args) < 2:
            return
        left, right = call.args[:2]
        if call.func in MULTIPLY:
            self._scaled(call.out, left, right)
            self._scaled(call.out, right, left)
            return
        first, second = (self.results.get(storage_of(x)) if isinstance(x, Tensor) else None for x in (left, right))
        if first is None or second is None or not _laid_out_alike(left, right) or not first.matches(second):
            return
        kept, other = sorted((first.event, second.event), key=lambda event: int(event.index))
        if kept is other or other is not events[-1]:
            return
        alpha = call.bound.get("alpha", 1)
        signs = {"aten::sub": (1, -alpha), "aten::rsub": (-alpha, 1)}.get(call.func._schema.name, (1, alpha))
        terms = sorted(zip((first, second), signs, strict=True), key=lambda term: isinstance(term[0].factor, Tensor))
        weights = _sum_of_maps(terms)
        kept.attention = terms[0][0].event.attention  # the softmax map is that of the one without a factor
        kept.attention.weights, kept.softmaxes = weights, kept.softmaxes + other.softmaxes
        if weights.is_meta:  # a sketch, which counts its bytes
            kept.memory += weights.nbytes
        events.pop()
        self.results = {key: each for key, each in self.results.items() if each.event not in (kept, other)}

    def _scaled(self, out: Any, x: Any, factor: Any) -> None:
        """Follow a result times a number, or times one number for each image, head and query."""
        before = self.results.get(storage_of(x)) if isinstance(x, Tensor) else None
        if before is None or not isinstance(out, Tensor) or not _laid_out_alike(out, x):
            return
        if isinstance(factor, Tensor):
            rows = x.ndim == 4 and x.shape[:3] == before.event.attention.shape[:3]
            if factor.numel() > 1 and not (rows and factor.ndim <= 4 and factor.shape[-1] == 1):
                return
            factor = factor.detach()
        memory = out.untyped_storage()
        self.results[storage_of(out)] = replace(before, memory=memory, factor=before.factor * factor)


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _sum_of_maps(terms: Iterable[tuple[Attended, float]]) -> Tensor:
    """Σ sign · factor · map, [B, H, N, N] in float32; without memory where the maps have none."""
    total: Any = 0
    for each, sign in terms:
        attention = each.event.attention
        held = attention.probs if attention.q is None else attention.q
        if held.is_meta:
            return torch.empty(attention.shape, dtype=torch.float32, device="meta")
        factor = each.factor.float() if isinstance(each.factor, Tensor) else each.factor
        total = total + sign * factor * attention.maps()["weights"]
    assert isinstance(total, Tensor)
    return total
