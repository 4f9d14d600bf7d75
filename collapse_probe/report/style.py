"""How every curve looks: one colour for one role, fixed scales, and the same text each time it is drawn."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from collapse_probe.report.heatmaps import whole_ticks
from collapse_probe.report.sheet import FAINT, INK, SWATCH, Key, Panel, Sheet, coordinate
from collapse_probe.results.readings import NULLS, Count
from collapse_probe.statistics.intervals import Array

P = ParamSpec("P")
Drawn = TypeVar("Drawn", bound="Sheet | None")


HEAD = "one head"  # what a dot among those of all heads stands for
WIDE, SLIM = 4.2, 3.1  # inches of a panel: a phone's width, half a desk's or a third
EDGE, TICK, LETTER = 4.0, 7.5, 0.64  # points around what is drawn, and between axis and words; a digit, of the font size
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": "#9aa5ae",
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.0,
    "axes.titlepad": 7.0,
    "xtick.color": "#9aa5ae",
    "ytick.color": "#9aa5ae",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
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
    "measured": Role("measured (95 % CI)", "#0b5fa5", marker="o", width=2.0),
    "untrained": Role("untrained copy", "#6b7680", (0, (5, 2))),
    "other_token": Role("chance level (other tokens)", "#d55e00", (0, (1.2, 1.2)), width=1.8),
    "other_image": Role("other images", "#01855f", (0, (6, 1.5, 1.2, 1.5))),
    "other_head": Role("other heads", "#b5579b", (0, (3, 1.2))),
    "other_key": Role("other keys", "#8a6d00", (0, (2, 1, 1, 1, 1, 1))),
}


def in_style() -> Any:
    """A context in which figures are made and drawn; leaves matplotlib's own settings as they were."""
    return style.context(["default", STYLE])


