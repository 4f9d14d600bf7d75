"""A model that the caller already holds: a plain nn.Module."""

from __future__ import annotations

from collapse_probe.data.preprocessing import of_module
from collapse_probe.distributed import unwrap
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, Request
from collapse_probe.registry import SOURCES


class ModuleSource:
    """Takes the module as it is, out of its wrappers; nobody knows how to make it afresh."""

    def names(self, pattern: str = "*") -> list[str]:
        """Nothing: such a model comes from Python only."""
        return []

    def has(self, name: str) -> bool:
        """False: no address leads here."""
        return False

    def blueprint(self, request: Request) -> Blueprint:
        """Raises ModelError where there is no module, or settings that only its constructor could take."""
        if request.module is None:
            raise ModelError("a plain module is passed from Python: collapse_probe.analyze(module, …)")
        if request.model_kwargs:
            raise ModelError("model_kwargs go to a constructor, but the model is already made: set them there")
        module = unwrap(request.module)
        return Blueprint(
            type(module).__name__,
            lambda _: module,
            lambda model: of_module(model, request.img_size),
            fixed="as given",
            remakable=False,
        )


SOURCES.add("module", ModuleSource())
