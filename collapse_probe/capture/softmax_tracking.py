"""Follow every softmax from where it is made to where it multiplies values: that makes it attention.

Of each tensor that is made from a softmax, its memory is known by which entry of the softmax stands at which place. So a
product tells which axis of the softmax it sums over (the keys), which axis it keeps for its result (the queries), and which
keys were left out on the way, however the map was turned, folded, sliced or copied before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import OperatorCall, four_axes, storage_of, tensors_in
from collapse_probe.capture.plan import Frame
from collapse_probe.capture.trace import Attention

SAMPLED = 4
"""Entries of each row that are kept to see which maps change with which image."""
ROW_SUM = 1e-3
"""How far from one the rows of a map may sum that was changed after its softmax and yet counts as normalised."""
BY_HAND = "normalised over the keys"
"""The operation of a map that is heard because it sums to one over what is contracted."""
MOST_HANDED_UP = 3
"""How many modules up from where it is made a softmax may multiply values."""


@dataclass(eq=False)
class Softmax:
    """A softmax over `dim` that may turn out to be attention, and every storage that holds values made from it.

    `places` maps a storage to the entries of the softmax that stand there ([memory], −1 where there is none), None where that
    is not known; in `exact` storages the values are the softmax's own, and `joined` ones hold others beside them. `broadcast`
    has what was multiplied elementwise into values: their shape, and the map. `direct` says that its logits are no product of
    activations. `memory` keeps the storages from being used again. It `leads` where it went into a sum or difference of maps
    as it was.
    """

    probs: Tensor
    dim: int
    stack: tuple[Frame, ...]
    holder: str
    sample: Tensor | None = None
    direct: bool = False
    places: dict[int, Tensor | None] = field(default_factory=dict)
    exact: set[int] = field(default_factory=set)
    memory: list[Any] = field(default_factory=list)
    joined: set[int] = field(default_factory=set)
    broadcast: dict[int, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    handed_up: int = 0
    leads: bool = False

    def entries(self, x: Tensor) -> Tensor | None:
        """Which entry of the softmax stands at each place of `x`, in the shape of `x`."""
        memory = self.places.get(storage_of(x))
        return None if memory is None else memory.as_strided(x.shape, x.stride(), x.storage_offset())

    def axes_along(self, entries: Tensor, axis: int) -> tuple[list[int], Tensor]:
        """The axes of the softmax whose index changes along an axis of `entries`, and the entries along it."""
        line = entries.movedim(axis, -1)
        while line.ndim > 1:
            line = line[0]
        if bool((line < 0).any()):
            lines = entries.movedim(axis, 0).flatten(1)
            line = lines[:, int((lines >= 0).sum(0).argmax())]
        kept = line[line >= 0].long()
        indices = torch.unravel_index(kept, self.probs.shape)
        return [i for i, index in enumerate(indices) if len(kept) and bool((index != index[0]).any())], kept


@dataclass(eq=False)
class Heard:
    """A map when it multiplied values: the attention, with at least four axes, queries and keys last.

    `operand` is the tensor that held it, `softmaxes` how many were merged into it, `lost` how many of the softmax's keys
    multiply nothing. `values` is what it multiplied.
    """

    attention: Attention
    stack: tuple[Frame, ...]
    holder: str
    operand: Tensor
    values: Tensor | None = None
    sample: Tensor | None = None
    direct: bool = False
    softmaxes: int = 1
    lost: int = 0


class Softmaxes:
    """The softmaxes of one forward pass that have not multiplied anything yet.

    `fixed` are the storages of the model's weights. `refused` says which softmaxes multiplied values otherwise than a map does.
    """

    def __init__(self, fixed: frozenset[int] = frozenset()) -> None:
        self.fixed = fixed
        self.pending: list[Softmax] = []
        self.refused: list[tuple[tuple[Frame, ...], str]] = []
        self._counting: dict[tuple[int, torch.device], Tensor] = {}
        self._moved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def begin(self, call: OperatorCall, stack: tuple[Frame, ...], holder: str, direct: bool, sampled: bool) -> None:
        """A softmax was computed: follow it, unless it has one axis."""
        probs = call.out.detach()
        if probs.ndim < 2:
            return
        dim = int(call.bound["dim"]) % probs.ndim
        sample = None
        if sampled:
            logits, keys = call.bound["self"].detach(), probs.shape[dim]
            few = torch.linspace(0, keys - 1, min(SAMPLED, keys), device=logits.device).long()
            sample = logits.index_select(dim, few).clone()
        softmax = Softmax(probs, dim, stack, holder, sample, direct)
        self._track(softmax, probs, self._numbers(probs.numel(), probs.device).view(probs.shape), exact=True)
        self.pending.append(softmax)

    def _numbers(self, count: int, device: torch.device) -> Tensor:
        if (count, device) not in self._counting:
            self._counting[count, device] = torch.arange(
                count, dtype=torch.int32 if count < 2**31 else torch.int64, device=device
            )
        return self._counting[count, device]

    def _track(self, softmax: Softmax, x: Tensor, entries: Tensor | None, exact: bool) -> None:
        """Know a tensor in new memory as made from the softmax."""
        storage = storage_of(x)
        if storage in softmax.places:
            return
        softmax.memory.append(x.untyped_storage())
        softmax.exact |= {storage} if exact else set()
        size = x.untyped_storage().nbytes() // x.element_size()
        if entries is not None and entries.is_contiguous() and x.is_contiguous() and x.numel() == size:
            softmax.places[storage] = entries.reshape(-1)
        elif entries is not None:
            geometry = (x.shape, x.stride(), x.storage_offset(), size)
            key = (entries.data_ptr(), entries.shape, entries.stride(), *geometry)
            if key not in self._moved:  # the same in every layer with maps of this shape
                memory = torch.full((size,), -1, dtype=entries.dtype, device=entries.device)
                memory.as_strided(*geometry[:3]).copy_(entries)
                self._moved[key] = entries, memory
            softmax.places[storage] = self._moved[key][1]
        else:
            softmax.places[storage] = None

    def follow(self, call: OperatorCall) -> list[Heard]:
        """Follow what an operator made from softmaxes; return those that multiplied values."""
        inputs, heard = list(tensors_in(call.args)), []
        if call.func in attention_operators.BATCHED_PRODUCTS and self._composed(call, *inputs[-2:]):
            return []
        for softmax in list(self.pending):
            touched = [x for x in inputs if storage_of(x) in softmax.places]
            if not touched or softmax not in self.pending:
                continue
            found = self._contracted(softmax, call, inputs, touched)
            if found is None:
                self._derive(softmax, call, touched)
                continue
            # maps that were merged into this one are parts of one effective map
            merged = storage_of(found.operand)
            with_it = [s for s in self.pending if s is not softmax and merged in s.places]
            if not softmax.leads and any(s.leads for s in with_it):
                continue  # the one that leads comes later
            self.pending = [s for s in self.pending if s is not softmax and s not in with_it]
            found.softmaxes += len(with_it)
            heard.append(found)
        return heard

    # ---- products ----

    def _composed(self, call: OperatorCall, left: Tensor, right: Tensor) -> bool:
        """Whether the operator multiplies two softmaxes with each other: over the keys of both, their product is a map."""
        first, second = (next((s for s in self.pending if storage_of(x) in s.exact), None) for x in (left, right))
        square = right.shape[-1] == right.shape[-2] == left.shape[-1]
        changed = square and second is None and any(storage_of(right) in s.places for s in self.pending if s is not first)
        if first is not None and changed:  # by an inverse, say
            self.refused.append((first.stack, "a product of maps of which one was changed"))
            self.pending.remove(first)
            return True
        if first is None or second is None:
            return False
        over_keys = [
            entries is not None and softmax.dim in softmax.axes_along(entries, -1)[0]
            for softmax, entries in ((first, first.entries(left)), (second, second.entries(right)))
        ]
        if not (all(over_keys) and is_normalised(out := call.out.detach(), -1)):
            self.refused.append((second.stack, "a product of softmaxes that is no map over the keys of both"))
            return True
        few = None if second.sample is None else out[..., :SAMPLED].clone()
        product = Softmax(out, out.ndim - 1, second.stack, second.holder, few, first.direct and second.direct)
        self._track(product, out, self._numbers(out.numel(), out.device).view(out.shape), exact=True)
        self.pending.append(product)
        return True

    def _contracted(self, softmax: Softmax, call: OperatorCall, inputs: list[Tensor], touched: list[Tensor]) -> Heard | None:
        """The map, where this operator sums values over its keys."""
        func = call.func
        if func in attention_operators.PRODUCTS:
            left, right = inputs[-2:]
            for x, values, contracted, kept in ((left, right, -1, -2), (right, left, -2, -1)):
                if storage_of(x) not in softmax.places:
                    continue
                if func in attention_operators.MATRIX_PRODUCTS and (softmax.probs.ndim > 2 or storage_of(values) in self.fixed):
                    continue  # a layer
                if (found := self._product(softmax, x, values, contracted, kept)) is not None:
                    return found
            return None
        if func in attention_operators.MULTIPLY and len(inputs) == 2:
            return self._multiplied(softmax, call, inputs, touched)
        if func in attention_operators.SUM and storage_of(touched[0]) in softmax.broadcast:
            return self._summed(softmax, call, touched[0])
        return None

    def _product(self, softmax: Softmax, x: Tensor, values: Tensor, contracted: int, kept: int) -> Heard | None:
        entries, shape, dim = softmax.entries(x), softmax.probs.shape, softmax.dim
        if entries is None:
            return self._by_shape(softmax, x, values, contracted)
        if storage_of(x) in softmax.joined and bool((x.detach()[entries < 0] != 0).any()):
            return self._normalised(softmax, x, values, contracted, "joined with what is no part of its softmax")
        keys, along = softmax.axes_along(entries, contracted)
        if not keys and shape[dim] == x.shape[contracted] == 1:
            keys = [dim]
        if dim in keys:
            queries, _ = softmax.axes_along(entries, kept)
            folded = self._unfolded(softmax, x, entries, values, contracted)
            return folded or self._heard(softmax, x, values, self._query_axis(softmax, queries), along)
        if len(keys) == 1 and {keys[0], dim} == {softmax.probs.ndim - 1, softmax.probs.ndim - 2}:
            return self._normalised(softmax, x, values, contracted, "summed over another axis than that of its softmax")
        return None

    def _unfolded(self, softmax: Softmax, x: Tensor, entries: Tensor, values: Tensor, contracted: int) -> Heard | None:
        """A map whose softmax ran over a matrix with the queries of all heads and images as its rows, as it is multiplied."""
        shape, last = softmax.probs.shape, contracted == -1 and softmax.dim == softmax.probs.ndim - 1
        same_keys = x.shape[-1] == shape[-1] and x.shape[-2] < shape[-2] and x.numel() == shape.numel()
        if not (last and same_keys and _counts_up(entries)):
            return None
        attention = Attention("", "softmax", probs=four_axes(softmax.probs.reshape(x.shape)))
        attention.weights = None if storage_of(x) in softmax.exact else four_axes(x)
        few = None if softmax.sample is None else four_axes(softmax.sample.reshape(*x.shape[:-1], -1))
        return Heard(attention, softmax.stack, softmax.holder, x, values, few, softmax.direct)

    def _query_axis(self, softmax: Softmax, candidates: list[int]) -> int | None:
        """The axis of the queries among those that a product keeps; heads may be folded into them."""
        shape, dim = softmax.probs.shape, softmax.dim
        candidates = [axis for axis in candidates if axis != dim]
        if candidates:
            square = [axis for axis in candidates if shape[axis] == shape[dim]]
            return (square or candidates)[-1]
        single = [axis for axis in (softmax.probs.ndim - 2, softmax.probs.ndim - 1) if axis != dim and shape[axis] == 1]
        return single[0] if single else None

    def _heard(self, softmax: Softmax, x: Tensor, values: Tensor | None, query: int | None, along: Tensor) -> Heard:
        shape, dim, probs = softmax.probs.shape, softmax.dim, softmax.probs
        met = list(dict.fromkeys(torch.unravel_index(along, shape)[dim].tolist()))  # in the order of the values
        indices = torch.tensor(met, dtype=torch.long, device=probs.device)
        lost = shape[dim] - len(indices) if len(along) else 0
        weights, heads = None, dict[int, Tensor]()
        square = query is not None and shape[query] == shape[dim]
        if storage_of(x) not in softmax.exact or (lost and square):
            weights = self._scattered(softmax, x)
            heads = {} if x.numel() == probs.numel() else self._covered(softmax, x, (dim, query))

        def matrix(t: Tensor, cut: bool) -> Tensor:
            if cut and ((lost and not square) or (not lost and met != sorted(met))):
                t = t.index_select(dim, indices)
            for axis, kept in heads.items():
                t = t.index_select(axis, kept)
            if query is None:
                return four_axes(t.movedim(dim, -1).unsqueeze(-2))
            order = [axis for axis in range(len(shape)) if axis not in (query, dim)]
            return four_axes(t.permute(*order, query, dim))

        attention = Attention(
            "", "softmax", probs=matrix(probs, True), weights=None if weights is None else matrix(weights, True)
        )
        sample = None if softmax.sample is None else matrix(softmax.sample, False)
        parts = math.prod(shape[axis] // len(kept) for axis, kept in heads.items())
        return Heard(attention, softmax.stack, softmax.holder, x, values, sample, softmax.direct, softmaxes=parts, lost=lost)

    @staticmethod
    def _covered(softmax: Softmax, x: Tensor, but: tuple[int | None, ...]) -> dict[int, Tensor]:
        """By axis of the softmax, but queries and keys, the indices that a map takes up where these are not all: half of the
        heads."""
        entries = softmax.entries(x)
        assert entries is not None
        covered = {}
        for axis, index in enumerate(torch.unravel_index(entries[entries >= 0].long(), softmax.probs.shape)):
            kept = torch.tensor(sorted(set(index.tolist())), dtype=torch.long, device=x.device)
            if axis not in but and 0 < len(kept) < softmax.probs.shape[axis]:
                covered[axis] = kept
        return covered

    @staticmethod
    def _scattered(softmax: Softmax, x: Tensor) -> Tensor:
        """What multiplies values in the shape of the softmax, zero where nothing does."""
        entries, shape = softmax.entries(x), softmax.probs.shape
        assert entries is not None
        for turned in (entries, entries.transpose(-1, -2)):
            if entries.numel() == softmax.probs.numel() and _counts_up(turned):  # laid out as the softmax is
                return (x if turned is entries else x.transpose(-1, -2)).reshape(shape).detach()
        flat, kept = entries.reshape(-1).long(), x.detach().reshape(-1)
        weights = torch.zeros(softmax.probs.numel() + 1, dtype=x.dtype, device=x.device)
        weights[flat] = kept  # −1 is the spare last place
        return weights[:-1].view(softmax.probs.shape)

    def _normalised(self, softmax: Softmax, x: Tensor, values: Tensor, contracted: int, otherwise: str) -> Heard | None:
        """A map that is no more the softmax's own: heard as it is where it sums to one over what is contracted, else
        refused."""
        self.pending = [s for s in self.pending if s is not softmax]
        if storage_of(x) in softmax.exact - softmax.joined or not is_normalised(x, contracted):
            self.refused.append((softmax.stack, f"a map that is {otherwise}"))
            return None
        attention, sample = read_operand(x, contracted, softmax.sample is not None)
        return Heard(attention, softmax.stack, softmax.holder, x, values, sample, softmax.direct)

    def _by_shape(self, softmax: Softmax, x: Tensor, values: Tensor, contracted: int) -> Heard | None:
        """A map whose way cannot be followed, told by its shape: as many entries, and the same last two sizes."""
        probs = softmax.probs
        if probs.ndim < 3 or softmax.dim != probs.ndim - 1 or x.shape[-2:] not in (probs.shape[-2:], probs.shape[-2:][::-1]):
            return None
        if x.numel() != probs.numel():
            self.refused.append((softmax.stack, "maps that are mixed into another number of heads than their softmax has"))
            return None
        turned = contracted == -2 if probs.shape[-1] == probs.shape[-2] else x.shape[-2:] != probs.shape[-2:]
        weights = (x.transpose(-1, -2) if turned else x).reshape(probs.shape).detach()
        attention = Attention("", "softmax", probs=four_axes(probs), weights=four_axes(weights))
        sample = None if softmax.sample is None else four_axes(softmax.sample)
        return Heard(attention, softmax.stack, softmax.holder, x, values, sample, softmax.direct)

    def _multiplied(self, softmax: Softmax, call: OperatorCall, inputs: list[Tensor], touched: list[Tensor]) -> Heard | None:
        """An elementwise product with values: with a single key that is all, else a sum over the keys must follow."""
        x = touched[0]
        values = inputs[1] if x is inputs[0] else inputs[0]
        if call.out.numel() <= x.numel() or values.numel() <= 1 or call.out.numel() > 2**28:
            return None
        entries = softmax.entries(x)
        if softmax.probs.shape[softmax.dim] == 1 and x.numel() == softmax.probs.numel():
            return self._heard(softmax, x, values, self._query_axis(softmax, [softmax.probs.ndim - 2]), torch.empty(0).long())
        if entries is None:
            return None
        size = (1,) * (call.out.ndim - values.ndim) + tuple(values.shape)
        self._track(softmax, call.out, entries.expand(call.out.shape), exact=storage_of(x) in softmax.exact)
        softmax.broadcast[storage_of(call.out)] = (size, x)
        return None

    def _summed(self, softmax: Softmax, call: OperatorCall, y: Tensor) -> Heard | None:
        """The sum over the keys of a map that was multiplied elementwise into values; a gate has no queries of its own."""
        entries, dims = softmax.entries(y), call.bound.get("dim")
        size, operand = softmax.broadcast[storage_of(y)]
        if entries is None or not dims or len(dims) != 1 or y.ndim != len(size):
            return None
        keys, along = softmax.axes_along(entries, dims[0])
        if keys != [softmax.dim]:
            return None
        axis = dims[0] % y.ndim
        free = [i for i in range(y.ndim) if i != axis and size[i] == 1]
        changing = [q for i in free for q in softmax.axes_along(entries, i)[0] if y.shape[i] > 1 and q != softmax.dim]
        if not changing:
            return None
        return self._heard(softmax, operand, None, changing[-1], along)

    # ---- everything else ----

    def _derive(self, softmax: Softmax, call: OperatorCall, touched: list[Tensor]) -> None:
        """An operator made something else from it: follow that too."""
        results = list(tensors_in((call.out,)))
        if all(storage_of(result) in softmax.places for result in results):
            return
        x = touched[0]
        exact = storage_of(x) in softmax.exact
        if call.func in attention_operators.MOVES:
            for result, numbers in zip(results, _replayed(call, softmax), strict=True):
                self._track(softmax, result, numbers, exact)
                softmax.joined |= {storage_of(result)} if call.func in attention_operators.JOINS else set()
            return
        copied = exact and call.func in attention_operators.COPIES
        softmax.leads |= exact and call.func in attention_operators.SUMS
        alike = next((y for y in touched if softmax.entries(y) is not None), None)
        for result in results:
            same = next((y for y in touched if y.shape == result.shape), None)
            numbers = None if same is None else softmax.entries(same)
            if numbers is None and alike is not None and alike.numel() == result.numel() and _mixed(alike.shape, result.shape):
                numbers = softmax.entries(alike)
                numbers = None if numbers is None else numbers.reshape(result.shape)
            self._track(softmax, result, numbers, copied and same is not None)
            softmax.joined |= {storage_of(result)} if storage_of(x) in softmax.joined else set()

    def hand_up(self, path: str, holder: str) -> None:
        """A module ends: what it made and did not multiply is now for the module around it."""
        for softmax in self.pending:
            if softmax.holder == path:
                softmax.holder, softmax.handed_up = holder, softmax.handed_up + 1
        self.pending = [softmax for softmax in self.pending if softmax.handed_up <= MOST_HANDED_UP]

    def overwritten(self, storages: set[int]) -> None:
        """Before an operator writes into memory: copy what was captured there, and know it as changed."""
        for softmax in self.pending:
            if storages & softmax.places.keys():
                if storage_of(softmax.probs) in storages:
                    softmax.probs = softmax.probs.clone()
                    softmax.places.setdefault(
                        storage_of(softmax.probs), self._numbers(softmax.probs.numel(), softmax.probs.device)
                    )
                softmax.exact -= storages


def _counts_up(entries: Tensor) -> bool:
    """Whether entries are 0, 1, 2, … in their order, by a sample: what moves data moves it regularly."""
    some = torch.linspace(0, entries.numel() - 1, 64, device=entries.device, dtype=torch.float64).long()
    return bool((entries[torch.unravel_index(some, entries.shape)] == some).all())


def is_normalised(x: Tensor, axis: int) -> bool:
    """Whether a tensor is nowhere negative and sums to one along an axis."""
    values = x.detach().float()
    off = (values.sum(axis) - 1).abs().max()
    return bool(values.min() >= 0) and bool(off <= ROW_SUM + 4 * torch.finfo(x.dtype).eps)


def read_operand(x: Tensor, contracted: int, sampled: bool) -> tuple[Attention, Tensor | None]:
    """A map as it stands in a product that sums over its axis `contracted`, −1 or −2, and its sample."""
    matrix = four_axes(x.detach() if contracted == -1 else x.detach().transpose(-1, -2))
    return Attention("", BY_HAND, probs=matrix), matrix[..., :SAMPLED].clone() if sampled else None


def _mixed(before: torch.Size, after: torch.Size) -> bool:
    """Whether two shapes differ in axes of size one alone."""
    return [n for n in before if n > 1] == [n for n in after if n > 1]


def _replayed(call: OperatorCall, softmax: Softmax) -> list[Tensor | None]:
    """What a movement of data makes of the entries; None for each result where that is not known."""

    def put_in(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(put_in, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        entries = softmax.entries(value)
        return torch.full(value.shape, -1, dtype=torch.int64, device=value.device) if entries is None else entries.long()

    args = put_in(call.args)
    args = (*args[:2], -1) if call.func in attention_operators.PADS else args
    try:
        return list(tensors_in((call.func(*args),)))
    except Exception:  # an operator that takes no integers, or has settings by name
        return [None] * len(list(tensors_in((call.out,))))
