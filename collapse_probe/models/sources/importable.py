"""The user's own models by import path: `import:package.module:callable`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from collapse_probe.data.preprocessing import of_module
from collapse_probe.downloads import first_line
from collapse_probe.errors import ModelError, UnknownNameError
from collapse_probe.models.loading import Blueprint, Request
from collapse_probe.registry import SOURCES, import_also_from_here


class ImportSource:
    """Calls a class or function that returns an nn.Module.

    `model_kwargs` are its arguments; `img_size` is passed on where it has a parameter of that name or
    `image_size`, `pretrained` where it has one of that name. Modules are also found in the current folder.
    """

    def names(self, pattern: str = "*") -> list[str]:
        """Nothing: what can be imported cannot be listed."""
        return []

    def has(self, name: str) -> bool:
        """True: only the import can tell."""
        return True

    def blueprint(self, request: Request) -> Blueprint:
        """Imports the callable now, so that a wrong path is told before anything else."""
        maker = _find(request.name)
        settings = dict(request.model_kwargs)
        taken = _parameters(maker)
        if request.img_size is not None:
            key = next((key for key in ("img_size", "image_size") if key in taken), None)
            settings.update({key: request.img_size} if key else {})

        def make(trained: bool) -> nn.Module:
            choice = {"pretrained": trained} if "pretrained" in taken and "pretrained" not in settings else {}
            model = maker(**settings, **choice)
            if not isinstance(model, nn.Module):
                raise ModelError(f"{request.name} must return a torch nn.Module, not {type(model).__name__}")
            return model

        return Blueprint(
            request.name,
            make,
            lambda model: of_module(model, request.img_size),
            fixed=f"as {request.name} made them",
        )


def _find(path: str) -> Callable[..., Any]:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ModelError(f"an import address reads import:package.module:callable, not 'import:{path}'")
    try:
        module = import_also_from_here(module_name)
    except Exception as error:  # the user's module may raise anything
        raise ModelError(f"cannot import {module_name!r}: {first_line(error)}") from error
    if not callable(found := getattr(module, attribute, None)):
        raise UnknownNameError(f"{module_name} has no callable {attribute!r}{_near(module)}")
    maker: Callable[..., Any] = found
    return maker


def _near(module: Any) -> str:
    models = [name for name, thing in vars(module).items() if isinstance(thing, type) and issubclass(thing, nn.Module)]
    return f"; its modules are {', '.join(models[:5])}" if models else ""


def _parameters(maker: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(maker).parameters)
    except (TypeError, ValueError):
        return frozenset()


SOURCES.add("import", ImportSource())
