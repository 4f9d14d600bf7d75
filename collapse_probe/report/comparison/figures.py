"""Comparison → matplotlib figures: the table of them, each a pure function that returns None where it has
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from collapse_probe.report.comparison.curves import adjacent_blocks, paired_differences, per_block
from collapse_probe.report.comparison.gallery import attention_gallery
from collapse_probe.report.comparison.verdict import RAW
from collapse_probe.report.heatmaps import SIGNED, UNSIGNED, Panel, Scale, grid, scale_of
from collapse_probe.report.html import Caption
from collapse_probe.report.style import (
    COMPARISON_NULL_LABELS,
    INK,
    MUTED,
    NARROW,
    ROLES,
    WIDE,
    Role,
    chosen,
    curve,
    draw_each,
    drawn,
    printable,
    roles,
    share_legend,
    sheet,
)
from collapse_probe.results.comparison import ACCURACY, PROBS, Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import adjacent, corrected_count, mean, null_of, pair_count, result_of
from collapse_probe.statistics.intervals import Array

COUNTS = "similar-blocks"
MOST = 8
MOST_TICKS = 12
CORRECTED = Role("corrected: κ > 0.5", "#d55e00", marker="s", width=2.0)


@drawn
def similar_blocks(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """How many adjacent pairs pass each threshold in each subject, with intervals; hollow: its untrained
    twin.
    """
    looks = {label: r for label, r in roles(comparison, MOST).items() if result_of(comparison.subjects[label], COUNTS)}
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
    pairs = max(pair_count(findings) for findings in subjects.values())
    room = max(0.05 * pairs, 0.1)
    axes.set(xlim=(-room, pairs + room), ylim=(len(rows) - 0.5, -0.5), xlabel=f"adjacent pairs, of {pairs}")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="x")
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color=INK, linewidth=0.3, alpha=0.4)
    if any(null_of(findings.metrics[COUNTS], "untrained") is not None for findings in subjects.values()):
        axes.plot([], [], "D", color=MUTED, markerfacecolor="white", markersize=9, label=COMPARISON_NULL_LABELS["untrained"])
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
    at, fresh = levels.index(row), null_of(reading, "untrained")
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
    raw = [_of_row(f, "raw > 0.9") if result_of(f, COUNTS) else (None, None, None) for f in subjects]
    corrected = [_of_row(f, "κ > 0.5") if result_of(f, COUNTS) else (None, None, None) for f in subjects]
    if axes is None:
        return any(value is not None for value, _, _ in raw)
    look = ROLES["measured"]
    curve(axes, x, _floats([v for v, _, _ in raw]), Role("raw", look.colour, marker="o", width=2.0), _ends(raw))
    curve(axes, x, _floats([v for v, _, _ in corrected]), CORRECTED, _ends(corrected))
    axes.set_title(f"similar blocks, of {max(map(pair_count, subjects))} pairs (raw > 0.9)")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylim(bottom=min(-0.3, axes.get_ylim()[0]))
    return True


def _ends(counts: list[tuple[float | None, Array | None, float | None]]) -> Array:
    return np.stack([np.full(2, np.nan) if ends is None else np.asarray(ends) for _, ends, _ in counts])


def _floats(values: list[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _adjacent_mean(findings: Findings, name: str, role: str | None) -> float | None:
    reading = result_of(findings, name)
    if reading is None or reading.values is None:
        return None
    values = reading.values if role is None else null_of(reading, role)
    return None if values is None else mean(adjacent(values))


def _raw_over(axes: Axes | None, x: Array, subjects: list[Findings]) -> bool:
    raw = _floats([_adjacent_mean(f, RAW, None) for f in subjects])
    if axes is None:
        return bool(np.isfinite(raw).any())
    curve(axes, x, raw, Role("raw", ROLES["measured"].colour, marker="o", width=2.0))
    for role in ("other_token", "untrained"):
        look = ROLES[role]
        named = Role(COMPARISON_NULL_LABELS[role].removeprefix("its "), look.colour, look.line, width=look.width)
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


MOST_IN_A_ROW = 4  # subjects in a row
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # where the scale of differences may end


@drawn
def matrices(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """Cosine between the maps of every two blocks: a column a subject, raw above and null-corrected
    beneath.
    """
    found = {label: m for label in shown(comparison) if (m := _matrix(comparison, label, RAW)) is not None}
    if not found:
        return None
    scale = scale_of(*found.values())
    raw = [Panel(m, f"{printable(label, 30)}: raw cosine", scale) for label, m in found.items()]
    kappas = {label: _kappa(comparison.subjects[label], RAW) for label in found}
    corrected = [None if m is None else Panel(m, f"{printable(label, 30)}: κ", SIGNED) for label, m in kappas.items()]
    return grid([*raw, *(corrected if any(corrected) else [])], len(found), narrow=narrow)


@drawn
def difference_maps(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """Each subject less the first, raw and null-corrected, all on one scale."""
    maps: list[tuple[str, Array | None, Array | None]] = []
    first = comparison.first
    for label in shown(comparison)[1:]:
        raw = _less(_matrix(comparison, label, RAW), _matrix(comparison, first, RAW))
        kappas = [_kappa(comparison.subjects[each], RAW) for each in (label, first)]
        if raw is not None:
            maps.append((label, raw, _less(*kappas)))
    if not maps:
        return None
    scale = difference_scale([m for _, *both in maps for m in both if m is not None])
    panels: list[Panel | None] = []
    for label, raw, kappa in maps:
        room = 14 if narrow else 22
        name = f"{printable(label, room)} − {printable(first, room)}"
        panels += [None if m is None else Panel(m, f"{name}, {kind}", scale) for m, kind in ((raw, "raw"), (kappa, "κ"))]
    return grid(panels, 2, narrow=narrow)


@drawn
def probs_and_weights(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """The softmax beside what multiplies V, a row a subject; drawn only where a subject changes its maps."""
    if not any(findings.model.get("mixes_maps") for findings in comparison.subjects.values()):
        return None
    found: list[tuple[str, Array, Array]] = []
    for label in shown(comparison):
        weights = _matrix(comparison, label, RAW)
        probs = _matrix(comparison, label, RAW + PROBS)
        if weights is not None:
            found.append((label, weights if probs is None else probs, weights))
    if not found:
        return None
    scale = scale_of(*(m for _, *both in found for m in both))
    panels: list[Panel | None] = []
    for label, probs, weights in found:
        same = " = probs" if probs is weights else ""
        panels += [
            Panel(probs, f"{printable(label, 22)}: probs", scale),
            Panel(weights, f"{printable(label, 22)}: weights{same}", scale),
        ]
    return grid(panels, 2, narrow=narrow)


@drawn
def cross_cka(comparison: Comparison, narrow: bool = False) -> Figure | None:
    """CKA between each depth of the first model and each of another's, a panel a subject."""
    found = {label: m for label in shown(comparison) if (m := _matrix(comparison, label, "cross-cka")) is not None}
    if not found:
        return None
    scale = scale_of(*found.values())
    first = printable(comparison.first, 22)
    panels = [
        Panel(m, printable(label, 30), scale, rows=f"depth of {first}", columns="depth of this model")
        for label, m in found.items()
    ]
    return grid(panels, min(len(panels), 2), narrow=narrow)


