"""The metrics of the weights over the blocks: one line for each matrix, with that of the untrained twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Panel:
    """One metric of the weights: `values` [blocks, matrices], `fresh` the untrained twin's, and the ends of the scale."""

    title: str
    unit: str
    matrices: Sequence[str]
    values: Array
    fresh: Array | None
    ends: tuple[float, float]


@drawn
def weights(findings: Findings, narrow: bool = False) -> Figure | None:
    """Row similarity, effective rank, orthogonality gap and energy of q, k, v, proj, fc1, fc2 over the blocks."""
    panels = []
    for name, (title, unit) in PANELS.items():
        reading = held(findings, name)
        if reading is not None and reading.values is not None:
            values, twin = shown(reading, reading.values), null(reading, "untrained")
            fresh = None if twin is None else shown(reading, twin)
            ends = limits(name, *(part for part in (values, fresh) if part is not None))
            panels.append(Panel(title, unit, matrices_in(reading), values, fresh, ends))
    return matrix_lines(panels, narrow) if panels else None


def matrix_lines(panels: Sequence[Panel], narrow: bool) -> Figure:
    """A panel each: one line a matrix, thin dashed lines of the same colour for the untrained twin."""
    columns = 1 if narrow else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = sheet(NARROW if narrow else (WIDE if columns == 2 else 7.5), (2.6 if narrow else 2.9) * rows + 0.9)
    places = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes, panel in zip(places, panels, strict=False):
        x = np.arange(len(panel.values), dtype=np.float64)
        for at, matrix in enumerate(panel.matrices):
            look = Role(matrix, COLOURS[at % len(COLOURS)], marker=MARKERS[at % len(MARKERS)], width=1.6)
            curve(axes, x, panel.values[:, at], look)
            if panel.fresh is not None:
                curve(axes, x, panel.fresh[:, at], replace(ROLES["untrained"], label="_", colour=look.colour, width=1.0))
        if panel.fresh is not None:
            curve(axes, x[:0], x[:0], replace(ROLES["untrained"], width=1.0))  # one grey entry in the legend for all of them
        axes.set(title=panel.title, ylabel=panel.unit, ylim=panel.ends)
        axes.grid(axis="y")
        over_blocks(axes, x, "block", 9)
    for axes in places[len(panels) :]:
        axes.remove()
    share_legend(figure, *places[: len(panels)], columns=4 if narrow else 7)
    return figure


def matrices_in(reading: Reading) -> list[str]:
    """The names of the matrices of a block × matrix reading, their numbers where it holds none."""
    assert reading.values is not None
    return [str(matrix) for matrix in reading.settings.get("matrices", range(reading.values.shape[1]))]


def shown(reading: Reading, values: Array) -> Array:
    """Values [blocks, matrices] as they are drawn: ranks as a share of the full one."""
    full = reading.settings.get("full_rank")
    return values if full is None else values / np.asarray(full, dtype=np.float64)


def limits(name: str, *lines: Array) -> tuple[float, float]:
    """From 0 to 1 for shares, else with 0 and some room above; energy from what it can be least, 1/2."""
    highest = max((float(np.nanmax(part)) for part in lines if np.isfinite(part).any()), default=1.0)
    if name in ("weight-similarity", "weight-rank"):
        return (-0.02, 1.03) if name == "weight-rank" or highest > 0.5 else (0.0, 1.15 * max(highest, 0.05))
    return (0.5, max(1.05 * highest, 0.75)) if name == "hyperspherical-energy" else (0.0, 1.08 * max(highest, 1e-12))
