"""The ear: hears every operator of one model's forward pass, and keeps what is attention. It changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe import kernels
from collapse_probe.errors import CaptureError
from collapse_probe.trace import Attention

Frame = tuple[str, int]
_LISTENING: set[int] = set()


@dataclass
class Event:
    """One attention call, as it was heard: its maps, where in the model it stood, and what the self-check needs."""

    attention: Attention
    stack: tuple[Frame, ...]
    value: Tensor | None = None
    out: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None


@dataclass
class Call:
    """One call of a module: when it began, and its first input tensor and its output where these were asked for."""

    path: str
    number: int
    stack: tuple[Frame, ...]
    input: Tensor | None = None
    output: Any = None


@dataclass
class Hearing:
    """All that was heard of one forward pass, in the order in which it happened."""

    images: int = 0
    input: Tensor | None = None
    output: Any = None
    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    suspects: list[tuple[str, str]] = field(default_factory=list)


@dataclass(eq=False)
class _Pending:
    """A softmax that may turn out to be attention, with every storage that holds values made from it."""

    event: Event
    holder: str
    exact: set[int]
    derived: set[int]
    alive: list[Tensor]
    hops: int = 0


class Ear(TorchDispatchMode):
    """Hears one model on one thread. `thorough` keeps what the plan and the self-check need, for every module call.

    `on_forward` is called with the Hearing of each forward pass that ended without an exception.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        on_forward: Callable[[Hearing], None],
        *,
        thorough: bool = False,
        watched: frozenset[Frame] = frozenset(),
    ) -> None:
        super().__init__()
        self.model, self.on_forward, self.thorough, self.watched = model, on_forward, thorough, watched
        self.names = {id(module): name for name, module in model.named_modules()}
        self.holds = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}
        self.thread = threading.get_ident()
        self.stack: list[Call] = []
        self._forget()

    def _forget(self) -> None:
        self.hearing = Hearing()
        self.counts: dict[str, int] = {}
        self.pending: list[_Pending] = []
        self.products: dict[int, tuple[str, bool, Tensor]] = {}

    # ---- which module is running ----

    def enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A global forward pre-hook: push the module on the stack."""
        if threading.get_ident() != self.thread or id(module) not in self.names:
            return
        path = self.names[id(module)]
        if module is self.model:
            self.stack.clear()  # a KeyboardInterrupt skips the hooks that would have emptied it
            self._forget()
            self.hearing.input = _first_tensor(args)
            self.hearing.images = 0 if self.hearing.input is None else len(self.hearing.input)
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        call = Call(path, number, self._frames())
        if self.thorough or (path, number) in self.watched:
            call.input = _detached(_first_tensor(args))
            self.hearing.calls.append(call)
        self.stack.append(call)

    def leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A global forward hook, called after exceptions too: pop the module, and finish with the root."""
        if threading.get_ident() != self.thread or id(module) not in self.names or not self.stack:
            return
        call = self.stack.pop()
        self._hand_over(call.path)
        if self.thorough or (call.path, call.number) in self.watched:
            call.output = _detached_tree(output)
        if not self.stack and output is not None:
            self.hearing.output = output
            heard = self.hearing
            self._forget()
            self.on_forward(heard)

    def _frames(self) -> tuple[Frame, ...]:
        return tuple((call.path, call.number) for call in self.stack)

    def _holder(self) -> str:
        return next((call.path for call in reversed(self.stack) if call.path in self.holds), "")

    def _hand_over(self, path: str) -> None:
        """A softmax made in a sub-module that ends may still be contracted by the module around it; not further up."""
        kept = []
        for pending in self.pending:
            if pending.holder == path:
                pending.holder, pending.hops = self._holder(), pending.hops + 1
            if pending.hops < 2:
                kept.append(pending)
        self.pending = kept
        if path in self.holds:
            self.products = {key: entry for key, entry in self.products.items() if entry[0] != path}

    # ---- what is running in it ----

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator unchanged; note it where it is attention."""
        kwargs = kwargs or {}
        if not self.stack:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            if kernels.opaque(func):
                self.hearing.opaque.append((self._holder(), str(func)))
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._guard(kernels.written(func, args, kwargs))
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func in kernels.FUSED:
            self._fused(*kernels.read_fused(func, kernels.arguments(func, args, kwargs), out))
        elif func in kernels.MULTI_HEAD:
            self._multi_head(func, kernels.arguments(func, args, kwargs), out)
        elif func in kernels.ENCODER_LAYER:
            self._heard(Event(kernels.read_encoder_layer(func, kernels.arguments(func, args, kwargs)), ()))
        elif func in kernels.SOFTMAX:
            self._softmax(kernels.arguments(func, args, kwargs), out)
        elif kernels.opaque(func):
            self.hearing.opaque.append((self._holder(), func._schema.name))
        else:
            if self.pending:
                self._follow(func, args, out)
            if self.thorough:
                self._suspect(func, args, out)

    def _heard(self, event: Event) -> None:
        event.stack, event.attention.owner = self._frames(), self._holder()
        self.hearing.events.append(event)

    def _fused(self, attention: Attention, value: Tensor, out: Tensor) -> None:
        event = Event(attention, ())
        if self.thorough:
            event.value, event.out = value, out
        self._heard(event)

    def _multi_head(self, func: Any, bound: dict[str, Any], out: Any) -> None:
        attention, value, finish = kernels.read_multi_head(func, bound, out)
        event = Event(attention, ())
        if self.thorough:
            event.value, event.out, event.finish = value, out[0], finish
        self._heard(event)

    def _softmax(self, bound: dict[str, Any], out: Tensor) -> None:
        attention = kernels.read_softmax(bound, out)
        if attention is not None:
            storage = _storage(out)
            event = Event(attention, self._frames())
            self.pending.append(_Pending(event, self._holder(), {storage}, {storage}, [out]))

    def _follow(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Keep track of what is made from a softmax, until it meets the values."""
        inputs = list(_tensors(args))
        for pending in list(self.pending):
            touched = [x for x in inputs if _storage(x) in pending.derived]
            if not touched or pending not in self.pending:
                continue
            if func in kernels.CONTRACTIONS or func in kernels.MULTIPLY:
                operand = next((x for x in touched if _same_map(x, pending.event.attention.probs)), None)
                single_key = pending.event.attention.probs.shape[-1] == 1  # type: ignore[union-attr]
                if operand is not None and (func in kernels.CONTRACTIONS or (single_key and len(inputs) == 2)):
                    self._confirm(pending, operand)
                    continue
            exact = func in kernels.KEEPS_VALUES and _storage(touched[0]) in pending.exact
            for result in _tensors((out,)):
                storage = _storage(result)
                if storage not in pending.derived:
                    pending.alive.append(result)
                    pending.derived.add(storage)
                    pending.exact |= {storage} if exact else set()

    def _confirm(self, pending: _Pending, operand: Tensor) -> None:
        """The softmax multiplies something: attention. What multiplies may be another tensor than the softmax."""
        attention, storage = pending.event.attention, _storage(operand)
        if storage not in pending.exact:
            probs = attention.probs
            assert probs is not None
            turned = operand.shape[-2:] != probs.shape[-2:]
            attention.weights = (operand.transpose(-1, -2) if turned else operand).reshape(probs.shape)
        # maps that were merged into this one are parts of one effective map
        self.pending = [p for p in self.pending if p is not pending and storage not in p.derived]
        self._heard_at(pending)

    def _heard_at(self, pending: _Pending) -> None:
        pending.event.attention.owner = pending.holder
        self.hearing.events.append(pending.event)

    def _suspect(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """A product of products without a softmax between: attention by hand, or linear attention."""
        holder = self._holder()
        touched = [self.products[key] for x in _tensors(args) if (key := _storage(x)) in self.products]
        changed = any(entry[1] for entry in touched if entry[0] == holder)
        if func in kernels.BATCHED_PRODUCTS:
            if any(entry[0] == holder for entry in touched):
                kind = "a softmax written by hand" if changed else "linear attention"
                self.hearing.suspects.append((holder, kind))
            self.products[_storage(out)] = (holder, False, out)
        elif touched:
            for result in _tensors((out,)):
                key = _storage(result)
                if key not in self.products:
                    self.products[key] = (holder, True, result)

    def _guard(self, targets: list[Tensor]) -> None:
        """Before an operator writes into a tensor that was captured, keep a copy of what was captured."""
        storages = {_storage(target) for target in targets}
        for pending in self.pending:
            if storages & pending.derived:
                _rescue(pending.event.attention, storages)
        for event in self.hearing.events:
            _rescue(event.attention, storages)
        for call in self.hearing.calls:
            if call.input is not None and _storage(call.input) in storages:
                call.input = call.input.clone()
            if isinstance(call.output, Tensor) and _storage(call.output) in storages:
                call.output = call.output.clone()


def _rescue(attention: Attention, storages: set[int]) -> None:
    for name in ("q", "k", "bias", "probs", "weights", "logsumexp"):
        tensor = getattr(attention, name)
        if tensor is not None and _storage(tensor) in storages:
            setattr(attention, name, tensor.clone())


@contextmanager
def ear(
    model: nn.Module,
    on_forward: Callable[[Hearing], None],
    *,
    thorough: bool = False,
    watched: frozenset[Frame] = frozenset(),
) -> Iterator[Ear]:
    """Listen to `model` inside the `with`; every forward pass of it is handed to `on_forward`.

    Raises CaptureError where this model is being listened to already. Under `torch.inference_mode` a dispatch mode
    would change low-level choices of PyTorch, so that inside the `with` it is `torch.no_grad` instead.
    """
    if id(model) in _LISTENING:
        raise CaptureError("this model is being listened to already; leave the first `with` before the second begins")
    hears = Ear(model, on_forward, thorough=thorough, watched=watched)
    with ExitStack() as stack:
        _LISTENING.add(id(model))
        stack.callback(_LISTENING.discard, id(model))
        entered = register_module_forward_pre_hook(hears.enter_module)
        stack.callback(entered.remove)
        left = register_module_forward_hook(hears.leave_module, always_call=True)
        stack.callback(left.remove)
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(hears)
        yield hears


def _first_tensor(args: tuple[Any, ...]) -> Tensor | None:
    return next(_tensors(args), None)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _detached_tree(value: Any) -> Any:
    """The first tensors of a module's output, whatever it is wrapped in."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return tuple(x.detach() for x in _tensors(value))
    return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_map(operand: Tensor, probs: Tensor | None) -> bool:
    assert probs is not None
    sizes = {probs.shape[-2:], probs.shape[-2:][::-1]}
    return operand.numel() == probs.numel() and operand.shape[-2:] in sizes
