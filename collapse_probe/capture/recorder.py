"""The ear: hears every operator of one model's forward pass, keeps what is attention, and changes nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture import operators as kernels
from collapse_probe.capture.operators import storage_of, tensors_in
from collapse_probe.capture.softmax_tracking import Frame, Products, Softmaxes, rescue
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError


def steady_tokens(tokens: Tensor | None, images: int) -> list[bool] | None:
    """Which positions of [B, N, D] or [N, B, D] are bitwise the same for all images; None for other shapes."""
    if tokens is None or tokens.is_nested or tokens.ndim != 3 or images < 2 or images not in tokens.shape[:2]:
        return None
    tokens = tokens if len(tokens) == images else tokens.transpose(0, 1)
    found: list[bool] = (tokens == tokens[:1]).all(2).all(0).tolist()
    return found


@dataclass(frozen=True)
class Shape:
    """What a sketch keeps of a tensor while the model runs: no memory among the model's own, which would tear that apart."""

    dtype: torch.dtype
    sizes: tuple[int, ...]


def sketch(value: Any) -> Any:
    """Shapes in place of tensors."""
    if isinstance(value, Tensor) and not value.is_nested:
        return Shape(value.dtype, tuple(value.shape))
    return [sketch(x) for x in value] if isinstance(value, tuple) else value


def unsketched(value: Any) -> Any:
    """Tensors of one element seen as their shapes, in place of the shapes."""
    if isinstance(value, Shape):
        return torch.empty((), dtype=value.dtype).expand(value.sizes)
    return tuple(unsketched(x) for x in value) if isinstance(value, list) else value


_HELD = ("q", "k", "bias", "probs", "weights")


@dataclass
class AttentionEvent:
    """One attention call as it was heard: its maps, where it stood, and what the self-check needs.

    `errors` are the self-check's (rows, output, logsumexp) once it was made.
    """

    attention: Attention
    stack: tuple[Frame, ...]
    value: Tensor | None = None
    out: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    errors: tuple[float, float, float] | None = None
    held: dict[int, int] = field(default_factory=dict)

    def sketch(self) -> None:
        """Keep of the tensors their shapes, and in `held` the bytes behind each storage."""
        self.held = self.storages()
        for name in _HELD:
            setattr(self.attention, name, sketch(getattr(self.attention, name)))
        self.value = self.out = self.finish = self.attention.logsumexp = None

    def storages(self) -> dict[int, int]:
        """The bytes behind each storage that the event keeps alive."""
        tensors = [t for name in _HELD if (t := getattr(self.attention, name)) is not None]
        return self.held or {storage_of(t): t.untyped_storage().nbytes() for t in tensors}


@dataclass
class ModuleCall:
    """One call of a module, with its first input tensor and its output where these were asked for.

    In a sketch both are tensors of one element seen as their shapes, and `steady` says which token positions of the input are
    the same for all images.
    """

    path: str
    number: int
    stack: tuple[Frame, ...]
    input: Tensor | None = None
    output: Any = None
    steady: list[bool] | None = None


@dataclass
class Recording:
    """All that was heard of one forward pass, in the order in which it happened.

    `input` is the first tensor that any module received: the images, also where the model is called by
    keyword.
    """

    images: int = 0
    input: Tensor | None = None
    output: Any = None
    events: list[AttentionEvent] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    suspects: list[tuple[str, str]] = field(default_factory=list)


def finish_sketch(heard: Recording) -> None:
    """Tensors seen as their shapes in place of the shapes, once the forward pass is over."""
    for call in heard.calls:
        call.input, call.output = unsketched(call.input), unsketched(call.output)
    for event in heard.events:
        for name in _HELD:
            setattr(event.attention, name, unsketched(getattr(event.attention, name)))


