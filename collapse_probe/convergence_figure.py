"""How the headline numbers settle as images come in, a panel each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from collapse_probe.drawing import MUTED, NARROW, ROLES, WIDE, Array, curve, drawn, share_legend, sheet
from collapse_probe.findings import Findings
from collapse_probe.sureness_tables import words_of


@drawn
def convergence(findings: Findings, narrow: bool = False) -> Figure | None:
    """Value and 95 % interval of each headline number over the first images; dotted: the end, with its tolerance."""
    found: Mapping[str, Any] = findings.sureness.get("convergence") or {}
    numbers: Mapping[str, Any] = found.get("numbers") or {}
    if not numbers or len(found["sizes"]) < 2:
        return None
    columns = 1 if narrow else min(2, len(numbers))
    rows = -(-len(numbers) // columns)
    figure = sheet(NARROW if narrow else (WIDE if columns == 2 else 7.5), 2.5 * rows + 0.5)
    places = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes, (name, entry) in zip(places, numbers.items(), strict=False):
        _settling(axes, np.array(found["sizes"], dtype=np.float64), entry)
        axes.set_title(words_of(name))
    for axes in places[len(numbers) :]:
        axes.remove()
    share_legend(figure, *places[: len(numbers)], columns=1 if narrow else 3)
    return figure


def _settling(axes: Axes, sizes: Array, entry: Mapping[str, Any]) -> None:
    value, low, high = (np.array(entry[key], dtype=np.float64) for key in ("value", "ci_low", "ci_high"))
    ends = np.stack([low, high], -1)
    curve(axes, sizes, value, ROLES["measured"], np.where(np.isfinite(ends), ends, value[:, None]))
    last, tolerance = value[-1], float(entry["tolerance"])
    if np.isfinite(last):
        axes.axhspan(last - tolerance, last + tolerance, color=MUTED, alpha=0.12, linewidth=0, zorder=0, label="tolerance")
        axes.axhline(last, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
        _scale(axes, ends, last, tolerance)
    axes.set_xscale("log")
    ticks = [t for e in range(8) for m in (1, 2, 5) if sizes[0] <= (t := m * 10**e) <= sizes[-1]]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 if len(ticks) <= 7 else 2]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="images", xlim=(sizes[0] * 0.95, sizes[-1] * 1.05))
    axes.grid(axis="y")


def _scale(axes: Axes, ends: Array, last: float, tolerance: float) -> None:
    """Room for the interval over a quarter of the images, and three tolerances at least; the first few images may leave it."""
    later = ends[len(ends) // 3 :]
    reach = float(np.max(np.abs(later[np.isfinite(later)] - last), initial=3 * tolerance))
    axes.set_ylim(last - 1.1 * reach, last + 1.1 * reach)
