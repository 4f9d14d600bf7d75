"""The user's own models by import path: `import:package.module:callable`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from collapse_probe.data.preprocessing import of_module
from collapse_probe.downloads import first_line
from collapse_probe.errors import ModelError, UnknownNameError
from collapse_probe.models.loading import Blueprint, Request, Source
from collapse_probe.registry import SOURCES, import_also_from_here


class ImportSource(Source):
    """Calls a class or function that returns an nn.Module.

    `model_kwargs` are its arguments; `img_size` is passed on where it has a parameter of that name or `image_size`,
    `pretrained` where it has one of that name. Modules are also found in the current folder.
    """

    def blueprint(self, request: Request) -> Blueprint:
        """Imports the callable now, so that a wrong path is reported before anything else."""
        maker = _find(request.name)
        settings = dict(request.model_kwargs)
        try:
            parameters = frozenset(inspect.signature(maker).parameters)
        except (TypeError, ValueError):
            parameters = frozenset()
        size_name = next((name for name in ("img_size", "image_size") if name in parameters), None)
        if request.img_size is not None and size_name is not None:
            settings[size_name] = request.img_size

        def make(trained: bool) -> nn.Module:
            choice = {"pretrained": trained} if "pretrained" in parameters else {}
            model = maker(**{**choice, **settings})
            if not isinstance(model, nn.Module):
                raise ModelError(f"{request.name} must return a torch nn.Module, not {type(model).__name__}")
            return model

        fixed = f"as {request.name} made them"
        return Blueprint(request.name, make, lambda model: of_module(model, request.img_size), fixed=fixed)


def _find(path: str) -> Callable[..., Any]:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ModelError(f"an import address reads import:package.module:callable, not 'import:{path}'")
    try:
        module = import_also_from_here(module_name)
    except Exception as error:  # the user's module may raise anything
        raise ModelError(f"cannot import {module_name!r}: {first_line(error)}") from error
    maker = getattr(module, attribute, None)
    if not callable(maker):
        models = [name for name, entry in vars(module).items() if isinstance(entry, type) and issubclass(entry, nn.Module)]
        hint = f"; its modules are {', '.join(models[:5])}" if models else ""
        raise UnknownNameError(f"{module_name} has no callable {attribute!r}{hint}")
    return maker  # type: ignore[no-any-return]


SOURCES.add("import", ImportSource())
