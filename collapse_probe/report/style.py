"""How every figure looks: one colour for one role, fixed scales, and files that come out the same twice."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image

from collapse_probe.files import FIGURE_FOLDER
from collapse_probe.results.readings import NULLS, Count
from collapse_probe.statistics.intervals import Array

P = ParamSpec("P")
Drawn = TypeVar("Drawn", bound="Figure | None")


WIDE, NARROW = 10.0, 3.7  # inches: a column on a desk, a column on a phone
INK, MUTED, FAINT = "#22303c", "#66737f", "#dde3e8"
HATCH, PAPER = "#b9c1c8", "#eef1f3"  # an undefined cell
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": "#9aa5ae",
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlepad": 8.0,
    "xtick.color": "#9aa5ae",
    "ytick.color": "#9aa5ae",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "collapse-probe",
}


@dataclass(frozen=True)
class Role:
    """What a line stands for, and how it looks in every figure."""

    label: str
    colour: str
    line: Any = "-"
    marker: str = ""
    width: float = 1.4


ROLES: dict[str, Role] = {
    "measured": Role("measured (95 % interval)", "#0b5fa5", marker="o", width=2.0),
    "untrained": Role("untrained twin", "#6b7680", (0, (5, 2))),
    "other_token": Role("other token", "#d55e00", (0, (1.2, 1.2)), width=1.8),
    "other_image": Role("other image", "#01855f", (0, (6, 1.5, 1.2, 1.5))),
    "other_head": Role("other head", "#b5579b", (0, (3, 1.2))),
    "other_key": Role("other key", "#8a6d00", (0, (2, 1, 1, 1, 1, 1))),
}


def in_style() -> Any:
    """A context in which figures are made and saved; leaves matplotlib's own settings as they were."""
    return style.context(["default", STYLE])


