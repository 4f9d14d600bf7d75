"""What was heard of one forward pass: attention events, module calls, and what could not be heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from collapse_probe.attention import Attention
from collapse_probe.kernels import storage_of
from collapse_probe.sketches import sketch, unsketched

Frame = tuple[str, int]
_HELD = ("q", "k", "bias", "probs", "weights")


@dataclass
class Event:
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
class Call:
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
class Hearing:
    """All that was heard of one forward pass, in the order in which it happened.

    `input` is the first tensor that any module received: the images, also where the model is called by
    keyword.
    """

    images: int = 0
    input: Tensor | None = None
    output: Any = None
    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    suspects: list[tuple[str, str]] = field(default_factory=list)


def finish_sketch(heard: Hearing) -> None:
    """Tensors seen as their shapes in place of the shapes, once the forward pass is over."""
    for call in heard.calls:
        call.input, call.output = unsketched(call.input), unsketched(call.output)
    for event in heard.events:
        for name in _HELD:
            setattr(event.attention, name, unsketched(getattr(event.attention, name)))
