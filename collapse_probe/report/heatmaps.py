"""Matrices as heatmaps on fixed scales, so that two models can be compared by eye."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import seaborn
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from collapse_probe.report.style import HATCH, INK, MUTED, NARROW, PAPER, WIDE, sheet, whole_ticks
from collapse_probe.statistics.intervals import Array

MOST_NUMBERED = 16  # more cells a side than this leave no room for a number in each
SMALLEST_NUMBER = 4.6  # points
UNDEFINED = "hatched: not compared, or undefined (as κ is wherever the other-token null is 1)"


@dataclass(frozen=True)
class Scale:
    """The two ends of a colour scale; never taken from the data."""

    low: float
    high: float
    colours: Colormap


WHOLE = seaborn.color_palette("mako_r", as_cmap=True)
# without the darkest end, where differences near 1 drown in black
UNSIGNED = Scale(0.0, 1.0, ListedColormap(WHOLE(np.linspace(0.0, 0.82, 256)), name="mako_r-to-0.82"))
SIGNED = Scale(-1.0, 1.0, seaborn.color_palette("vlag", as_cmap=True))


@dataclass(frozen=True)
class Panel:
    """One matrix to draw: `values` [rows, columns], NaN where undefined; a dot in every cell that is `marked` says `mark`."""

    values: Array
    title: str
    scale: Scale
    rows: str = "block"
    columns: str = "block"
    marked: NDArray[np.bool_] | None = None
    mark: str = ""


def scale_of(*matrices: Array) -> Scale:
    """0 … 1, or −1 … 1 as soon as one value lies below zero."""
    lowest = min((float(np.min(m[np.isfinite(m)], initial=0.0)) for m in matrices), default=0.0)
    return SIGNED if lowest < -1e-9 else UNSIGNED


def short(value: float) -> str:
    """A cosine in as few characters as a cell holds; 1 stays for what is 1, everything nearly so is .99.

    >>> short(0.943), short(-0.05), short(0.998), short(1.0), short(-0.001)
    ('.94', '−.05', '.99', '1', '0')
    """
    if 0.99 < abs(value) < 0.9995:
        value = math.copysign(0.99, value)
    text = f"{value:.2f}".replace("-", "−")
    return {"1.00": "1", "−1.00": "−1", "0.00": "0", "−0.00": "0"}.get(text, text.replace("0.", ".", 1))


def heat(axes: Axes, panel: Panel, side: float, *, square: bool = True) -> None:
    """Draw `panel` on `axes`, about `side` inches wide; undefined cells stay hatched."""
    undefined = ~np.isfinite(panel.values)
    shown = np.where(undefined, 0.0, panel.values)
    cells = max(panel.values.shape)
    size = min(7.5, side * 72 / cells * (0.36 if panel.scale.low < 0 else 0.5))
    size = size if square and cells <= MOST_NUMBERED and size >= SMALLEST_NUMBER else 0.0
    hatch(axes)
    seaborn.heatmap(
        shown,
        mask=undefined,
        vmin=panel.scale.low,
        vmax=panel.scale.high,
        cmap=panel.scale.colours,
        annot=np.vectorize(short, otypes=[object])(shown) if size else False,
        fmt="",
        annot_kws={"size": size},
        cbar=False,
        xticklabels=False,
        yticklabels=False,
        square=square,
        ax=axes,
    )
    for text in axes.texts:
        text.set_in_layout(False)  # they lie inside the cells; measuring each is slow
    if panel.marked is not None and panel.marked.any():
        rows, columns = np.nonzero(panel.marked)  # a dot in the middle of the cell, or above the number where there is one
        cell = 72 * side / cells  # points
        dot, down = (min(0.14 * cell, 2.4), 0.2) if size else (min(0.24 * cell, 2.6), 0.5)
        axes.plot(columns + 0.5, rows + down, linestyle="", marker="o", markersize=dot, color=INK, markeredgewidth=0)
    for axis, count in zip((axes.yaxis, axes.xaxis), panel.values.shape, strict=True):
        ticks = whole_ticks(count, 16 if side > 2.4 else 8)
        axis.set_ticks([t + 0.5 for t in ticks], labels=[str(t) for t in ticks], rotation=0)
    axes.tick_params(length=0, pad=3)
    axes.set(title=panel.title, ylabel=panel.rows, xlabel=panel.columns)
    bar = axes.figure.colorbar(axes.collections[0], cax=axes.inset_axes((1.03, 0.0, 0.1 / side, 1.0)))
    bar.outline.set_visible(False)
    bar.set_ticks([panel.scale.low, (panel.scale.low + panel.scale.high) / 2, panel.scale.high])
    bar.ax.tick_params(length=2, labelsize=7.5)


def hatch(axes: Axes) -> None:
    """Hatch the ground of a matrix, which shows where cells are undefined."""
    axes.patch.set(facecolor=PAPER, edgecolor=HATCH, hatch="//////", linewidth=0)


def grid(places: Sequence[Panel | None], columns: int, *, narrow: bool = False) -> Figure:
    """Panels in rows of `columns` (one when narrow), None leaving a gap; a key explains hatching and dots."""
    panels = [panel for panel in places if panel is not None]
    places, columns = (panels, 1) if narrow else (places, columns)
    rows = -(-len(places) // columns)
    cell = NARROW if narrow else WIDE / max(columns, 2)
    side = cell - 1.05
    keys = _keys(panels, 46 if cell * columns < 6 else 200)
    figure = sheet(cell * columns, (side + 0.75) * rows + (0.5 if narrow else 0.3) * len(keys))
    for at, panel in enumerate(places):
        if panel is not None:
            heat(figure.add_subplot(rows, columns, at + 1), panel, side)
    if keys:
        figure.legend(list(keys.values()), list(keys), loc="outside lower left", labelcolor=MUTED)
    return figure


def _keys(panels: Sequence[Panel], width: int) -> dict[str, Artist]:
    """What needs words under the panels: lines of at most `width` letters, and what each stands beside."""
    found: dict[str, Artist] = {}
    if any(not np.isfinite(panel.values).all() for panel in panels):
        found[textwrap.fill(UNDEFINED, width)] = undefined_patch()
    for panel in panels:
        if panel.marked is not None and panel.marked.any():
            dot = Line2D([], [], color=INK, marker="o", markersize=2.6, markeredgewidth=0, linestyle="")
            found[textwrap.fill(panel.mark, width)] = dot
    return found


def undefined_patch() -> Patch:
    """The key to an undefined cell."""
    return Patch(facecolor=PAPER, edgecolor=HATCH, hatch="//////", linewidth=0)
