"""Runs a model with other attention maps in place of its own; whatever is not replaced stays the same to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from collapse_probe.capture import operators as kernels
from collapse_probe.capture.capture import noise
from collapse_probe.capture.discovery import heads_queries_keys, regular
from collapse_probe.capture.operators import storage_of, tensors_in
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.recorder import AttentionEvent, Recorder
from collapse_probe.capture.softmax_tracking import Frame
from collapse_probe.capture.trace import Attention, maps_of
from collapse_probe.distributed import unwrap
from collapse_probe.errors import CaptureError

KINDS: dict[str, str] = {
    "share": "the map of the block before, as it is in the same run (already replaced, where that block is replaced too); with "
    "blocks of other sizes between, that of the nearest earlier block whose map has the same heads, queries and keys",
    "mean": "the mean of the block's own map over all images of the run, gathered in a pass before with nothing replaced",
    "uniform": "the same weight for every key that the query may see",
    "identity": "every query reads its own token alone",
    "skip": "the attention branch gives zeros, its bias included, so that the residual stream passes alone",
}
WITHOUT_BRANCH = (
    "no module around the attention gives nothing but the attention's result: the residual is added within, or something "
    "besides the map carries the tokens on"
)


@dataclass(frozen=True)
class Branch:
    """What is silenced to skip a layer: the module call `frame`, or where that is None the attention inside a fused layer."""

    frame: Frame | None


@dataclass(frozen=True)
class Replacement:
    """What happens to one attention layer: its `kind`; the layer that `share` takes from; the branch that `skip` silences."""

    kind: str
    source: int | None = None
    branch: Branch | None = None


def layers_of(plan: Plan, block: int) -> list[int]:
    """The attention layers of a block, as indices into `plan.layers`."""
    return [i for i in plan.map_layers if plan.layers[i].block == block]


def source_of(plan: Plan, layer: int) -> int | None:
    """The layer whose map `share` takes: in the nearest earlier block with a map of the same heads, queries and keys."""
    mine = plan.layers[layer]
    assert mine.block is not None
    for block in range(mine.block - 1, -1, -1):
        alike = [i for i in layers_of(plan, block) if not plan.layers[i].reason and plan.layers[i].signature == mine.signature]
        if alike:
            place = layers_of(plan, mine.block).index(layer)
            return alike[min(place, len(alike) - 1)]
    return None


def refusal(plan: Plan, kind: str, block: int, branches: Mapping[int, Branch]) -> str:
    """Why the maps of a block cannot be replaced by `kind`; empty where they can."""
    for layer in layers_of(plan, block):
        found = plan.layers[layer]
        if kind in ("share", "mean") and found.reason:
            return found.reason
        if kind == "share" and source_of(plan, layer) is None:
            return (
                "there is no block before it"
                if block == 0
                else f"no earlier block has a map of {found.heads} heads and {found.queries} × {found.keys}"
            )
        if kind == "identity" and found.queries != found.keys:
            return f"its maps are not square ({found.queries} × {found.keys})"
        if kind == "skip" and layer not in branches:
            return f"{found.owner}: {WITHOUT_BRANCH}"
    return ""


def replacements_for(plan: Plan, kind: str, blocks: Sequence[int], branches: Mapping[int, Branch]) -> dict[int, Replacement]:
    """The orders for all layers of some blocks, none of which refuses."""
    return {
        layer: Replacement(
            kind, source_of(plan, layer) if kind == "share" else None, branches.get(layer) if kind == "skip" else None
        )
        for block in blocks
        for layer in layers_of(plan, block)
    }


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


Gather = Callable[[int, Tensor], None]
"""Takes the index of a layer and its map [B, H, N, N] in float32: what multiplies V."""

SILENT = "silent"
"""The kind of order with which branches are looked for: every map is zero."""
READERS = (
    (kernels.FUSED, kernels.read_fused),
    (kernels.MULTI_HEAD, kernels.read_multi_head),
    (kernels.ENCODER_LAYER, kernels.read_encoder_layer),
)


class MapReplacer(Recorder):  # type: ignore[no-untyped-call]
    """An ear that also acts: what multiplies V in the layers named by `orders` is another map.

    A fused kernel runs, and its output is replaced by A'·V for the new map, in the kernel's dtype and memory layout; its other
    outputs (the logsumexp, random states), which only a backward pass reads, stay. The fast paths of nn.MultiheadAttention and
    nn.TransformerEncoderLayer likewise, through the rest of what they compute. In eager attention the product runs again with
    the new map in place of the operand that multiplies V; where a model changes its map after the softmax (Re-attention,
    talking heads) that is the changed map, which counts as the layer's map throughout.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        orders: Mapping[int, Replacement],
        means: Mapping[int, Tensor],
        gather: Gather | None,
    ) -> None:
        super().__init__(model, lambda heard: None)
        self.plan, self.orders, self.means, self.gather = plan, orders, means, gather
        self.silenced = {order.branch.frame for order in orders.values() if order.branch is not None} - {None}
        self.looking = any(order.kind == SILENT for order in orders.values())
        self.around: dict[int, tuple[Frame, ...]] = {}
        self.within: set[int] = set()
        self.steady: set[Frame] = set()

    def _begin(self) -> None:
        super()._begin()
        self.lenders = Counter(order.source for order in self.orders.values() if order.source is not None)
        self.lent: dict[int, Tensor] = {}

    def leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A global forward hook: zeros in place of the output of a silenced branch."""
        top = self.stack[-1] if self.stack else None
        frame = (top.path, top.number) if top is not None and top.path == self._path(module) else None
        super().leave_module(module, args, output)
        if frame is None:
            return None
        if self.looking and _alike_for_all_images(output):
            self.steady.add(frame)
        return _zeros_first(output) if frame in self.silenced else None

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, operands = len(self.hearing.events), self._operands(func, args)
        out = super()._run(func, args, kwargs)
        for index, event in enumerate(self.hearing.events[before:], start=before):
            self._check(index, event)
            new = self._new_map(index, event.attention)
            order = self.orders.get(index)
            if order is not None and order.kind == "skip":
                out = self._skipped(func, args, kwargs, out)
            elif new is not None:
                operand = operands.get(id(event.attention))
                out = (
                    self._kernel_with(func, args, kwargs, out, new)
                    if operand is None
                    else _product_with(func, args, kwargs, operand, new)
                )
            event.sketch()
        return out

    def _check(self, index: int, event: AttentionEvent) -> None:
        regular(event, self.hearing.images)
        expected = self.plan.layers[index] if index < len(self.plan.layers) else None
        found = event.attention.owner, heads_queries_keys(event.attention)
        if expected is None or found != (expected.owner, expected.signature):
            wanted = "no further one" if expected is None else f"{expected.owner} with {expected.signature}"
            raise CaptureError(
                f"attention call {index} was expected to be {wanted} (heads, queries, keys), came {found[0]} with {found[1]}; "
                "replace maps in a model whose depth does not depend on the data, on images of the probe's size"
            )
        if self.looking:
            self.around[index] = event.stack

    def _new_map(self, index: int, heard: Attention) -> Tensor | None:
        """The map [B, H, N, N] that layer `index` uses instead of its own, None where it keeps that; lends and gathers maps."""
        order, new = self.orders.get(index), None
        if order is not None and order.kind != "skip":
            new = self._made(index, order, heard).expand(shape_of(heard))
        if index in self.lenders or self.gather is not None:
            used = own_map(heard) if new is None else new
            if index in self.lenders:
                self.lent[index] = used
            if self.gather is not None:
                self.gather(index, used)
        return new

    def _made(self, index: int, order: Replacement, heard: Attention) -> Tensor:
        if order.kind == "share":
            assert order.source is not None
            self.lenders[order.source] -= 1
            return self.lent[order.source] if self.lenders[order.source] else self.lent.pop(order.source)
        if order.kind == "mean":
            return self.means[index]
        if order.kind == "uniform":
            return uniform(heard)
        tokens, device = shape_of(heard)[-1], device_of(heard)
        return torch.eye(tokens, device=device) if order.kind == "identity" else torch.zeros((), device=device)

    def _kernel_with(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, new: Tensor) -> Any:
        """What a kernel returns when its map is `new`."""
        bound = kernels.arguments(func, args, kwargs)
        attention, value, _, finish = _reader(func)(func, bound, out)
        assert attention.q is not None
        mixed = (new @ _all_heads(value, attention.q.shape[1]).float()).to(value.dtype)
        whole = mixed if finish is None else finish(mixed)
        if func in kernels.MULTI_HEAD and out[1] is not None and out[1].numel():
            return _refilled(out[0], whole), _refilled(out[1], new.mean(1) if bound["average_attn_weights"] else new)
        return (_refilled(out[0], whole), *out[1:]) if isinstance(out, tuple) else _refilled(out, whole)

    def _skipped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """A fused encoder layer without its attention branch; elsewhere the branch is silenced where its module ends."""
        if func not in kernels.ENCODER_LAYER:
            return out
        bound = kernels.arguments(func, args, kwargs)
        bound |= {name: torch.zeros_like(bound[name]) for name in ("proj_weight", "proj_bias")}
        _, value, _, finish = kernels.read_encoder_layer(func, bound, out)
        assert finish is not None
        return _refilled(out, finish(value))

    def _operands(self, func: Any, args: tuple[Any, ...]) -> dict[int, Tensor]:
        """For each softmax that a product is about to use: the operand that holds its map, by the id of its Attention."""
        if not self.softmaxes.pending or func not in kernels.CONTRACTIONS | kernels.MULTIPLY:
            return {}
        inputs, found = list(tensors_in(args)), {}
        for softmax in self.softmaxes.pending:
            probs = softmax.attention.probs
            assert probs is not None
            alike = [x for x in inputs if storage_of(x) in softmax.derived and x.numel() == probs.numel()]
            if func in kernels.CONTRACTIONS:
                alike = [x for x in alike if x.shape[-2:] in (probs.shape[-2:], probs.shape[-2:][::-1])]
            if alike:
                found[id(softmax.attention)] = alike[0]
        return found

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        before = len(self.hearing.events)
        super()._note(func, args, kwargs, out)
        if func in kernels.ENCODER_LAYER:
            self.within |= set(range(before, len(self.hearing.events)))


@contextmanager
def replacing(
    model: nn.Module,
    plan: Plan,
    orders: Mapping[int, Replacement],
    *,
    means: Mapping[int, Tensor] | None = None,
    gather: Gather | None = None,
) -> Iterator[MapReplacer]:
    """Run `model` with other maps inside the `with`, as `orders` say by index into `plan.layers`; with none it runs as it is.

    `means` holds the maps [H, N, N] in float32 that `mean` puts in; `gather` is called with each layer's map. Raises
    CaptureError where a forward pass is not the one that was planned.
    """
    acts = MapReplacer(unwrap(model), plan, orders, means or {}, gather)
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(acts.enter_module).remove)
        stack.callback(register_module_forward_hook(acts.leave_module, always_call=True).remove)
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(acts)
        yield acts


def branches_of(model: nn.Module, plan: Plan, size: tuple[int, int], seed: int = 0) -> dict[int, Branch]:
    """For each layer what has to give zeros so that its attention adds nothing; layers without such a place are missing.

    With all maps zero, two different images are run: the outermost module between the block and its attention whose output is
    then the same for both adds nothing but attention (and biases), and so can be silenced. The residual stream differs.
    """
    model = unwrap(model)
    silent = {index: Replacement(SILENT) for index in plan.map_layers}
    with torch.inference_mode(False), torch.no_grad(), replacing(model, plan, silent) as acts:
        model(noise(model, size, 3, seed))
    found = {index: Branch(None) for index in acts.within}
    for index, stack in acts.around.items():
        block = plan.layers[index].block
        if index in acts.within or block is None:
            continue
        inside = plan.blocks[block].partition(" (call ")[0] + "."
        frame = next((f for f in stack if f[0].startswith(inside) and f in acts.steady), None)
        if frame is not None:
            found[index] = Branch(frame)
    return found


def _reader(func: Any) -> Callable[[Any, dict[str, Any], Any], kernels.Read]:
    return next(read for operators, read in READERS if func in operators)


def _all_heads(value: Tensor, heads: int) -> Tensor:
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)


def _refilled(like: Tensor, values: Tensor) -> Tensor:
    """`values` in the shape, dtype and memory layout of `like`: what follows may rely on them."""
    return torch.empty_like(like).copy_(values.reshape(like.shape))


def _product_with(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operand: Tensor, new: Tensor) -> Any:
    """A product again, with the map `new` in place of `operand`, turned as that is."""
    square = new.shape[-1] == new.shape[-2]
    turned = operand is list(tensors_in(args))[-1] if square else operand.shape[-2:] != new.shape[-2:]
    put_in = (new.transpose(-1, -2) if turned else new).reshape(operand.shape).to(operand.dtype)
    return func(*_swapped(args, operand, put_in), **kwargs)


def _swapped(values: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_swapped(value, old, new) for value in values)
    return new if values is old else values


def _alike_for_all_images(output: Any) -> bool:
    """Whether the first tensor of a module's output is the same for every entry of its first axis."""
    x = next(tensors_in(output if isinstance(output, (list, tuple)) else (output,)), None)
    if x is None or x.ndim < 2 or len(x) < 2 or not x.is_floating_point():
        return False
    return torch.allclose(x, x[:1].expand_as(x), rtol=1e-4, atol=1e-6)


def _zeros_first(output: Any) -> Any:
    """A module's output with zeros in place of its first tensor."""
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    first = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    return (*output[:first], torch.zeros_like(output[first]), *output[first + 1 :])
