"""Curves of several subjects: over the blocks with intervals and nulls, their paired differences, and over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from collapse_probe.report.colours import FLARE
from collapse_probe.report.comparison.verdict import RAW
from collapse_probe.report.sheet import INK, MUTED, Sheet
from collapse_probe.report.style import (
    DEPTH,
    DISTINCT,
    MARKERS,
    ROLES,
    Role,
    charts,
    curve,
    drawn,
    evenly_spaced,
    floor,
    mark_count,
    over_blocks,
    over_counts,
    panels,
    printable,
)
from collapse_probe.results.comparison import ACCURACY, KAPPA, PROBS, Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import (
    Count,
    adjacent,
    counts_of,
    entropy_share,
    mean,
    null_ci95,
    null_of,
    pair_count,
    result_of,
)
from collapse_probe.results.rules import FALSE_DISCOVERY_RATE, KAPPA_ABOVE, RAW_ABOVE
from collapse_probe.statistics.intervals import Array

MOST_SUBJECTS = 8  # whose curves can be told apart
MOST_TICKS = 12
NULL_LINES = {"other_token": (0, (1.2, 1.2)), "untrained": (0, (5, 2))}
NULL_NAMES = {"other_token": "its chance level", "untrained": "its untrained copy"}
OTHER_IMAGES = (0, (6, 1.5, 1.2, 1.5))
CORRECTED = Role(f"corrected: κ > {KAPPA_ABOVE:g}", "#d55e00", marker="s", width=2.0)
AT_SOFTMAX = Role("raw similarity of the softmax map", "#01855f", (0, (4, 1.5)), marker="^")
OVER_BLOCKS = {  # title, unit, what it runs along
    "head-similarity": ("between heads of one block", "cosine", "block"),
    "image-similarity": ("between images", "cosine", "block"),
    "attention-entropy": ("attention entropy", "share of log N", "block"),
    "patch-diversity": ("patch diversity", "1 − mean |cosine|", DEPTH),
    "cls-patch-similarity": ("class token and patches", "cosine", DEPTH),
}
DIFFERENCES = {
    RAW: "raw similarity with the block before",
    RAW + KAPPA: "κ of that similarity",
    RAW + PROBS: "raw similarity of the softmax map",
    "head-similarity": "similarity of heads in one block",
    "attention-entropy": "attention entropy, nats",
    "patch-diversity": "patch diversity",
    "cls-patch-similarity": "class token and patches",
}


def colours(comparison: Comparison) -> dict[str, str]:
    """A colour for each label: distinct ones, or along one ramp for checkpoints and for many subjects."""
    labels = list(comparison.subjects)
    if not comparison.trajectory and len(labels) <= len(DISTINCT):
        return dict(zip(labels, DISTINCT, strict=False))
    return dict(zip(labels, FLARE.spread(len(labels)), strict=True))


def roles(comparison: Comparison) -> dict[str, Role]:
    """How the measured line of each subject looks; of MOST_SUBJECTS where there are more."""
    looks = {
        label: Role(printable(label, 34), colour, marker=MARKERS[place % len(MARKERS)], width=1.8)
        for place, (label, colour) in enumerate(colours(comparison).items())
    }
    return {label: looks[label] for label in evenly_spaced(list(looks), MOST_SUBJECTS)}


@dataclass(frozen=True)
class Line:
    """One curve of one subject: values over `x` with an interval, and its nulls by role."""

    x: Array
    values: Array
    ci95: Array | None = None
    nulls: Mapping[str, Array] = field(default_factory=dict)


Lines = Mapping[str, Line]
"""One curve by subject."""


def values_of(findings: Findings, name: str, null: str | None = None) -> Array | None:
    """The values of a metric, or of one of its nulls (or its kappa), where findings hold them."""
    result = result_of(findings, name)
    return None if result is None else result.array if null is None else null_of(result, null)


def _lines(comparison: Comparison, name: str, null: str | None = None) -> Lines:
    """A metric (or its kappa) of every subject that has it: over blocks or depths, or each block with the one before.

    Beside it its nulls of NULL_LINES; attention entropy in shares of log N.
    """
    lines = {}
    for label in roles(comparison):
        findings = comparison.subjects[label]
        result, values = result_of(findings, name), values_of(findings, name, null)
        if result is None or values is None:
            continue
        ci95 = result.ci95 if null is None else null_ci95(result, null)
        beside = () if null is not None else tuple(NULL_LINES) if name == RAW else ("untrained",)
        nulls = {role: each for role in beside if (each := null_of(result, role)) is not None}
        if name == "attention-entropy":
            if (share := entropy_share(findings)) is None:
                continue
            values, ci95, nulls = share.mean, share.ci95, {} if share.untrained is None else {"untrained": share.untrained}
        if name == RAW:
            if len(values) < 2:
                continue
            values, ci95 = adjacent(result, values), None if ci95 is None else adjacent(result, ci95)
            nulls = {role: adjacent(result, each) for role, each in nulls.items()}
        lines[label] = Line(np.arange(float(len(values))) + (name == RAW), values, ci95, nulls)
    return lines


@drawn
def adjacent_blocks(comparison: Comparison) -> Sheet | None:
    """Similarity of each block with the one before, all subjects in one plot with their nulls; kappa beneath."""
    raw, kappa = _lines(comparison, RAW), _lines(comparison, RAW, "kappa")
    if not raw:
        return None
    axes = panels(2 if kappa else 1, tall=3.2)
    _overlay(axes[0], raw, comparison)
    axes[0].set(ylabel="cosine with the block before", ylim=(floor(_every(raw)), 1.03))
    if kappa:
        _overlay(axes[1], kappa, comparison)
        axes[1].axhline(0.0, color=MUTED, linewidth=0.8, zorder=0)
        axes[1].axhline(KAPPA_ABOVE, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
        axes[1].set(ylabel="κ", ylim=(min(floor(_every(kappa)), -0.25), 1.05))
    for each in axes:
        over_blocks(each, max((line.x for line in raw.values()), key=len), "block b, compared with block b − 1", 12)
    _name_nulls(axes[0], raw)
    return charts(axes)


@drawn
def per_block(comparison: Comparison) -> Sheet | None:
    """Heads, images, entropy and patch diversity over the blocks, all subjects, each with its untrained copy."""
    each = {name: lines for name in OVER_BLOCKS if (lines := _lines(comparison, name))}
    if not each:
        return None
    places = panels(len(each))
    for axes, (name, lines) in zip(places, each.items(), strict=True):
        title, unit, along = OVER_BLOCKS[name]
        _overlay(axes, lines, comparison)
        over_blocks(axes, max((line.x for line in lines.values()), key=len), along, 12)
        axes.set(title=title, ylabel=unit, ylim=(floor(_every(lines)), 1.03))
    _name_nulls(places[0], next(iter(each.values())))
    return charts(places)


def _overlay(axes: Axes, lines: Lines, comparison: Comparison) -> None:
    looks = roles(comparison)
    for label, line in lines.items():
        curve(axes, line.x, line.values, looks[label], line.ci95)
        for null, values in line.nulls.items():
            curve(axes, line.x, values, Role("", looks[label].colour, NULL_LINES[null], width=1.2))
    axes.grid(axis="y")


def _every(lines: Lines) -> list[Array]:
    drawn = ((line.values, line.ci95, *line.nulls.values()) for line in lines.values())
    return [values for of_line in drawn for values in of_line if values is not None]


def _name_nulls(axes: Axes, lines: Lines) -> None:
    """A name for what the other lines in a subject's colour are."""
    for null in dict.fromkeys(null for line in lines.values() for null in line.nulls):
        axes.add_line(Line2D([], [], color=MUTED, linestyle=NULL_LINES[null], linewidth=1.2, label=NULL_NAMES[null]))


