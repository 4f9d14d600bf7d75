"""The attention gallery: the map of every block laid over the picture, on one scale for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from collapse_probe.report.style import NARROW, WIDE, colour_bar, drawn, printable
from collapse_probe.results.findings import Findings, Gallery
from collapse_probe.statistics.intervals import Array

Pixels = NDArray[np.uint8]
FOLD = 8.0  # the scale runs from 1/8 to 8 times uniform attention
MOST_PICTURES, MOST_ROLLED = 4, 2
GAP, TITLE, FOOT = 0.05, 0.34, 0.75  # inches
PER_INCH = 160  # pixels of the photographs
COLOURS = LinearSegmentedColormap.from_list("less-more", ["#1d4f9c", "#6ea4da", "#f2f2f2", "#f39a3b", "#b3200c"])
LABEL = {"boxstyle": "square,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
ATTENTION = "attention to a patch, times uniform attention (1/N)"
ROLLOUT = "rollout from a patch, times an even share (1/N)"
STRENGTH = (0.72, 0.9)  # how far the strongest blue, the strongest red covers the picture


@dataclass(frozen=True)
class Spread:
    """How a map's value becomes a position in −1 … 1: by doublings around uniform, or linear around 0."""

    signed: bool
    limit: float

    def place(self, times_uniform: Array) -> Array:
        """Times uniform -> −1 … 1, clipped at the ends; NaN stays."""
        if self.signed:
            return np.asarray(np.clip(times_uniform / self.limit, -1.0, 1.0))
        low = np.maximum(times_uniform, 1.0 / self.limit)
        return np.asarray(np.clip(np.log(low) / math.log(self.limit), -1.0, 1.0))

    @property
    def ticks(self) -> dict[float, str]:
        """Positions on the colour bar with their labels."""
        if self.signed:
            return {-1.0: f"−{self.limit:g}×", 0.0: "0", 1.0: f"{self.limit:g}×"}
        return {-1.0: "1/8", -2 / 3: "1/4", -1 / 3: "1/2", 0.0: "1", 1 / 3: "2", 2 / 3: "4", 1.0: "8"}


def times_uniform(findings: Findings, gallery: Gallery) -> Array:
    """The maps, whose rows sum to one over all N tokens, in units of uniform attention (1/N): 1 is what a uniform map pays."""
    return np.asarray(gallery.maps * float(findings.model.get("tokens") or gallery.maps[0, 0].size))


def spread_of(maps: Array) -> Spread:
    """By doublings up to 8 times uniform; for maps with negative entries linear, to the 99th percentile."""
    finite = maps[np.isfinite(maps)]
    if not (finite < 0).any():
        return Spread(False, FOLD)
    reach = max(float(np.quantile(np.abs(finite), 0.99)), 1e-6)
    step = 10.0 ** math.floor(math.log10(reach))
    return Spread(True, math.ceil(reach / step) * step)


def overlay(picture: Pixels, positions: Array) -> Pixels:
    """`positions` [rows, columns] in −1 … 1, coloured and laid over the grey `picture` [height, width, 3]."""
    height, width = picture.shape[:2]
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    base = np.repeat(0.38 + 0.6 * grey[..., None], 3, axis=2)
    small = Image.fromarray(np.nan_to_num(positions).astype(np.float32))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    return np.asarray(_blend(base, smooth) * 255, dtype=np.uint8)


def _blend(base: Array, positions: Array) -> Array:
    colour = COLOURS((positions + 1) / 2)[..., :3]
    cover = np.where(positions < 0, STRENGTH[0], STRENGTH[1])[..., None] * np.abs(positions)[..., None]
    return np.asarray(base * (1 - cover) + colour * cover)


SHADES = ListedColormap(_blend(np.full((256, 3), 0.75), np.linspace(-1.0, 1.0, 256)))
"""How positions look over a picture that is evenly grey."""


