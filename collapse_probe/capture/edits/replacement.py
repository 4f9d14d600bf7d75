"""Runs a model with other attention maps in place of its own; whatever is not replaced stays the same to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import OperatorCall, tensors_in
from collapse_probe.capture.layers import frame_of
from collapse_probe.capture.layout import is_plain, laid_out, read_part
from collapse_probe.capture.plan import IMAGE, Frame, Layer, Part, Plan
from collapse_probe.capture.recorder import AttentionEvent, ModuleTable, Recorder
from collapse_probe.capture.trace import Attention, expand_heads
from collapse_probe.distributed import unwrap
from collapse_probe.errors import CaptureError

KINDS: dict[str, str] = {
    "share": "the map of the block before, as it is in the same run (already replaced, where that block is replaced too); with "
    "blocks of other sizes between, that of the nearest earlier block whose map has the same heads, queries and keys, if each "
    "block from there on gives its output to the next",
    "mean": "the mean of the block's own map over all images of the run, gathered in a pass before with nothing replaced",
    "donor": "the map of another image, which is drawn by the image's name out of 64 at most, never itself, and runs beside it",
    "uniform": "the same weight for every key that the query may see",
    "identity": "every query reads its own token alone",
    "skip": "the attention branch gives zeros, its bias included, so that the residual stream passes alone",
}
CHANGED = "changed"
"""The kind of replacement of a layer whose map and values are handed to a caller, who may give others."""
ZEROS = "zeros"
"""The kind of replacement with which branches are searched: every map is zero."""


Branch = Frame | None
"""What gives zeros to skip a layer: a module call, or where that is None the attention inside a fused layer."""


@dataclass(frozen=True)
class Replacement:
    """What happens to one attention layer: its `kind`; the layer that `share` takes from; the branch that `skip` zeroes."""

    kind: str
    source: int | None = None
    branch: Branch = None


def layers_of(plan: Plan, block: int) -> list[int]:
    """The attention layers of a block, as indices into `plan.layers`."""
    return [i for i in plan.map_layers if plan.layers[i].block == block]


def source_of(plan: Plan, layer: int) -> int | None:
    """The layer whose map `share` takes: in the nearest earlier block with a map of the same heads, queries and keys.

    None also where some block on the way does not give its output to the next.
    """
    mine = plan.layers[layer]
    assert mine.block is not None
    place = layers_of(plan, mine.block).index(layer)
    group = {plan.map_layers[position] for position in plan.groups().get(mine.signature, [])}
    for block in reversed(range(mine.block)):
        if not plan.adjacent_blocks[block]:
            return None
        if alike := [i for i in layers_of(plan, block) if i in group]:
            return alike[min(place, len(alike) - 1)]
    return None


def refusal(plan: Plan, kind: str, block: int, branches: Mapping[int, Branch]) -> str:
    """Why the maps of a block cannot be replaced by `kind`; empty where they can."""
    for index in layers_of(plan, block):
        layer = plan.layers[index]
        if why := _not_one_call(layer):
            return why
        if kind in ("share", "mean", "donor") and layer.reason:
            return layer.reason
        if kind == "share" and source_of(plan, index) is None:
            if block == 0 or not plan.adjacent_blocks[block - 1]:
                return "there is no block before it" + (" that gives it its output" if block else "")
            return f"no earlier block has a map of {layer.heads} heads and {layer.queries} × {layer.keys}"
        if kind == "identity" and layer.queries != layer.keys:
            return f"its maps are not square ({layer.queries} × {layer.keys})"
        if kind == "skip" and index not in branches:
            return (
                f"{layer.owner}: no module around the attention gives nothing but the attention's result: the residual is "
                "added within, or something besides the map carries the tokens on"
            )
    return ""


def _not_one_call(layer: Layer) -> str:
    """Why the maps of a layer cannot be put into a call; empty where one call makes them for all images."""
    if not layer.parts:
        return layer.reason or "its attention was not captured"
    if len(layer.parts) > 1 or layer.parts[0].calls != 1:
        return f"{layer.owner}: its maps are made in several attention calls"
    if not any(role == IMAGE for axis in layer.parts[0].axes for role, _ in axis):
        return f"{layer.owner}: its maps do not depend on the image"
    return ""


def replacements_for(plan: Plan, kind: str, blocks: Sequence[int], branches: Mapping[int, Branch]) -> dict[int, Replacement]:
    """The replacements for all layers of some blocks, by layer; `refusal` must be empty for each."""
    return {
        layer: Replacement(
            kind, source_of(plan, layer) if kind == "share" else None, branches.get(layer) if kind == "skip" else None
        )
        for block in blocks
        for layer in layers_of(plan, block)
    }


def uniform(attention: Attention) -> Tensor:
    """The same weight for every key that a query may see, to be broadcast to [B, H, N, N]; zeros where it may see none.

    Hidden are what a mask hides; in eager attention, where no mask is recorded, the keys whose softmax is exactly 0.

    >>> probs = torch.tensor([[[[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]]])
    >>> uniform(Attention("attn", "softmax", probs=probs))[0, 0, 0].tolist()
    [0.5, 0.5, 0.0]
    """
    if attention.q is None:
        assert attention.probs is not None
        visible = attention.probs != 0
    else:
        visible = torch.ones(1, 1, *attention.shape[-2:], dtype=torch.bool, device=attention.q.device)
        if attention.bias is not None:
            bias = attention.bias
            visible = visible & (bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2)
        if attention.causal:
            visible = visible.tril()
    return visible.float() / visible.sum(-1, keepdim=True).clamp_min(1)


Change = Callable[[int, Tensor, Tensor | None], "tuple[Tensor, Tensor | None, Tensor | None] | None"]
"""Takes the index of a layer, its map [B, H, N, N] and, of fused attention, its values [B, H, N, K], in float32; gives another
map, what is added to its product with the values, and which images are changed (None: all); or None where all stays.
"""
Gather = Callable[[int, Tensor], None]
"""Takes the index of a layer and its map [B, H, N, N] in float32: what multiplies V."""


class MapReplacer:
    """Puts other maps in place of those that multiply V in the layers named by `replacements`, while a recorder runs.

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
        replacements: Mapping[int, Replacement],
        means: Mapping[int, Tensor],
        gather: Gather | None,
        modules: ModuleTable | None = None,
        change: Change | None = None,
    ) -> None:
        self.recorder = Recorder(
            model, by_hand=plan.by_hand, on_operator=self._on_operator, on_module=self._on_module, modules=modules
        )
        self.plan, self.replacements, self.means, self.gather, self.change = plan, replacements, means, gather, change
        self.zeroed = {r.branch for r in replacements.values()} - {None}
        self.searching = any(r.kind == ZEROS for r in replacements.values())
        self.stacks: dict[int, tuple[Frame, ...]] = {}  # by layer: the modules around it
        self.fused_blocks: set[int] = set()  # layers inside a fused encoder layer
        self.steady: set[Frame] = set()  # module calls whose (first) output is the same for all images
        self.calls = {  # by module call, queries and keys: the layer
            (layer.parts[0].frame, layer.queries, layer.keys): i
            for i, layer in enumerate(plan.layers)
            if not _not_one_call(layer)
        }
        self.takers: Counter[int] = Counter()  # by layer: how many layers are still to take its map
        self.shared: dict[int, Tensor] = {}

    def _on_module(self, frame: Frame, output: Any) -> Any:
        """Zeros in place of the output of a branch that is skipped."""
        if self.searching:
            x = next(tensors_in(output if isinstance(output, (list, tuple)) else (output,)), None)
            if x is not None and x.ndim > 1 and len(x) > 1 and x.is_floating_point():
                self.steady |= {frame} if torch.allclose(x, x[:1].expand_as(x), rtol=1e-4, atol=1e-6) else set()
        if frame not in self.zeroed or output is None:
            return None
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        first = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
        return (*output[:first], torch.zeros_like(output[first]), *output[first + 1 :])

    def _on_operator(self, call: OperatorCall, events: list[AttentionEvent]) -> None:
        for event in events:
            if event.index == 0:  # a new forward pass
                self.takers = Counter(r.source for r in self.replacements.values() if r.source is not None)
                self.shared.clear()
            index = self._layer_of(event)
            if index is None:
                event.sketch()
                continue
            if self.searching:
                self.stacks[index] = event.stack
                if call.func in attention_operators.ENCODER_LAYER:
                    self.fused_blocks.add(index)
            part, raw, replacement = self.plan.layers[index].parts[0], event.attention, self.replacements.get(index)
            images = self.recorder.log.images
            skipped = replacement is None or replacement.kind == "skip"
            if self.plan.layers[index].mixed and raw.weights is None and not (skipped and self.gather is None):
                raise CaptureError(
                    f"the map in effect in {part.frame[0]} is a sum of several kernels' maps, which the model never forms and "
                    "which cannot be replaced; switch its fused attention off (timm: TIMM_FUSED_ATTN=0)"
                )
            if replacement is not None and replacement.kind == CHANGED:
                self._change(index, part, call, event, images)
                event.sketch()
                continue
            new = self._new_map(index, read_part(part, [raw], images))
            if replacement is not None and replacement.kind == "skip":
                if call.func in attention_operators.ENCODER_LAYER:  # elsewhere the branch gives zeros where its module ends
                    zeros = {name: torch.zeros_like(call.bound[name]) for name in ("proj_weight", "proj_bias")}
                    kernel = attention_operators.read_encoder_layer(
                        OperatorCall(call.func, (), {**call.bound, **zeros}, call.out)
                    )
                    assert kernel.finish is not None
                    call.out = _refilled(call.out, kernel.finish(kernel.value))
            elif new is not None:
                like = raw.probs if raw.q is None else raw.q
                assert like is not None
                new = laid_out(new, part, like, images)
                call.out = _kernel_with(call, new) if event.operand is None else _product_with(call, event, new)
            event.sketch()

    def _change(self, index: int, part: Part, call: OperatorCall, event: AttentionEvent, images: int) -> None:
        """Let the caller change what a call gives."""
        assert self.change is not None
        raw = event.attention
        own, values = _own_map(read_part(part, [raw], images)), None
        if event.operand is None and is_plain(part):
            values = expand_heads(attention_operators.READERS[call.func](call).value, own.shape[1]).float()
        made = self.change(index, own, values)
        if made is None:
            return
        new, added, rows = made
        like, before = raw.probs if raw.q is None else raw.q, call.out
        assert like is not None
        new = laid_out(new, part, like, images)
        call.out = _kernel_with(call, new, added) if event.operand is None else _product_with(call, event, new)
        first, old = (x[0] if isinstance(x, tuple) else x for x in (call.out, before))
        if rows is not None and is_plain(part) and first.ndim == 4 and len(first) == len(rows):
            first[~rows] = old[~rows]  # what is not changed stays the kernel's own

    def _layer_of(self, event: AttentionEvent) -> int | None:
        """The layer of a call, None where its maps cannot be replaced; CaptureError where the probe had no such call."""
        frame, (queries, keys) = frame_of(event), event.attention.shape[-2:]
        index = self.calls.get((frame, queries, keys))
        mine = [part for layer in self.plan.layers for part in layer.parts if part.frame == frame]
        fits = any(part.keys == keys and queries in part.queries for part in mine)
        if not fits and (mine or frame not in self.plan.frames):
            raise CaptureError(
                f"attention call {event.index}, in {frame[0] or 'the model'}, has {queries} queries and {keys} keys, as none "
                "had in the probe; replace maps in a model whose depth does not depend on the data, and on images of its size"
            )
        return index

    def _new_map(self, index: int, attention: Attention) -> Tensor | None:
        """The map [B, H, N, N] that a layer uses instead of its own, None where it keeps that; shares and gathers maps."""
        new, replacement = None, self.replacements.get(index)
        if replacement is not None and replacement.kind != "skip":
            new = self._made(index, replacement, attention).expand(attention.shape)
        if index in self.takers or self.gather is not None:
            used = _own_map(attention) if new is None else new
            if index in self.takers:
                self.shared[index] = used
            if self.gather is not None:
                self.gather(index, used)
        return new

    def _made(self, index: int, replacement: Replacement, attention: Attention) -> Tensor:
        if replacement.kind == "share":
            source = replacement.source
            assert source is not None
            self.takers[source] -= 1
            return self.shared[source] if self.takers[source] else self.shared.pop(source)
        if replacement.kind == "mean":
            return self.means[index]
        if replacement.kind == "uniform":
            return uniform(attention)
        if replacement.kind == "donor":  # the second half of the images lends to the first, and keeps its own
            own = _own_map(attention)
            lent = own[len(own) // 2 :]
            return torch.cat([lent, lent])
        like = attention.probs if attention.q is None else attention.q
        assert like is not None
        if replacement.kind == "identity":
            return torch.eye(attention.shape[-1], device=like.device)
        return torch.zeros((), device=like.device)


def _own_map(attention: Attention) -> Tensor:
    """What multiplies V [B, H, N, N] in float32, in memory of its own: the model may overwrite it."""
    if attention.q is not None:
        return attention.maps()["weights"]
    own = attention.probs if attention.weights is None else attention.weights
    assert own is not None
    return own.to(torch.float32, copy=True)


@contextmanager
def replacing(
    model: nn.Module,
    plan: Plan,
    replacements: Mapping[int, Replacement],
    *,
    means: Mapping[int, Tensor] | None = None,
    gather: Gather | None = None,
    modules: ModuleTable | None = None,
    change: Change | None = None,
) -> Iterator[MapReplacer]:
    """Run `model` with other maps inside the `with`, by index into `plan.layers`; with no replacements it runs as it is.

    `means` holds the maps [H, N, N] in float32 that `mean` puts in; `gather` is called with each layer's map, `change` with
    what the layers of the kind CHANGED multiply. Raises CaptureError where a forward pass is not the one that was planned.
    `modules` as in `Recorder`.
    """
    replacer = MapReplacer(unwrap(model), plan, replacements, means or {}, gather, modules, change)
    with torch.inference_mode(False), torch.no_grad(), replacer.recorder.attached():
        yield replacer


def _kernel_with(call: OperatorCall, new: Tensor, added: Tensor | None = None) -> Any:
    """What a kernel returns when its map is `new`, and `added` what is added to the product with its values."""
    kernel, out = attention_operators.READERS[call.func](call), call.out
    mixed = kernel.mixed(new)
    mixed = (mixed if added is None else mixed + added).to(kernel.value.dtype)
    whole = mixed if kernel.finish is None else kernel.finish(mixed)
    if call.func in attention_operators.MULTI_HEAD and out[1] is not None and out[1].numel():
        return _refilled(out[0], whole), _refilled(out[1], new.mean(1) if call.bound["average_attn_weights"] else new)
    return (_refilled(out[0], whole), *out[1:]) if isinstance(out, tuple) else _refilled(out, whole)


def _refilled(like: Tensor, values: Tensor) -> Tensor:
    """`values` in the shape, dtype and memory layout of `like`: what follows may rely on them."""
    return torch.empty_like(like).copy_(values.reshape(like.shape))


def _product_with(call: OperatorCall, event: AttentionEvent, new: Tensor) -> Any:
    """A product again, with the map `new` in place of the operand that multiplied V, laid out as that is.

    Raises CaptureError where the layer's own map, laid out so, is not the operand.
    """
    operand, own = event.operand, event.attention.weights if event.attention.mixed else event.attention.probs
    assert operand is not None
    assert own is not None
    square = new.shape[-1] == new.shape[-2]
    transposed = operand is list(tensors_in(call.args))[-1] if square else operand.shape[-2:] != new.shape[-2:]

    def laid(maps: Tensor) -> Tensor:
        return (maps.transpose(-1, -2) if transposed else maps).reshape(operand.shape).to(operand.dtype)

    if operand.numel() != own.numel() or not torch.equal(laid(own), operand):
        raise CaptureError(
            f"the maps of {event.attention.owner or 'the model'} cannot be replaced: how they are laid out where they multiply "
            "the values is not known"
        )
    put_in = laid(new)

    def swapped(values: Any) -> Any:
        if isinstance(values, (list, tuple)):
            return type(values)(map(swapped, values))
        return put_in if values is operand else values

    return call.func(*swapped(call.args), **call.kwargs)
