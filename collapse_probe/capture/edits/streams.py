"""Changes the residual stream of a model while it runs: blocks or their MLPs left out, states of tokens replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
Changes = Mapping[Frame, Callable[[Tensor], Tensor]]
"""By the call of a block, what is made of the stream that enters it."""
Shape = tuple[int, ...] | None


def block_call(plan: Plan, block: int) -> Frame | None:
    """The module call that is a block; None for a block that is no module of its own."""
    path, place = plan.blocks[block].partition(" (call ")[0], plan.taps[block + 1]
    return (path, place.call) if place.side == "output" and place.path == path else None


def stream_in(values: Any) -> Tensor | None:
    """The first tensor among a module's arguments, or its results, that can hold tokens."""
    given = tensors_in(values if isinstance(values, (tuple, list)) else (values,))
    return next((x for x in given if not x.is_nested and x.ndim > 2 and x.is_floating_point()), None)


class StreamHooks:
    """Global hooks that follow the calls of one model's modules; what `enter` and `leave` return takes the place of a module's
    arguments and output. `final` names a module call whose output is kept in `last`.

    PyTorch's fast paths look for hooks of a module's own, and not for global ones: these change no bit elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        bypass: Bypass,
        modules: ModuleTable | None = None,
        changes: Changes | None = None,
        final: Frame | None = None,
    ) -> None:
        self.model, self.names = model, (ModuleTable.of(model) if modules is None else modules).names
        self.bypass, self.sources, self.changes, self.final = bypass, frozenset(bypass.values()), changes or {}, final
        self.last: Tensor | None = None
        self.running: list[Frame] = []
        self.counts: dict[str, int] = {}
        self.kept: dict[Frame, Tensor] = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """A global forward pre-hook: keep what enters the modules that are asked for, before anything is written into it; and
        change the stream that enters a block.
        """
        path = self.names.get(id(module))
        if path is None:
            return None
        if module is self.model:
            self.running, self.counts, self.kept = [], {}, {}
        frame = (path, self.counts.get(path, 0))
        self.counts[path] = frame[1] + 1
        self.running.append(frame)
        if frame in self.sources and (x := stream_in(args)) is not None:
            self.kept[frame] = x.clone()
        if frame in self.changes and (x := stream_in(args)) is not None:
            changed = self.changes[frame](x)
            return tuple(changed if value is x else value for value in args)
        return None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A global forward hook: what was kept in place of a block's output; None where it stays."""
        path = self.names.get(id(module))
        if path is None or not self.running:
            return None
        frame = self.running.pop()
        while frame[0] != path:  # an exception inside the model, which caught it itself
            frame = self.running.pop()
        if frame in self.bypass:
            output = _with_stream(output, self.kept[self.bypass[frame]])
        if frame == self.final:
            self.last = stream_in(output)
        return output if frame in self.bypass else None

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


class _Shapes(StreamHooks):
    """Notes the shapes of what enters and leaves each block, and which module is given what leaves the last one."""

    def __init__(self, model: nn.Module, frames: Mapping[Frame, int]) -> None:
        super().__init__(model, {})
        self.frames, self.end = frames, max(frames, key=frames.__getitem__, default=None)
        self.after: Frame | None = None
        self.left: Tensor | None = None
        self.found: dict[int, tuple[Shape, Shape]] = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note whether it is the first that is given what left the last block."""
        super().enter(module, args)
        x = stream_in(args)
        if self.after is None and self.left is not None and x is self.left and module is not self.model:
            self.after = self.running[-1]

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Note them."""
        frame = self.running[-1] if self.running else ("", 0)
        super().leave(module, args, output)
        if self.names.get(id(module)) != frame[0]:
            return None
        before, after = (None if x is None else tuple(x.shape[1:]) for x in (stream_in(args), stream_in(output)))
        if frame in self.frames:
            self.found[self.frames[frame]] = (before, after)
        if frame == self.end:
            self.left = stream_in(output)
        if frame == self.after and before != after:
            self.after = None
        return None


@dataclass(frozen=True)
class Streams:
    """The `shapes` of what enters and leaves each block, without the images, and the `final` module call: the norm that is
    given what leaves the last block, or else that block.
    """

    shapes: Mapping[int, tuple[Shape, Shape]] = field(default_factory=dict)
    final: Frame | None = None


def streams_of(model: nn.Module, plan: Plan, size: tuple[int, int], channels: int = 3, seed: int = 0) -> Streams:
    """Found with two images of noise; blocks that are no modules of their own are missing."""
    model = unwrap(model)
    shapes = _Shapes(model, {frame: b for b in range(len(plan.blocks)) if (frame := block_call(plan, b)) is not None})
    with shapes.attached():
        model(noise(model, size, channels, seed))
    return Streams(shapes.found, shapes.after or shapes.end)


def fixed_blocks(plan: Plan, streams: Streams) -> dict[int, str]:
    """The blocks that cannot be left out, and why: what leaves them has to have the shape of what enters."""
    reasons = {}
    for block, name in enumerate(plan.blocks):
        before, after = streams.shapes.get(block, (None, None))
        if block not in streams.shapes:
            reasons[block] = f"{name} is no module of its own that could be left out"
        elif before is None or after is None:
            reasons[block] = f"{name} takes no tokens as its first argument, or gives none"
        elif before != after:
            shape = " to ".join("×".join(map(str, each)) for each in (before, after))
            reasons[block] = f"it changes the shape of what passes through it ({shape}), which the next block relies on"
    return reasons


# ---- states of tokens ----


@dataclass(frozen=True)
class Drawn:
    """What was drawn for the images of one run, each by its name: `others` [B, 2 or more], positions of random patch tokens,
    of which a control takes as many as there are tokens that are edited (`count`), and `noise` [B, count, D], directions of
    length 1.
    """

    others: Tensor
    noise: Tensor

    @property
    def count(self) -> int:
        """How many tokens are edited."""
        return self.noise.shape[1]


def with_states(kind: str, x: Tensor, at: Tensor, means: Tensor | None, noise: Tensor) -> Tensor:
    """The stream [B, N, D] with other states at the positions `at` [b, k] of its first b images; a donor's are those of the
    image b places later.

    zero: zeros. mean: of `means` [N, D], the mean state at each position. noise: a random direction with the length of the
    state that it replaces. donor: another image's state at the same position.
    """
    count, tokens = len(at), at[..., None].expand(-1, -1, x.shape[2])
    own = x[:count].gather(1, tokens)
    if kind == "zero":
        new = torch.zeros_like(own)
    elif kind == "mean":
        assert means is not None
        new = means.to(x.dtype)[at]
    elif kind == "noise":
        new = noise.to(x.dtype) * torch.linalg.vector_norm(own.float(), dim=2, keepdim=True).to(x.dtype)
    else:
        new = x[count : 2 * count].gather(1, tokens)
    changed = x.clone()
    changed[:count] = changed[:count].scatter(1, tokens, new.to(x.dtype))
    return changed
