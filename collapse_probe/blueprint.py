"""What a caller asks of a model source and what the source answers: the two sides of that socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from collapse_probe.subject import Preprocess


@dataclass(frozen=True)
class Request:
    """What is wanted of a source: `name` is the address without its scheme.

    `img_size` is the side of the input in pixels. `module` is the model itself where the caller already holds
    it; otherwise None.
    """

    address: str
    name: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Blueprint:
    """How a source would make one model.

    `make(trained)` makes it with its published weights, or with fresh ones drawn from torch's CPU generator.
    `preprocess(model)` gives its preprocessing, and notes on what had to be assumed. `trained` is the tag of
    the published weights, None where there are none. `fixed` is set where the weights are not ours to choose
    and says whose they are. `remakable` is False where `make` cannot give a second, fresh model.
    """

    name: str
    make: Callable[[bool], nn.Module]
    preprocess: Callable[[nn.Module], tuple[Preprocess, tuple[str, ...]]]
    trained: str | None = None
    fixed: str | None = None
    remakable: bool = True


class Source(Protocol):
    """One place where models come from; an instance is entered in `SOURCES` under its address scheme."""

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a shell pattern; none where the place cannot be listed. Fetches nothing."""
        ...

    def has(self, name: str) -> bool:
        """Whether `name` is a name here; True where only trying can tell."""
        ...

    def blueprint(self, request: Request) -> Blueprint:
        """How to make the requested model. Raises UnknownNameError or ModelError."""
        ...


class ImageTower(nn.Module):
    """Lets a model of another library take pixels and return one tensor: [B, 3, height, width] -> [B, …].

    `wrapped` is the library's own module, `answer` picks the tensor out of what it returns, `settings` are
    further keyword arguments of its forward.
    """

    def __init__(self, wrapped: nn.Module, answer: Callable[[Any], Tensor], settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.wrapped, self.answer, self.settings = wrapped, answer, dict(settings or {})

    def forward(self, pixels: Tensor) -> Tensor:
        """The tensor that `answer` finds."""
        return self.answer(self.wrapped(pixels, **self.settings))
