"""Counts of similar blocks of several subjects with their intervals, and the course of the numbers over
training.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from collapse_probe.colours import NULL_LABELS, roles
from collapse_probe.drawing import (
    INK,
    MUTED,
    NARROW,
    ROLES,
    WIDE,
    Array,
    Role,
    curve,
    drawn,
    printable,
    share_legend,
    sheet,
)
from collapse_probe.findings import Findings
from collapse_probe.heatmaps import UNSIGNED
from collapse_probe.pairing import ACCURACY, PROBS
from collapse_probe.readings import adjacent, corrected_count, held, mean, null, pairs_of
from collapse_probe.sentences import RAW
from collapse_probe.side_by_side import Comparison

COUNTS = "similar-blocks"
MOST = 8
MOST_TICKS = 12
CORRECTED = Role("corrected: κ > 0.5", "#d55e00", marker="s", width=2.0)


@drawn
def similar_blocks(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """How many adjacent pairs pass each threshold in each subject, with intervals; hollow: its untrained
    twin.
    """
    looks = {label: r for label, r in roles(comparison, MOST).items() if held(comparison.subjects[label], COUNTS)}
    if not looks:
        return None
    subjects = {label: comparison.subjects[label] for label in looks}
    rows = _rows(subjects)
    figure = sheet(NARROW if narrow else 8.5, (0.24 * len(looks) + 0.3) * len(rows) + 1.4)
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for at, (label, findings) in enumerate(subjects.items()):
            place = y + (at - (len(subjects) - 1) / 2) * 0.7 / len(subjects)
            _count(axes, place, _of_row(findings, row), looks[label])
    pairs = max(pairs_of(findings) for findings in subjects.values())
    room = max(0.05 * pairs, 0.1)
    axes.set(xlim=(-room, pairs + room), ylim=(len(rows) - 0.5, -0.5), xlabel=f"adjacent pairs, of {pairs}")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="x")
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color=INK, linewidth=0.3, alpha=0.4)
    if any(null(findings.metrics[COUNTS], "untrained") is not None for findings in subjects.values()):
        axes.plot([], [], "D", color=MUTED, markerfacecolor="white", markersize=9, label=NULL_LABELS["untrained"])
    share_legend(figure, axes, columns=1 if narrow else 3)
    return figure


def _rows(subjects: Mapping[str, Findings]) -> list[str]:
    some = next(iter(subjects.values())).metrics[COUNTS]
    levels = [f"raw > {level:g}" for level in some.settings.get("thresholds", (0.8, 0.9, 0.95))]
    return [*levels, *(["κ > 0.5"] if any(corrected_count(f) for f in subjects.values()) else [])]


def _of_row(findings: Findings, row: str) -> tuple[float | None, Array | None, float | None]:
    """The count, its interval and the untrained twin's count."""
    if row.startswith("κ"):
        found = corrected_count(findings)
        return (None, None, None) if found is None else (found.value, found.ci95, None)
    reading = findings.metrics[COUNTS]
    levels = [f"raw > {level:g}" for level in reading.settings.get("thresholds", ())]
    if row not in levels or reading.values is None:
        return None, None, None
    at, fresh = levels.index(row), null(reading, "untrained")
    ci95 = None if reading.ci95 is None else reading.ci95[at]
    return float(reading.values[at]), ci95, None if fresh is None else float(fresh[at])


