"""Matrices as heatmaps on fixed scales, so that two models can be compared by eye; each cell says its numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

from collapse_probe.report.colours import AMBER, MAKO, Ramp
from collapse_probe.report.sheet import LETTER, SWATCH, Key, Sheet, coordinate, words
from collapse_probe.statistics.intervals import Array

MOST_NUMBERED = 13  # cells a side, twelve blocks and one depth: more leave no room for a number in each
SMALLEST_NUMBER = 7.0  # pixels
LEFT, RIGHT, TOP, BOTTOM = 44.0, 46.0, 30.0, 38.0  # pixels around a matrix
LINE = 15.0  # pixels from line to line of a title
WIDTH, SLIM, MANY = 390.0, 290.0, 2  # of a panel, that of a phone; where more than so many stand in a row
HATCH, PAPER = "#b9c1c8", "#eef1f3"  # an undefined cell
ON_CELLS = "#22303d"  # letters on cells, whose colours are the same in the dark
UNDEFINED = "hatched: not compared, or undefined (as κ is where the chance level is 1)"
PHASES = "dashed: where one phase of depth ends and the next begins (depth-phases)"


@dataclass(frozen=True)
class Scale:
    """The two ends of a colour scale; never taken from the data."""

    low: float
    high: float
    colours: Ramp

    def index(self, values: Array) -> NDArray[np.intp]:
        """The shade of each value."""
        return self.colours.index((values - self.low) / (self.high - self.low))


UNSIGNED = Scale(0.0, 1.0, MAKO.upto(0.82))  # without the darkest end, where differences near 1 drown in black
SIGNED = Scale(-1.0, 1.0, AMBER.upto(0.82).before(UNSIGNED.colours))
"""From 0 up as UNSIGNED, so that a cosine and a κ of one size have one colour; below 0 amber."""


@dataclass(frozen=True)
class Heatmap:
    """One matrix to draw: `values` [rows, columns], NaN where undefined; a dot in every cell that is `marked` says `mark`.

    `beside` holds further numbers of each cell by their names, [rows, columns] or intervals [rows, columns, 2]; they stand in
    what a cell says when it is pointed at, and `name` what its own number is called there. `phases` are the blocks with which
    a phase of depth begins, where lines are drawn (rows and columns of depths have one more in front).
    """

    values: Array
    title: str
    scale: Scale
    rows: str = "block"
    columns: str = "block"
    marked: NDArray[np.bool_] | None = None
    mark: str = ""
    beside: Mapping[str, Array] = field(default_factory=dict)
    square: bool = True
    width: float = WIDTH
    name: str = ""
    phases: tuple[int, ...] = ()

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell in pixels."""
        rows, columns = self.values.shape
        wide = (self.width - LEFT - RIGHT) / max(columns, rows if self.square else 1)
        return wide, wide if self.square else min(max(14.0, 60.0 / rows), 200.0 / rows)

    @property
    def lines(self) -> list[str]:
        """The title in lines that fit."""
        return textwrap.wrap(self.title, int((self.width - LEFT) / (LETTER * 12)))[:3]

    @property
    def top(self) -> float:
        """Pixels above the matrix."""
        return TOP + LINE * max(len(self.lines) - 1, 0)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        return self.width, self.top + self.values.shape[0] * self.cell[1] + BOTTOM

    @property
    def label(self) -> str:
        """What it shows, in words."""
        known = self.values[np.isfinite(self.values)]
        ends = f"from {cell_number(known.min())} to {cell_number(known.max())}" if known.size else "undefined everywhere"
        rows, columns = self.values.shape
        return f"{self.title}: {self.rows} × {self.columns}, {rows} by {columns} cells, {ends}"

    def body(self, name: str) -> str:
        """Cells with what they say, numbers where they fit, dots, axes, and the colour bar."""
        return self.drawn(name, (self,))

    def drawn(self, name: str, maps: Sequence[Heatmap]) -> str:
        """The axes and cells of this one with the colours of `maps` (of its size, first itself), each with words of its own."""
        (wide, tall), (rows, columns) = self.cell, self.values.shape
        width, height = wide * columns, tall * rows
        top = max(each.top for each in maps)
        hole = not all(np.isfinite(each.values).all() for each in maps)
        groups = [each._seen(width, height, len(maps) > 1, at) for at, each in enumerate(maps)]
        return "".join(
            [
                f'<g transform="translate({coordinate(LEFT)} {coordinate(top)})">',
                hatched(name, width, height) if hole else "",
                f'<g class="cells" data-rows="{escape(self.rows)}" data-columns="{escape(self.columns)}"',
                f' data-across="{columns}" transform="scale({wide:.6g} {tall:.6g})" shape-rendering="crispEdges">',
                f"{self._cells(maps)}</g>",
                self._axes(width, height),
                self._lines(width, height),
                *groups,
                "</g>",
            ]
        )

    def _seen(self, width: float, height: float, one_of_several: bool, at: int) -> str:
        """What is seen of this matrix alone: title, numbers, dots and colour bar."""
        down = -self.top + 16
        title = "".join(words(line, 0, down + LINE * row, size=12) for row, line in enumerate(self.lines))
        inside = f"{title}{self._numbers()}{self._dots()}{self._bar(width, height)}"
        return f'<g class="view v{at}">{inside}</g>' if one_of_several else inside

    def _cells(self, maps: Sequence[Heatmap]) -> str:
        fills = [each._fills() for each in maps]
        says = self._says()
        rows, columns = self.values.shape
        cells = []
        for r in range(rows):
            for c in range(columns):
                first = fills[0][r][c]
                more = ";".join(f"--v{at}:{each[r][c]}" for at, each in enumerate(fills[1:], start=1))
                look = f'fill="{first}"{" pointer-events=" + chr(34) + "all" + chr(34) if first == "none" else ""}'
                style = f' style="{more}"' if more else ""
                cells.append(f'<path {look}{style} d="M{c} {r}h1v1h-1z"><title>{says[r][c]}</title></path>')
        return "".join(cells)

    def _fills(self) -> list[list[str]]:
        """The colour of each cell, none where undefined."""
        codes, shades, whole = (
            self.scale.colours.codes,
            self.scale.index(self.values).tolist(),
            np.isfinite(self.values).tolist(),
        )
        return [
            [codes[shade] if known else "none" for shade, known in zip(*row, strict=True)]
            for row in zip(shades, whole, strict=True)
        ]

    def _says(self) -> list[list[str]]:
        """What each cell says: where it is, its number, and those of `beside` that are defined."""
        down, along = (escape(axis.partition(" (")[0]) for axis in (self.rows, self.columns))
        same = down == along
        columns = [(f"{escape(self.name)} " if self.name else "", _texts(self.values))]
        columns += [(f"{escape(name)} ", _texts(values)) for name, values in self.beside.items()]
        found = []
        for r in range(self.values.shape[0]):
            row = []
            for c in range(self.values.shape[1]):
                where = f"{down}s {r} and {c}" if same else f"{down} {r}, {along} {c}"
                facts = "; ".join(f"{name}{texts[r][c]}" for name, texts in columns if texts[r][c])
                row.append(f"{where}: {facts or 'undefined'}")
            found.append(row)
        return found

    def _numbers(self) -> str:
        """A number in every cell, in letters that can be read on its colour; nothing where they do not fit."""
        (wide, tall), signed = self.cell, self.scale.low < 0
        size = min(10.0, wide * (0.36 if signed else 0.5))
        if not self.square or max(self.values.shape) > MOST_NUMBERED or size < SMALLEST_NUMBER:
            return ""
        dark = np.asarray(self.scale.colours.dark)[self.scale.index(self.values)]
        groups = {ON_CELLS: "", "#fff": ""}
        for r, c in np.argwhere(np.isfinite(self.values)).tolist():
            x, y = coordinate((c + 0.5) * wide), coordinate((r + 0.5) * tall + 0.36 * size)
            groups["#fff" if dark[r, c] else ON_CELLS] += f'<text x="{x}" y="{y}">{short(self.values[r, c])}</text>'
        look = f'font-size="{size:.3g}" text-anchor="middle" pointer-events="none"'
        return "".join(f'<g fill="{colour}" {look}>{texts}</g>' for colour, texts in groups.items() if texts)

    def _dots(self) -> str:
        """A dot in the middle of every marked cell, or above its number where there is one."""
        if self.marked is None or not self.marked.any():
            return ""
        wide, tall = self.cell
        radius, down = (
            (min(0.07 * wide, 1.6), 0.17) if max(self.values.shape) <= MOST_NUMBERED else (min(0.13 * wide, 2.0), 0.5)
        )
        dots = (
            f'<circle cx="{coordinate((c + 0.5) * wide)}" cy="{coordinate((r + down) * tall)}" r="{radius:.2f}"/>'
            for r, c in np.argwhere(self.marked).tolist()
        )
        return f'<g pointer-events="none">{"".join(dots)}</g>'

    def _axes(self, width: float, height: float) -> str:
        (wide, tall), (rows, columns) = self.cell, self.values.shape
        below = [words(str(tick), (tick + 0.5) * wide, height + 13) for tick in whole_ticks(columns, max(int(width / 19), 1))]
        beside = [words(str(tick), -5, (tick + 0.5) * tall + 3.5) for tick in whole_ticks(rows, max(int(height / 14), 1))]
        names = [
            words(self.columns, width / 2, height + 29, size=11, anchor="middle"),
            words(self.rows, -27, height / 2, size=11, anchor="middle", turned=True),
        ]
        groups = f'<g font-size="10" text-anchor="middle">{"".join(below)}</g><g font-size="10" text-anchor="end">'
        return f"{groups}{''.join(beside)}</g>{''.join(names)}"

    def _lines(self, width: float, height: float) -> str:
        """Where one phase of depth ends and the next begins, along both axes."""
        wide, tall = self.cell
        first = [start + self.rows.startswith("depth") for start in self.phases]
        path = "".join(
            f"M0 {coordinate(at * tall)}H{coordinate(width)}M{coordinate(at * wide)} 0V{coordinate(height)}" for at in first
        )
        look = 'fill="none" stroke-dasharray="4 2" pointer-events="none"'
        under = f'<path {look} stroke="#fff" stroke-width="2.6" d="{path}"/>'
        return f'{under}<path {look} stroke="{ON_CELLS}" stroke-width="1.2" d="{path}"/>' if path else ""

    def _bar(self, width: float, height: float) -> str:
        """The colours of the scale with its two ends and its middle."""
        return colour_bar(self.scale.colours, (width + 8, 0, 7, height), _ends(self.scale))