def drawn(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """Run `draw` in our style, then settle its layout: however often it is saved, it comes out the same."""

    @functools.wraps(draw)
    def settled(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with in_style():
            figure = draw(*args, **kwargs)
            if figure is not None:
                FigureCanvasAgg(figure)  # a canvas known to no window system, with which text can be measured
                if (engine := figure.get_layout_engine()) is not None:
                    engine.execute(figure)
                    figure.set_layout_engine("none")
        return figure

    return settled


def sheet(width: float, height: float) -> Figure:
    """An empty figure of so many inches whose parts make room for each other."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.05, hspace=0.05)
    return Figure(figsize=(width, height), layout=layout)


def curve(axes: Axes, x: Array, values: Array, role: Role, ci95: Array | None = None) -> None:
    """One line over blocks, with its interval as a band; `ci95` [..., 2].

    Undefined points leave a gap; a point between two gaps is marked, and so are the ends of its interval.
    """
    few, known = len(x) <= 40, np.pad(np.isfinite(np.asarray(values, dtype=np.float64)), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    axes.plot(
        x,
        values,
        color=role.colour,
        linestyle=role.line,
        linewidth=role.width,
        marker=role.marker if few else "",
        markersize=4.0,
        label=role.label,
        zorder=2 if role.marker else 3,  # a null that coincides stays visible on top
    )
    if ci95 is not None:
        axes.fill_between(x, ci95[..., 0], ci95[..., 1], color=role.colour, alpha=0.2, linewidth=0, zorder=1)
        if alone.any():
            axes.vlines(x[alone], ci95[alone, 0], ci95[alone, 1], color=role.colour, alpha=0.4, linewidth=3, zorder=1)
    if alone.any() and not (role.marker and few):
        axes.plot(x[alone], values[alone], "_", color=role.colour, markersize=9, markeredgewidth=role.width, zorder=3)


def panels(
    count: int, narrow: bool, *, tall: float, columns: int = 2, above: float = 0.5, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, each `tall` inches, in rows of `columns` (one when narrow), `above` inches for a legend."""
    columns = 1 if narrow else min(columns, count)
    rows = -(-count // columns)
    figure = sheet(NARROW if narrow else WIDE if columns > 1 else 7.5, tall * rows + above)
    places = list(figure.subplots(rows, columns, squeeze=False, sharex=share_x).ravel())
    for axes in places[count:]:
        axes.remove()
    return figure, places[:count]


def share_legend(figure: Figure, columns: int) -> None:
    """One legend above the figure for everything that its panels name, each name once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside upper left",
        ncols=columns,
        handlelength=2.3,
        columnspacing=1.4,
        borderaxespad=0.3,
    )


def colour_bar(
    figure: Figure, scale: Normalize, colours: Colormap, label: str, ticks: Mapping[float, str] | None = None, up: float = 0.42
) -> None:
    """A horizontal colour bar `up` inches above the foot of a figure that places its axes by hand, with `label` beneath it."""
    width, height = figure.get_size_inches()
    span = min(4.2, width - 0.5)
    axes = figure.add_axes(((width - span) / 2 / width, up / height, span / width, 0.11 / height))
    figure.colorbar(ScalarMappable(scale, colours), cax=axes, orientation="horizontal")
    if ticks is not None:
        axes.set_xticks(list(ticks), list(ticks.values()))
    axes.tick_params(length=2, labelsize=7.5)
    axes.set_xlabel(label, fontsize=8, color=MUTED, labelpad=2)


def dots_of_heads(axes: Axes, x: Array, values: Array) -> None:
    """Every head of every block as a pale dot; `values` [blocks, heads]."""
    look = {"color": ROLES["measured"].colour, "alpha": 0.3, "markersize": 6, "markeredgewidth": 0, "zorder": 1}
    axes.plot(np.repeat(x, values.shape[1]), values.ravel(), ".", label="one head", **look)  # type: ignore[arg-type]


def over_blocks(axes: Axes, x: Array, label: str, most: int = 16) -> None:
    """At most `most` whole numbers along the x axis, half a step of room at both ends."""
    first, last = int(x[0]), int(x[-1])
    ticks = [first + tick for tick in whole_ticks(last - first + 1, most)]
    axes.set(xlabel=label, xticks=ticks, xlim=(first - 0.5, last + 0.5))


def over_counts(axes: Axes, rows: Sequence[str], pairs: int) -> None:
    """Named rows from the top, and along the x axis the number of adjacent pairs up to `pairs`."""
    room = min(max(0.05 * pairs, 0.1), 0.9)
    axes.set(xlim=(-room, pairs + room), ylim=(len(rows) - 0.5, -0.5), xlabel=f"adjacent pairs, of {pairs}")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="x")


def mark_count(axes: Axes, y: float, count: Count, role: Role, twin: Role) -> None:
    """One count as a mark at height `y` with the number above it and its interval as a bar; hollow: the untrained twin's."""
    axes.plot([count.value], [y], role.marker, color=role.colour, markersize=6, label=role.label, zorder=3)
    if count.untrained is not None:
        hollow: dict[str, Any] = {"markersize": 10.5, "markerfacecolor": "white", "zorder": 2}
        axes.plot([count.untrained], [y], "D", color=twin.colour, label=twin.label, **hollow)
    if count.ci95 is not None and np.isfinite(count.ci95).all():
        axes.plot(count.ci95, [y, y], color=role.colour, linewidth=4, alpha=0.35, solid_capstyle="butt", zorder=1)
    if np.isfinite(count.value):
        above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
        axes.annotate(f"{count.value:.3g}", (count.value, y), (0, 9), **above)


def floor(lines: Iterable[Array]) -> float:
    """The lower end of a scale: 0, or a little below the lowest value, so that it does not make much of tiny differences."""
    return min(float(np.min(line[np.isfinite(line)], initial=0.0)) for line in lines) * 1.1 - 0.03


def whole_ticks(count: int, most: int = 16) -> list[int]:
    """Every, every second, fourth … index below `count`, at most `most` of them."""
    step = 1
    while count > step * most:
        step *= 2
    return list(range(0, count, step))


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def printable(text: str, most: int = 40) -> str:
    """`text` in letters that the figures' font has, shortened in the middle; for names that users chose."""
    known = "".join(letter if ord(letter) in _glyphs() and letter.isprintable() else "□" for letter in text)
    if len(known) <= most:
        return known
    half = (most - 1) // 2
    return f"{known[:half]}…{known[-half:]}"


@contextlib.contextmanager
def _as_it_was(figure: Figure) -> Iterator[None]:
    """Style on, and afterwards the figure's own canvas and resolution again, which writing changes."""
    canvas, dpi = figure.canvas, figure.dpi
    try:
        with in_style():
            yield
    finally:
        figure.dpi = dpi
        figure.set_canvas(canvas)


def pixels(figure: Figure, dpi: float) -> Image.Image:
    """`figure` as an RGB picture with `dpi` pixels an inch."""
    with _as_it_was(figure):
        figure.dpi = dpi
        canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def svg(figure: Figure) -> bytes:
    """`figure` as an SVG with text as outlines, without a date: the same figure gives the same bytes."""
    buffer = io.StringIO()
    with _as_it_was(figure):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().encode()


def png(figure: Figure, dpi: float = 180) -> bytes:
    """`figure` as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    pixels(figure, dpi).save(buffer, "png")
    return buffer.getvalue()


DISTINCT = ("#0b5fa5", "#d55e00", "#01855f", "#b5579b", "#8a6d00", "#5b4fa2", "#a8322d", "#4a7f87")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")


def evenly_spaced(labels: Sequence[str], most: int) -> list[str]:
    """All labels, or `most` of them evenly spaced, first and last among them.

    >>> evenly_spaced(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    if len(labels) <= most:
        return list(labels)
    places = np.linspace(0, len(labels) - 1, most).round().astype(int)
    return [labels[at] for at in dict.fromkeys(places.tolist())]


DEPTH = "depth (0: before block 0)"
NULL_LABELS = {**{role: ROLES[role].label for role in NULLS}, "kappa": "κ"}


def save(figures: Mapping[str, Figure], folder: str | Path) -> None:
    """Write each figure as figures/NAME.png and figures/NAME.svg into `folder`."""
    inside = Path(folder) / FIGURE_FOLDER
    inside.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (inside / f"{name}.png").write_bytes(png(figure))
        (inside / f"{name}.svg").write_bytes(svg(figure))