def drawn(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """Run `draw` in our style."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with in_style():
            return draw(*args, **kwargs)

    return styled


@dataclass(frozen=True)
class Chart:
    """A panel that matplotlib draws: a figure with one pair of axes, which takes all the room that its words leave."""

    figure: Figure

    @property
    def axes(self) -> Axes:
        """The axes."""
        return self.figure.axes[0]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in points, which the drawing takes as pixels."""
        width, height = self.figure.get_size_inches()
        return 72 * float(width), 72 * float(height)

    @property
    def label(self) -> str:
        """What it shows, in words."""
        title = self.axes.get_title(loc="left")
        about = f"{title or self.axes.get_ylabel()} along {self.axes.get_xlabel()}".replace("\n", " ").strip()
        ends: dict[str, list[float]] = {}
        for line in self.axes.get_lines():
            values = np.ma.filled(np.ma.asarray(line.get_ydata(), dtype=np.float64), np.nan)
            if not str(line.get_label()).startswith("_"):
                ends.setdefault(str(line.get_label()), []).extend(values[np.isfinite(values)].tolist())
        said = [name if not each else f"{name} from {_said(min(each))} to {_said(max(each))}" for name, each in ends.items()]
        others = [name for name in dict.fromkeys(self.axes.get_legend_handles_labels()[1]) if name not in ends]
        return f"{about}: {', '.join([*said, *others])}" if said or others else about

    @property
    def data(self) -> str:
        """Every named line that runs over blocks, depths or other numbers, and where in the drawing its points are, as JSON."""
        lines = {}
        for line in self.axes.get_lines():
            x, y = (np.ma.filled(np.ma.asarray(part, dtype=np.float64), np.nan) for part in line.get_data())
            label = str(line.get_label())
            if not label.startswith("_") and label != HEAD and len(x) > 1:
                lines[label] = [hexes(line.get_color())[0], _few(x), _few(y)]
        if not lines:
            return ""
        _settle(self.figure)
        logs = [axis == "log" for axis in (self.axes.get_xscale(), self.axes.get_yscale())]
        start, end = (10.0 if log else 1.0 for log in logs), (1.0 if log else 0.0 for log in logs)
        corners = self.axes.transData.transform([tuple(end), tuple(start)]) * 72 / self.figure.dpi
        (x0, y0), (x1, y1) = corners.tolist()
        height = self.size[1]
        along = self.axes.get_xlabel().partition(" ")[0]
        place = {
            "x": [round(x0, 2), round(x1 - x0, 4), int(logs[0])],
            "y": [round(height - y0, 2), round(y0 - y1, 4), int(logs[1])],
        }
        return json.dumps({"of": along, **place, "lines": lines}, ensure_ascii=False, separators=(",", ":"))

    def body(self, name: str) -> str:
        """The drawing as SVG, with text as text and no date; every id that is needed begins with `name`."""
        with in_style():
            _settle(self.figure)
            buffer, canvas = io.StringIO(), self.figure.canvas
            svg: Any = FigureCanvasSVG(self.figure)  # its methods have no types
            svg.print_svg(buffer, metadata={"Date": None, "Creator": None})
            self.figure.set_canvas(canvas)
        return _lean(buffer.getvalue(), name)


def _said(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _few(values: Array) -> list[float | None]:
    """Four digits of each value; None where undefined."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def _settle(figure: Figure) -> None:
    """Give the axes the room that their words leave, by their letters: measuring each word takes longer than drawing all.

    Axis labels and title get fixed places: matplotlib measures all tick labels to find theirs. Turned words are measured.
    """
    (axes,) = figure.axes
    wide, tall = (72 * float(side) for side in figure.get_size_inches())
    names = {axis: _tick_labels(axis) for axis in (axes.xaxis, axes.yaxis)}
    lines, small = 1.2 * STYLE["axes.labelsize"], STYLE["xtick.labelsize"]
    beside = [0.5 * _width(name, small) for name in names[axes.xaxis][-1:]]  # half of the last word stands out
    beside += [3 + _width(text.get_text(), small) for text in axes.texts if text.get_position()[0] > 1]
    title = axes.get_title(loc="left")
    left = EDGE + max((_width(name, small) for name in names[axes.yaxis]), default=0.0) + TICK
    left += lines if axes.get_ylabel() else 0.0
    down = EDGE + TICK + 1.2 * small + lines * (axes.get_xlabel().count("\n") + 1 if axes.get_xlabel() else 0)
    up = EDGE + 0.6 * small + (1.2 * STYLE["axes.titlesize"] * (title.count("\n") + 1) + 3 if title else 0.0)
    if any(tick.get_rotation() for tick in axes.get_xticklabels()[:1]):
        down = EDGE + lines + _lowest(figure, axes)
    place = (left / wide, down / tall, 1 - (left + EDGE + max(beside, default=0.0)) / wide, 1 - (down + up) / tall)
    axes.set_position((*place[:2], max(place[2], 0.05), max(place[3], 0.05)))
    axes.xaxis.set_label_coords(place[0] + place[2] / 2, (EDGE + 0.95 * lines) / tall, figure.transFigure)
    axes.xaxis.label.set_verticalalignment("top")
    axes.yaxis.set_label_coords((EDGE + 0.8 * lines) / wide, place[1] + place[3] / 2, figure.transFigure)
    axes.set_title(title, loc="left", y=1.0)


def _tick_labels(axis: Any) -> list[str]:
    """The words at the ticks that are seen."""
    low, high = sorted(axis.get_view_interval())
    places = axis.get_majorticklocs()
    names = axis.get_major_formatter().format_ticks(places)
    return [name for at, name in zip(places, names, strict=True) if low <= at <= high]


def _width(text: str, size: float) -> float:
    """About how wide text of this size is, in the same units: as wide as digits."""
    return LETTER * size * max(map(len, text.split("\n")))


def _lowest(figure: Figure, axes: Axes) -> float:
    """How far the words at the x axis reach below it, in points."""
    canvas: Any = FigureCanvasAgg(figure)  # known to no window system; text can be measured with it
    box = axes.xaxis.get_tightbbox(canvas.get_renderer())
    return 0.0 if box is None else (axes.get_window_extent().y0 - box.y0) * 72 / figure.dpi


NEEDED = re.compile(r'(?:href="#|url\(#)([^")]+)')
IDS = re.compile(r' id="([^"]*)"')
TAGS = re.compile(r"<[^>]*>")
DIGITS = re.compile(r"(\.\d\d)\d+")
CLUTTER = (
    (re.compile(r"^.*?<svg[^>]*>|</svg>\s*$|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL), ""),
    (re.compile(r"font: ([\d.]+px) [^;\"]*"), r"font-size: \1"),
    (re.compile(r"font-family: [^;\"]*;? ?"), ""),
    (re.compile(r' transform="rotate\(-0 [^"]*"'), ""),
    (re.compile(r"\s*\n\s*"), " "),
    (re.compile(r"<g>\s*(<(?:use|path|text)[^>]*(?:/>|>[^<]*</text>))\s*</g>"), r"\1"),
    (re.compile(r"> <"), "><"),
    (re.compile(r"xlink:href"), "href"),
)


def _lean(svg: str, name: str) -> str:
    """The inside of matplotlib's SVG without what a browser does not need; ids that stay begin with `name`."""
    needed = {each: f"{name}-{at}" for at, each in enumerate(dict.fromkeys(NEEDED.findall(svg)))}
    svg = TAGS.sub(lambda tag: DIGITS.sub(r"\1", tag[0]), svg)  # words keep their digits
    svg = IDS.sub(lambda found: f' id="{needed[found[1]]}"' if found[1] in needed else "", svg)
    svg = NEEDED.sub(lambda found: found[0].removesuffix(found[1]) + needed[found[1]], svg)
    for pattern, instead in CLUTTER:
        svg = pattern.sub(instead, svg)
    return svg.strip()


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
        label=role.label if ci95 is not None else role.label.removesuffix(" (95 % CI)"),
        zorder=2 if role.marker else 3,  # a null that coincides stays visible on top
    )
    if ci95 is not None:
        axes.fill_between(x, ci95[..., 0], ci95[..., 1], color=role.colour, alpha=0.2, linewidth=0, zorder=1)
        if alone.any():
            axes.vlines(x[alone], ci95[alone, 0], ci95[alone, 1], color=role.colour, alpha=0.4, linewidth=3, zorder=1)
    if alone.any() and not (role.marker and few):
        axes.plot(x[alone], values[alone], "_", color=role.colour, markersize=9, markeredgewidth=role.width, zorder=3)


def panels(count: int, *, tall: float = 2.8, columns: int = 2) -> list[Axes]:
    """The axes of `count` panels, each a figure of its own, `tall` inches; less where more than two stand in a row."""
    wide, tall = (WIDE, tall) if min(count, columns) <= 2 else (SLIM, 0.85 * tall)
    return [Figure(figsize=(wide, tall)).add_axes((0.14, 0.16, 0.82, 0.72)) for _ in range(count)]


def charts(places: Sequence[Axes], columns: int = 2) -> Sheet:
    """The panels as one figure in rows of `columns`, beneath a key for everything that they name, each name once."""
    named: dict[str, Any] = {}
    for axes in places:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figures = [figure for axes in places if isinstance(figure := axes.get_figure(), Figure)]
    return Sheet(
        tuple(map(Chart, figures)),
        min(columns, len(figures)),
        above=tuple(Key(label, _swatch(each)) for label, each in named.items()),
    )


def beside(panel: Panel, sheet: Sheet) -> Sheet:
    """`sheet` with another panel before its own."""
    return replace(sheet, places=(panel, *sheet.places), columns=sheet.columns + 1)


def _swatch(handle: Any) -> str:
    """A line with its marker, or an area, as the key shows it."""
    wide, tall = SWATCH
    if isinstance(handle, ErrorbarContainer):
        handle = handle[0]
    if not isinstance(handle, Line2D):
        colour, alpha = hexes(handle.get_facecolor())
        return f'<path fill="{colour}" fill-opacity="{alpha:g}" d="M2 1h{wide - 4:g}v{tall - 2:g}h-{wide - 4:g}z"/>'
    colour, opacity = hexes(handle.get_color(), max(handle.get_alpha() or 1.0, 0.6))
    parts = []
    if handle.get_linestyle() not in ("None", "", " "):
        dashes = getattr(handle, "_dash_pattern", (0, None))[1]  # in points; no public name gives them
        pattern = "" if not dashes else f' stroke-dasharray="{" ".join(f"{each:.3g}" for each in dashes)}"'
        look = f'stroke="{colour}" stroke-width="{handle.get_linewidth():g}" fill="none"{pattern}'
        parts.append(f'<path {look} d="M1 {tall / 2:g}h{wide - 2:g}"/>')
    if handle.get_marker() not in ("", "None", " ", None):
        fill, _ = hexes(handle.get_markerfacecolor())
        shape = MarkerStyle(handle.get_marker())
        outline = shape.get_path().transformed(shape.get_transform())
        scale = min(handle.get_markersize(), 9.0)
        d = _outline(outline, scale)
        look = (
            f'fill="{fill}" stroke="{colour}" stroke-width="{max(handle.get_markeredgewidth(), 0.1):g}" opacity="{opacity:g}"'
        )
        parts.append(f'<path {look} transform="translate({wide / 2:g} {tall / 2:g})" d="{d}"/>')
    return "".join(parts)


def hexes(colour: Any, alpha: float | None = None) -> tuple[str, float]:
    """A colour of matplotlib as `#rrggbb` and how much it covers."""
    red, green, blue, cover = to_rgba(colour if isinstance(colour, str) else tuple(np.ravel(colour)[:4].tolist()), alpha)
    return to_hex((red, green, blue)), float(cover)


def _outline(path: Any, scale: float) -> str:
    """The outline of a marker `scale` pixels wide, as an SVG path."""
    letters, parts = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}, []
    for points, code in path.iter_segments():
        pairs: Any = () if code == 79 else np.reshape(points, (-1, 2)) * (scale, -scale)
        parts.append(letters[int(code)] + " ".join(f"{coordinate(x)} {coordinate(y)}" for x, y in pairs))
    return "".join(parts)