_LISTENING: set[int] = set()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears one model on one thread. `thorough` keeps what plan and self-check need, for every module call; `examine`
    is called with each event and the number of images as it happens, and may sketch it; of the modules' inputs and outputs
    then no more than the shapes are kept.

    `on_forward` is called with the Hearing of each forward pass that ended without an exception.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        on_forward: Callable[[Recording], None],
        *,
        thorough: bool = False,
        examine: Callable[[AttentionEvent, int], None] | None = None,
        watched: frozenset[Frame] = frozenset(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.on_forward, self.thorough, self.watched = model, on_forward, thorough, watched
        self.examine, self.sketched = examine, examine is not None
        self.names = {id(module): name for name, module in model.named_modules()}
        self.holds = _holders(model)
        self.thread = threading.get_ident()
        self.stack: list[ModuleCall] = []
        self.error_before: BaseException | None = None
        self.lowered: torch.dtype | None = None
        self._forget()

    def _forget(self) -> None:
        self.hearing = Recording()
        self.counts: dict[str, int] = {}
        self.softmaxes, self.products = Softmaxes(), Products()

    # ---- which module is running ----

    def enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A global forward pre-hook: push the module on the stack."""
        path = self._path(module)
        if path is None or (module is not self.model and not self.stack):
            return
        if module is self.model:
            self._begin()
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        call = ModuleCall(path, number, self._frames())
        if self.hearing.input is None:
            self.hearing.input = _first_tensor(args)
            self.hearing.images = 0 if self.hearing.input is None else len(self.hearing.input)
        if self.thorough or (path, number) in self.watched:
            call.input = _first_tensor(args)
            if self.sketched:
                call.steady, call.input = steady_tokens(call.input, self.hearing.images), sketch(call.input)
            self.hearing.calls.append(call)
        self.stack.append(call)
        self.lowered = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    def _begin(self) -> None:
        if torch.is_inference_mode_enabled():
            raise CaptureError(
                "torch.inference_mode began inside the listening, where it would change the model's outputs; "
                "let it begin before, or use torch.no_grad"
            )
        self.stack.clear()  # a KeyboardInterrupt skips the hooks that would have emptied it
        self._forget()
        self.error_before = sys.exc_info()[1]

    def leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A global forward hook, called after exceptions too: pop the module, and finish with the root."""
        path = self._path(module)
        if path is None or not self.stack or self.stack[-1].path != path:
            return
        call = self.stack.pop()
        self.softmaxes.hand_up(path, self._holder())
        if path in self.holds:
            self.products.forget(path)
        if self.thorough or (path, call.number) in self.watched:
            call.output = sketch(_detached_tree(output)) if self.sketched else _detached_tree(output)
        if not self.stack and sys.exc_info()[1] is self.error_before:
            self.hearing.output, heard = output, self.hearing
            self._forget()
            if self.sketched:
                finish_sketch(heard)
            self.on_forward(heard)

    def _path(self, module: nn.Module) -> str | None:
        """The name of one of the model's own modules, running in the thread that listens."""
        return self.names.get(id(module)) if threading.get_ident() == self.thread else None

    def _frames(self) -> tuple[Frame, ...]:
        return tuple((call.path, call.number) for call in self.stack)

    def _holder(self) -> str:
        return next((call.path for call in reversed(self.stack) if call.path in self.holds), "")

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
        if func in kernels.ENCODER_LAYER and self.lowered is not None:
            # this kernel calls operators that autocast lowers, unless a dispatch mode has switched it off
            with torch.autocast("cpu", self.lowered):
                return self._run(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func in kernels.FUSED:
            self._kernel(*kernels.read_fused(func, kernels.arguments(func, args, kwargs), out))
        elif func in kernels.MULTI_HEAD:
            self._kernel(*kernels.read_multi_head(func, kernels.arguments(func, args, kwargs), out))
        elif func in kernels.ENCODER_LAYER:
            self._kernel(
                *kernels.read_encoder_layer(func, kernels.arguments(func, args, kwargs), out),
                inside="self_attn",
            )
        elif func in kernels.SOFTMAX:
            attention = kernels.read_softmax(kernels.arguments(func, args, kwargs), out)
            if attention is not None:
                self.softmaxes.begin(attention, self._frames(), self._holder())
        elif kernels.opaque(func):
            self.hearing.opaque.append((self._holder(), func._schema.name))
        else:
            self._follow(func, args, out)

    def _kernel(
        self,
        attention: Attention,
        value: Tensor,
        out: Tensor,
        finish: kernels.Finish | None,
        inside: str = "",
    ) -> None:
        """Attention in one operator; `inside` names the sub-module that it stands for without calling it."""
        owner, stack = self._holder(), self._frames()
        if inside:
            owner = f"{owner}.{inside}".removeprefix(".")
            stack = (*stack, (owner, stack[-1][1]))
        attention.owner = owner
        event = AttentionEvent(attention, stack)
        if self.thorough:
            event.value, event.out, event.finish = value, out, finish
        self._heard(event)

    def _heard(self, event: AttentionEvent) -> None:
        self.hearing.events.append(event)
        if self.examine is not None:
            self.examine(event, self.hearing.images)

    def _follow(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        for softmax in self.softmaxes.follow(func, args, out) if self.softmaxes.pending else ():
            softmax.attention.owner = softmax.holder
            self._heard(AttentionEvent(softmax.attention, softmax.stack))
        if self.thorough:
            holder = self._holder()
            kind = self.products.follow(func, args, out, holder)
            if kind is not None:
                self.hearing.suspects.append((holder, kind))

    def _guard(self, targets: list[Tensor]) -> None:
        """Before an operator writes into a tensor that was captured, keep a copy of what was captured."""
        storages = {storage_of(target) for target in targets}
        self.softmaxes.overwritten(storages)
        for event in self.hearing.events:
            rescue(event.attention, storages)
            rescue(event, storages, ("value", "out"))
        for call in self.hearing.calls:
            rescue(call, storages, ("input", "output"))
            if isinstance(call.output, tuple):
                call.output = tuple(x.clone() if storage_of(x) in storages else x for x in call.output)


@contextmanager
def ear(
    model: nn.Module,
    on_forward: Callable[[Recording], None],
    *,
    thorough: bool = False,
    examine: Callable[[AttentionEvent, int], None] | None = None,
    watched: frozenset[Frame] = frozenset(),
) -> Iterator[Recorder]:
    """Listen to `model` inside the `with`; every forward pass of it is handed to `on_forward`.

    Raises CaptureError where this model is being listened to already. Under `torch.inference_mode` a dispatch
    mode would change low-level choices of PyTorch, so that inside the `with` it is `torch.no_grad` instead.
    """
    if id(model) in _LISTENING:
        raise CaptureError("this model is being listened to already; leave the first `with` before the second begins")
    hears = Recorder(model, on_forward, thorough=thorough, examine=examine, watched=watched)
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


def _holders(model: nn.Module) -> set[str]:
    """The names of the modules that have parameters, of their own or of a module inside."""
    found: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(parameter is not None for parameter in module._parameters.values()):
            while name not in found:
                found.add(name)
                name = name.rpartition(".")[0]
    return found


def _first_tensor(args: tuple[Any, ...]) -> Tensor | None:
    return next((x.detach() for x in tensors_in(args)), None)


def _detached_tree(value: Any) -> Any:
    """A module's output: a tensor, or the tensors in a list, tuple or dict as a tuple."""
    if isinstance(value, Tensor):
        return value.detach()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return tuple(x.detach() for x in tensors_in(inside)) or None
