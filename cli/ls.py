"""`collapse-probe ls`: what there is, one line each."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click
from collapse_probe.cli import options

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
    """Names and lines of one kind."""
    from collapse_probe import registry

    if kind == "data":
        yield from DATA
    elif kind == "models":
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
