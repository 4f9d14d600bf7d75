"""Where each subject looks: the same pictures, a row a subject, with the map of every block laid over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.report.gallery import ATTENTION, COLOURS, LABEL, Spread, overlay, spread_of, times_uniform
from collapse_probe.report.style import MUTED, NARROW, WIDE, colour_bar, drawn, evenly_spaced, printable
from collapse_probe.results.comparison import Comparison
from collapse_probe.statistics.intervals import Array

MOST_SUBJECTS, MOST_PICTURES, LEAST_COLUMNS, MOST_COLUMNS = 4, 3, 10, 12
MARGIN, GAP, NAME, TITLE, FOOT, BAR = 0.1, 0.04, 0.22, 0.3, 0.12, 0.8  # inches


@dataclass(frozen=True)
class SubjectMaps:
    """One subject's maps [pictures, blocks, rows, columns] in times uniform, and how they become colours."""

    label: str
    maps: Array
    spread: Spread
    pictures: NDArray[np.uint8]


@drawn
def attention_gallery(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """For each picture a row of every subject's maps; one scale for all unless only some maps have negative entries."""
    galleries = [findings.gallery.names for findings in comparison.subjects.values() if findings.gallery is not None]
    common = [name for name in (galleries or [()])[0] if all(name in names for names in galleries)]  # in the first one's order
    names = common[:MOST_PICTURES]
    subjects = _subjects(comparison, names)
    if not subjects:
        return None
    width = NARROW if narrow else WIDE
    columns = 4 if narrow else min(MOST_COLUMNS, max(LEAST_COLUMNS, *(s.maps.shape[1] for s in subjects)))
    tile = (width - 2 * MARGIN) / (columns + 1) - GAP
    tall = tile * subjects[0].pictures.shape[1] / subjects[0].pictures.shape[2]
    strips = [NAME + -(-s.maps.shape[1] // columns) * (tall + GAP) for s in subjects]
    spreads = list(dict.fromkeys(s.spread for s in subjects))
    height = len(names) * (TITLE + sum(strips) + FOOT) + BAR * len(spreads)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    top = 0.0
    for at, name in enumerate(names):
        top += TITLE
        axes.text(MARGIN, top - 0.06, printable(name, 40 if narrow else 90), fontsize=9, va="bottom", parse_math=False)
        for subject, strip in zip(subjects, strips, strict=True):
            _strip(axes, subject, at, top, (columns, tile, tall))
            top += strip
        top += FOOT
    for at, spread in enumerate(spreads):
        whose = printable(", ".join(s.label for s in subjects if s.spread == spread), 50)
        label = ATTENTION if len(spreads) == 1 else f"{whose}: {ATTENTION}"
        colour_bar(figure, Normalize(-1, 1), COLOURS, label, spread.ticks, BAR * (len(spreads) - at) - 0.32)
    return figure


def _subjects(comparison: Comparison, names: list[str]) -> list[SubjectMaps]:
    """The subjects that have maps of these pictures, at most MOST_SUBJECTS."""
    galleries = {label: f.gallery for label, f in comparison.subjects.items() if names and f.gallery is not None}
    maps, pictures = {}, {}
    for label in evenly_spaced(list(galleries), MOST_SUBJECTS):
        gallery = galleries[label]
        at = [gallery.names.index(name) for name in names]
        maps[label] = times_uniform(comparison.subjects[label], gallery)[at]
        pictures[label] = gallery.pictures[at]
    signed = {bool((each[np.isfinite(each)] < 0).any()) for each in maps.values()}
    common = spread_of(np.concatenate([each.ravel() for each in maps.values()])) if len(signed) == 1 else None
    return [SubjectMaps(label, each, common or spread_of(each), pictures[label]) for label, each in maps.items()]


def _strip(axes: Axes, subject: SubjectMaps, at: int, top: float, layout: tuple[int, float, float]) -> None:
    """Picture number `at` and the maps of one subject, `top` inches down; `layout`: maps in a row, width and height of one."""
    columns, tile, tall = layout
    top += NAME
    axes.text(MARGIN, top - 0.05, printable(subject.label, 60), fontsize=8, va="bottom", color=MUTED, parse_math=False)
    picture = subject.pictures[at]
    _put(axes, picture, (MARGIN, MARGIN + tile, top + tall, top))
    for block, positions in enumerate(subject.spread.place(subject.maps[at])):
        row, column = divmod(block, columns)
        left, down = MARGIN + (column + 1) * (tile + GAP), top + row * (tall + GAP)
        _put(axes, overlay(picture, positions), (left, left + tile, down + tall, down))
        axes.text(left + 0.03, down + 0.03, str(block), fontsize=6, va="top", bbox=LABEL)


def _put(axes: Axes, picture: NDArray[np.uint8], extent: tuple[float, float, float, float]) -> None:
    axes.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased", zorder=0)
