"""The metrics of the weights over the blocks: one line for each matrix, with that of the untrained twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from collapse_probe.drawing import NARROW, ROLES, WIDE, Array, Role, curve, drawn, over_blocks, share_legend, sheet
from collapse_probe.findings import Findings, Reading
from collapse_probe.readings import held, null

PANELS = {
    "weight-similarity": ("mean |cosine| between rows", "|cosine|"),
    "weight-rank": ("effective rank / full rank", "share"),
    "weight-orthogonality": ("gap of W Wᵀ: λmax − λmin", "squared units of the weights"),
    "hyperspherical-energy": ("energy of the rows on the sphere", "mean 1 / distance"),
}
COLOURS = ("#0b5fa5", "#d55e00", "#01855f", "#b5579b", "#8a6d00", "#5b4bb0")
MARKERS = ("o", "s", "^", "D", "v", "P")


@drawn
def weights(findings: Findings, narrow: bool = False) -> Figure | None:
    """Row similarity, effective rank, orthogonality gap and energy of q, k, v, proj, fc1, fc2 over the blocks."""
    found = {name: reading for name in PANELS if (reading := held(findings, name)) is not None}
    if not found:
        return None
    columns = 1 if narrow else min(2, len(found))
    rows = -(-len(found) // columns)
    figure = sheet(NARROW if narrow else (WIDE if columns == 2 else 6.5), (2.6 if narrow else 2.9) * rows + 0.9)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, reading) in zip(places, found.items(), strict=False):
        title, unit = PANELS[name]
        values, fresh = shown(reading, reading.values), shown(reading, null(reading, "untrained"))
        x = np.arange(len(values), dtype=np.float64)
        for at, matrix in enumerate(reading.settings["matrices"]):
            colour = COLOURS[at % len(COLOURS)]
            curve(axes, x, values[:, at], Role(matrix, colour, marker=MARKERS[at % len(MARKERS)], width=1.6))
            if len(fresh):
                curve(axes, x, fresh[:, at], replace(ROLES["untrained"], label="_", colour=colour, width=1.0))
        if len(fresh):
            curve(axes, x[:0], x[:0], replace(ROLES["untrained"], width=1.0))  # one grey entry in the legend for all of them
        axes.set(title=title, ylabel=unit)
        axes.set_ylim(*limits(name, values, fresh))
        axes.grid(axis="y")
        over_blocks(axes, x, "block", 9)
    for axes in places[len(found) :]:
        axes.remove()
    share_legend(figure, *places[: len(found)], columns=4 if narrow else 7)
    return figure


def shown(reading: Reading, values: Array | None) -> Array:
    """Values [blocks, matrices] as they are drawn: ranks as a share of the full one; empty where there are none."""
    if values is None:
        return np.empty((0, 0))
    full = reading.settings.get("full_rank")
    return values if full is None else values / np.asarray(full, dtype=np.float64)


def limits(name: str, *lines: Array) -> tuple[float, float]:
    """From 0 to 1 for shares, else with 0 and some room above; energy from what it can be least, 1/2."""
    highest = max((float(np.nanmax(part)) for part in lines if part.size and np.isfinite(part).any()), default=1.0)
    if name in ("weight-similarity", "weight-rank"):
        return (-0.02, 1.03) if name == "weight-rank" or highest > 0.5 else (0.0, 1.15 * max(highest, 0.05))
    return (0.5, max(1.05 * highest, 0.75)) if name == "hyperspherical-energy" else (0.0, 1.08 * max(highest, 1e-12))