@dataclass(frozen=True)
class Switch:
    """Matrices of one shape in one place; a page shows one at a time, and the cells of the first say the numbers of all."""

    maps: tuple[Heatmap, ...]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        first, top = self.maps[0], max(each.top for each in self.maps)
        return first.width, first.size[1] - first.top + top

    @property
    def label(self) -> str:
        """What can be shown, in words."""
        return "; ".join(each.label for each in self.maps)

    def body(self, name: str) -> str:
        """The first matrix, with the colours and words of the others beside its own."""
        return self.maps[0].drawn(name, self.maps)


def _ends(scale: Scale) -> dict[float, str]:
    return {at: f"{scale.low + at * (scale.high - scale.low):g}".replace("-", "−") for at in (0.0, 0.5, 1.0)}


def colour_bar(
    colours: Ramp, box: tuple[float, float, float, float], ticks: Mapping[float, str], *, level: bool = False
) -> str:
    """A bar in the box (left, top, width, height), upright or `level`, with words at positions from 0 to 1."""
    x, y, width, height = box
    steps = 48
    cells = []
    for step in range(steps):
        code = colours.codes[round((step + 0.5) / steps * (len(colours.codes) - 1))]
        place = f"M{step} 0h1.1v1h-1.1z" if level else f"M0 {steps - 1 - step}h1v1.1h-1z"
        cells.append(f'<path fill="{code}" d="{place}"/>')
    scale = f"{width / steps:.4g} {height:.4g}" if level else f"{width:.4g} {height / steps:.4g}"
    bar = f'<g transform="translate({coordinate(x)} {coordinate(y)}) scale({scale})">{"".join(cells)}</g>'
    if level:
        said = [words(text, x + at * width, y + height + 11, anchor="middle") for at, text in ticks.items()]
    else:
        said = [words(text, x + width + 3, y + (1 - at) * (height - 7) + 7) for at, text in ticks.items()]
    return f'{bar}<g font-size="9.5">{"".join(said)}</g>'


