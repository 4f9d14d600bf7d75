"""Where in the picture the patch embeddings of unusual length sit, depth by depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from collapse_probe.drawing import HATCH, MUTED, NARROW, PAPER, WIDE, Array, drawn
from collapse_probe.findings import Findings, Reading
from collapse_probe.heatmaps import UNSIGNED

ENDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
HEAD, FOOT, TITLE, GAP = 0.3, 0.7, 0.24, 0.1  # inches


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
    """The outliers of every token-norm reading, each rule once."""
    found: dict[str, Places] = {}
    for name, reading in findings.metrics.items():
        maps = reading.settings.get("outlier_map")
        if name.partition("@")[0] != "token-norm" or reading.values is None or maps is None:
            continue
        shares = np.array(reading.settings.get("outlier_share", [None] * len(maps)), dtype=np.float64)
        found.setdefault(_rule(reading), Places(_rule(reading), np.array(maps, dtype=np.float64), shares))
    return list(found.values())


def without_outliers(findings: Findings) -> list[str]:
    """The rules under which no token of any image stands out."""
    return [places.rule for places in places_of(findings) if not places.any]


def _rule(reading: Reading) -> str:
    fixed, deviations = reading.settings.get("threshold"), reading.settings.get("deviations")
    return f"norm above {fixed:g}" if fixed is not None else f"norm above the image's median + {deviations:g} · MAD"


@drawn
def outlier_places(findings: Findings, narrow: bool = False) -> Figure | None:
    """A small map for each depth and rule: the share of images with an outlier at each place."""
    found = [places for places in places_of(findings) if places.any]
    if not found:
        return None
    width, columns = (NARROW, 4) if narrow else (WIDE, 9)
    tile = (width - 0.3 - GAP * (columns - 1)) / columns
    tall = tile * min(found[0].maps.shape[1] / found[0].maps.shape[2], 3.0)
    rows = [-(-len(places.maps) // columns) for places in found]
    height = sum(HEAD + count * (tall + TITLE) for count in rows) + FOOT
    figure = Figure(figsize=(width, height))
    highest = max(float(np.nanmax(places.maps)) for places in found)
    scale = Normalize(0.0, next((end for end in ENDS if highest <= end + 1e-9), 1.0))
    top = 0.0
    for places, count in zip(found, rows, strict=True):
        figure.text(0.1 / width, 1 - (top + 0.2) / height, places.rule, fontsize=9, va="center")
        top += HEAD
        for depth, grid in enumerate(places.maps):
            row, column = divmod(depth, columns)
            left, down = 0.1 + column * (tile + GAP), top + row * (tall + TITLE) + TITLE
            axes = figure.add_axes((left / width, 1 - (down + tall) / height, tile / width, tall / height))
            _small(axes, grid, scale)
            axes.set_title(_title(depth, places.shares[depth], narrow), fontsize=7.5 if not narrow else 6.5, pad=2.5)
        top += count * (tall + TITLE)
    _bar(figure, scale, width, height)
    return figure


def _title(depth: int, share: float, narrow: bool) -> str:
    said = "–" if not np.isfinite(share) else f"{100 * share:.3g} %"
    return f"{depth}: {said}" if narrow else f"depth {depth}: {said}"


def _small(axes: Axes, grid: Array, scale: Normalize) -> None:
    axes.patch.set(facecolor=PAPER, edgecolor=HATCH, hatch="//////", linewidth=0)
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap=UNSIGNED.colours, norm=scale)
    axes.invert_yaxis()
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.5)


def _bar(figure: Figure, scale: Normalize, width: float, height: float) -> None:
    span = min(4.2, width - 0.5)
    bar = figure.add_axes(((width - span) / 2 / width, 0.42 / height, span / width, 0.11 / height))
    figure.colorbar(ScalarMappable(scale, UNSIGNED.colours), cax=bar, orientation="horizontal")
    bar.tick_params(length=2, labelsize=7.5)
    bar.set_xlabel("share of images with an outlier at this place", fontsize=8, color=MUTED, labelpad=2)