def shown(comparison: Comparison) -> list[str]:
    """The subjects that have room in a row, first and last among them."""
    return chosen(list(comparison.subjects), MOST_IN_A_ROW)


def difference_scale(matrices: list[Array]) -> Scale:
    """From −limit to limit, the smallest of LIMITS that holds every value; never finer than the first."""
    reach = max(float(np.abs(m[np.isfinite(m)]).max(initial=0.0)) for m in matrices)
    limit = next((limit for limit in LIMITS if reach <= limit + 1e-9), LIMITS[-1])
    return Scale(-limit, limit, SIGNED.colours)


def _matrix(comparison: Comparison, label: str, name: str) -> Array | None:
    reading = result_of(comparison.subjects[label], name)
    return None if reading is None else reading.values


def _kappa(findings: Findings, name: str) -> Array | None:
    reading = result_of(findings, name)
    return None if reading is None else null_of(reading, "kappa")


def _less(one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None or one.shape != other.shape else one - other


FIGURES: dict[str, Callable[[Comparison, bool], Figure | None]] = {
    "course": course,
    "matrices": matrices,
    "difference-maps": difference_maps,
    "cross-cka": cross_cka,
    "adjacent": adjacent_blocks,
    "similar-blocks": similar_blocks,
    "paired-differences": paired_differences,
    "probs-and-weights": probs_and_weights,
    "per-block": per_block,
    "attention-gallery": attention_gallery,
}
CAPTIONS: dict[str, Caption] = {
    "course": Caption(
        "Over training",
        "The same quantities at every checkpoint, in the natural order of the file names: counts of similar "
        "blocks with their intervals over images, raw similarity beside its wrong-token null and the untrained "
        "twin, κ, patch diversity and, where there are labels, accuracy.",
        "It is the course of one training run. A raw number that moves together with its null says "
        "nothing about the maps agreeing more or less.",
    ),
    "matrices": Caption(
        "How alike the attention maps of two blocks are, on one common scale",
        "Raw cosine above; beneath κ, what is left of it beyond the wrong-token null, on a fixed scale "
        "from −1 to 1. With more than four subjects, four evenly spaced ones are drawn.",
        "A darker raw panel is no collapse by itself: near-uniform maps score near 1 without any training.",
    ),
    "difference-maps": Caption(
        "What the others have more or less than the first",
        "Each subject's matrix less the first subject's, raw and null-corrected, all on one scale that the colour bars name.",
        "A difference in the raw panel that is missing beside it, in κ, is explained by the null.",
    ),
    "cross-cka": Caption(
        "Which depths of two models tell the images apart alike",
        "Unbiased linear CKA over minibatches of the same images, between each depth of the first model and each "
        "depth of the other; 1 where the patch embeddings are equal up to rotation, shift and scale.",
        "It compares what is told apart, not how maps look: a bright band off the diagonal means that the same "
        "state is reached at another depth. A few dominant directions can carry all of it.",
    ),
    "adjacent": Caption(
        "Each block compared with the one before",
        "Measured similarity of every subject with its 95 % interval, its wrong-token null (dotted) and its "
        "untrained twin (dashed) in the same colour; κ beneath, with its threshold.",
        "Overlapping intervals do not mean that there is no difference: the images are the same, and the "
        "paired differences below are sharper.",
    ),
    "similar-blocks": Caption(
        "How many blocks count as similar",
        "Adjacent pairs above each threshold, with 95 % intervals over images; hollow diamonds are each "
        "subject's untrained twin; the last row counts pairs with κ above 0.5.",
        "A count depends on its threshold. Where the hollow diamonds lie as far apart as the filled "
        "marks, the contrast needs no training.",
    ),
    "paired-differences": Caption(
        "Paired differences, block by block",
        "Subject less the first subject on the same images, with 95 % bootstrap intervals. Filled marks: the "
        "Wilcoxon signed-rank test with the false discovery rate held at 5 % over the blocks.",
        "A filled mark can be a tiny difference, seen because there are many images; and the intervals do"
        " not cover another training run.",
    ),
    "probs-and-weights": Caption(
        "What softmax gives, and what multiplies the values",
        "Left the softmax (probs), right what is used (weights), a row a subject, on one scale. A fix "
        "such as Re-attention changes only the right one.",
        "Less similar weights can come from the mixing alone, also with random weights; they do not show "
        "that the softmax has become more diverse.",
    ),
    "per-block": Caption(
        "Heads, images, entropy and patches",
        "The other illnesses, every subject with its 95 % interval and its untrained twin.",
        "Patches can grow alike while attention stays diverse, and the other way round.",
    ),
    "attention-gallery": Caption(
        "Where each subject looks",
        "The same pictures, a row a subject: the picture as that model sees it, then the map of every block "
        "at the softmax, as times uniform attention. All maps share one scale.",
        "A map is a mean over heads and can look flat although single heads are sharp.",
    ),
}


def draw_all(comparison: Comparison, *, narrow: bool = False, names: Collection[str] = FIGURES) -> dict[str, Figure]:
    """Every figure (of `names`) that this comparison fills, by name, in the order of the page; `narrow` for a phone."""
    return draw_each({name: draw for name, draw in FIGURES.items() if name in names}, comparison, narrow)