@drawn
def paired_differences(comparison: Comparison) -> Sheet | None:
    """What each block has more or less than in the first subject, with paired intervals; filled: q ≤ FALSE_DISCOVERY_RATE."""
    looks, room = roles(comparison), 30
    pairs = [pair for pair in comparison.pairs if pair.second in looks]
    names = [name for name in DIFFERENCES if any(name in pair.differences for pair in pairs)]
    if not names:
        return None
    places = panels(len(names))
    for axes, name in zip(places, names, strict=True):
        axes.axhline(0.0, color=INK, linewidth=0.8, zorder=0)
        axes.grid(axis="y")
        axes.set_title(DIFFERENCES[name])
        here = [pair for pair in pairs if name in pair.differences]
        for at, pair in enumerate(here):
            paired, role = pair.differences[name].paired, looks[pair.second]
            aside = (at - (len(here) - 1) / 2) * min(0.12, 0.6 / len(here))  # so that no pair hides another
            x = np.array(pair.differences[name].places, dtype=np.float64) + aside
            axes.vlines(x, paired.ci95[:, 0], paired.ci95[:, 1], color=role.colour, linewidth=1.6, alpha=0.6)
            axes.plot(x, paired.difference, role.marker, color=role.colour, markersize=5.0, markerfacecolor="white")
            sure, label = paired.q <= FALSE_DISCOVERY_RATE, f"{printable(pair.second, room)} − {printable(pair.first, room)}"
            axes.plot(x[sure], paired.difference[sure], role.marker, color=role.colour, markersize=5.0, label=label)
        first = here[0].differences[name]
        along = DEPTH if first.axis == "depth" else "block b, with block b − 1" if first.places[0] == 1 else "block"
        over_blocks(axes, np.array(first.places, dtype=np.float64), along, 12)
    places[0].plot([], [], " ", label=f"filled: q ≤ {FALSE_DISCOVERY_RATE:g}")
    return charts(places)


