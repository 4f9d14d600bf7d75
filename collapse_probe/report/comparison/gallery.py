"""Where each subject looks: the same pictures, a row a subject, the map of every block laid over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.report.gallery import COLOURS, LABEL, Spread, overlay, spread_of, times_uniform
from collapse_probe.report.style import MUTED, NARROW, WIDE, chosen, drawn, printable
from collapse_probe.results.comparison import Comparison
from collapse_probe.statistics.intervals import Array

MOST_SUBJECTS, MOST_PICTURES, LEAST_COLUMNS, MOST_COLUMNS = 4, 3, 10, 12
GAP, NAME, TITLE, BAR = 0.04, 0.22, 0.3, 0.8  # inches


@dataclass(frozen=True)
class Shown:
    """One subject's maps [pictures, blocks, rows, columns] in times uniform, and how they become colours."""

    label: str
    maps: Array
    spread: Spread
    pictures: NDArray[np.uint8]


@drawn
def attention_gallery(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """For each picture a row of every subject's maps; one scale for all unless only some maps have
    negative entries.
    """
    names = _common(comparison)
    subjects = _shown(comparison, names)
    if not subjects:
        return None
    width = NARROW if narrow else WIDE
    columns = 4 if narrow else min(MOST_COLUMNS, max(LEAST_COLUMNS, *(s.maps.shape[1] for s in subjects)))
    tile = (width - 0.2) / (columns + 1) - GAP
    tall = tile * subjects[0].pictures.shape[1] / subjects[0].pictures.shape[2]
    strips = [NAME + -(-s.maps.shape[1] // columns) * (tall + GAP) for s in subjects]
    spreads = list(dict.fromkeys(s.spread for s in subjects))
    height = len(names) * (TITLE + sum(strips) + 0.12) + BAR * len(spreads)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    top = 0.0
    for at, name in enumerate(names):
        axes.text(
            0.1,
            top + TITLE - 0.06,
            printable(name, 40 if narrow else 90),
            fontsize=9,
            va="bottom",
            parse_math=False,
        )
        top += TITLE
        for subject, strip in zip(subjects, strips, strict=True):
            _strip(axes, subject, at, top, (columns, tile, tall))
            top += strip
        top += 0.12
    for at, spread in enumerate(spreads):
        of = [s.label for s in subjects if s.spread == spread]
        _bar(
            figure,
            spread,
            "" if len(spreads) == 1 else ", ".join(of),
            (width, height),
            BAR * (len(spreads) - at) - 0.32,
        )
    return figure


def _common(comparison: Comparison) -> list[str]:
    """Pictures that every subject's gallery holds, in the first one's order."""
    galleries = [findings.gallery for findings in comparison.subjects.values()]
    if any(gallery is None for gallery in galleries):
        galleries = [gallery for gallery in galleries if gallery is not None]
    if not galleries or galleries[0] is None:
        return []
    held = [set(gallery.names) for gallery in galleries if gallery is not None]
    return [name for name in galleries[0].names if all(name in names for names in held)][:MOST_PICTURES]


def _shown(comparison: Comparison, names: list[str]) -> list[Shown]:
    """The subjects that have maps of these pictures, at most MOST_SUBJECTS."""
    found: list[tuple[str, Array, NDArray[np.uint8]]] = []
    if not names:
        return []
    for label, findings in comparison.subjects.items():
        gallery = findings.gallery
        if gallery is not None:
            at = [gallery.names.index(name) for name in names]
            found.append((label, times_uniform(findings, gallery)[at], gallery.pictures[at]))
    labels = chosen([label for label, _, _ in found], MOST_SUBJECTS)
    kept = [entry for entry in found if entry[0] in labels]
    signed = {bool((maps[np.isfinite(maps)] < 0).any()) for _, maps, _ in kept}
    common = spread_of(np.concatenate([maps.ravel() for _, maps, _ in kept])) if len(signed) == 1 else None
    return [Shown(label, maps, common or spread_of(maps), pictures) for label, maps, pictures in kept]


def _strip(axes: Axes, subject: Shown, at: int, top: float, layout: tuple[int, float, float]) -> None:
    """The picture and the maps of one subject, `top` inches down."""
    columns, tile, tall = layout
    name = printable(subject.label, 60)
    axes.text(0.1, top + NAME - 0.05, name, fontsize=8, va="bottom", color=MUTED, parse_math=False)
    top += NAME
    picture = subject.pictures[at]
    _put(axes, picture, 0.1, top, tile, tall)
    for block, positions in enumerate(subject.spread.place(subject.maps[at])):
        row, column = divmod(block, columns)
        left, down = 0.1 + (column + 1) * (tile + GAP), top + row * (tall + GAP)
        _put(axes, overlay(picture, positions), left, down, tile, tall)
        axes.text(left + 0.03, down + 0.03, str(block), fontsize=6, va="top", bbox=LABEL)


def _put(axes: Axes, picture: NDArray[np.uint8], left: float, top: float, wide: float, tall: float) -> None:
    extent = (left, left + wide, top + tall, top)
    axes.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased", zorder=0)


def _bar(figure: Figure, spread: Spread, of: str, size: tuple[float, float], bottom: float) -> None:
    width, height = size
    span = min(4.2, width - 0.5)
    place = ((width - span) / 2 / width, bottom / height, span / width, 0.11 / height)
    bar = figure.add_axes(place)
    figure.colorbar(ScalarMappable(Normalize(-1, 1), COLOURS), cax=bar, orientation="horizontal")
    bar.set_xticks(list(spread.ticks), list(spread.ticks.values()))
    bar.tick_params(length=2, labelsize=7.5)
    text = "attention to a patch, times uniform attention (1/N)"
    whose = f"{printable(of, 50)}: {text}" if of else text
    bar.set_xlabel(whose, fontsize=8, color=MUTED, labelpad=2)