def dots_of_heads(axes: Axes, x: Array, values: Array) -> None:
    """Every head of every block as a pale dot; `values` [blocks, heads]."""
    look = {"color": ROLES["measured"].colour, "alpha": 0.3, "markersize": 6, "markeredgewidth": 0, "zorder": 1}
    axes.plot(np.repeat(x, values.shape[1]), values.ravel(), ".", label=HEAD, **look)  # type: ignore[arg-type]


def over_blocks(axes: Axes, x: Array, label: str, most: int = 16) -> None:
    """At most `most` whole numbers along the x axis, half a step of room at both ends."""
    first, last = int(x[0]), int(x[-1])
    ticks = [first + tick for tick in whole_ticks(last - first + 1, most)]
    axes.set(xlabel=label, xticks=ticks, xlim=(first - 0.5, last + 0.5))


def powers_of_ten(axes: Axes) -> None:
    """A logarithmic y axis with 10⁻³, 10⁻² … at its ticks, as text."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"10{str(round(np.log10(value))).translate(raised)}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def over_counts(axes: Axes, rows: Sequence[str], pairs: int) -> None:
    """Named rows from the top, and along the x axis the number of adjacent pairs up to `pairs`."""
    room = min(max(0.05 * pairs, 0.1), 0.9)
    axes.set(xlim=(-room, pairs + room), ylim=(len(rows) - 0.5, -0.5), xlabel=f"adjacent pairs, of {pairs}")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="x")


def mark_count(axes: Axes, y: float, count: Count, role: Role, twin: Role) -> None:
    """One count as a mark at height `y` with the number above it and its interval as a bar; hollow: the untrained copy's."""
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
