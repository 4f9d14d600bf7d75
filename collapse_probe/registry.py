"""The tables into which new files plug: sources, metrics, fixes, penalties, recipes. The page a contributor reads.

Adding a thing is one file in its family's folder that ends with a table entry, for example::

    METRICS.add("my-metric", MyMetric)

The family's package imports each of its files, so that the entry is there wherever the table is used.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from collapse_probe.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names and what they stand for; fills itself from its family's package; answers a wrong name with the nearest."""

    def __init__(self, noun: str, package: str) -> None:
        self.noun, self.package = noun, package
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Enter `entry` under `name`; a name can be taken once."""
        assert name not in self._entries, f"{self.noun} {name!r} is entered twice"
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        self._fill()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(self)}"
            raise UnknownNameError(f"no {self.noun} called {name!r}; {hint}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._fill()
        return len(self._entries)

    def _fill(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, self.package + "."):
            importlib.import_module(module.name)


SOURCES: Registry[Any] = Registry("model source", "collapse_probe.models.sources")
METRICS: Registry[Any] = Registry("metric", "collapse_probe.metrics")
FIXES: Registry[Any] = Registry("fix", "collapse_probe.models.fixes")
PENALTIES: Registry[Any] = Registry("penalty", "collapse_probe.training.penalties")
RECIPES: Registry[Any] = Registry("recipe", "collapse_probe.training.recipes")
PRESETS: Registry[Any] = Registry("preset", "collapse_probe.metrics")
