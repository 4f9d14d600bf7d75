"""This project's own models: `ours:NAME`, the families that it registers with timm."""

from __future__ import annotations

import importlib
import importlib.util

from collapse_probe.blueprint import Blueprint, Request
from collapse_probe.sockets import SOURCES

FAMILIES = ("deepvit",)  # modules of this package that register models with timm when imported


class OurSource:
    """The names that `FAMILIES` brought into timm's registry; timm makes the models."""

    def names(self, pattern: str = "*") -> list[str]:
        """Our names, sorted."""
        import timm

        present = [name for name in FAMILIES if importlib.util.find_spec(f"collapse_probe.{name}")]
        for family in present:
            importlib.import_module(f"collapse_probe.{family}")
        return sorted(name for family in present for name in timm.list_models(pattern, module=family))

    def has(self, name: str) -> bool:
        """Whether one of our families registered `name`."""
        return name.partition(".")[0] in self.names()

    def blueprint(self, request: Request) -> Blueprint:
        """timm's own blueprint: our models are registered there."""
        blueprint: Blueprint = SOURCES["timm"].blueprint(request)
        return blueprint


SOURCES.add("ours", OurSource())