def _texts(values: Array) -> list[list[str]]:
    """Numbers, or intervals, as text; empty where undefined."""
    if values.ndim == 3:
        lows, highs = (_texts(values[..., end]) for end in (0, 1))
        pairs = (zip(low, high, strict=True) for low, high in zip(lows, highs, strict=True))
        return [[f"[{a}, {b}]" if a and b else "" for a, b in row] for row in pairs]
    return [[cell_number(value) for value in row] for row in values.tolist()]


def cell_number(value: float) -> str:
    """Three digits after the point; empty where undefined.

    >>> cell_number(-0.0514), cell_number(float("nan"))
    ('−0.051', '')
    """
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else ""


def mosaic(values: Array, scale: Scale) -> str:
    """Cells of one unit without words: one path a colour, neighbours in a row as one; undefined ones are left out."""
    found: dict[int, list[str]] = {}
    shades = np.where(np.isfinite(values), scale.index(values), -1)
    for r, row in enumerate(shades.tolist()):
        start = 0
        for c in range(1, len(row) + 1):
            if c == len(row) or row[c] != row[start]:
                if row[start] >= 0:
                    found.setdefault(row[start], []).append(f"M{start} {r}h{c - start}v1h-{c - start}z")
                start = c
    return "".join(f'<path fill="{scale.colours.codes[shade]}" d="{"".join(each)}"/>' for shade, each in found.items())


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


