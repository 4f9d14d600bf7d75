"""Records every operator of one model's forward pass that is attention, and changes nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture import attention_operators
from collapse_probe.capture.attention_operators import (
    NO_SOFTMAX,
    AttendedSums,
    KernelCall,
    OperatorCall,
    Products,
    storage_of,
    tensors_in,
)
from collapse_probe.capture.plan import Frame
from collapse_probe.capture.residual_sums import NOTHING, ResidualSums, Sum
from collapse_probe.capture.softmax_tracking import SAMPLED, Softmaxes, is_normalised, read_operand
from collapse_probe.capture.trace import Attention
from collapse_probe.errors import CaptureError

FIRST_CHANNELS = 4


def steady_tokens(tokens: Tensor | None, images: int) -> list[bool] | None:
    """Which positions of [B, N, D] or [N, B, D] are bitwise the same for all images; None for other shapes."""
    if tokens is None or tokens.is_nested or tokens.ndim != 3 or images < 2 or images not in tokens.shape[:2]:
        return None
    tokens = tokens if len(tokens) == images else tokens.transpose(0, 1)
    steady = (tokens[1:, :, :FIRST_CHANNELS] == tokens[:1, :, :FIRST_CHANNELS]).all(2).all(0)
    if bool(steady.any()):  # the other channels are looked at only where these are the same
        steady = steady & (tokens[1:] == tokens[:1]).all(2).all(0)
    found: list[bool] = steady.tolist()
    return found


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a module and of those in it: parameters, frozen ones kept as buffers, and views that FSDP keeps."""
    for part in module.modules():
        yield from _own_weights(part)


def _own_weights(module: nn.Module) -> Iterator[Tensor]:
    for weight in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(weight, Tensor):
            yield weight


def sketch(value: Any) -> Any:
    """Tensors without memory, of the same shapes and types, in place of a tensor or of those in a tuple."""
    if isinstance(value, Tensor) and not value.is_nested:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return tuple(map(sketch, value)) if isinstance(value, tuple) else value


