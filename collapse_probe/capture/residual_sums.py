"""Which tensors of a forward pass are sums of what entered a module and of what attention gave: x′ = x + Attn(x)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from collapse_probe.capture.attention_operators import OperatorCall, storage_of, tensors_in

Place = tuple[int, int]
Sum = tuple[tuple[int, int], ...]
"""Of a sum, for each of its two tensors: the module calls, as bits, whose input it was, and the attention calls, as bits, that
went into the other one."""
NOTHING: Sum = ()
ADDITIONS = ("aten::add", "aten::add_")


def _place(x: Tensor) -> Place:
    """Which part of its memory a tensor takes: the same for one that is only viewed otherwise."""
    return int(x.storage_offset()), x.numel()


class ResidualSums:
    """Of one forward pass, which tensors are the sum of what entered a module and of what attention gave."""

    def __init__(self) -> None:
        self._inputs: dict[int, dict[Place, int]] = {}  # by memory, and its part
        self._attended: dict[int, int] = {}
        self._sums: dict[int, dict[Place, Sum]] = {}

    def enter(self, x: Tensor | None, bit: int) -> Sum:
        """A module call gets a tensor: returns of which sum it is the result."""
        if x is None or x.is_nested:
            return NOTHING
        places = self._inputs.setdefault(storage_of(x), {})
        places[_place(x)] = places.get(_place(x), 0) | bit
        return self.of(x)

    def of(self, x: Tensor | None) -> Sum:
        """The sum whose result a tensor is."""
        return NOTHING if x is None or x.is_nested else self._sums.get(storage_of(x), {}).get(_place(x), NOTHING)

    def follow(self, call: OperatorCall, attention: int) -> None:
        """An operator ran, in which these attention calls (as bits) ended."""
        given = [x for x in tensors_in((*call.args, *call.kwargs.values())) if not x.is_nested]
        storages = {storage_of(x) for x in given}
        for storage in storages:
            attention |= self._attended.get(storage, 0)
        total = self._sum(call, given)
        for x in tensors_in((call.out,)):
            if x.is_nested:
                continue
            if storage_of(x) not in storages or call.func._schema.is_mutable:  # new numbers, in memory that others may have had
                self._inputs.pop(storage_of(x), None)
                self._sums.pop(storage_of(x), None)
                if total != NOTHING:
                    self._sums[storage_of(x)] = {_place(x): total}
            self._attended[storage_of(x)] = attention

    def _sum(self, call: OperatorCall, given: Sequence[Tensor]) -> Sum:
        if call.func._schema.name not in ADDITIONS or len(given) != 2 or call.bound.get("alpha", 1) != 1:
            return NOTHING
        if given[0].shape != call.out.shape or given[1].shape != call.out.shape:
            return NOTHING
        pairs = (given, given[::-1])
        return tuple((self._readers(x), self._attended.get(storage_of(branch), 0)) for x, branch in pairs)

    def _readers(self, x: Tensor) -> int:
        return self._inputs.get(storage_of(x), {}).get(_place(x), 0)