def whole_ticks(count: int, most: int = 16) -> list[int]:
    """Every, every second, fourth … index below `count`, at most `most` of them."""
    step = 1
    while count > step * most:
        step *= 2
    return list(range(0, count, step))


def hatched(name: str, width: float, height: float) -> str:
    """A ground that shows where cells are undefined."""
    pattern = (
        f'<pattern id="{name}-hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<path fill="{PAPER}" d="M0 0h5v5h-5z"/><path stroke="{HATCH}" d="M0 0v5"/></pattern>'
    )
    box = f"M0 0h{coordinate(width)}v{coordinate(height)}h-{coordinate(width)}z"
    return f'<defs>{pattern}</defs><path fill="url(#{name}-hatch)" d="{box}"/>'


def undefined_key() -> Key:
    """The key to an undefined cell."""
    lines = "".join(f"M{x} 11L{x + 10} 1" for x in (4, 9, 14, 19))
    return Key(UNDEFINED, f'<path fill="{PAPER}" d="M2 1h26v10h-26z"/><path stroke="{HATCH}" d="{lines}"/>')


def grid(places: Sequence[Heatmap | Switch | None], columns: int, views: Sequence[str] = ()) -> Sheet:
    """Matrices in rows of `columns`, None leaving a gap; a key explains hatching and dots.

    `views` are the words of the switch for those that share a place; the figure's file has them side by side.
    """
    apart = [each.maps if isinstance(each, Switch) else (each,) for each in places]
    found: dict[str, Key] = {}
    for panel in (panel for maps in apart for panel in maps if panel is not None):
        if not np.isfinite(panel.values).all():
            found[UNDEFINED] = undefined_key()
        if panel.marked is not None and panel.marked.any():
            found[panel.mark] = Key(panel.mark, f'<circle cx="{SWATCH[0] / 2:g}" cy="{SWATCH[1] / 2:g}" r="1.8"/>')
        if panel.phases:
            line = f'<path fill="none" stroke="{ON_CELLS}" stroke-width="1.2" stroke-dasharray="4 2" d="M2 6h26"/>'
            found[PHASES] = Key(PHASES, line)
    below = tuple(found.values())
    whole = Sheet(tuple(_sized(each, columns) for each in places), columns, below=below, views=tuple(views))
    if not views:
        return whole
    most = max(map(len, apart))
    filed = [each for maps in apart for each in (*maps, *[None] * (most - len(maps)))]
    return replace(whole, filed=Sheet(tuple(_sized(each, most) for each in filed), most, below=below))


def _sized(panel: Heatmap | Switch | None, columns: int) -> Heatmap | Switch | None:
    """The panel as wide as it may be in a row of so many."""
    if panel is None or columns <= MANY:
        return panel
    if isinstance(panel, Switch):
        return Switch(tuple(replace(each, width=SLIM) for each in panel.maps))
    return replace(panel, width=SLIM)
