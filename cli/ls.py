"""`collapse-probe ls`: what there is, one line each."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

import collapse_probe

KINDS = ("models", "metrics", "presets", "fixes", "penalties", "recipes", "data")


@click.command("ls", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("pattern", required=False)
@options.plugin
@options.talking
def command(kind: str, pattern: str | None, quiet: bool, verbose: int) -> None:
    """List models, metrics, presets, fixes, penalties, recipes or data, those that match PATTERN (* and ? as in a shell)."""
    rows = [(name, line) for name, line in entries(kind) if matches(name, pattern)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, line in rows:
        click.echo(f"{name:<{width}}  {line}".rstrip())
    if not rows:
        click.echo(f"nothing among the {kind} matches {pattern!r}", err=True)


def matches(name: str, pattern: str | None) -> bool:
    """Whether a name, or what follows its scheme, fits the pattern; one without wildcards fits anywhere in the name."""
    if pattern is None:
        return True
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return any(fnmatch.fnmatch(part, wild) for part in (name, name.partition(":")[2]))


def entries(kind: str) -> Iterator[tuple[str, str]]:
    """Names and lines of one kind; torch is imported for plug-ins alone, and for libraries that cannot be read otherwise."""
    from collapse_probe import registry

    table: Any = registry.SOURCES if kind == "models" else getattr(registry, kind.upper(), None)
    if kind == "data":
        yield from DATA
    elif registry.loaded_plugins or table.has_entry_points or (kind == "models" and importlib.util.find_spec("open_clip")):
        yield from registered(kind)
    else:
        stored: dict[str, dict[str, str]] = json.loads(STORED.read_text(encoding="utf-8"))
        yield from stored[kind].items()
        if kind == "models":
            yield from ((f"{library}:{name}", "") for library in LIBRARIES for name in library_names(library))


def registered(kind: str) -> Iterator[tuple[str, str]]:
    """The same from the tables themselves, with everything that our own files import."""
    from collapse_probe import registry

    if kind == "models":
        for scheme, source in registry.SOURCES.items():
            try:
                names = source.names()
            except Exception as error:  # a plug-in may raise anything
                warnings.warn(f"the model source {scheme!r} cannot be listed: {type(error).__name__}: {error}", stacklevel=2)
                continue
            yield from ((f"{scheme}:{name}", "") for name in names)
    else:
        for name, entry in getattr(registry, kind.upper()).items():
            yield name, LINES[kind](entry) if kind in LINES else entry.summary


def listing() -> str:
    """The content of STORED: names and lines of everything of ours. A test compares it; `make listing` writes it."""
    own = {kind: dict(registered(kind)) for kind in KINDS if kind != "data"}
    own["models"] = {name: line for name, line in own["models"].items() if name.startswith("ours:")}
    return json.dumps(own, indent=1, ensure_ascii=False) + "\n"


def library_names(library: str) -> list[str]:
    """The models that an installed library registers, read from its source; by importing it where that finds none."""
    spec = importlib.util.find_spec(library)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    texts = (path.read_text(encoding="utf-8") for place in places for path in (Path(place) / "models").glob("*.py"))
    names = sorted({name for text in texts for name in REGISTERED.findall(text)}, key=LIBRARIES[library])
    if names or spec is None:
        return names
    from collapse_probe.registry import SOURCES

    return list(SOURCES[library].names())


def _naturally(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


STORED = Path(collapse_probe.__file__).parent / "listing.json"
LIBRARIES: dict[str, Callable[[str], Any]] = {"timm": _naturally, "torchvision": str}
"""The libraries whose models are listed, and how each sorts them."""
REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:[@ )][^\n]*\n)*def (\w+)\(", re.MULTILINE)


def _metric_line(metric: Any) -> str:
    variants = "".join(f" @{suffix}" for suffix in metric.variants)
    return metric.summary + (f"; variants{variants}" if variants else "")


LINES: dict[str, Callable[[Any], str]] = {
    "metrics": _metric_line,
    "presets": lambda preset: f"version {preset.version}; {preset.summary} ({preset.paper}): {', '.join(preset.metrics)}",
    "recipes": lambda recipe: recipe().about,
}
DATA = (
    ("FOLDER", "a folder of images, flat or with class folders"),
    ("FILE.tar", "a tar archive of images"),
    ("bundled:digits", "scikit-learn's 1797 handwritten digits, 8 × 8 pixels, with labels"),
    ("bundled:photos", "crops of photographs that come with scikit-image and scikit-learn"),
    ("hfds/ORG/NAME", "a Hugging Face data set (hfids/… streams it)"),
    ("wds/FOLDER", "WebDataset shards"),
    ("tfds/NAME", "a TensorFlow data set"),
    ("torch/NAME", "a torchvision data set"),
)
