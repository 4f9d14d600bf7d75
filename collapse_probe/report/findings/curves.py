"""Numbers over the blocks of a model as curves, with their intervals and their nulls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from collapse_probe.report.findings.tables import words_of
from collapse_probe.report.heatmaps import UNSIGNED, Panel, heat
from collapse_probe.report.style import INK, MUTED, NARROW, ROLES, WIDE, Role, curve, drawn, over_blocks, share_legend, sheet
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    adjacent,
    corrected_count,
    entropy_share,
    null_ci95,
    null_of,
    nulls_of,
    pair_count,
    result_of,
)
from collapse_probe.results.rules import COUNT_THRESHOLDS, KAPPA_ABOVE
from collapse_probe.statistics.intervals import Array


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


OVER_BLOCKS = {
    "head-similarity": "between heads of one block",
    "image-similarity": "between images",
    "patch-diversity": "patch diversity",
}


@drawn
def adjacent_blocks(findings: Findings, narrow: bool = False) -> Figure | None:
    """Similarity of each block with the one before, with nulls and thresholds; kappa beneath."""
    reading = result_of(findings, "attention-similarity")
    if reading is None or reading.values is None or len(reading.values) < 2:
        return None
    x, kappa = np.arange(1.0, len(reading.values)), null_of(reading, "kappa")
    rows = 1 if kappa is None else 2
    figure = sheet(NARROW if narrow else WIDE, 3.8 if kappa is None else 5.6)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[3, 2][:rows])[:, 0]
    references = {role: adjacent(values) for role, values in nulls_of(reading).items()}
    _with_references(axes[0], x, adjacent(reading.values), _adjacent_or_none(reading.ci95), references)
    _thresholds(axes[0], COUNT_THRESHOLDS)
    axes[0].set_ylabel("cosine with the block before")
    if kappa is not None:
        _kappa(axes[1], x, adjacent(kappa), _adjacent_or_none(null_ci95(reading, "kappa")))
    over_blocks(axes[-1], x, "block b, compared with block b − 1")
    share_legend(figure, axes[0], columns=2 if narrow else 5)
    return figure


def _adjacent_or_none(matrix: Array | None) -> Array | None:
    return None if matrix is None else adjacent(matrix)


def _with_references(axes: Axes, x: Array, values: Array, ci95: Array | None, others: Mapping[str, Array]) -> None:
    """The measured curve with its band and the references in `others`, from 0 (or the lowest) to 1."""
    curve(axes, x, values, ROLES["measured"], ci95)
    for role, line in others.items():
        curve(axes, x, line, ROLES[role])
    axes.set_ylim(_floor([values, *others.values()]), 1.03)
    axes.grid(axis="y")


def _floor(lines: Iterable[Array]) -> float:
    lowest = min(float(np.min(line[np.isfinite(line)], initial=0.0)) for line in lines)
    return lowest * 1.1 - 0.03


def _thresholds(axes: Axes, levels: Iterable[float]) -> None:
    for level in levels:
        axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
        place = blended_transform_factory(axes.transAxes, axes.transData)
        axes.text(1.005, level, f"{level:g}", fontsize=7.5, color=MUTED, va="center", transform=place)


def _kappa(axes: Axes, x: Array, values: Array, ci95: Array | None) -> None:
    curve(axes, x, values, ROLES["measured"], ci95)
    null_role = ROLES["other_token"]
    axes.axhline(0.0, color=null_role.colour, linestyle=null_role.line, linewidth=null_role.width, zorder=1)
    _thresholds(axes, (KAPPA_ABOVE,))
    axes.set(ylabel="null-corrected κ", ylim=(min(_floor([values]), -0.25), 1.05))
    axes.grid(axis="y")


@drawn
def per_block(findings: Findings, narrow: bool = False) -> Figure | None:
    """Head similarity, image similarity and patch diversity over the blocks, each with its nulls."""
    found = {name: reading for name in OVER_BLOCKS if (reading := result_of(findings, name)) is not None}
    if not found:
        return None
    count = len(found)
    size = (NARROW, 2.5 * count + 0.6) if narrow else ({1: 5.0, 2: 7.5}.get(count, WIDE), 3.4)
    figure = sheet(*size)
    axes = figure.subplots(count if narrow else 1, 1 if narrow else count, squeeze=False).ravel()
    for place, (name, reading) in zip(axes, found.items(), strict=True):
        assert reading.values is not None
        x = np.arange(len(reading.values), dtype=np.float64)
        _with_references(place, x, reading.values, reading.ci95, nulls_of(reading))
        deep = reading.dims == ("depth",)
        over_blocks(place, x, "depth (0: before block 0)" if deep else "block", 9)
        unit = "1 − mean |cosine|" if name == "patch-diversity" else "cosine"
        place.set(title=OVER_BLOCKS[name], ylabel=unit)
    share_legend(figure, *axes, columns=2 if narrow else 5)
    return figure


@drawn
def entropy(findings: Findings, narrow: bool = False) -> Figure | None:
    """Attention entropy of every head as a share of log N, and beneath it the mean over heads."""
    share = entropy_share(findings)
    if share is None:
        return None
    blocks, heads = share.heads.shape
    width = NARROW if narrow else WIDE
    tall = min(max(0.16 * heads, 0.8), 2.6)
    figure = sheet(width, tall + 3.9)
    top, bottom = figure.subplots(2, 1, height_ratios=[tall, 2.5])
    title = f"entropy / {share.unit} (1: uniform attention)"
    heat(top, Panel(share.heads.T, title, UNSIGNED, "head", "block"), width - 1.0, square=False)
    x = np.arange(blocks, dtype=np.float64)
    others = {} if share.untrained is None else {"untrained": share.untrained}
    _with_references(bottom, x, share.mean, share.ci95, others)
    bottom.plot(
        np.repeat(x, heads),
        share.heads.ravel(),
        ".",
        color=ROLES["measured"].colour,
        alpha=0.3,
        markersize=6,
        markeredgewidth=0,
        label="one head",
    )
    over_blocks(bottom, x, "block")
    bottom.set(ylabel="share of log N", title="mean over heads")
    share_legend(figure, bottom, columns=2 if narrow else 4)
    return figure


@drawn
def similar_blocks(findings: Findings, narrow: bool = False) -> Figure | None:
    """How many adjacent pairs pass each threshold, with intervals; last, how many pass by kappa."""
    reading = result_of(findings, "similar-blocks")
    if reading is None or reading.values is None:
        return None
    rows = len(reading.values) + (corrected_count(findings) is not None)
    figure = sheet(NARROW if narrow else 7.5, 0.42 * rows + 1.3)
    axes = figure.subplots()
    counts(axes, findings, "similar-blocks")
    share_legend(figure, axes, columns=2)
    return figure


def counts(axes: Axes, findings: Findings, name: str) -> None:
    """The counts of one similar-blocks reading, a row for each threshold; last, how many pass by kappa."""
    reading = findings.metrics[name]
    assert reading.values is not None
    levels = [float(level) for level in reading.settings.get("thresholds", COUNT_THRESHOLDS)]
    rows = [f"raw > {level:g}" for level in levels]
    corrected, fresh = corrected_count(findings, name), null_of(reading, "untrained")
    for y, value in enumerate(reading.values):
        _count(axes, y, float(value), None if reading.ci95 is None else reading.ci95[y])
        if fresh is not None:
            _count(axes, y, float(fresh[y]), None, "untrained")
    if corrected is not None:
        _count(axes, len(levels), corrected.value, corrected.ci95)
        rows.append(f"κ > {corrected.above:g}")
    _count_axes(axes, rows, pair_count(findings, name))


def _count_axes(axes: Axes, rows: list[str], pairs: int) -> None:
    room = max(0.03 * pairs, 0.1)
    axes.set(xlim=(-room, pairs + room), ylim=(len(rows) - 0.5, -0.5), xlabel=f"adjacent pairs, of {pairs}")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="x")


def _count(axes: Axes, y: int, value: float, ends: Array | None, role: str = "measured") -> None:
    """One count as a dot on row `y`, with its interval as a bar and the number above it."""
    look = ROLES[role]
    filled = role == "measured"
    axes.plot(
        [value],
        [y],
        linestyle="",
        marker="o" if filled else "D",
        markersize=7 if filled else 11,
        color=look.colour,
        markerfacecolor=look.colour if filled else "white",
        label=look.label,
        zorder=3 if filled else 2,
    )
    if ends is not None and np.isfinite(ends).all():
        axes.plot(ends, [y, y], color=look.colour, linewidth=4, alpha=0.35, solid_capstyle="butt", zorder=1)
    if filled and np.isfinite(value):
        axes.annotate(f"{value:.3g}", (value, y), (0, 9), textcoords="offset points", ha="center", fontsize=8, color=INK)


PANELS = {
    "weight-similarity": ("mean |cosine| between rows", "|cosine|"),
    "weight-rank": ("effective rank / full rank", "share"),
    "weight-orthogonality": ("gap of W Wᵀ: λmax − λmin", "squared units of the weights"),
    "hyperspherical-energy": ("energy of the rows on the sphere", "mean 1 / distance"),
}
COLOURS = ("#0b5fa5", "#d55e00", "#01855f", "#b5579b", "#8a6d00", "#5b4bb0")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class MatrixPanel:
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
        reading = result_of(findings, name)
        if reading is not None and reading.values is not None:
            values, twin = shown(reading, reading.values), null_of(reading, "untrained")
            fresh = None if twin is None else shown(reading, twin)
            ends = limits(name, *(part for part in (values, fresh) if part is not None))
            panels.append(MatrixPanel(title, unit, matrices_in(reading), values, fresh, ends))
    return matrix_lines(panels, narrow) if panels else None


def matrix_lines(panels: Sequence[MatrixPanel], narrow: bool) -> Figure:
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


def matrices_in(reading: MetricResult) -> list[str]:
    """The names of the matrices of a block × matrix reading, their numbers where it holds none."""
    assert reading.values is not None
    return [str(matrix) for matrix in reading.details.get("matrices", range(reading.values.shape[1]))]


def shown(reading: MetricResult, values: Array) -> Array:
    """Values [blocks, matrices] as they are drawn: ranks as a share of the full one."""
    full = reading.details.get("full_rank")
    return values if full is None else values / np.asarray(full, dtype=np.float64)


def limits(name: str, *lines: Array) -> tuple[float, float]:
    """From 0 to 1 for shares, else with 0 and some room above; energy from what it can be least, 1/2."""
    highest = max((float(np.nanmax(part)) for part in lines if np.isfinite(part).any()), default=1.0)
    if name in ("weight-similarity", "weight-rank"):
        return (-0.02, 1.03) if name == "weight-rank" or highest > 0.5 else (0.0, 1.15 * max(highest, 0.05))
    return (0.5, max(1.05 * highest, 0.75)) if name == "hyperspherical-energy" else (0.0, 1.08 * max(highest, 1e-12))