def _count(axes: Axes, y: float, numbers: tuple[float | None, Array | None, float | None], role: Role) -> None:
    value, ends, fresh = numbers
    style = {"linestyle": "", "color": role.colour}
    if fresh is not None:
        twin = {"marker": "D", "markersize": 10.5, "markerfacecolor": "white"}
        axes.plot([fresh], [y], zorder=2, **twin, **style)  # type: ignore[arg-type]
    if value is None:
        return
    look = {"marker": role.marker, "markersize": 5.5, "label": role.label}
    axes.plot([value], [y], zorder=3, **look, **style)  # type: ignore[arg-type]
    axes.annotate(f"{value:.3g}", (value, y), (10, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    if ends is not None and np.isfinite(ends).all():
        axes.plot(ends, [y, y], color=role.colour, linewidth=4, alpha=0.35, solid_capstyle="butt", zorder=1)


@drawn
def course(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """The numbers over the checkpoints of one training; only for those."""
    if not comparison.trajectory:
        return None
    held_all = list(comparison.subjects.values())
    x = np.arange(len(held_all), dtype=np.float64)
    panels = [p for p in (_counts_over, _raw_over, _kappa_over, _diversity_over, _accuracy_over) if p(None, x, held_all)]
    if not panels:
        return None
    columns = 1 if narrow else 2
    rows = -(-len(panels) // columns)
    figure = sheet(NARROW if narrow else WIDE, 2.9 * rows + 0.9)
    places = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, panel in zip(places, panels, strict=False):
        panel(axes, x, held_all)
        axes.grid(axis="y")
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes in places[max(len(panels) - columns, 0) : len(panels)]:
        _checkpoints(axes, list(comparison.subjects))
    share_legend(figure, *places, columns=1 if narrow else 4)
    return figure


def _checkpoints(axes: Axes, labels: list[str]) -> None:
    step = -(-len(labels) // MOST_TICKS)
    ticks = sorted({*range(0, len(labels) - 1, step), len(labels) - 1})
    names = [printable(labels[tick], 18) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(labelbottom=True)


def _counts_over(axes: Axes | None, x: Array, subjects: list[Findings]) -> bool:
    raw = [_of_row(f, "raw > 0.9") if held(f, COUNTS) else (None, None, None) for f in subjects]
    corrected = [_of_row(f, "κ > 0.5") if held(f, COUNTS) else (None, None, None) for f in subjects]
    if axes is None:
        return any(value is not None for value, _, _ in raw)
    look = ROLES["measured"]
    curve(axes, x, _floats([v for v, _, _ in raw]), Role("raw", look.colour, marker="o", width=2.0), _ends(raw))
    curve(axes, x, _floats([v for v, _, _ in corrected]), CORRECTED, _ends(corrected))
    axes.set_title(f"similar blocks, of {max(map(pairs_of, subjects))} pairs (raw > 0.9)")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylim(bottom=min(-0.3, axes.get_ylim()[0]))
    return True


def _ends(counts: list[tuple[float | None, Array | None, float | None]]) -> Array:
    return np.stack([np.full(2, np.nan) if ends is None else np.asarray(ends) for _, ends, _ in counts])


def _floats(values: list[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _adjacent_mean(findings: Findings, name: str, role: str | None) -> float | None:
    reading = held(findings, name)
    if reading is None or reading.values is None:
        return None
    values = reading.values if role is None else null(reading, role)
    return None if values is None else mean(adjacent(values))


def _raw_over(axes: Axes | None, x: Array, subjects: list[Findings]) -> bool:
    raw = _floats([_adjacent_mean(f, RAW, None) for f in subjects])
    if axes is None:
        return bool(np.isfinite(raw).any())
    curve(axes, x, raw, Role("raw", ROLES["measured"].colour, marker="o", width=2.0))
    for role in ("other_token", "untrained"):
        look = ROLES[role]
        named = Role(NULL_LABELS[role].removeprefix("its "), look.colour, look.line, width=look.width)
        curve(axes, x, _floats([_adjacent_mean(f, RAW, role) for f in subjects]), named)
    if any(f.model.get("mixes_maps") for f in subjects):
        probs = Role("at the softmax (probs)", "#01855f", (0, (4, 1.5)), marker="^")
        curve(axes, x, _floats([_adjacent_mean(f, RAW + PROBS, None) for f in subjects]), probs)
    axes.set_title("raw similarity, mean over neighbours")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
    return True


def _kappa_over(axes: Axes | None, x: Array, subjects: list[Findings]) -> bool:
    return _one_curve(axes, x, [_adjacent_mean(f, RAW, "kappa") for f in subjects], "κ, mean over neighbours")


def _diversity_over(axes: Axes | None, x: Array, subjects: list[Findings]) -> bool:
    values = [f.summary.get("patch_diversity_last") for f in subjects]
    return _one_curve(axes, x, values, "patch diversity after the last block")


def _accuracy_over(axes: Axes | None, x: Array, subjects: list[Findings]) -> bool:
    return _one_curve(axes, x, [f.summary.get(ACCURACY) for f in subjects], "accuracy")


def _one_curve(axes: Axes | None, x: Array, values: list[float | None], title: str) -> bool:
    found = _floats(values)
    if axes is None:
        return bool(np.isfinite(found).any())
    curve(axes, x, found, Role("raw", ROLES["measured"].colour, marker="o", width=2.0))
    low, high = float(np.nanmin(found)), float(np.nanmax(found))
    room = max(0.08 * (high - low), 0.02)
    axes.set(title=title, ylim=(min(low, UNSIGNED.low) - room, max(high, 0.5) + room))
    return True
