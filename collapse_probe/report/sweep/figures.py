"""Sweep → matplotlib figures: counts, kappa and accuracy along whatever was varied, with intervals over seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from collapse_probe.report.html import Caption
from collapse_probe.report.style import DISTINCT, MARKERS, NARROW, WIDE, Role, drawn, printable, share_legend, sheet
from collapse_probe.results.sweep import PUBLISHED, UNTRAINED, Points, Sweep, estimate, spelled

UNTRAINED_LINE, PROBS_LINE = (0, (5, 2)), (0, (1.2, 1.2))
PUBLISHED_COLOUR = "#c8102e"
PUBLISHED_MARKS = {"ViT": "*", "DeepViT": "X"}
ASIDE = 0.03  # between two curves, in shares of the nearest step on the axis
ROUND = 1.3  # room around places on an axis, in shares of its nearest step
Panel = tuple[str, str]  # key, title

PANELS: dict[str, tuple[Panel, ...]] = {
    "similar-blocks": (
        ("similar_blocks", "raw: adjacent pairs with a cosine above 0.9"),
        ("similar_blocks_corrected", "corrected: adjacent pairs with κ above 0.5"),
    ),
    "kappa": (
        ("kappa_adjacent", "mean κ of adjacent blocks"),
        ("attention_similarity_adjacent", "mean raw cosine"),
    ),
    "accuracy": (("accuracy", "share of held-out images right"),),
}
SEEN = {
    "similar-blocks": (
        "Similar blocks",
        "How many blocks count as similar to the block before: by the raw cosine, and by κ, which takes off what unrelated "
        "tokens agree on. Dashed: the same architecture with fresh weights, on the same images.",
        "More blocks leave more to count. A raw count that the dashed line reaches needs no training to come about.",
    ),
    "kappa": (
        "κ and raw cosine",
        "The mean over adjacent blocks of κ (0: as alike as the maps of unrelated tokens; 1: the same map) and of the raw "
        "cosine. Dashed: the same architecture with fresh weights.",
        "A mean over blocks hides where in the network they are alike; every cell's findings say it block by block.",
    ),
    "accuracy": (
        "Accuracy",
        "Top-1 accuracy on the held-out images at the end of the training.",
        "All cells share one recipe: none was tuned for its own size, and a difference may be one of tuning.",
    ),
}
STARS = (
    "Stars and crosses: the counts that the README of the official DeepViT code gives for ViT and DeepViT of 16, 24 and 32 "
    "blocks. They are other data (ImageNet), another scale (width 384, 12 heads) and a count that was not defined."
)


def captions(sweep: Sweep) -> dict[str, Caption]:
    """The caption of every figure of this sweep, by name."""
    seeds = "Bars: 95 % t intervals over seeds." if len(sweep.seeds) > 1 else "One seed: no intervals."
    found = {}
    for axis in sweep.axes:
        aside = ["Curves stand a little beside each other, so that none is hidden."] if len(sweep.series(axis)) > 1 else []
        for kind, (title, seen, limits) in SEEN.items():
            stars = [STARS] if (kind, axis) == ("similar-blocks", "depth") else []
            found[f"{kind}-by-{axis}"] = Caption(f"{title} against {axis}", " ".join([seen, seeds, *aside, *stars]), limits)
    return found


def _roles(labels: Sequence[str]) -> dict[str, Role]:
    some = len(labels) <= len(DISTINCT)
    shades = DISTINCT if some else list(map(str, seaborn.color_palette("viridis", n_colors=len(labels)).as_hex()))
    return {
        label: Role(printable(label, 34) or "trained", shades[at], marker=MARKERS[at % len(MARKERS)], width=1.8)
        for at, label in enumerate(labels)
    }


def _line(axes: Axes, x: Sequence[float], points: Points, key: str, role: Role, **look: Any) -> bool:
    """One curve with its intervals; whether there was anything to draw."""
    held = [estimate(cell.number(key) for cell in cells) for _, cells in points]
    y = np.array([each.mean for each in held])
    if not np.isfinite(y).any():
        return False
    ends = np.array([each.ci95 or (each.mean, each.mean) for each in held])
    reach = np.abs(ends.T - y)
    plain = {"color": role.colour, "linestyle": role.line, "marker": role.marker, "markersize": 5.5, "linewidth": role.width}
    axes.errorbar(x, y, yerr=reach if reach.any() else None, label=role.label, capsize=3.0, elinewidth=1.1, **{**plain, **look})
    return True


def _places(sweep: Sweep, axis: str) -> dict[str, float]:
    """Where each value stands on its axis: numbers at themselves, anything else one after the other."""
    values = sweep.varied[axis]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return {spelled(value): float(value) if numbers else float(at) for at, value in enumerate(values)}


def _ticks(axes: Axes, axis: str, places: dict[str, float], extra: Sequence[float]) -> None:
    ordered = sorted({*places.values(), *extra})
    names = {at: name for name, at in places.items()}
    logarithmic = len(ordered) > 2 and ordered[0] > 0 and ordered[-1] / ordered[0] > 30
    if logarithmic:
        axes.set_xscale("log")
        room = (ordered[0] / ROUND, ordered[-1] * ROUND)
    else:
        step = min(np.diff(ordered), default=1.0) / 2 * ROUND
        room = (ordered[0] - step, ordered[-1] + step)
    axes.set_xticks(ordered, [printable(names.get(at, f"{at:g}"), 14) for at in ordered])
    axes.minorticks_off()
    axes.set(xlabel=axis, xlim=room)


def _published(axes: Axes) -> None:
    for name, counts in PUBLISHED["similar_blocks"].items():
        axes.plot(
            PUBLISHED["depth"],
            counts,
            linestyle="",
            marker=PUBLISHED_MARKS[name],
            markersize=10 if name == "ViT" else 7,
            color=PUBLISHED_COLOUR,
            label=f"published {name}: ImageNet, other count",
            zorder=4,
        )
        for depth, count in zip(PUBLISHED["depth"], counts, strict=True):
            axes.annotate(str(count), (depth, count), (6, 5), textcoords="offset points", color=PUBLISHED_COLOUR, fontsize=8)


def _aside(roles: dict[str, Role], places: list[float]) -> list[tuple[Role, float]]:
    """The roles, and how far to the side each is drawn, so that none hides another."""
    step = float(min(np.diff(sorted(places)), default=0.0))
    return [(role, ASIDE * step * (at - (len(roles) - 1) / 2)) for at, role in enumerate(roles.values())]


def _panel(axes: Axes, sweep: Sweep, axis: str, key: str) -> None:
    places, series = _places(sweep, axis), sweep.series(axis)
    for label, (role, aside) in zip(series, _aside(_roles(list(series)), list(places.values())), strict=True):
        points = series[label]
        x = [places[spelled(value)] + aside for value, _ in points]
        _line(axes, x, points, key, role)
        if key != "accuracy":
            twin = Role(f"{role.label}, untrained" if label else "untrained", role.colour, UNTRAINED_LINE, width=1.1)
            _line(axes, x, points, UNTRAINED + key, twin, marker=role.marker, markerfacecolor="white", markersize=4.0)
        if key == "similar_blocks":
            softmax = Role(f"{role.label}, its softmax", role.colour, PROBS_LINE, width=1.3)
            _line(axes, x, points, "similar_blocks_probs", softmax)
    stars = axis == "depth" and key == "similar_blocks"
    if stars:
        _published(axes)
    _ticks(axes, axis, places, PUBLISHED["depth"] if stars else ())
    axes.grid(axis="y")
    if key.startswith("similar_blocks"):
        axes.set_ylim(bottom=min(-0.4, axes.get_ylim()[0]), top=max(axes.get_ylim()[1], 1.4))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


@drawn
def figure_of(sweep: Sweep, kind: str, axis: str, narrow: bool = False) -> Figure | None:
    """The panels of one kind along one axis; None where no cell has any of their numbers."""
    panels = [(k, t) for k, t in PANELS[kind] if any(np.isfinite(cell.number(k)) for cell in sweep.finished)]
    if not panels:
        return None
    count = len(panels)
    lines = 2 * len(sweep.series(axis)) + 3
    figure = sheet(NARROW if narrow else WIDE, count * 3.0 + 0.22 * lines if narrow else 4.1 + 0.11 * lines)
    shape = (count, 1) if narrow else (1, count)
    places = figure.subplots(*shape, squeeze=False).ravel()
    for axes, (key, title) in zip(places, panels, strict=True):
        _panel(axes, sweep, axis, key)
        axes.set_title(title)
    share_legend(figure, *places, columns=1 if narrow else 3)
    return figure


def draw_all(sweep: Sweep, *, narrow: bool = False) -> dict[str, Figure]:
    """Every figure that the finished cells fill, by name, in the order of the page; `narrow` for a phone."""
    makers: dict[str, Callable[[], Figure | None]] = {
        f"{kind}-by-{axis}": functools.partial(figure_of, sweep, kind, axis, narrow) for axis in sweep.axes for kind in PANELS
    }
    made = {name: make() for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}
