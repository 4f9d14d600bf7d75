"""Curves of several subjects over the blocks, laid over one another, with intervals and nulls; and their
paired differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from collapse_probe.report.comparison.verdict import RAW
from collapse_probe.report.style import (
    COMPARISON_NULL_LABELS,
    FAINTER,
    INK,
    MUTED,
    NARROW,
    WIDE,
    Role,
    curve,
    drawn,
    null_role,
    over_blocks,
    printable,
    roles,
    share_legend,
    sheet,
)
from collapse_probe.results.comparison import KAPPA, PROBS, Comparison, Pair
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import adjacent, entropy_share, null_ci95, null_of, result_of
from collapse_probe.results.rules import KAPPA_ABOVE
from collapse_probe.statistics.intervals import Array

MOST = 8  # subjects whose curves can be told apart
ALPHA = 0.05
DIFFERENCES = {
    RAW: "raw similarity with the block before",
    RAW + KAPPA: "κ of that similarity",
    RAW + PROBS: "raw similarity at the softmax (probs)",
    "head-similarity": "similarity of heads in one block",
    "attention-entropy": "attention entropy, nats",
    "patch-diversity": "patch diversity",
}


@dataclass(frozen=True)
class Line:
    """One curve of one subject: values over `x` with an interval, and its nulls by role."""

    x: Array
    values: Array
    ci95: Array | None
    nulls: dict[str, Array]


@drawn
def adjacent_blocks(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """Similarity of each block with the one before, all subjects in one plot with their nulls; kappa
    beneath.
    """
    raw = _lines(comparison, _raw)
    if not raw:
        return None
    kappa = _lines(comparison, _kappa)
    rows = 2 if kappa else 1
    figure = sheet(NARROW if narrow else WIDE, 3.9 * rows)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    looks = roles(comparison, MOST)
    _overlay(axes[0], raw, looks)
    axes[0].set(ylabel="cosine with the block before", ylim=(_floor(raw), 1.03))
    if kappa:
        _overlay(axes[1], kappa, looks)
        axes[1].axhline(0.0, color=MUTED, linewidth=0.8, zorder=0)
        axes[1].axhline(KAPPA_ABOVE, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
        axes[1].set(ylabel="null-corrected κ", ylim=(min(_floor(kappa), -0.25), 1.05))
    over_blocks(axes[-1], _widest(raw), "block b, compared with block b − 1")
    _legend(figure, axes[0], raw, narrow)
    return figure


@drawn
def per_block(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """Heads, images, entropy and patch diversity over the blocks, all subjects, each with its untrained
    twin.
    """
    kinds: list[tuple[str, str, str, Callable[[Findings], Line | None]]] = [
        ("between heads of one block", "cosine", "block", _plain("head-similarity")),
        ("between images", "cosine", "block", _plain("image-similarity")),
        ("attention entropy", "share of log N", "block", _entropy),
        ("patch diversity", "1 − mean |cosine|", "depth (0: before block 0)", _plain("patch-diversity")),
    ]
    found = [(*kind[:3], lines) for kind in kinds if (lines := _lines(comparison, kind[3]))]
    if not found:
        return None
    columns = 1 if narrow else 2
    rows = -(-len(found) // columns)
    figure = sheet(NARROW if narrow else WIDE, 2.9 * rows + 0.5)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, unit, along, lines) in zip(places, found, strict=False):
        _overlay(axes, lines, roles(comparison, MOST))
        axes.set_ylim(_floor(lines), 1.03)
        over_blocks(axes, _widest(lines), along, 12)
        axes.set(title=title, ylabel=unit)
    for axes in places[len(found) :]:
        axes.set_axis_off()
    _legend(figure, places[0], found[0][3], narrow)
    return figure


@drawn
def paired_differences(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """What each block has more or less than in the first subject, with paired intervals; filled: q ≤ 0.05."""
    looks = roles(comparison, MOST)
    pairs = [pair for pair in comparison.pairs if pair.second in looks]
    names = [name for name in DIFFERENCES if any(name in pair.differences for pair in pairs)]
    if not names:
        return None
    columns = 1 if narrow else 2
    rows = -(-len(names) // columns)
    figure = sheet(NARROW if narrow else WIDE, 2.7 * rows + 0.5)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(places, names, strict=False):
        _differences(axes, name, pairs, looks, 18 if narrow else 34)
    for axes in places[len(names) :]:
        axes.set_axis_off()
    places[0].plot([], [], " ", label=f"filled: q ≤ {ALPHA:g}")
    share_legend(figure, *places, columns=1 if narrow else 3)
    return figure


def _differences(axes: Axes, name: str, pairs: list[Pair], looks: dict[str, Role], room: int) -> None:
    axes.axhline(0.0, color=INK, linewidth=0.8, zorder=0)
    axes.grid(axis="y")
    axes.set_title(DIFFERENCES[name])
    there = [pair for pair in pairs if name in pair.differences]
    for at, pair in enumerate(there):
        found, role = pair.differences[name], looks[pair.second]
        paired = found.paired
        x = np.array(found.places, dtype=np.float64) + (at - (len(there) - 1) / 2) * min(0.12, 0.6 / len(there))
        axes.vlines(x, paired.ci95[:, 0], paired.ci95[:, 1], color=role.colour, linewidth=1.6, alpha=0.6)
        sure = paired.q <= ALPHA
        label = f"{printable(pair.second, room)} − {printable(pair.first, room)}"
        style = {"linestyle": "", "marker": role.marker, "color": role.colour, "markersize": 5.0}
        axes.plot(x[sure], paired.difference[sure], label=label, **style)  # type: ignore[arg-type]
        axes.plot(x[~sure], paired.difference[~sure], markerfacecolor="white", **style)  # type: ignore[arg-type]
    if there:
        shown = there[0].differences[name]
        along = "block b, with block b − 1" if shown.places[0] == 1 else "block"
        along = "depth (0: before block 0)" if shown.axis == "depth" else along
        over_blocks(axes, np.array(shown.places, dtype=np.float64), along, 12)


def _lines(comparison: Comparison, of: Callable[[Findings], Line | None]) -> dict[str, Line]:
    found = {label: of(comparison.subjects[label]) for label in roles(comparison, MOST)}
    return {label: line for label, line in found.items() if line is not None}


def _raw(findings: Findings) -> Line | None:
    reading = result_of(findings, RAW)
    if reading is None or reading.values is None or len(reading.values) < 2:
        return None
    taken = {role: null_of(reading, role) for role in FAINTER}
    return Line(
        np.arange(1.0, len(reading.values)),
        adjacent(reading.values),
        None if reading.ci95 is None else adjacent(reading.ci95),
        {role: adjacent(values) for role, values in taken.items() if values is not None},
    )


def _kappa(findings: Findings) -> Line | None:
    reading = result_of(findings, RAW)
    values = None if reading is None else null_of(reading, "kappa")
    if reading is None or values is None or len(values) < 2:
        return None
    ci95 = null_ci95(reading, "kappa")
    return Line(np.arange(1.0, len(values)), adjacent(values), None if ci95 is None else adjacent(ci95), {})


def _plain(name: str) -> Callable[[Findings], Line | None]:
    def line(findings: Findings) -> Line | None:
        reading = result_of(findings, name)
        if reading is None or reading.values is None:
            return None
        fresh = null_of(reading, "untrained")
        nulls = {} if fresh is None else {"untrained": fresh}
        return Line(np.arange(len(reading.values), dtype=np.float64), reading.values, reading.ci95, nulls)

    return line


def _entropy(findings: Findings) -> Line | None:
    share = entropy_share(findings)
    if share is None:
        return None
    nulls = {} if share.untrained is None else {"untrained": share.untrained}
    return Line(np.arange(len(share.mean), dtype=np.float64), share.mean, share.ci95, nulls)


def _overlay(axes: Axes, lines: dict[str, Line], looks: dict[str, Role]) -> None:
    for label, line in lines.items():
        curve(axes, line.x, line.values, looks[label], line.ci95)
        for role, values in line.nulls.items():
            curve(axes, line.x, values, null_role(looks[label], role))
    axes.grid(axis="y")


def _widest(lines: dict[str, Line]) -> Array:
    return max((line.x for line in lines.values()), key=len)


def _floor(lines: dict[str, Line]) -> float:
    """Zero, or a little below the lowest value: the scale must not make much of tiny differences."""
    values = np.concatenate([v for line in lines.values() for v in (line.values, *line.nulls.values())])
    return float(np.min(values[np.isfinite(values)], initial=0.0)) * 1.1 - 0.03


def _legend(figure: Figure, axes: Axes, lines: dict[str, Line], narrow: bool) -> None:
    """Subjects by colour, and what the other lines of that colour are."""
    kinds: Iterable[str] = dict.fromkeys(role for line in lines.values() for role in line.nulls)
    for role in kinds:
        axes.add_line(Line2D([], [], color=MUTED, linestyle=FAINTER[role], linewidth=1.2, label=COMPARISON_NULL_LABELS[role]))
    share_legend(figure, axes, columns=1 if narrow else 4)
