"""The user's own models by import path: `import:package.module:callable`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from collapse_probe.data.preprocessing import Preprocess, Size, for_channels, input_channels, of_module, size_of
from collapse_probe.downloads import first_line
from collapse_probe.errors import ModelError, UnknownNameError
from collapse_probe.models.loading import Blueprint, Request, Source
from collapse_probe.registry import SOURCES, import_also_from_here

SIZES = ("img_size", "image_size")
CHANNELS = ("in_chans", "in_channels", "channels", "num_channels")


class ImportSource(Source):
    """Calls a class or function that returns an nn.Module.

    `model_kwargs` are its arguments; `img_size` is passed on where it has a parameter of that name or `image_size`,
    `pretrained` where it has one of that name. The size, and channels that the model does not tell, are read off these
    arguments and their defaults. Modules are also found in the current folder.
    """

    def blueprint(self, request: Request) -> Blueprint:
        """Imports the callable now, so that a wrong path is reported before anything else."""
        maker = _find(request.name)
        settings = dict(request.model_kwargs)
        try:
            parameters = {name: one.default for name, one in inspect.signature(maker).parameters.items()}
        except (TypeError, ValueError):
            parameters = {}
        size_name = next((name for name in SIZES if name in parameters), None)
        if request.img_size is not None and size_name is not None:
            settings[size_name] = request.img_size
        chosen: dict[str, Any] = {**parameters, **settings}
        size: Size | None = request.img_size
        for name in SIZES:
            size = size or size_of(chosen.get(name))
        channels = next((chosen[name] for name in CHANNELS if isinstance(chosen.get(name), int)), None)

        def make(trained: bool) -> nn.Module:
            choice = {"pretrained": trained} if "pretrained" in parameters else {}
            model = maker(**{**choice, **settings})
            if not isinstance(model, nn.Module):
                raise ModelError(f"{request.name} must return a torch nn.Module, not {type(model).__name__}")
            return model

        def preprocess(model: nn.Module) -> tuple[Preprocess, tuple[str, ...]]:
            made, notes = of_module(model, size)
            return for_channels(made, channels if input_channels(model) is None else None), notes

        return Blueprint(request.name, make, preprocess, fixed=f"as {request.name} made them")


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
