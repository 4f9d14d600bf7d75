"""A model that the caller passes: a plain nn.Module."""

from __future__ import annotations

from collapse_probe.data.preprocessing import of_module
from collapse_probe.distributed import unwrap
from collapse_probe.errors import ModelError
from collapse_probe.models.loading import Blueprint, Request, Source
from collapse_probe.registry import SOURCES


class ModuleSource(Source):
    """Takes the module as it is, out of its wrappers; it cannot be made afresh."""

    def has(self, name: str) -> bool:
        """False: no address leads here."""
        return False

    def blueprint(self, request: Request) -> Blueprint:
        """Raises ModelError where there is no module, or settings that only its constructor could take."""
        if request.module is None:
            raise ModelError("a plain module is passed from Python: collapse_probe.analyze(module, …)")
        if request.model_kwargs:
            raise ModelError("model_kwargs go to a constructor, but the model is already made: set them there")
        module, name = unwrap(request.module), type(unwrap(request.module)).__name__
        size = request.img_size
        return Blueprint(name, lambda _: module, lambda model: of_module(model, size), fixed="as given", remakable=False)


SOURCES.add("module", ModuleSource())