@dataclass(frozen=True)
class Layout:
    """Where the tiles of one picture stand, in inches.

    The picture takes two by two tiles; the maps stand right of it in rows of `columns`, or flow around it.
    """

    width: float
    columns: int
    rows: int
    tile: float
    tall: float
    around: bool

    @classmethod
    def of(cls, blocks: int, shape: tuple[int, ...], narrow: bool) -> Layout:
        """The layout for so many blocks of pictures of `shape` (height, width); they flow when narrow."""
        width = NARROW if narrow else WIDE
        columns = 4 if narrow else (8 if blocks > 12 else max(min(6, blocks), 4))
        across = columns if narrow else columns + 2
        rows = -(-(blocks + 4 * narrow) // columns)  # the picture takes the place of four maps
        tile = (width - 0.2 - GAP * across) / across
        return cls(width, columns, max(rows, 2), tile, tile * shape[0] / shape[1], narrow)

    @property
    def height(self) -> float:
        """Inches that one picture takes with all its maps."""
        return TITLE + self.rows * (self.tall + GAP) + 0.1

    def map_corner(self, block: int) -> tuple[float, float]:
        """Left and top of the map of `block`."""
        if self.around:
            row, column = divmod(block + 4, 4) if block >= 4 else (block // 2, block % 2 + 2)
        else:
            row, column = divmod(block, self.columns)
            column += 2
        return 0.1 + column * (self.tile + GAP), TITLE + row * (self.tall + GAP)


@drawn
def attention_gallery(findings: Findings, narrow: bool = False) -> Figure | None:
    """Each picture and then the map of every block that has one over the picture, all on one scale."""
    gallery = findings.gallery
    return _laid_over(findings, gallery, narrow, ATTENTION) if gallery is not None and gallery.names else None


@drawn
def rollout_gallery(findings: Findings, narrow: bool = False) -> Figure | None:
    """Each picture and then, laid over it, what attention rollout has gathered up to every block."""
    gallery = findings.gallery
    if gallery is None or gallery.rollouts is None or not gallery.names:
        return None
    return _laid_over(findings, replace(gallery, maps=gallery.rollouts[:MOST_ROLLED]), narrow, ROLLOUT)


def _laid_over(findings: Findings, gallery: Gallery, narrow: bool, unit: str) -> Figure:
    maps = times_uniform(findings, gallery)[:MOST_PICTURES]
    spread = spread_of(maps)
    layout = Layout.of(maps.shape[1], gallery.pictures.shape[1:3], narrow)
    height = layout.height * len(maps) + FOOT
    figure = Figure(figsize=(layout.width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, layout.width), ylim=(height, 0))
    axes.set_axis_off()
    for at, positions in enumerate(spread.place(maps)):
        _strip(axes, layout, at * layout.height, gallery, at, positions)
    colour_bar(figure, Normalize(-1, 1), SHADES, unit, spread.ticks)
    return figure


def _strip(axes: Axes, layout: Layout, top: float, gallery: Gallery, at: int, positions: Array) -> None:
    """Picture `at` of the gallery with its maps, `top` inches down; `positions` [blocks, rows, columns]."""
    picture, numbers = gallery.pictures[at], gallery.blocks or range(len(positions))
    name = printable(gallery.names[at], 36 if layout.around else 90)
    axes.text(0.1, top + TITLE - 0.08, name, fontsize=9, va="bottom", parse_math=False)
    canvas = np.full((_pixels(layout.height), _pixels(layout.width), 3), 255, dtype=np.uint8)
    _paste(canvas, picture, 0.1, TITLE, 2 * layout.tile + GAP, 2 * layout.tall + GAP)
    small = _resized(picture, layout.tall, layout.tile)
    for place, (block, one) in enumerate(zip(numbers, positions, strict=True)):
        left, down = layout.map_corner(place)
        _paste(canvas, overlay(small, one), left, down, layout.tile, layout.tall)
        axes.text(left + 0.035, top + down + 0.035, str(block), fontsize=7, va="top", bbox=LABEL)
    extent = (0.0, canvas.shape[1] / PER_INCH, top + canvas.shape[0] / PER_INCH, top)
    axes.imshow(canvas, extent=extent, aspect="auto", interpolation="antialiased", zorder=0)


def _pixels(inches: float) -> int:
    return max(round(inches * PER_INCH), 1)


def _resized(picture: Pixels, tall: float, wide: float) -> Pixels:
    size = (_pixels(wide), _pixels(tall))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)


def _paste(canvas: Pixels, tile: Pixels, left: float, top: float, wide: float, tall: float) -> None:
    fitted = _resized(tile, tall, wide)
    y, x = _pixels(top), _pixels(left)
    canvas[y : y + fitted.shape[0], x : x + fitted.shape[1]] = fitted
