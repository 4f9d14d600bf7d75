"""Hears by which matrices the blocks of a model multiply, so that a weight is the one in use, reparametrised or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture import operators as kernels
from collapse_probe.capture.discovery import regular
from collapse_probe.capture.recorder import AttentionEvent, Recorder, ear
from collapse_probe.capture.softmax_tracking import Frame
from collapse_probe.capture.weight_matrices import (
    BY_HEAD,
    NAMES,
    ORDERED,
    STATED,
    Matrices,
    Matrix,
    Product,
    attention_roles,
    doubtful_split,
    mlp_roles,
    projection_role,
)

_PLAIN = {
    **dict.fromkeys(kernels.operators("mm"), ("self", "mat2")),
    **dict.fromkeys(kernels.operators("addmm"), ("mat1", "mat2")),
}
_BATCHED = kernels.operators("bmm")
_LINEAR = kernels.operators("linear")
_CONVOLUTION = kernels.operators("convolution")
_CALL = re.compile(r"(.*) \(call (\d+)\)")


@dataclass(eq=False)
class BlockProducts:
    """What was heard of one block: products before and after its attention, and what the attention's own say."""

    path: str
    before: list[Product] = field(default_factory=list)
    after: list[Product] = field(default_factory=list)
    events: int = 0
    found: dict[str, Matrix] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    event: AttentionEvent | None = None

    def attended(self, event: AttentionEvent) -> None:
        """Tell q, k and v of the block's attention apart, while its values are there."""
        self.events += 1
        found, reason = attention_roles(self.before, event)
        self.found |= found
        self.missing |= {} if found else dict.fromkeys(BY_HEAD, reason)
        self.before.clear()
        event.sketch()
        self.event = event

    def finish(self) -> None:
        """Tell the products after the attention apart, once the block is over."""
        if self.events != 1:
            reason = f"{self.events} attention layers run in this block, and its matrices belong to no one of them"
            self.found, self.missing = {}, dict.fromkeys(NAMES, reason)
            return
        assert self.event is not None
        if "proj" not in self.found:
            at = projection_role(self.after, self.event, self.found.get("v"))
            if at is None:
                self.missing["proj"] = "no product after the attention has the width of its values"
            else:
                self.found["proj"] = Matrix(self.after.pop(at).weight, ORDERED)
        if "fc1" not in self.found:
            found, reason = mlp_roles(self.after)
            self.found |= found
            self.missing |= {} if found else dict.fromkeys(NAMES[4:], reason)
        doubt = doubtful_split(self.found)
        if doubt:
            self.found = {name: matrix for name, matrix in self.found.items() if name not in BY_HEAD}
            self.missing |= dict.fromkeys(BY_HEAD, doubt)
        self.missing = {name: reason for name, reason in self.missing.items() if name not in self.found}


class ProductRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each product of token vectors with a matrix, in the block in which it happens; changes nothing."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {(kernels.storage_of(p), p.storage_offset()): name for name, p in model.named_parameters()}
        self.places = [_frame(name) for name in blocks]
        self.heard = [BlockProducts(path) for path, _ in self.places]
        self.hears: Recorder | None = None

    def attended(self, event: AttentionEvent, images: int) -> None:
        """What the ear calls at each attention."""
        block = self._block(event.stack)
        if block is not None:
            block.attended(regular(event, images))
        else:
            event.sketch()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator unchanged; note it where it multiplies by a matrix."""
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and self.hears is not None and self.hears.stack:
            self._note(func, kernels.arguments(func, args, kwargs or {}), out)
        return out

    def _note(self, func: Any, bound: dict[str, Any], out: Any) -> None:
        assert self.hears is not None
        if func in kernels.MULTI_HEAD | kernels.ENCODER_LAYER:
            block = self._block([(c.path, c.number) for c in self.hears.stack])
            if block is not None:
                block.found |= _stated(bound)
        else:
            product = product_of(func, bound, out)
            if product is not None:
                self._add(product)

    def _add(self, product: Product) -> None:
        assert self.hears is not None
        frames = [(c.path, c.number) for c in self.hears.stack]
        block = self._block(frames)
        if block is None or product.rows <= self.hears.hearing.images:
            return
        w = product.weight
        name = self.names.get((kernels.storage_of(w), w.storage_offset()), frames[-1][0])
        product = replace(product, name=name.removeprefix(block.path + "."))
        if block.events:
            block.after.append(replace(product, output=None))
        else:
            block.before.append(product)

    def _block(self, frames: Sequence[Frame]) -> BlockProducts | None:
        """The block in which a module stack stands, if any."""
        for path, number in frames:
            for place, (block, call) in enumerate(self.places):
                if number == call and (path == block or path.startswith(block + ".")):
                    return self.heard[place]
        return None


def record_matrices(model: nn.Module, images: Tensor, blocks: Sequence[str]) -> Matrices:
    """The matrices of each block (names as in a Plan) by which `model` multiplies in one forward pass of `images`.

    The pass is a plain one under no_grad. What cannot be told has its reason in `Matrices.missing`.
    """
    listens = ProductRecorder(model, blocks)
    hears = ear(model, lambda heard: None, thorough=True, examine=listens.attended)
    with torch.inference_mode(False), torch.no_grad(), hears as listens.hears, listens:
        model(images)
    for block in listens.heard:
        block.finish()
    return Matrices(tuple(blocks), tuple(b.found for b in listens.heard), tuple(b.missing for b in listens.heard))


def product_of(func: Any, bound: dict[str, Any], out: Any) -> Product | None:
    """The product that an operator makes of vectors with a matrix, or None."""
    if func in _PLAIN:
        vectors, matrix = (bound[name] for name in _PLAIN[func])
        return Product("", matrix.detach().T, len(vectors), out.detach())
    if func in _BATCHED and len(bound["mat2"]) == 1:
        return Product("", bound["mat2"].detach()[0].T, bound["self"].shape[1], out.detach()[0])
    if func in _LINEAR and bound["weight"].ndim == 2:
        return Product("", bound["weight"].detach(), out.numel() // out.shape[-1], out.detach().flatten(0, -2))
    if func in _CONVOLUTION and _pointwise(bound):
        output = out.detach().flatten(2).transpose(1, 2).flatten(0, 1)
        return Product("", bound["weight"].detach().flatten(1), len(output), output)
    return None


def _pointwise(bound: dict[str, Any]) -> bool:
    """Whether a convolution is one matrix applied at every place."""
    weight = bound["weight"]
    once = bound["groups"] == 1 and not bound["transposed"] and not any(bound["padding"]) and set(bound["stride"]) == {1}
    return bool(once and weight.ndim == 4 and weight.shape[2:] == (1, 1))


def _stated(bound: dict[str, Any]) -> dict[str, Matrix]:
    """The matrices that the fast path of nn.MultiheadAttention, or of a whole encoder layer, is given."""
    heads = bound.get("num_head", bound.get("num_heads"))
    parts = bound["qkv_weight"].detach().chunk(3)
    found = {name: Matrix(part, STATED, int(heads or 1)) for name, part in zip(BY_HEAD, parts, strict=True)}
    rest = {"proj": "proj_weight", "fc1": "ffn_weight_1", "fc2": "ffn_weight_2"}
    return found | {name: Matrix(bound[key].detach(), STATED) for name, key in rest.items() if bound.get(key) is not None}


def _frame(name: str) -> Frame:
    """Path and number of the call that a block's name in a Plan stands for."""
    repeated = _CALL.fullmatch(name)
    return (repeated[1], int(repeated[2]) - 1) if repeated else (name, 0)
