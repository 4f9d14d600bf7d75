"""Where tokens of unusual length sit: a small map for each depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collapse_probe.report.heatmaps import UNSIGNED, Scale, colour_bar, hatched, mosaic
from collapse_probe.report.sheet import INK, SWATCH, Key, Sheet, coordinate, words
from collapse_probe.results.findings import Findings
from collapse_probe.statistics.intervals import Array

ENDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # where the scale may end
SIDE, TITLE, GAP, COLUMNS = 100.0, 16.0, 4.0, 9  # pixels, and maps in a row


@dataclass(frozen=True)
class Places:
    """One rule's outliers: the share of images with one at each place [depths, rows, columns], and of tokens [depths]."""

    rule: str
    maps: Array
    shares: Array

    @property
    def any(self) -> bool:
        """Whether there is any outlier at all."""
        return bool((self.maps[np.isfinite(self.maps)] > 0).any())


def places_of(findings: Findings) -> list[Places]:
    """The outliers of every token-norm result, each rule once."""
    rules: dict[str, Places] = {}
    for name, result in findings.metrics.items():
        maps = result.details.get("outlier_map")
        if name.partition("@")[0] == "token-norm" and result.values is not None and maps is not None:
            fixed, deviations = result.settings.get("threshold"), result.settings.get("deviations")
            rule = f"norm above the image's median + {deviations:g} · MAD" if fixed is None else f"norm above {fixed:g}"
            shares = np.array(result.details.get("outlier_share", [None] * len(maps)), dtype=np.float64)
            rules.setdefault(rule, Places(rule, np.array(maps, dtype=np.float64), shares))
    return list(rules.values())


@dataclass(frozen=True)
class Place:
    """One small map: the share of images with an outlier at each place [rows, columns] of one depth."""

    shares: Array
    title: str
    scale: Scale

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        rows, columns = self.shares.shape
        return SIDE, TITLE + SIDE * min(rows / columns, 3.0) + GAP

    @property
    def label(self) -> str:
        """What it shows, in words."""
        known = self.shares[np.isfinite(self.shares)]
        return f"depth {self.title}; at one place up to {100 * float(np.max(known, initial=0.0)):.3g} % of the images"

    def body(self, name: str) -> str:
        """The map under its title, in a frame; places that are not compared are hatched."""
        rows, columns = self.shares.shape
        wide, tall = SIDE - 2, self.size[1] - TITLE - GAP
        ground = "" if np.isfinite(self.shares).all() else hatched(name, wide, tall)
        cells = mosaic(self.shares, self.scale)
        return (
            f'{words(self.title, 1, 11, size=10)}<g transform="translate(1 {TITLE:g})">{ground}'
            f'<g transform="scale({wide / columns:.5g} {tall / rows:.5g})" shape-rendering="crispEdges">{cells}</g>'
            f'<path fill="none" stroke="{INK}" stroke-width="0.5" d="M0 0h{wide:g}v{coordinate(tall)}h-{wide:g}z"/></g>'
        )


def outlier_places(findings: Findings) -> Sheet | None:
    """A small map for each depth and rule: the share of images with an outlier at each place."""
    rules = [places for places in places_of(findings) if places.any]
    if not rules:
        return None
    highest = max(float(np.nanmax(places.maps)) for places in rules)
    scale = Scale(0.0, next((end for end in ENDS if highest <= end + 1e-9), 1.0), UNSIGNED.colours)
    several, maps = len(rules) > 1, []
    for at, places in enumerate(rules, start=1):
        for depth, (shares, of_tokens) in enumerate(zip(places.maps, places.shares, strict=True)):
            share = f"{100 * of_tokens:.3g} %" if np.isfinite(of_tokens) else "–"
            maps.append(Place(shares, f"{f'({at}) ' if several else ''}{depth}: {share}", scale))
    rule_keys = [Key(f"{f'({at}) ' if several else ''}{places.rule}", "") for at, places in enumerate(rules, start=1)]
    bar = colour_bar(scale.colours, (0, 2, SWATCH[0], 8), {}, level=True)
    ends = Key(f"0 to {100 * scale.high:g} % of the images with an outlier at this place", bar)
    return Sheet(tuple(maps), COLUMNS, above=tuple(rule_keys), below=(ends,), small=True)
