"""The tables into which new files plug: sources, metrics, fixes, penalties, recipes. The page a contributor reads.

Adding a thing is one file that ends with a table entry, for example::

    METRICS.add("my-metric", MyMetric)

Our own files lie in their family's folder. A package of one's own names its modules as entry points, and they are imported
wherever the table is used; what `module` registers with `add` counts, the name of the entry point does not::

    [project.entry-points."collapse_probe.metrics"]     # or .sources, .fixes, .penalties
    my-metric = "my_package.my_metric"

A single file, or a module that is not installed, is loaded with `--plugin` (`load_plugin`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from collapse_probe.downloads import first_line
from collapse_probe.errors import PluginError, UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names and what they stand for; fills itself from its family's package and the entry points of `group`.

    Every entry must have the attributes `needs`. A wrong name is answered with the nearest ones.
    """

    def __init__(self, noun: str, package: str, group: str | None = None, needs: tuple[str, ...] = ()) -> None:
        self.noun, self.package, self.group, self.needs = noun, package, group, needs
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        self._filled = False

    def add(self, name: str, entry: T) -> T:
        """Enter `entry` under `name`.

        The module that entered a name may enter it again (a reloaded module, a notebook's cell), and any module may replace an
        entry of `__main__`. Raises PluginError where another module holds the name, so that no plug-in changes what a name
        means, and where the entry lacks an attribute of `needs`.
        """
        module = sys._getframe(1).f_globals.get("__name__", "__main__")
        if not module.startswith(self.package):
            self._import_family()  # else a name of ours would be free until then
        if self._modules.get(name, module) not in (module, "__main__"):
            raise PluginError(f"the {self.noun} {name!r} is defined in {self._modules[name]} already; choose another name")
        missing = [attribute for attribute in self.needs if not hasattr(entry, attribute)]
        if missing:
            raise PluginError(f"the {self.noun} {name!r} of {module} needs the attribute {' and '.join(missing)}")
        self._entries[name], self._modules[name] = entry, module
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

    @property
    def entered(self) -> dict[str, T]:
        """What was entered until now, our own files perhaps not among it; imports nothing."""
        return dict(self._entries)

    @property
    def has_entry_points(self) -> bool:
        """Whether installed packages bring entries."""
        return self.group is not None and bool(metadata.entry_points(group=self.group))

    def _fill(self) -> None:
        self._import_family()
        if self.group is not None:
            load_entry_points(self.group)

    def _import_family(self) -> None:
        if self._filled:
            return
        self._filled = True  # before the imports, which may look names up
        try:
            for module in pkgutil.walk_packages(importlib.import_module(self.package).__path__, f"{self.package}."):
                importlib.import_module(module.name)
        except BaseException:
            self._filled = False
            raise


_loaded_groups: set[str] = set()
loaded_plugins: list[str] = []
"""What `load_plugin` loaded, for processes that are started anew."""


def load_entry_points(group: str) -> None:
    """Import what installed packages name in an entry point group, once; what fails is left out, with a warning."""
    if group in _loaded_groups:
        return
    _loaded_groups.add(group)
    for point in metadata.entry_points(group=group):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            text = f"the plug-in {point.name!r} ({point.value}, of {group}) is left out: {first_line(error)}"
            warnings.warn(text, stacklevel=2)


def load_plugin(address: str) -> None:
    """Import a module by its name, or run a file `….py`, so that it registers what it brings. Raises PluginError."""
    is_file = address.endswith(".py")
    address = str(Path(address).absolute()) if is_file else address
    try:
        if is_file:  # a name of its own, under which the same file replaces its entries
            name = f"plugin_{Path(address).stem}_{hashlib.sha256(address.encode()).hexdigest()[:8]}"
            spec: Any = importlib.util.spec_from_file_location(name, address)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        else:
            module = import_also_from_here(address)
            if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
                raise ImportError("it is a folder without an __init__.py")
    except (Exception, SystemExit) as error:
        what = f"the plug-in {address} cannot be loaded: {first_line(error)}"
        raise PluginError(f"{what}; expected the name of a module, or a file that ends in .py") from error
    loaded_plugins.append(address)


def import_also_from_here(name: str) -> ModuleType:
    """Import a module that may also lie in the current folder."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)


SOURCES: Registry[Any] = Registry(
    "model source", "collapse_probe.models.sources", "collapse_probe.sources", ("names", "has", "blueprint")
)
METRICS: Registry[Any] = Registry("metric", "collapse_probe.metrics", "collapse_probe.metrics", ("name", "summary", "dims"))
FIXES: Registry[Any] = Registry("fix", "collapse_probe.models.fixes", "collapse_probe.fixes", ("name", "summary", "neutral"))
PENALTIES: Registry[Any] = Registry(
    "penalty", "collapse_probe.training.penalties", "collapse_probe.penalties", ("name", "summary", "metric", "needs")
)
RECIPES: Registry[Any] = Registry("recipe", "collapse_probe.training.recipes")
PRESETS: Registry[Any] = Registry("preset", "collapse_probe.metrics", "collapse_probe.metrics")
