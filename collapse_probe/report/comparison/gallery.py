"""Where each subject looks: the same pictures, a row a subject, with the map of every block laid over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collapse_probe.report.gallery import (
    ATTENTION,
    SHADES_OVER_GREY,
    Spread,
    overlays,
    spread_of,
    tile_of,
    times_uniform,
)
from collapse_probe.report.photographs import Album, Photographs, resized
from collapse_probe.report.style import evenly_spaced, printable
from collapse_probe.results.comparison import Comparison
from collapse_probe.statistics.intervals import Array

MOST_SUBJECTS, MOST_PICTURES, LEAST_COLUMNS, MOST_COLUMNS = 4, 3, 10, 12


@dataclass(frozen=True)
class SubjectMaps:
    """One subject's maps [pictures, blocks, rows, columns] in times uniform, how these become colours, the blocks' numbers."""

    label: str
    maps: Array
    spread: Spread
    pictures: NDArray[np.uint8]
    numbers: Sequence[int]


def attention_gallery(comparison: Comparison) -> Photographs | None:
    """For each picture a row of every subject's maps; one scale for all unless only some maps have negative entries."""
    galleries = [findings.gallery.names for findings in comparison.subjects.values() if findings.gallery is not None]
    common = [name for name in (galleries or [()])[0] if all(name in names for names in galleries)]  # in the first one's order
    names = common[:MOST_PICTURES]
    subjects = _subjects(comparison, names)
    if not subjects:
        return None
    most = max(subject.maps.shape[1] for subject in subjects)
    tile = tile_of(subjects[0].pictures.shape[1:3], MOST_COLUMNS + 1)
    album = Album(min(MOST_COLUMNS, max(LEAST_COLUMNS, most)), tile, large=False)
    for at, name in enumerate(names):
        for subject in subjects:
            heading, label = printable(name, 90), printable(subject.label, 60)
            album.heading(f"{heading}, {label}")
            picture = resized(subject.pictures[at], tile)
            maps = overlays(picture, subject.spread.place(subject.maps[at]))
            album.strip(heading, label, subject.pictures[at], maps, subject.numbers)
    spreads = list(dict.fromkeys(subject.spread for subject in subjects))
    for spread in spreads:
        whose = printable(", ".join(s.label for s in subjects if s.spread == spread), 50)
        album.bar(SHADES_OVER_GREY, spread.ticks, ATTENTION if len(spreads) == 1 else f"{whose}: {ATTENTION}")
    return album.photographs()


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
    numbers = {label: galleries[label].blocks or range(each.shape[1]) for label, each in maps.items()}
    return [
        SubjectMaps(label, each, common or spread_of(each), pictures[label], numbers[label]) for label, each in maps.items()
    ]
