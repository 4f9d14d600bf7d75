"""Records by which matrices the blocks of a model multiply, so that a weight is the one in use, reparametrised or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import OperatorCall, storage_of
from collapse_probe.capture.plan import Frame
from collapse_probe.capture.recorder import AttentionEvent, Recorder
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

_OPERANDS = {
    **dict.fromkeys(attention_operators.operators("mm"), ("self", "mat2")),
    **dict.fromkeys(attention_operators.operators("addmm"), ("mat1", "mat2")),
}
_BATCHED = attention_operators.operators("bmm")
_LINEAR = attention_operators.operators("linear")
_CONVOLUTION = attention_operators.operators("convolution")


@dataclass(eq=False)
class BlockProducts:
    """The products of one block, `frame`, before and after its attention, and the matrices told apart so far."""

    frame: Frame
    before: list[Product] = field(default_factory=list)
    after: list[Product] = field(default_factory=list)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    events: list[AttentionEvent] = field(default_factory=list)

    def add_attention(self, event: AttentionEvent) -> None:
        """Tell q, k and v of the block's attention apart, while its values are there."""
        roles, reason = attention_roles(self.before, event)
        self.matrices |= roles
        self.missing |= {} if roles else dict.fromkeys(BY_HEAD, reason)
        self.before.clear()
        event.sketch()
        self.events.append(event)

    def finish(self) -> None:
        """Tell the products after the attention apart, once the block is over."""
        if len(self.events) != 1:
            reason = f"{len(self.events)} attention layers run in this block, and its matrices belong to no one of them"
            self.matrices, self.missing = {}, dict.fromkeys(NAMES, reason)
            return
        if "proj" not in self.matrices:
            index = projection_role(self.after, self.events[0], self.matrices.get("v"))
            if index is None:
                self.missing["proj"] = "no product after the attention has the width of its values"
            else:
                self.matrices["proj"] = Matrix(self.after.pop(index).weight, ORDERED)
        if "fc1" not in self.matrices:
            roles, reason = mlp_roles(self.after)
            self.matrices |= roles
            self.missing |= {} if roles else dict.fromkeys(NAMES[4:], reason)
        if doubt := doubtful_split(self.matrices):
            self.matrices = {name: matrix for name, matrix in self.matrices.items() if name not in BY_HEAD}
            self.missing |= dict.fromkeys(BY_HEAD, doubt)
        self.missing = {name: reason for name, reason in self.missing.items() if name not in self.matrices}


class ProductRecorder:
    """Notes each product of token vectors with a matrix, in the block in which it happens."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.recorder = Recorder(model, thorough=True, on_operator=self._on_operator)
        self.names = {(storage_of(p), p.storage_offset()): name for name, p in model.named_parameters()}
        self.blocks = []
        for name in blocks:  # as in a Plan, which numbers the calls of a repeated block
            repeated = re.fullmatch(r"(.*) \(call (\d+)\)", name)
            self.blocks.append(BlockProducts((repeated[1], int(repeated[2]) - 1) if repeated else (name, 0)))

    def _on_operator(self, call: OperatorCall, events: list[AttentionEvent]) -> None:
        for event in events:
            block = self._block(event.stack)
            if block is None:
                event.sketch()
            else:
                block.add_attention(event)
        frames = self.recorder.frames()
        block = self._block(frames)
        if block is None:
            return
        if (
            call.func in attention_operators.MULTI_HEAD | attention_operators.ENCODER_LAYER
        ):  # whose fast paths are given the matrices by name
            bound, thirds = call.bound, call.bound["qkv_weight"].detach().chunk(3)
            heads = int(bound.get("num_head", bound.get("num_heads")) or 1)
            block.matrices |= {name: Matrix(weight, STATED, heads) for name, weight in zip(BY_HEAD, thirds, strict=True)}
            for name, key in (("proj", "proj_weight"), ("fc1", "ffn_weight_1"), ("fc2", "ffn_weight_2")):
                if bound.get(key) is not None:
                    block.matrices[name] = Matrix(bound[key].detach(), STATED)
            return
        product = product_of(call)
        if product is not None and product.rows > self.recorder.log.images:
            w = product.weight
            name = self.names.get((storage_of(w), w.storage_offset()), frames[-1][0])
            product = replace(product, name=name.removeprefix(block.frame[0] + "."))
            if block.events:
                block.after.append(replace(product, output=None))
            else:
                block.before.append(product)

    def _block(self, frames: Sequence[Frame]) -> BlockProducts | None:
        """The block in which a module stack stands, if any."""
        for path, number in frames:
            for block in self.blocks:
                if number == block.frame[1] and (path == block.frame[0] or path.startswith(block.frame[0] + ".")):
                    return block
        return None


def record_matrices(model: nn.Module, images: Tensor, blocks: Sequence[str]) -> Matrices:
    """The matrices of each block (names as in a Plan) by which `model` multiplies in one forward pass of `images`.

    The pass is a plain one under no_grad. What cannot be told has its reason in `Matrices.missing`.
    """
    products = ProductRecorder(model, blocks)
    with torch.inference_mode(False), torch.no_grad(), products.recorder.attached():
        model(images)
    for block in products.blocks:
        block.finish()
    return Matrices(tuple(blocks), tuple(b.matrices for b in products.blocks), tuple(b.missing for b in products.blocks))


def product_of(call: OperatorCall) -> Product | None:
    """The product that an operator makes of vectors with a matrix, or None."""
    func, out = call.func, call.out
    if func in _OPERANDS:
        vectors, matrix = (call.bound[name] for name in _OPERANDS[func])
        return Product("", matrix.detach().T, len(vectors), out.detach())
    if func in _BATCHED and len(call.bound["mat2"]) == 1:
        return Product("", call.bound["mat2"].detach()[0].T, call.bound["self"].shape[1], out.detach()[0])
    if func in _LINEAR and call.bound["weight"].ndim == 2:
        return Product("", call.bound["weight"].detach(), out.numel() // out.shape[-1], out.detach().flatten(0, -2))
    if func in _CONVOLUTION and call.bound["weight"].shape[2:] == (1, 1):
        bound = call.bound
        if bound["groups"] == 1 and not bound["transposed"] and not any(bound["padding"]) and set(bound["stride"]) == {1}:
            output = out.detach().flatten(2).transpose(1, 2).flatten(0, 1)
            return Product("", bound["weight"].detach().flatten(1), len(output), output)
    return None
