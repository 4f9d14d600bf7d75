"""Follow every softmax from where it is made to where it multiplies values: that makes it attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from collapse_probe.capture import operators as kernels
from collapse_probe.capture.operators import storage_of, tensors_in
from collapse_probe.capture.trace import Attention

Frame = tuple[str, int]
MOST_HANDED_UP = 1
"""A softmax made in one module may be multiplied by the module around it, not further up."""


@dataclass(eq=False)
class Softmax:
    """A softmax that may turn out to be attention, with every storage that holds values made from it.

    `exact` are the storages whose values are the softmax's own; `memory` keeps the storages from being used
    again.
    """

    attention: Attention
    stack: tuple[Frame, ...]
    holder: str
    exact: set[int]
    derived: set[int]
    memory: list[Any]
    handed_up: int = 0


class Softmaxes:
    """The softmaxes of one forward pass that have not multiplied anything yet."""

    def __init__(self) -> None:
        self.pending: list[Softmax] = []

    def begin(self, attention: Attention, stack: tuple[Frame, ...], holder: str) -> None:
        """A softmax was computed."""
        assert attention.probs is not None
        storage, memory = storage_of(attention.probs), [attention.probs.untyped_storage()]
        self.pending.append(Softmax(attention, stack, holder, {storage}, {storage}, memory))

    def follow(self, func: Any, args: Sequence[Any], out: Any) -> list[Softmax]:
        """An operator ran: follow what it made from softmaxes; return those that multiplied something."""
        inputs, confirmed = list(tensors_in(args)), []
        for softmax in list(self.pending):
            touched = [x for x in inputs if storage_of(x) in softmax.derived]
            if not touched or softmax not in self.pending:
                continue
            operand = _operand(func, inputs, touched, softmax, out)
            if operand is None:
                _derive(softmax, func, touched, out)
                continue
            _confirm(softmax, operand, turned=operand is inputs[-1])
            # maps that were merged into this one are parts of one effective map
            merged = storage_of(operand)
            self.pending = [s for s in self.pending if s is not softmax and merged not in s.derived]
            confirmed.append(softmax)
        return confirmed

    def hand_up(self, path: str, holder: str) -> None:
        """A module ends: what it made and did not multiply is now for the module around it."""
        for softmax in self.pending:
            if softmax.holder == path:
                softmax.holder, softmax.handed_up = holder, softmax.handed_up + 1
        self.pending = [s for s in self.pending if s.handed_up <= MOST_HANDED_UP]

    def overwritten(self, storages: set[int]) -> None:
        """Before an operator writes into memory: keep what was captured there, and know it as changed."""
        for softmax in self.pending:
            if storages & softmax.derived:
                rescue(softmax.attention, storages)
                softmax.exact -= storages


class Products:
    """Batched products whose result is multiplied again in the same module without a softmax between."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[str, bool, Tensor]] = {}

    def follow(self, func: Any, args: Sequence[Any], out: Any, holder: str) -> str | None:
        """An operator ran; says which kind of attention a product of products looks like."""
        touched = [self.made[key] for x in tensors_in(args) if (key := storage_of(x)) in self.made]
        here = [changed for owner, changed, _ in touched if owner == holder]
        if func in kernels.BATCHED_PRODUCTS:
            self.made[storage_of(out)] = (holder, False, out)
            return None if not here else "a softmax written by hand" if any(here) else "linear attention"
        for result in tensors_in((out,)) if touched else ():
            self.made.setdefault(storage_of(result), (holder, True, result))
        return None

    def forget(self, holder: str) -> None:
        """A module ends."""
        self.made = {key: entry for key, entry in self.made.items() if entry[0] != holder}


def rescue(holder: Any, storages: set[int], names: Iterable[str] = kernels.KEPT) -> None:
    """Replace those of the named tensors that live in `storages` by copies."""
    for name in names:
        tensor = getattr(holder, name)
        if isinstance(tensor, Tensor) and storage_of(tensor) in storages:
            setattr(holder, name, tensor.clone())


def _operand(func: Any, inputs: list[Tensor], touched: list[Tensor], softmax: Softmax, out: Any) -> Tensor | None:
    """The operand of a product that is the map; a map of one key may be multiplied elementwise into wider values."""
    probs = softmax.attention.probs
    assert probs is not None
    alike = [x for x in touched if x.numel() == probs.numel()]
    if probs.shape[-1] == 1 and func in kernels.MULTIPLY and len(inputs) == 2 and out.numel() > probs.numel():
        return alike[0] if alike else None
    sizes = {probs.shape[-2:], probs.shape[-2:][::-1]}
    return next((x for x in alike if func in kernels.CONTRACTIONS and x.shape[-2:] in sizes), None)


def _confirm(softmax: Softmax, operand: Tensor, turned: bool) -> None:
    """Attention it is. What multiplies V may be another map than the softmax; keys are the summed axis."""
    probs = softmax.attention.probs
    assert probs is not None
    if storage_of(operand) in softmax.exact:
        return
    if probs.shape[-1] != probs.shape[-2]:
        turned = operand.shape[-2:] != probs.shape[-2:]
    softmax.attention.weights = (operand.transpose(-1, -2) if turned else operand).reshape(probs.shape).detach()


def _derive(softmax: Softmax, func: Any, touched: list[Tensor], out: Any) -> None:
    exact = func in kernels.KEEPS_VALUES and storage_of(touched[0]) in softmax.exact
    for result in tensors_in((out,)):
        storage = storage_of(result)
        if storage not in softmax.derived:
            softmax.memory.append(result.untyped_storage())
            softmax.derived.add(storage)
            softmax.exact |= {storage} if exact else set()
