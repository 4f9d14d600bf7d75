"""Records every operator of one model's forward pass that is attention, and changes nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import KernelCall, OperatorCall, storage_of, tensors_in
from collapse_probe.capture.plan import Frame
from collapse_probe.capture.softmax_tracking import Products, Softmaxes, copy_before_write
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError


def steady_tokens(tokens: Tensor | None, images: int) -> list[bool] | None:
    """Which positions of [B, N, D] or [N, B, D] are bitwise the same for all images; None for other shapes."""
    if tokens is None or tokens.is_nested or tokens.ndim != 3 or images < 2 or images not in tokens.shape[:2]:
        return None
    tokens = tokens if len(tokens) == images else tokens.transpose(0, 1)
    steady: list[bool] = (tokens == tokens[:1]).all(2).all(0).tolist()
    return steady


def sketch(value: Any) -> Any:
    """Tensors without memory, of the same shapes and types, in place of a tensor or of those in a tuple."""
    if isinstance(value, Tensor) and not value.is_nested:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return tuple(map(sketch, value)) if isinstance(value, tuple) else value


@dataclass
class AttentionEvent:
    """One attention call: its maps, the modules that were running, and what the self-check needs.

    `index` counts the events of the forward pass; `kernel` is the call of a fused kernel in a thorough recording; `operand` is
    the tensor that held an eager map when it multiplied V; `errors` are the self-check's (rows, output, logsumexp).
    """

    attention: Attention
    stack: tuple[Frame, ...]
    index: int
    kernel: KernelCall | None = None
    operand: Tensor | None = None
    errors: tuple[float, float, float] | None = None
    memory: int = 0

    def sketch(self) -> None:
        """Keep only the shapes of the tensors, and in `memory` the bytes that they took."""
        self.memory = self.held_bytes()
        for name in ("q", "k", "bias", "probs", "weights"):
            setattr(self.attention, name, sketch(getattr(self.attention, name)))
        self.kernel = self.operand = self.attention.logsumexp = None

    def held_bytes(self) -> int:
        """The bytes behind the storages that the event keeps alive."""
        a = self.attention
        tensors = [t for t in (a.q, a.k, a.bias, a.probs, a.weights) if t is not None]
        return self.memory or sum({storage_of(t): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass
class ModuleCall:
    """One call of a module, with its first input tensor and its output where these were asked for.

    In a sketch both have no memory, and `steady` says which token positions of the input are the same for all images.
    """

    path: str
    number: int
    stack: tuple[Frame, ...]
    input: Tensor | None = None
    output: Any = None
    steady: list[bool] | None = None


@dataclass
class PassLog:
    """All that was recorded of one forward pass, in the order in which it happened.

    `input` is the first tensor that any module received: the images, also where the model is called by keyword. `opaque` and
    `suspects` are (module, what it computed): attention that cannot be captured.
    """

    images: int = 0
    input: Tensor | None = None
    output: Any = None
    events: list[AttentionEvent] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    suspects: list[tuple[str, str]] = field(default_factory=list)


_RECORDED: set[int] = set()
"""The ids of the models that are being recorded."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the forward passes of one model on one thread, while it is `attached`.

    `on_forward` receives the PassLog of each forward pass that ended without an exception. `thorough` keeps what plan and
    self-check need, for every module call; otherwise the inputs and outputs of the module calls in `watched` are kept.
    `on_operator` is called after each operator with its call, whose `out` it may replace, and with the attention events that it
    completed, while their tensors are there; the log then keeps no more than the shapes of the modules' inputs and outputs.
    `on_module` is called with each module call and its output; what it returns, unless None, takes the output's place.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        on_forward: Callable[[PassLog], None] | None = None,
        *,
        thorough: bool = False,
        watched: frozenset[Frame] = frozenset(),
        on_operator: Callable[[OperatorCall, list[AttentionEvent]], None] | None = None,
        on_module: Callable[[Frame, Any], Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.on_forward, self.on_operator, self.on_module = model, on_forward, on_operator, on_module
        self.thorough, self.watched = thorough, watched
        self.names = {id(module): name for name, module in model.named_modules()}
        self.holders: set[str] = set()  # modules that have parameters, of their own or of a module inside
        for name, module in model.named_modules(remove_duplicate=False):
            if any(parameter is not None for parameter in module._parameters.values()):
                while name not in self.holders:
                    self.holders.add(name)
                    name = name.rpartition(".")[0]
        self.thread = threading.get_ident()
        self.stack: list[ModuleCall] = []
        self.error_before: BaseException | None = None
        self.lowered: torch.dtype | None = None
        self._reset()

    def _reset(self) -> None:
        self.log = PassLog()
        self.counts: dict[str, int] = {}
        self.softmaxes, self.products = Softmaxes(), Products()

    @contextmanager
    def attached(self) -> Iterator[Recorder]:
        """Record the model inside the `with`; hooks and the mode are removed at its end.

        Raises CaptureError where this model is being recorded already. Under `torch.inference_mode` a dispatch mode would
        change low-level choices of PyTorch, so that inside the `with` it is `torch.no_grad` instead.
        """
        if id(self.model) in _RECORDED:
            raise CaptureError("this model is being recorded already; leave the first `with` before the second begins")
        with ExitStack() as stack:
            _RECORDED.add(id(self.model))
            stack.callback(_RECORDED.discard, id(self.model))
            stack.callback(register_module_forward_pre_hook(self.enter_module).remove)
            stack.callback(register_module_forward_hook(self.leave_module, always_call=True).remove)
            if hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            stack.enter_context(self)
            yield self

    # ---- which module is running ----

    def enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A global forward pre-hook: push the module on the stack."""
        path = self._path(module)
        if path is None or (module is not self.model and not self.stack):
            return
        if module is self.model:
            if torch.is_inference_mode_enabled():
                raise CaptureError(
                    "torch.inference_mode began inside the recording, where it would change the model's outputs; "
                    "let it begin before, or use torch.no_grad"
                )
            self.stack.clear()  # a KeyboardInterrupt skips the hooks that would have emptied it
            self._reset()
            self.error_before = sys.exc_info()[1]
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        call, log = ModuleCall(path, number, self.frames()), self.log
        kept = self.thorough or (path, number) in self.watched
        first = next((x.detach() for x in tensors_in(args)), None) if kept or log.input is None else None
        if log.input is None:
            log.input, log.images = first, 0 if first is None else len(first)
        if kept:
            call.input = first
            if self.on_operator is not None:
                call.steady, call.input = steady_tokens(first, log.images), sketch(first)
            log.calls.append(call)
        self.stack.append(call)
        self.lowered = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    def leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A global forward hook, called after exceptions too: pop the module, and finish with the root."""
        path = self._path(module)
        if path is None or not self.stack or self.stack[-1].path != path:
            return None
        call = self.stack.pop()
        self.softmaxes.hand_up(path, self._holder())
        if path in self.holders:
            self.products.forget(path)
        if self.thorough or (path, call.number) in self.watched:
            call.output = _detached(output) if self.on_operator is None else sketch(_detached(output))
        if not self.stack and sys.exc_info()[1] is self.error_before:
            self.log.output, log = output, self.log
            self._reset()
            if self.on_forward is not None:
                self.on_forward(log)
        return None if self.on_module is None else self.on_module((path, call.number), output)

    def frames(self) -> tuple[Frame, ...]:
        """The module calls that are running, outermost first."""
        return tuple((call.path, call.number) for call in self.stack)

    def _path(self, module: nn.Module) -> str | None:
        """The name of one of the model's own modules, running in the recorder's thread."""
        return self.names.get(id(module)) if threading.get_ident() == self.thread else None

    def _holder(self) -> str:
        return next((call.path for call in reversed(self.stack) if call.path in self.holders), "")

    # ---- which operators run in it ----

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator unchanged; record it where it is attention."""
        kwargs = kwargs or {}
        if not self.stack:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            if attention_operators.opaque(func):
                self.log.opaque.append((self._holder(), str(func)))
            return func(*args, **kwargs)
        call = OperatorCall(func, args, kwargs)
        if func._schema.is_mutable:
            self._protect({storage_of(target) for target in call.written()})
        # this kernel calls operators that autocast lowers, unless a dispatch mode has switched it off
        lowered = self.lowered if func in attention_operators.ENCODER_LAYER else None
        with nullcontext() if lowered is None else torch.autocast("cpu", lowered):
            call.out = func(*args, **kwargs)
            first = len(self.log.events)
            self._note(call)
            if self.on_operator is not None:
                self.on_operator(call, self.log.events[first:])
        return call.out

    def _note(self, call: OperatorCall) -> None:
        func, holder = call.func, self._holder()
        if func in attention_operators.READERS:
            kernel, stack = attention_operators.READERS[func](call), self.frames()
            if func in attention_operators.ENCODER_LAYER:  # which stands for its attention module without calling it
                holder = f"{holder}.self_attn".removeprefix(".")
                stack = (*stack, (holder, stack[-1][1]))
            self._add_event(kernel.attention, holder, stack, kernel=kernel if self.thorough else None)
        elif func in attention_operators.SOFTMAX:
            attention = attention_operators.read_softmax(call)
            if attention is not None:
                self.softmaxes.begin(attention, self.frames(), holder)
        elif attention_operators.opaque(func):
            self.log.opaque.append((holder, func._schema.name))
        else:
            for softmax, operand in self.softmaxes.follow(call) if self.softmaxes.pending else ():
                kept = None if self.on_operator is None else operand
                self._add_event(softmax.attention, softmax.holder, softmax.stack, operand=kept)
            if self.thorough and (kind := self.products.follow(call, holder)) is not None:
                self.log.suspects.append((holder, kind))

    def _add_event(self, attention: Attention, owner: str, stack: tuple[Frame, ...], **more: Any) -> None:
        attention.owner = owner
        if attention.probs is not None and attention.probs.ndim == 3:  # [B·H, N, N]
            images, maps = self.log.images, attention.probs.shape
            shape = (images, -1, *maps[1:]) if images and maps[0] % images == 0 else (-1, 1, *maps[1:])
            attention.probs = attention.probs.reshape(shape)
            attention.weights = None if attention.weights is None else attention.weights.reshape(shape)
        self.log.events.append(AttentionEvent(attention, stack, len(self.log.events), **more))

    def _protect(self, storages: set[int]) -> None:
        """Before an operator writes into tensors that were captured, copy what was captured there."""
        self.softmaxes.overwritten(storages)
        for event in self.log.events:
            copy_before_write(event.attention, storages)
            if event.kernel is not None:
                copy_before_write(event.kernel, storages, ("value", "out"))
        for call in self.log.calls:
            copy_before_write(call, storages, ("input", "output"))
            if isinstance(call.output, tuple):
                call.output = tuple(x.clone() if storage_of(x) in storages else x for x in call.output)


def _detached(value: Any) -> Any:
    """A module's output: a tensor, or the tensors in a list, tuple or dict as a tuple."""
    if isinstance(value, Tensor):
        return value.detach()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return tuple(x.detach() for x in tensors_in(inside)) or None
