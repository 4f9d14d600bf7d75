"""Follows what a pass makes of its tokens, so that products that are added or chained are read as the one matrix they are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef as _StorageWeakRef

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import OperatorCall, storage_of, tensors_in
from collapse_probe.capture.weights.matrices import Product, centred, tolerance_of

StorageWeakRef: Any = _StorageWeakRef

_OPERANDS = {
    **dict.fromkeys(attention_operators.operators("mm"), ("self", "mat2")),
    **dict.fromkeys(attention_operators.operators("addmm"), ("mat1", "mat2")),
    **dict.fromkeys(attention_operators.operators("bmm"), ("self", "mat2")),
    **dict.fromkeys(attention_operators.operators("linear", "convolution"), ("input", "weight")),
}
_ADDED_TO = attention_operators.operators("addmm")
_BATCHED = attention_operators.operators("bmm")
_CONVOLUTION = attention_operators.operators("convolution")
_OTHER_PRODUCTS = attention_operators.operators(
    "baddbmm", "matmul", "_int_mm", "_scaled_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu"
)
_SUMS = {
    **dict.fromkeys(attention_operators.operators("add", "add_"), 1.0),
    **dict.fromkeys(attention_operators.operators("sub", "sub_"), -1.0),
}
_MULTIPLY = attention_operators.operators("mul", "mul_")
_DIVIDE = attention_operators.operators("div", "div_")
_WRITES = attention_operators.operators("copy_")
_COPIES = attention_operators.operators("_to_copy", "clone")

Ids = frozenset[int]
NONE: Ids = frozenset()


@dataclass(frozen=True, eq=False)
class Step:
    """One product of tokens, or one attention call, and the steps of which its input was made.

    `kind` is "product" (of `rows` vectors with one matrix), "convolution" (of another kind than 1 × 1) or "unread", a product
    whose matrix cannot be read; "sum" or "scale" where products are added or multiplied by a vector; or "attention".
    """

    kind: str
    inputs: Ids
    name: str = ""
    rows: int = 0

    @property
    def multiplies(self) -> bool:
        """Whether a matrix is in it."""
        return self.kind in ("product", "convolution", "unread")


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A tensor whose vectors are `source` [rows, in] · weightᵀ, up to a constant: `output` [rows, out], `parts` made it so.

    `memory` is the tensor itself, contiguous, whose last axis (or its second, `channels`, [B, C, h, w]) runs over the outputs.
    `place` is the same for two maps that read the same vectors.
    """

    name: str
    source: Tensor
    place: tuple[Any, ...]
    weight: Tensor
    memory: Tensor
    parts: Ids
    channels: bool = False

    @property
    def output(self) -> Tensor:
        """[rows, out]"""
        return _vectors(self.memory, self.channels)

    def columns(self, x: Tensor) -> slice | None:
        """Which outputs a view of `memory` holds, for every row and in their order; None where it holds something else."""
        whole = self.memory
        first, width = x.storage_offset() - whole.storage_offset(), self.weight.shape[0]
        if x.ndim < 2 or first < 0 or not x.numel():
            return None
        if self.channels:
            if x.shape[:1] + x.shape[2:] != whole.shape[:1] + whole.shape[2:] or x.stride() != whole.stride():
                return None
            return slice(first // whole.stride(1), first // whole.stride(1) + x.shape[1])
        size, axis = 1, x.ndim - 1
        while axis >= 0 and (x.shape[axis] == 1 or x.stride(axis) == size) and size * x.shape[axis] <= width:
            size, axis = size * x.shape[axis], axis - 1
            if size * (len(whole.reshape(-1, width))) == x.numel():
                break
        step = width
        for i in range(axis, -1, -1):
            if x.shape[i] != 1 and x.stride(i) != step:
                return None
            step *= x.shape[i]
        return slice(first, first + size) if step == whole.numel() and first + size <= width else None

    def laid_out(self) -> LinearMap | None:
        """The same with its memory contiguous and the outputs along one axis; None where they are not."""
        last = self.memory.movedim(1, -1) if self.channels else self.memory
        if last.shape[-1] != len(self.weight):
            return None
        if last.is_contiguous():
            return replace(self, memory=last, channels=False)
        return self if self.channels and self.memory.is_contiguous() else None

    def part(self, span: slice) -> LinearMap:
        """The same with some of the outputs only; its memory stays the whole."""
        return replace(self, weight=self.weight[span])


@dataclass
class LinearMaps:
    """What each tensor of a pass is made of: which steps it depends on, and of which matrix it is the product.

    `made_of` holds, by storage, the steps on which each tensor that depends on the image depends; what is missing there is
    a constant of the model. `gates` are the steps of two tensors that were multiplied elementwise.
    """

    steps: list[Step] = field(default_factory=list)
    gates: list[tuple[Ids, Ids]] = field(default_factory=list)
    listed: set[Ids] = field(default_factory=set)
    made_of: dict[int, tuple[Any, Ids]] = field(default_factory=dict)
    maps: dict[int, LinearMap] = field(default_factory=dict)
    copies: dict[int, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)

    def enter_block(self) -> None:
        """What was made before is the block's input."""
        self.made_of = {key: (alive, NONE) for key, (alive, _) in self.made_of.items() if not alive.expired()}
        self.copies = {key: entry for key, entry in self.copies.items() if not entry[0].expired()}
        self.maps.clear()
        self.listed.clear()

    def depends(self, *tensors: Tensor) -> Ids | None:
        """The steps on which tensors depend; None where none of them depends on the image."""
        known = [self.made_of[key][1] for x in tensors if (key := storage_of(x)) in self.made_of]
        return frozenset().union(*known) if known else None

    def begin(self, images: Tensor) -> None:
        """The images enter the model."""
        self._made(images, NONE)

    def _made(self, x: Tensor, ids: Ids) -> None:
        key = storage_of(x)
        if key in self.made_of:
            self.made_of[key] = self.made_of[key][0], self.made_of[key][1] | ids
        elif key:
            self.made_of[key] = StorageWeakRef(x.untyped_storage()), ids

    def _step(self, kind: str, inputs: Ids, name: str = "", rows: int = 0) -> Ids:
        self.steps.append(Step(kind, inputs, name, rows))
        return frozenset((len(self.steps) - 1,))

    def inputs_of(self, parts: Ids) -> Ids:
        """The steps on which the inputs of some steps depend, beside these steps themselves."""
        return frozenset().union(*(self.steps[s].inputs for s in parts)) - parts

    def follow(self, call: OperatorCall, name: str, attention: bool) -> list[Product]:
        """An operator ran in a module of this name: the products (single, chained or added) that it made."""
        inputs = list(tensors_in((*call.args, *call.kwargs.values())))
        ids = self.depends(*inputs)
        if ids is None or _writes_back(call):
            return []
        made: list[LinearMap] = []
        if attention:
            ids |= self._step("attention", ids)
        elif _multiplies(call):
            made, new = self._product(call, inputs, ids, name)
            ids |= new
        elif call.func in _SUMS:
            made, new = self._sum(call, ids)
            ids |= new
        elif call.func in _MULTIPLY or call.func in _DIVIDE:
            made, new = self._scaled(call, ids)
            ids |= new
        elif call.func in _COPIES:
            made = self._copied(call)
        written = list(call.written()) if call.func._schema.is_mutable else []
        for out in (*tensors_in((call.out,)), *written):
            self._made(out, ids)
        for out in written:
            self.maps.pop(storage_of(out), None)
        products = []
        for m in made:
            if (laid := m.laid_out()) is not None:
                self.maps[storage_of(m.memory)] = laid
            if m.parts not in self.listed:  # else the same matrix, scaled, moved by a constant or copied
                self.listed.add(m.parts)
                products.append(Product(m.name, m.weight, len(m.source), m.output, m.parts))
        return products

    def _place(self, x: Tensor) -> tuple[Any, ...]:
        key = storage_of(x)
        return self.copies[key][1] if key in self.copies else (key, x.storage_offset(), x.numel(), x.shape[-1])

    def _map_of(self, x: Any) -> tuple[LinearMap, slice] | None:
        if not isinstance(x, Tensor) or storage_of(x) not in self.maps:
            return None
        whole = self.maps[storage_of(x)]
        for view in (x, x.movedim(1, -1)) if x.ndim > 2 else (x,):
            if (span := whole.columns(view)) is not None:
                return whole, span
        return None

    def _product(self, call: OperatorCall, inputs: list[Tensor], ids: Ids, name: str) -> tuple[list[LinearMap], Ids]:
        own = call.func.namespace == "aten"
        vectors, matrix = (
            (call.bound[name] for name in _OPERANDS[call.func]) if call.func in _OPERANDS else (*inputs, *inputs)[-2:]
        )
        if own and self.depends(vectors) is not None and self.depends(matrix) is not None:
            return [], NONE  # of two tensors that both come from the image, as in attention
        product = product_of(call)
        if product is None or self.depends(vectors) is None:
            return [], self._step("convolution" if call.func in _CONVOLUTION else "unread", ids, str(call.func))
        channels = call.func in _CONVOLUTION
        source = _vectors(vectors.detach(), channels)
        new = self._step("product", ids, name, len(source))
        made = LinearMap(name, source, self._place(vectors), product.weight, call.out.detach(), new, channels)
        base = call.bound["self"] if call.func in _ADDED_TO else None
        added_to = base is not None and self.depends(base) is not None
        inner = self._map_of(vectors)
        if inner is not None and len(inner[0].source) == len(source):
            chain, weight = inner[0].part(inner[1]), wider(product.weight)
            chained = replace(
                made,
                name=common_name(chain.name, name),
                source=chain.source,
                place=chain.place,
                weight=weight @ chain.weight.to(weight.dtype),
                parts=chain.parts | new,
            )
            made = chained if added_to or follows(chained) else made
        if added_to:
            first = self._map_of(base)
            sums = self._step("sum", ids)
            total = (
                None if first is None else _added(first[0].part(first[1]), made, call.out, float(call.bound["beta"]), 1.0, sums)
            )
            if total is None:
                self.steps[next(iter(new))] = Step("unread", ids, str(call.func))
            return [] if total is None else [total], new | sums
        return [made], new

    def _sum(self, call: OperatorCall, ids: Ids) -> tuple[list[LinearMap], Ids]:
        a, b = call.bound["self"], call.bound["other"]
        sign = _SUMS[call.func] * float(call.bound.get("alpha", 1))
        left, right = self._map_of(a), self._map_of(b)
        in_place = call.func._schema.is_mutable
        if left is not None and right is not None:
            (whole, span), other, new = left, right[0].part(right[1]), self._step("sum", ids)
            if in_place:
                weight = wider(whole.weight).clone()
                if whole.place != other.place or weight[span].shape != other.weight.shape:
                    return [], NONE
                weight[span] += sign * other.weight.to(weight.dtype)
                name = common_name(whole.name, other.name)
                total = replace(whole, name=name, weight=weight, parts=whole.parts | other.parts | new)
                return [total] if follows(total) else [], new
            sums = _added(whole.part(span), other, call.out, 1.0, sign, new)
            return [] if sums is None else [sums], new
        one, constant = (left, b) if left is not None else (right, a)
        if one is None or (isinstance(constant, Tensor) and self.depends(constant) is not None):
            return [], NONE
        whole, span = one
        if in_place:
            return [whole] if left is not None else [], NONE
        moved = replace(whole.part(span), memory=call.out.detach())
        return [replace(moved, weight=moved.weight * (sign if one is right else 1.0))], NONE

    def _scaled(self, call: OperatorCall, ids: Ids) -> tuple[list[LinearMap], Ids]:
        a, b = call.bound["self"], call.bound["other"]
        of_a, of_b = (self.depends(x) if isinstance(x, Tensor) else None for x in (a, b))
        if of_a is not None and of_b is not None:
            self.gates.append((of_a, of_b))
            return [], NONE
        one, factor = (self._map_of(a), b) if of_a is not None else (self._map_of(b), a)
        if one is None or call.func._schema.is_mutable or (call.func in _DIVIDE and of_a is None):
            return [], NONE
        whole, span = one
        part, weight = whole.part(span), wider(whole.weight[span])
        if isinstance(factor, Tensor):
            width = len(weight)
            if factor.numel() not in (1, width) or (factor.numel() == width and factor.ndim and _runs_elsewhere(factor, whole)):
                return [], NONE
            factor = factor.detach().reshape(-1, 1).to(weight.dtype)
        weight = weight / factor if call.func in _DIVIDE else weight * factor
        scaled = replace(part, weight=weight, memory=call.out.detach())
        if isinstance(factor, Tensor) and factor.numel() > 1 and span == slice(0, len(whole.weight)) and follows(scaled):
            new = self._step("scale", ids, part.name)
            return [replace(scaled, parts=part.parts | new)], new
        return [scaled], NONE

    def _copied(self, call: OperatorCall) -> list[LinearMap]:
        x, out = call.bound["self"], call.out
        place = self._place(x) if x.is_contiguous() else (*self._place(x), tuple(x.shape), x.stride())
        self.copies[storage_of(out)] = StorageWeakRef(out.untyped_storage()), place
        known = self._map_of(x)
        return [] if known is None else [replace(known[0].part(known[1]), memory=out.detach())]


def _added(a: LinearMap, b: LinearMap, out: Tensor, of_a: float, of_b: float, new: Ids) -> LinearMap | None:
    """The sum of two maps of the same vectors, if the tensor that was computed follows it."""
    if a.place != b.place or a.weight.shape != b.weight.shape or out.ndim < 2:
        return None
    weight = wider(a.weight) * of_a + wider(b.weight).to(wider(a.weight).dtype) * of_b
    total = replace(a, name=common_name(a.name, b.name), weight=weight, memory=out.detach(), parts=a.parts | b.parts | new)
    for channels in (False, True):
        laid = replace(total, channels=channels).laid_out()
        if laid is not None and follows(laid):
            return laid
    return None


def follows(made: LinearMap) -> bool:
    """Whether the output that was computed is that of the matrix, up to one constant vector."""
    output, source = made.output, made.source
    if len(output) != len(source) or output.shape[1] != len(made.weight):
        return False
    expected = centred(source, 0) @ made.weight.detach().cpu().double().T
    return bool((centred(output, 0) - expected).norm() <= tolerance_of(output) * expected.norm())


def product_of(call: OperatorCall) -> Product | None:
    """The product that an operator makes of vectors with a matrix, or None."""
    func, out = call.func, call.out
    if func not in _OPERANDS:
        return None
    vectors, matrix = (call.bound[name] for name in _OPERANDS[func])
    if func in _BATCHED:
        return Product("", matrix.detach()[0].T, vectors.shape[1], out.detach()[0]) if len(matrix) == 1 else None
    if func in _CONVOLUTION:
        bound = call.bound
        plain = bound["groups"] == 1 and not bound["transposed"] and not any(bound["padding"]) and set(bound["stride"]) == {1}
        if any(size != 1 for size in matrix.shape[2:]) or not plain:
            return None
        output = _vectors(out.detach(), True)
        return Product("", matrix.detach().flatten(1), len(output), output)
    if matrix.ndim != 2:
        return None
    weight = matrix.detach() if "weight" in _OPERANDS[func] else matrix.detach().T
    alpha = call.bound.get("alpha", 1)
    return Product("", weight if alpha == 1 else weight * alpha, out.numel() // out.shape[-1], out.detach().flatten(0, -2))


def _writes_back(call: OperatorCall) -> bool:
    """Whether a view is copied onto itself, as Python does after `x[...] += y`."""
    if call.func not in _WRITES:
        return False
    target, source = call.bound["self"], call.bound["src"]
    same = storage_of(target) == storage_of(source) and target.storage_offset() == source.storage_offset()
    return same and target.shape == source.shape and target.stride() == source.stride()


def _multiplies(call: OperatorCall) -> bool:
    """Whether an operator may multiply tokens by a matrix: known products, and whatever is not PyTorch's own."""
    return call.func in _OPERANDS or call.func in _OTHER_PRODUCTS or call.func.namespace not in ("aten", "prim", "prims")


def _vectors(x: Tensor, channels: bool) -> Tensor:
    """[rows, channels]"""
    return x.movedim(1, -1).flatten(0, -2) if channels else x.reshape(-1, x.shape[-1])


def _runs_elsewhere(factor: Tensor, made: LinearMap) -> bool:
    """Whether a vector of factors runs along another axis than the outputs."""
    axis = factor.ndim - 3 if made.channels else factor.ndim - 1
    return axis < 0 or factor.shape[axis] != factor.numel()


def wider(weight: Tensor) -> Tensor:
    """Detached, in float32 or more, so that sums of matrices are not rounded to half precision."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def common_name(*names: str) -> str:
    """The module that is common to some names, which says what they are together; the first name where none is."""
    same = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*(name.split(".") for name in names), strict=False))
    return ".".join(words[0] for words in same) or names[0]