@dataclass(eq=False, repr=False)
class AttentionEvent:
    """One attention call: its maps as the model laid them out, the modules that were running, and what the self-check needs.

    `index` counts the events of the forward pass; `kernel` is the call of a fused kernel in a thorough recording; `operand` is
    the tensor that held an eager map when it multiplied V; `errors` are the self-check's (rows, output, logsumexp), `masked`
    its finding that keys are hidden, `nonfinite` the heads with numbers that are not finite. A thorough recording also keeps a
    `sample` of the logits (or of q and k), and knows whether they are `direct`, no product of activations, and whether the
    values are `made` from such a product. `softmaxes` were merged into the map, and `lost` keys multiply nothing. `sources` are
    the module calls from whose outputs the queries and the keys of a kernel were made.
    """

    attention: Attention
    stack: tuple[Frame, ...]
    index: int
    kernel: KernelCall | None = None
    operand: Tensor | None = None
    errors: tuple[float, float, float] | None = None
    memory: int = 0
    sample: tuple[Tensor, ...] = ()
    direct: bool = False
    made: bool = False
    softmaxes: int = 1
    lost: int = 0
    masked: bool = False
    nonfinite: tuple[int, ...] = ()
    sources: tuple[int, int] = (0, 0)

    def sketch(self) -> None:
        """Keep only the shapes of the tensors, and in `memory` the bytes that they took."""
        self.memory = self.held_bytes()
        for name in ("q", "k", "v", "bias", "probs", "weights"):
            setattr(self.attention, name, sketch(getattr(self.attention, name)))
        self.kernel = self.operand = self.attention.logsumexp = None

    def held_bytes(self) -> int:
        """The bytes behind the storages that the event keeps alive."""
        a = self.attention
        tensors = [t for t in (a.q, a.k, a.bias, a.probs, a.weights) if t is not None]
        return self.memory or sum({storage_of(t): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(eq=False, repr=False)
class ModuleCall:
    """One call of a module, with its first input tensor and its output where these were asked for.

    In a sketch both have no memory, and `steady` says which token positions of the input are the same for all images. `bit`
    stands for the call in masks: `read` are the calls from whose outputs something was made that this one read, `entered` those
    from whose outputs its input was made. Its input is the result of `sum`, and it gave that of `gave`.
    """

    path: str
    number: int
    stack: tuple[Frame, ...]
    bit: int = 0
    read: int = 0
    entered: int = 0
    sum: Sum = NOTHING
    gave: Sum = NOTHING
    input: Tensor | None = None
    output: Any = None
    steady: list[bool] | None = None


@dataclass(eq=False, repr=False)
class PassLog:
    """All that was recorded of one forward pass, in the order in which it happened.

    `input` is the first tensor that any module received: the images, also where the model is called by keyword. `opaque` and
    `suspects` are (stack of calls, what was computed): attention that cannot be captured. `products` are the module calls in
    which activations were multiplied with one another, `again` the events whose result was multiplied so once more.
    """

    images: int = 0
    input: Tensor | None = None
    output: Any = None
    events: list[AttentionEvent] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    opaque: list[tuple[tuple[Frame, ...], str]] = field(default_factory=list)
    suspects: list[tuple[tuple[Frame, ...], str]] = field(default_factory=list)
    products: set[Frame] = field(default_factory=set)
    again: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class ModuleTable:
    """A model's modules: their `names` by id, the storages of their weights (`fixed`), and the names of those that have weights
    of their own or in a module inside (`holders`). True while no module and no weight is exchanged. The `weights` are held, so
    that the memory of one that a module drops (a map that it keeps for whoever asks) is not taken for another tensor's.
    """

    names: Mapping[int, str]
    fixed: frozenset[int]
    holders: frozenset[str]
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ModuleTable:
        """Read off the model, which takes as long as a forward pass of a small one."""
        holders: set[str] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            if next(_own_weights(module), None) is not None:
                while name not in holders:
                    holders.add(name)
                    name = name.rpartition(".")[0]
        names = {id(module): name for name, module in model.named_modules()}
        weights = tuple(weights_of(model))
        return cls(names, frozenset(storage_of(weight) for weight in weights), frozenset(holders), weights)


_RECORDED: set[int] = set()
"""The ids of the models that are being recorded."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the forward passes of one model on one thread, while it is `attached`.

    `on_forward` receives the PassLog of each forward pass that ended without an exception. `thorough` keeps what plan and
    self-check need, for every module call; otherwise the inputs and outputs of the module calls in `watched` are kept, and a
    softmax written by hand is heard only if `by_hand`. `on_operator` is called after each operator with its call, whose `out`
    it may replace, and with the attention events that it completed, while their tensors are there; the log then keeps no more
    than the shapes of the modules' inputs and outputs. `on_module` is called with each module call and its output; what it
    returns, unless None, takes the output's place. `modules` spares reading them off the model again. With `values` what the
    maps multiply is kept as well.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch wraps every call of the mode in a guard against its compiler; `attached` switches that off once."""
        return not hasattr(torch.compiler, "set_stance")

    def __init__(
        self,
        model: nn.Module,
        on_forward: Callable[[PassLog], None] | None = None,
        *,
        thorough: bool = False,
        watched: frozenset[Frame] = frozenset(),
        by_hand: bool = False,
        on_operator: Callable[[OperatorCall, list[AttentionEvent]], None] | None = None,
        on_module: Callable[[Frame, Any], Any] | None = None,
        modules: ModuleTable | None = None,
        values: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.on_forward, self.on_operator, self.on_module = model, on_forward, on_operator, on_module
        self.thorough, self.watched, self.by_hand, self.values = thorough, watched, by_hand, values
        modules = ModuleTable.of(model) if modules is None else modules
        self.names, self.fixed, self.holders = modules.names, modules.fixed, modules.holders
        self.thread = threading.get_ident()
        self.stack: list[ModuleCall] = []
        self.error_before: BaseException | None = None
        self.lowered: torch.dtype | None = None
        self.resting = False
        self._reset()

    def _reset(self) -> None:
        self.log = PassLog()
        self.counts: dict[str, int] = {}
        self.softmaxes, self.products, self.residual = Softmaxes(self.fixed), Products(self.fixed), ResidualSums()
        self.attended = AttendedSums()
        self.lineage: dict[int, int] = {}  # by storage: the module calls from whose outputs it was made, as bits
        self.operands: dict[int, tuple[int, int]] = {}  # the same of the two operands of the newest product that went into it

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let passes over the model go by inside the `with`."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    @contextmanager
    def attached(self, nested: bool = False) -> Iterator[Recorder]:
        """Record the model inside the `with`; hooks and the mode are removed at its end.

        Raises CaptureError where this model is being recorded already, unless `nested` in a recorder that pauses. Under
        `torch.inference_mode` a dispatch mode would change low-level choices of PyTorch, so that inside the `with` it is
        `torch.no_grad` instead.
        """
        if id(self.model) in _RECORDED and not nested:
            raise CaptureError("this model is being recorded already; leave the first `with` before the second begins")
        with ExitStack() as stack:
            if id(self.model) not in _RECORDED:
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
        given: list[Tensor] = []
        if kept or log.input is None:
            with self.paused():  # these operators are the recorder's own
                given = [x.detach() for x in tensors_in(args)]
        first = next(
            (x for x in given if log.images and not x.is_nested and x.ndim > 2 and log.images in x.shape[:2]),
            given[0] if given else None,
        )
        if log.input is None:
            log.input, log.images = first, 0 if first is None else len(first)
        if kept:
            call.input = first
            call.entered = 0 if first is None else self.lineage.get(storage_of(first), 0)
            if self.on_operator is not None:
                with self.paused():
                    call.steady, call.input = steady_tokens(first, log.images), sketch(first)
            call.bit = 1 << len(log.calls)
            call.sum = self.residual.enter(first, call.bit) if self.thorough else NOTHING
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
        for result in tensors_in((output,)) if self.thorough else ():
            self.lineage[storage_of(result)] = self.lineage.get(storage_of(result), 0) | call.bit
            call.gave = call.gave if call.gave != NOTHING else self.residual.of(result)
        if self.thorough or (path, call.number) in self.watched:
            with self.paused():
                call.output = _detached(output) if self.on_operator is None else sketch(_detached(output))
        if not self.stack and sys.exc_info()[1] is self.error_before:
            self.log.output, log = output, self.log
            log.again = self.products.again
            log.suspects[:0] = self.softmaxes.refused
            self._reset()
            if self.on_forward is not None:
                self.on_forward(log)
        return None if self.on_module is None else self.on_module((path, call.number), output)

    def frames(self) -> tuple[Frame, ...]:
        """The module calls that are running, outermost first."""
        return tuple((call.path, call.number) for call in self.stack)

    def _path(self, module: nn.Module) -> str | None:
        """The name of one of the model's own modules, running in the recorder's thread."""
        return self.names.get(id(module)) if threading.get_ident() == self.thread and not self.resting else None

    def _holder(self) -> str:
        return next((call.path for call in reversed(self.stack) if call.path in self.holders), "")

    # ---- which operators run in it ----

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator unchanged; record it where it is attention."""
        kwargs = kwargs or {}
        if not self.stack or self.resting:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            if attention_operators.opaque(func):
                self.log.opaque.append((self.frames(), str(func)))
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
            if self.thorough:
                self._inherit(call)
                self.residual.follow(call, sum(1 << event.index for event in self.log.events[first:]))
            if self.on_operator is not None:
                self.on_operator(call, self.log.events[first:])
        return call.out

    def _note(self, call: OperatorCall) -> None:
        func, holder = call.func, self._holder()
        if func in attention_operators.READERS:
            kernel, stack = attention_operators.READERS[func](call), self.frames()
            kernel.attention.v = kernel.value if self.values else None
            if func in attention_operators.ENCODER_LAYER:  # which stands for its attention module without calling it
                holder = f"{holder}.self_attn".removeprefix(".")
                stack = (*stack, (holder, stack[-1][1]))
            more: dict[str, Any] = {}
            if self.thorough:
                q, k = (
                    0 if x is None else self.lineage.get(storage_of(x), 0) for x in (kernel.attention.q, kernel.attention.k)
                )
                more = {"kernel": kernel, "sample": _sample_of(kernel.attention), "sources": (q, k)}
            self._add_event(kernel.attention, holder, stack, **more)
            self.attended.begin(self.log.events[-1], kernel.value, kernel.out)
        elif func in attention_operators.SOFTMAX:
            direct = self.thorough and not self.products.made_from(call.bound["self"])
            self.softmaxes.begin(call, self.frames(), holder, direct, sampled=self.thorough)
            self.products.made.pop(storage_of(call.out), None)
        elif attention_operators.opaque(func):
            self.log.opaque.append((self.frames(), func._schema.name))
        else:
            self.attended.follow(call, self.log.events)
            self._note_product(call, holder)

    def _note_product(self, call: OperatorCall, holder: str) -> None:
        origin, kept = None, self.on_operator is not None
        heard_here = self.softmaxes.follow(call) if self.softmaxes.pending else []
        for heard in heard_here:
            origin = len(self.log.events) if heard.direct else None
            if self.values:
                heard.attention.v = attention_operators.values_of(heard.attention, heard.values, call)
            self._add_event(
                heard.attention,
                heard.holder,
                heard.stack,
                operand=heard.operand if kept else None,
                sample=() if heard.sample is None else (heard.sample,),
                direct=heard.direct,
                made=self.products.made_from(heard.values),
                softmaxes=heard.softmaxes,
                lost=heard.lost,
                sources=(0, 0) if heard.direct else self._sources(heard.attention.probs),
            )
            if heard.values is not None and isinstance(call.out, Tensor):
                self.attended.begin(self.log.events[-1], heard.values, call.out)
        if not (self.thorough or self.by_hand):
            return
        again = self.products.follow(call, holder, origin)
        if self.thorough and call.func in attention_operators.BATCHED_PRODUCTS and self.products.made_from(call.out):
            self.log.products |= set(self.frames())
        if again is None or heard_here:
            return
        kind, operand, contracted = again
        if kind == NO_SOFTMAX and is_normalised(operand, contracted):
            attention, sample = read_operand(operand, contracted, self.thorough)
            samples = () if sample is None else (sample,)
            held, sources = operand if kept else None, self._sources(operand)
            self._add_event(attention, holder, self.frames(), operand=held, sample=samples, sources=sources)
        elif self.thorough:
            self.log.suspects.append((self.frames(), kind))

    def _add_event(self, attention: Attention, owner: str, stack: tuple[Frame, ...], **more: Any) -> None:
        attention.owner = owner
        self.log.events.append(AttentionEvent(attention, stack, len(self.log.events), **more))

    def _sources(self, x: Tensor | None) -> tuple[int, int]:
        """From which module calls the two operands of the product were made from which a tensor was made."""
        return (0, 0) if x is None else self.operands.get(storage_of(x), (0, 0))

    def _inherit(self, call: OperatorCall) -> None:
        """What an operator makes stems from the module calls, and the operands of a product, that its inputs stem from."""
        given = list(tensors_in((*call.args, *call.kwargs.values())))
        inputs = {storage_of(x) for x in given}
        mask = 0
        for storage in inputs:
            mask |= self.lineage.get(storage, 0)
        operands = next((self.operands[storage] for storage in map(storage_of, given) if storage in self.operands), (0, 0))
        if call.func in attention_operators.BATCHED_PRODUCTS:
            left, right = (self.lineage.get(storage_of(x), 0) for x in given[-2:])
            operands = left, right
        for running in self.stack:
            running.read |= mask
        for result in tensors_in((call.out,)):
            storage = storage_of(result)
            self.lineage[storage] = mask | (self.lineage.get(storage, 0) if storage in inputs else 0)
            self.operands[storage] = operands

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


CAPTURED = ("q", "k", "v", "bias", "probs", "weights", "logsumexp")


def copy_before_write(holder: Any, storages: set[int], names: Iterable[str] = CAPTURED) -> None:
    """Replace those of the named tensors that live in `storages` by copies."""
    for name in names:
        tensor = getattr(holder, name)
        if isinstance(tensor, Tensor) and storage_of(tensor) in storages:
            setattr(holder, name, tensor.clone())


def _sample_of(attention: Attention) -> tuple[Tensor, ...]:
    """A few channels of every query and key."""
    assert attention.q is not None
    assert attention.k is not None
    return attention.q[..., :SAMPLED].clone(), attention.k[..., :SAMPLED].clone()


def _detached(value: Any) -> Any:
    """A module's output: a tensor, or all tensors in it as a tuple."""
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(x.detach() for x in tensors_in((value,))) or None
