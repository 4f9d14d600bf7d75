"""Where tokens of unusual length sit: a small map for each depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from collapse_probe.report.heatmaps import UNSIGNED, hatch
from collapse_probe.report.style import NARROW, WIDE, colour_bar, drawn
from collapse_probe.results.findings import Findings
from collapse_probe.statistics.intervals import Array

ENDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # where the scale may end
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


@drawn
def outlier_places(findings: Findings, narrow: bool = False) -> Figure | None:
    """A small map for each depth and rule: the share of images with an outlier at each place."""
    rules = [places for places in places_of(findings) if places.any]
    if not rules:
        return None
    width, columns = (NARROW, 4) if narrow else (WIDE, 9)
    tile = (width - 0.3 - GAP * (columns - 1)) / columns
    tall = tile * min(rules[0].maps.shape[1] / rules[0].maps.shape[2], 3.0)
    rows = [-(-len(places.maps) // columns) for places in rules]
    height = sum(HEAD + count * (tall + TITLE) for count in rows) + FOOT
    figure = Figure(figsize=(width, height))
    highest = max(float(np.nanmax(places.maps)) for places in rules)
    scale = Normalize(0.0, next((end for end in ENDS if highest <= end + 1e-9), 1.0))
    top = 0.0
    for places, count in zip(rules, rows, strict=True):
        figure.text(0.1 / width, 1 - (top + 0.2) / height, places.rule, fontsize=9, va="center")
        top += HEAD
        for depth, (shares, of_tokens) in enumerate(zip(places.maps, places.shares, strict=True)):
            row, column = divmod(depth, columns)
            left, down = 0.1 + column * (tile + GAP), top + row * (tall + TITLE) + TITLE
            axes = figure.add_axes((left / width, 1 - (down + tall) / height, tile / width, tall / height))
            hatch(axes)
            axes.pcolormesh(np.ma.masked_invalid(shares), cmap=UNSIGNED.colours, norm=scale)
            axes.invert_yaxis()
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, linewidth=0.5)
            title = f"{'' if narrow else 'depth '}{depth}: {f'{100 * of_tokens:.3g} %' if np.isfinite(of_tokens) else '–'}"
            axes.set_title(title, fontsize=6.5 if narrow else 7.5, pad=2.5)
        top += count * (tall + TITLE)
    colour_bar(figure, scale, UNSIGNED.colours, "share of images with an outlier at this place")
    return figure
