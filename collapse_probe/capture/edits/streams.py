"""Leaves whole blocks or their MLPs out of a model while it runs: what leaves such a block is what entered it, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from collapse_probe.capture.attention_operators import tensors_in
from collapse_probe.capture.capture import noise
from collapse_probe.capture.plan import Frame, Plan
from collapse_probe.capture.recorder import ModuleTable
from collapse_probe.distributed import unwrap

Bypass = Mapping[Frame, Frame]
"""By the call of a block, the module call with whose first input the block's output is replaced: the block itself where nothing
of it is to stay."""


def block_call(plan: Plan, block: int) -> Frame | None:
    """The module call that is a block; None for a block that is no module of its own."""
    path, place = plan.blocks[block].partition(" (call ")[0], plan.taps[block + 1]
    return (path, place.call) if place.side == "output" and place.path == path else None


def stream_in(values: Any) -> Tensor | None:
    """The first tensor among a module's arguments, or its results, that can hold tokens."""
    given = tensors_in(values if isinstance(values, (tuple, list)) else (values,))
    return next((x for x in given if not x.is_nested and x.ndim > 2 and x.is_floating_point()), None)


class StreamHooks:
    """Global hooks that follow the calls of one model's modules; what `leave` returns takes the place of a module's output.

    PyTorch's fast paths look for hooks of a module's own, and not for global ones: these change no bit elsewhere.
    """

    def __init__(self, model: nn.Module, bypass: Bypass, modules: ModuleTable | None = None) -> None:
        self.model, self.names = model, (ModuleTable.of(model) if modules is None else modules).names
        self.bypass, self.sources = bypass, frozenset(bypass.values())
        self.running: list[Frame] = []
        self.counts: dict[str, int] = {}
        self.kept: dict[Frame, Tensor] = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A global forward pre-hook: keep what enters the modules that are asked for, before anything is written into it."""
        path = self.names.get(id(module))
        if path is None:
            return
        if module is self.model:
            self.running, self.counts, self.kept = [], {}, {}
        frame = (path, self.counts.get(path, 0))
        self.counts[path] = frame[1] + 1
        self.running.append(frame)
        if frame in self.sources and (x := stream_in(args)) is not None:
            self.kept[frame] = x.clone()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A global forward hook: what was kept in place of a block's output; None where it stays."""
        path = self.names.get(id(module))
        if path is None or not self.running:
            return None
        frame = self.running.pop()
        while frame[0] != path:  # an exception inside the model, which caught it itself
            frame = self.running.pop()
        return _with_stream(output, self.kept[self.bypass[frame]]) if frame in self.bypass else None

    @contextmanager
    def attached(self) -> Iterator[StreamHooks]:
        """Follow the model inside the `with`; compiled models run eagerly there, as in a recording."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self.enter).remove)
            stack.callback(register_module_forward_hook(self.leave).remove)
            if hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield self


def _with_stream(output: Any, stream: Tensor) -> Any:
    """A module's output with another tensor in place of its (first) one."""
    if isinstance(output, Tensor):
        return stream.reshape(output.shape)  # of a grid of tokens, where these were in a row
    at = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    return type(output)((*output[:at], stream.reshape(output[at].shape), *output[at + 1 :]))


def left_out(model: nn.Module, bypass: Bypass, modules: ModuleTable | None = None) -> Any:
    """Run `model` without the blocks, or without what follows a place in them, that `bypass` names, inside the `with`."""
    return StreamHooks(unwrap(model), bypass, modules).attached()


class _Shapes(StreamHooks):
    """Notes the shapes of what enters and leaves each block."""

    def __init__(self, model: nn.Module, frames: Mapping[Frame, int]) -> None:
        super().__init__(model, {})
        self.frames = frames
        self.found: dict[int, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = {}

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Note them."""
        frame = self.running[-1] if self.running else ("", 0)
        super().leave(module, args, output)
        if frame in self.frames and self.names.get(id(module)) == frame[0]:
            before, after = (None if x is None else tuple(x.shape[1:]) for x in (stream_in(args), stream_in(output)))
            self.found[self.frames[frame]] = (before, after)
        return None


def fixed_blocks(model: nn.Module, plan: Plan, size: tuple[int, int], channels: int = 3, seed: int = 0) -> dict[int, str]:
    """The blocks that cannot be left out, and why: what leaves them has to have the shape of what enters."""
    model = unwrap(model)
    frames = {frame: b for b in range(len(plan.blocks)) if (frame := block_call(plan, b)) is not None}
    reasons = {
        b: f"{plan.blocks[b]} is no module of its own that could be left out"
        for b in range(len(plan.blocks))
        if b not in frames.values()
    }
    shapes = _Shapes(model, frames)
    with shapes.attached():
        model(noise(model, size, channels, seed))
    for block in frames.values():
        before, after = shapes.found.get(block, (None, None))
        if before is None or after is None:
            reasons[block] = f"{plan.blocks[block]} takes no tokens as its first argument, or gives none"
        elif before != after:
            shape = " to ".join("×".join(map(str, each)) for each in (before, after))
            reasons[block] = f"it changes the shape of what passes through it ({shape}), which the next block relies on"
    return reasons