@drawn
def similar_blocks(comparison: Comparison) -> Sheet | None:
    """How many adjacent pairs pass each threshold in each subject, with intervals; hollow: its untrained copy."""
    looks = roles(comparison)
    subjects = {label: each for label in looks if (each := counts_of(comparison.subjects[label]))}
    if not subjects:
        return None
    rows = sorted(dict.fromkeys(row for each in subjects.values() for row in each), key=lambda row: row.startswith("κ"))
    (axes,) = panels(1, tall=(0.22 * len(subjects) + 0.25) * len(rows) + 0.7)
    for y, row in enumerate(rows):
        for at, (label, each) in enumerate(subjects.items()):
            if row in each:
                height, twin = y + (at - (len(subjects) - 1) / 2) * 0.7 / len(subjects), Role("_", looks[label].colour)
                mark_count(axes, height, each[row], looks[label], twin)
    over_counts(axes, rows, max(pair_count(comparison.subjects[label]) for label in subjects))
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color=INK, linewidth=0.3, alpha=0.4)
    if any(count.untrained is not None for each in subjects.values() for count in each.values()):
        axes.plot([], [], "D", color=MUTED, markerfacecolor="white", markersize=9, label=NULL_NAMES["untrained"])
    return charts([axes])


@drawn
def gram_drift(comparison: Comparison) -> Sheet | None:
    """How far patch similarities have moved from the first subject: by depth, and after the last block over a training."""
    looks, subjects = roles(comparison), list(comparison.subjects.items())
    results = {label: each for label, findings in subjects if (each := result_of(findings, "gram-drift")) is not None}
    if not results:
        return None
    over_training = comparison.trajectory and len(results) > 1
    places = panels(2 if over_training else 1, tall=3.2)
    for label in (label for label in looks if label in results):
        result, x = results[label], np.arange(float(len(results[label].array)))
        curve(places[0], x, result.array, looks[label], result.ci95)
        if (chance := null_of(result, "other_image")) is not None:
            curve(places[0], x, chance, Role("", looks[label].colour, OTHER_IMAGES, width=1.2))
    deepest = max((each.array for each in results.values()), key=len)
    over_blocks(places[0], np.arange(float(len(deepest))), DEPTH, 12)
    places[0].add_line(Line2D([], [], color=MUTED, linestyle=OTHER_IMAGES, linewidth=1.2, label="other images"))
    places[0].set(title="at every depth", ylabel=next(iter(results.values())).description.unit)
    if over_training:
        last = [results.get(label) for label, _ in subjects]
        values = np.array([np.nan if each is None else each.array[-1] for each in last])
        ends = np.array([[np.nan] * 2 if each is None or each.ci95 is None else each.ci95[-1] for each in last])
        measured = Role("after the last block", ROLES["measured"].colour, marker="o", width=2.0)
        curve(places[1], np.arange(float(len(last))), values, measured, ends)
        places[1].set(title="after the last block, over the training")
        _name_checkpoints(places[1], [label for label, _ in subjects])
    for axes in places:
        axes.grid(axis="y")
        axes.set_ylim(bottom=0.0)
    return charts(places)


