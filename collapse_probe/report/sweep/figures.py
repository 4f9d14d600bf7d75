"""Sweep → matplotlib figures: counts, kappa and accuracy along whatever was varied, with intervals over seeds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from collapse_probe.report.html import Caption, Drawing, Figure, draw_figures
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import DISTINCT, MARKERS, Role, charts, drawn, hexes, panels, printable
from collapse_probe.results.rules import KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.results.sweep import PUBLISHED, UNTRAINED, Points, Sweep, estimate, spelled

UNTRAINED_LINE, PROBS_LINE = (0, (5, 2)), (0, (1.2, 1.2))
PUBLISHED_COLOUR = "#c8102e"
PUBLISHED_MARKS = {"ViT": ("*", 10), "DeepViT": ("X", 7)}  # marker and size
ASIDE = 0.03  # between two curves, in shares of the nearest step on the axis
ROUND = 1.3  # room around places on an axis, in shares of its nearest step
LOGARITHMIC_FROM = 30  # largest over smallest value of an axis
PANELS = {
    "similar-blocks": {
        "similar_blocks": f"adjacent pairs with a raw similarity above {RAW_ABOVE:g}",
        "similar_blocks_corrected": f"adjacent pairs with κ above {KAPPA_ABOVE:g}",
    },
    "kappa": {"kappa_adjacent": "mean κ of adjacent blocks", "attention_similarity_adjacent": "mean raw similarity"},
    "accuracy": {"accuracy": "share of held-out images right"},
}
CAPTIONS = {
    "similar-blocks": Caption(
        "Similar blocks",
        "How many blocks count as similar to the block before: by raw similarity, and by κ, which takes off the chance level "
        "(other tokens). Dashed: an untrained copy of the same architecture, on the same images.",
        "More blocks leave more to count. A raw count that the dashed line reaches needs no training to come about.",
    ),
    "kappa": Caption(
        "κ and raw similarity",
        "The mean over adjacent blocks of κ (0: no more than chance; 1: identical maps) and of raw similarity. Dashed: an "
        "untrained copy of the same architecture.",
        "A mean over blocks hides where in the network they are alike; every cell's findings say it block by block.",
    ),
    "accuracy": Caption(
        "Accuracy",
        "Top-1 accuracy on the held-out images at the end of the training.",
        "All cells share one recipe: none was tuned for its own size, and a difference may be one of tuning.",
    ),
}
STARS = (
    "Stars and crosses: the counts that the README of the official DeepViT code gives for ViT and DeepViT of 16, 24 and 32 "
    "blocks. They are other data (ImageNet), another scale (width 384, 12 heads) and a count that was not defined."
)


def drawings(sweep: Sweep) -> dict[str, Drawing]:
    """The figures that a sweep over these axes can have, by name."""
    figures: dict[str, Drawing] = {}
    for axis in sweep.axes:
        for kind, caption in CAPTIONS.items():
            seen = [caption.seen, "Bars: 95 % t intervals over seeds." if len(sweep.seeds) > 1 else "One seed: no intervals."]
            if len(sweep.series(axis)) > 1:
                seen.append("Curves stand a little beside each other, so that none is hidden.")
            if (kind, axis) == ("similar-blocks", "depth"):
                seen.append(STARS)
            draw_kind = functools.partial(draw, kind=kind, axis=axis)
            title = f"{caption.title} against {axis}"
            figures[f"{kind}-by-{axis}"] = Drawing(title, " ".join(seen), caption.limits, draw_kind)
    return figures


def draw_all(sweep: Sweep) -> dict[str, Figure]:
    """Every figure that the finished cells fill, by name, in the order of the page."""
    return draw_figures(drawings(sweep), sweep)


@drawn
def draw(sweep: Sweep, *, kind: str, axis: str) -> Sheet | None:
    """The panels of one kind along one axis; None where no cell has any of their numbers."""
    titles = {k: t for k, t in PANELS[kind].items() if any(np.isfinite(cell.number(k)) for cell in sweep.finished)}
    if not titles:
        return None
    places = panels(len(titles), tall=3.6)
    for axes, (key, title) in zip(places, titles.items(), strict=True):
        _panel(axes, sweep, axis, key)
        axes.set_title(title)
    return charts(places)


def _panel(axes: Axes, sweep: Sweep, axis: str, key: str) -> None:
    series, numeric = sweep.series(axis), sweep.is_numeric(axis)
    places = {spelled(value): float(value) if numeric else float(at) for at, value in enumerate(sweep.varied[axis])}
    step = float(min(np.diff(sorted(places.values())), default=0.0))
    for at, (role, points) in enumerate(zip(_roles(list(series)), series.values(), strict=True)):
        aside = ASIDE * step * (at - (len(series) - 1) / 2)
        x = [places[spelled(value)] + aside for value, _ in points]
        _curve(axes, x, points, key, role)
        if key != "accuracy":
            label = "untrained" if series.keys() == {""} else f"{role.label}, untrained"
            twin = Role(label, role.colour, UNTRAINED_LINE, role.marker, width=1.1)
            _curve(axes, x, points, UNTRAINED + key, twin, markerfacecolor="white", markersize=4.0)
        if key == "similar_blocks":
            softmax = Role(f"{role.label}, its softmax", role.colour, PROBS_LINE, width=1.3)
            _curve(axes, x, points, "similar_blocks_probs", softmax)
    published = axis == "depth" and key == "similar_blocks"
    if published:
        for name, counts in PUBLISHED["similar_blocks"].items():
            (marker, size), label = PUBLISHED_MARKS[name], f"published {name}: ImageNet, other count"
            axes.plot(PUBLISHED["depth"], counts, marker, markersize=size, color=PUBLISHED_COLOUR, label=label, zorder=4)
            for depth, count in zip(PUBLISHED["depth"], counts, strict=True):
                look: dict[str, Any] = {"textcoords": "offset points", "color": PUBLISHED_COLOUR, "fontsize": 8}
                axes.annotate(str(count), (depth, count), (6, 5), **look)
    _ticks(axes, axis, places, PUBLISHED["depth"] if published else ())
    axes.grid(axis="y")
    if key.startswith("similar_blocks"):
        axes.set_ylim(bottom=min(-0.4, axes.get_ylim()[0]), top=max(axes.get_ylim()[1], 1.4))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _roles(labels: Sequence[str]) -> list[Role]:
    distinct = len(labels) <= len(DISTINCT)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(labels) + 2)[1:-1])
    colours = DISTINCT if distinct else [hexes(shade)[0] for shade in shades]
    return [
        Role(printable(label, 34) or "trained", colours[at], marker=MARKERS[at % len(MARKERS)], width=1.8)
        for at, label in enumerate(labels)
    ]


def _curve(axes: Axes, x: Sequence[float], points: Points, key: str, role: Role, **look: Any) -> None:
    """One curve with its intervals, where any cell has the number."""
    estimates = [estimate(cell.number(key) for cell in cells) for _, cells in points]
    y = np.array([each.mean for each in estimates])
    if not np.isfinite(y).any():
        return
    reach = np.abs(np.array([each.ci95 or (each.mean, each.mean) for each in estimates]).T - y)
    line = {"color": role.colour, "linestyle": role.line, "marker": role.marker, "linewidth": role.width, "markersize": 5.5}
    axes.errorbar(x, y, yerr=reach if reach.any() else None, label=role.label, capsize=3.0, elinewidth=1.1, **{**line, **look})


def _ticks(axes: Axes, axis: str, places: dict[str, float], more: Sequence[float]) -> None:
    """A tick for every varied value, and for `more`; on a logarithmic axis where they span much."""
    ordered = sorted({*places.values(), *more})
    names = {at: name for name, at in places.items()}
    if len(ordered) > 2 and ordered[0] > 0 and ordered[-1] / ordered[0] > LOGARITHMIC_FROM:
        axes.set_xscale("log")
        room = (ordered[0] / ROUND, ordered[-1] * ROUND)
    else:
        step = min(np.diff(ordered), default=1.0) / 2 * ROUND
        room = (ordered[0] - step, ordered[-1] + step)
    axes.set_xticks(ordered, [printable(names.get(at, f"{at:g}"), 14) for at in ordered])
    axes.minorticks_off()
    axes.set(xlabel=axis, xlim=room)
