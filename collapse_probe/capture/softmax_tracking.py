"""Follow every softmax from where it is made to where it multiplies values: that makes it attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import OperatorCall, storage_of, tensors_in
from collapse_probe.capture.plan import Frame
from collapse_probe.capture.trace import Attention

MOST_HANDED_UP = 1
"""A softmax made in one module may be multiplied by the module around it, not further up."""


@dataclass(eq=False)
class Softmax:
    """A softmax that may turn out to be attention, with every storage that holds values made from it.

    `exact` are the storages whose values are the softmax's own; `memory` keeps the storages from being used again.
    """

    attention: Attention
    stack: tuple[Frame, ...]
    holder: str
    exact: set[int]
    derived: set[int]
    memory: list[Any]
    handed_up: int = 0

    def operand_of(self, call: OperatorCall, inputs: list[Tensor], touched: list[Tensor]) -> Tensor | None:
        """The operand of a product that is the map; a map of one key may be multiplied elementwise into wider values."""
        probs = self.attention.probs
        assert probs is not None
        alike = [x for x in touched if x.numel() == probs.numel()]
        if (
            probs.shape[-1] == 1
            and call.func in attention_operators.MULTIPLY
            and len(inputs) == 2
            and call.out.numel() > probs.numel()
        ):
            return alike[0] if alike else None
        sizes = {probs.shape[-2:], probs.shape[-2:][::-1]}
        return next((x for x in alike if call.func in attention_operators.CONTRACTIONS and x.shape[-2:] in sizes), None)

    def confirm(self, operand: Tensor, transposed: bool) -> None:
        """It is attention. What multiplies V may be another map than the softmax; keys are the summed axis."""
        probs = self.attention.probs
        assert probs is not None
        if storage_of(operand) in self.exact:
            return
        if probs.shape[-1] != probs.shape[-2]:
            transposed = operand.shape[-2:] != probs.shape[-2:]
        self.attention.weights = (operand.transpose(-1, -2) if transposed else operand).reshape(probs.shape).detach()

    def derive(self, call: OperatorCall, touched: list[Tensor]) -> None:
        """An operator made something else from it: follow that too."""
        exact = call.func in attention_operators.COPIES and storage_of(touched[0]) in self.exact
        for result in tensors_in((call.out,)):
            storage = storage_of(result)
            if storage not in self.derived:
                self.memory.append(result.untyped_storage())
                self.derived.add(storage)
                self.exact |= {storage} if exact else set()


class Softmaxes:
    """The softmaxes of one forward pass that have not multiplied anything yet."""

    def __init__(self) -> None:
        self.pending: list[Softmax] = []

    def begin(self, attention: Attention, stack: tuple[Frame, ...], holder: str) -> None:
        """A softmax was computed."""
        assert attention.probs is not None
        storage, memory = storage_of(attention.probs), [attention.probs.untyped_storage()]
        self.pending.append(Softmax(attention, stack, holder, {storage}, {storage}, memory))

    def follow(self, call: OperatorCall) -> list[tuple[Softmax, Tensor]]:
        """Follow what an operator made from softmaxes; return those that multiplied something, with the operand that did."""
        inputs, confirmed = list(tensors_in(call.args)), []
        for softmax in list(self.pending):
            touched = [x for x in inputs if storage_of(x) in softmax.derived]
            if not touched or softmax not in self.pending:
                continue
            operand = softmax.operand_of(call, inputs, touched)
            if operand is None:
                softmax.derive(call, touched)
                continue
            softmax.confirm(operand, transposed=operand is inputs[-1])
            # maps that were merged into this one are parts of one effective map
            merged = storage_of(operand)
            self.pending = [s for s in self.pending if s is not softmax and merged not in s.derived]
            confirmed.append((softmax, operand))
        return confirmed

    def hand_up(self, path: str, holder: str) -> None:
        """A module ends: what it made and did not multiply is now for the module around it."""
        for softmax in self.pending:
            if softmax.holder == path:
                softmax.holder, softmax.handed_up = holder, softmax.handed_up + 1
        self.pending = [s for s in self.pending if s.handed_up <= MOST_HANDED_UP]

    def overwritten(self, storages: set[int]) -> None:
        """Before an operator writes into memory: copy what was captured there, and know it as changed."""
        for softmax in self.pending:
            if storages & softmax.derived:
                copy_before_write(softmax.attention, storages)
                softmax.exact -= storages


class Products:
    """Batched products whose result is multiplied again in the same module without a softmax between."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[str, bool, Tensor]] = {}  # by storage: the module, whether changed since, the result

    def follow(self, call: OperatorCall, holder: str) -> str | None:
        """An operator ran; says which kind of attention a product of products looks like."""
        touched = [self.made[key] for x in tensors_in(call.args) if (key := storage_of(x)) in self.made]
        here = [changed for owner, changed, _ in touched if owner == holder]
        if call.func in attention_operators.BATCHED_PRODUCTS:
            self.made[storage_of(call.out)] = (holder, False, call.out)
            return None if not here else "a softmax written by hand" if any(here) else "linear attention"
        for result in tensors_in((call.out,)) if touched else ():
            self.made.setdefault(storage_of(result), (holder, True, result))
        return None

    def forget(self, holder: str) -> None:
        """A module ends."""
        self.made = {key: entry for key, entry in self.made.items() if entry[0] != holder}


CAPTURED = ("q", "k", "bias", "probs", "weights", "logsumexp")


def copy_before_write(holder: Any, storages: set[int], names: Iterable[str] = CAPTURED) -> None:
    """Replace those of the named tensors that live in `storages` by copies."""
    for name in names:
        tensor = getattr(holder, name)
        if isinstance(tensor, Tensor) and storage_of(tensor) in storages:
            setattr(holder, name, tensor.clone())