def _name_checkpoints(axes: Axes, labels: Sequence[str]) -> None:
    """Names of some of the checkpoints at their places, the first and the last among them."""
    ticks = sorted({*range(0, len(labels) - 1, -(-len(labels) // MOST_TICKS)), len(labels) - 1})
    axes.set_xticks(ticks, [printable(labels[tick], 18) for tick in ticks], rotation=35, ha="right", rotation_mode="anchor")


Panels = Sequence[tuple[str, str, Sequence[tuple[Role, Array, Array | None]]]]
"""Panels over training: title; scale, as count, cosine or number; curves with intervals, first the one that it is about."""


@drawn
def course(comparison: Comparison) -> Sheet | None:
    """The numbers over the checkpoints of one training; only for those."""
    each = _course_panels(list(comparison.subjects.values()))
    filled = [panel for panel in each if np.isfinite(panel[2][0][1]).any()]
    if not comparison.trajectory or not filled:
        return None
    places = panels(len(filled), tall=3.0)
    labels = list(comparison.subjects)
    for axes, (title, scale, lines) in zip(places, filled, strict=True):
        for role, values, ci95 in lines:
            curve(axes, np.arange(float(len(labels))), values, role, ci95)
        axes.set_title(title)
        axes.grid(axis="y")
        if scale == "count":
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_ylim(bottom=min(-0.3, axes.get_ylim()[0]))
        elif scale == "cosine":
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
        else:
            low, high = (float(end(lines[0][1])) for end in (np.nanmin, np.nanmax))
            room = max(0.08 * (high - low), 0.02)
            axes.set_ylim(min(low, 0.0) - room, max(high, 0.5) + room)
    for axes in places:
        _name_checkpoints(axes, labels)
    return charts(places)


def _course_panels(subjects: Sequence[Findings]) -> Panels:
    def similarity(name: str, null: str | None = None) -> Array:
        each = [(findings.metrics.get(name), values_of(findings, name, null)) for findings in subjects]
        means = [None if result is None else mean(adjacent(result, values)) for result, values in each]
        return np.array(means, dtype=np.float64)

    def count(row: str) -> tuple[Array, Array]:
        each = [counts_of(findings).get(row, Count(np.nan, 0.0)) for findings in subjects]
        ends = [np.full(2, np.nan) if c.ci95 is None else c.ci95 for c in each]
        return np.array([c.value for c in each]), np.stack(ends)

    def summary(name: str) -> Array:
        return np.array([findings.summary.get(name) for findings in subjects], dtype=np.float64)

    def last(name: str) -> Array:
        each = [values_of(findings, name) for findings in subjects]
        return np.array([np.nan if values is None else values[-1] for values in each], dtype=np.float64)

    measured = Role("raw", ROLES["measured"].colour, marker="o", width=2.0)
    similarities = [(measured, similarity(RAW), None)]
    for null, name in NULL_NAMES.items():
        similarities.append((replace(ROLES[null], label=name.removeprefix("its ")), similarity(RAW, null), None))
    if any(findings.model.get("mixes_maps") for findings in subjects):
        similarities.append((AT_SOFTMAX, similarity(RAW + PROBS), None))
    row, pairs = f"raw > {RAW_ABOVE:g}", max(map(pair_count, subjects))
    similar = [(measured, *count(row)), (CORRECTED, *count(f"κ > {KAPPA_ABOVE:g}"))]
    return [
        (f"similar blocks, of {pairs} pairs ({row})", "count", similar),
        ("raw similarity, mean over adjacent blocks", "cosine", similarities),
        ("κ, mean over adjacent blocks", "number", [(measured, similarity(RAW, "kappa"), None)]),
        ("patch diversity after the last block", "number", [(measured, summary("patch_diversity_last"), None)]),
        ("class token and patches after the last block", "number", [(measured, last("cls-patch-similarity"), None)]),
        ("accuracy", "number", [(measured, summary(ACCURACY), None)]),
    ]
