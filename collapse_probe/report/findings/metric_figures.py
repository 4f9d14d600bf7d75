"""A figure for every result that no figure of its own shows: dots and curves over blocks, matrices, weights, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from collapse_probe.report.findings.curves import counts
from collapse_probe.report.heatmaps import SIGNED, Heatmap, Switch, grid, scale_of
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import (
    DEPTH,
    DISTINCT,
    MARKERS,
    ROLES,
    Role,
    charts,
    curve,
    dots_of_heads,
    drawn,
    over_blocks,
    panels,
)
from collapse_probe.results.findings import Description, Findings, MetricResult
from collapse_probe.results.readings import null_ci95, null_of, nulls_of, over_heads, phase_starts, result_of
from collapse_probe.statistics.intervals import Array

STEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
TICKS = [m * 10.0**e for e in range(7) for m in (1, 2, 5)]
RAW = "raw similarity"
REFERENCE = Role("", "#22303c", (0, (1, 2)), width=1.2)


@dataclass(frozen=True)
class Lines:
    """One panel of curves over `x`: the measured one with its interval, others by role, single heads, a reference line."""

    title: str
    unit: str
    along: str
    values: Array
    ci95: Array | None = None
    others: Mapping[str, Array] = field(default_factory=dict)
    dots: Array | None = None
    reference: Array | None = None

    @property
    def points(self) -> Array:
        """Every point that the panel must show."""
        parts = [self.values, self.ci95, self.dots, self.reference, *self.others.values()]
        return np.concatenate([part[np.isfinite(part)] for part in parts if part is not None])


def kind(result: MetricResult) -> str:
    """How a result is drawn: heads, curve, matrix, weights or counts; empty where no figure can show its axes."""
    kinds = {("block", "head"): "heads", ("block", "matrix"): "weights", ("threshold",): "counts"}
    return kinds.get(result.dims) or {1: "curve", 2: "matrix"}.get(len(result.dims), "")


@drawn
def family_figure(findings: Findings, names: Sequence[str]) -> Sheet | None:
    """The results `names` of one metric with its variants and of one kind, a panel each; scales of one unit are shared."""
    results = {name: result for name in names if (result := result_of(findings, name)) is not None}
    if not results:
        return None
    shape = kind(next(iter(results.values())))
    if shape == "matrix":
        return matrices(results, phase_starts(findings))
    if shape == "counts":
        return counts(findings, list(results))
    if shape == "weights":
        return matrix_lines(results)
    return _curves(findings, results)


def matrices(results: Mapping[str, MetricResult], phases: tuple[int, ...] = ()) -> Sheet:
    """One result with its chance level and κ in one place; of several a place for the values and one for what they are
    compared with, each with a switch between the results.
    """
    readings = [readings_of(result, phases) for result in results.values()]
    if len(readings) == 1:
        return switched(readings[0])
    first = [maps[0] for maps in readings]
    if len({each.values.shape for each in first}) > 1:
        return grid([each for maps in readings for each in (maps[0], maps[-1] if len(maps) > 1 else None)], 2)
    names = [each.title for each in first]
    last = [maps[-1] if len(maps) > 1 else None for maps in readings]
    return grid([Switch(tuple(first)), *([_filled(last, first)] if any(last) else [])], 2 if any(last) else 1, names)


def switched(maps: Sequence[Heatmap]) -> Sheet:
    """These matrices in one place, with a switch where there are several."""
    return grid([Switch(tuple(maps)) if len(maps) > 1 else maps[0]], 1, [each.name for each in maps] if len(maps) > 1 else ())


def _filled(maps: Sequence[Heatmap | None], like: Sequence[Heatmap]) -> Switch:
    """A switch of as many matrices as `like`; one that is missing is undefined everywhere."""
    blank = [replace(each, values=np.full_like(each.values, np.nan), title="not measured", beside={}) for each in like]
    return Switch(tuple(one if one is not None else other for one, other in zip(maps, blank, strict=True)))


def readings_of(result: MetricResult, phases: tuple[int, ...] = ()) -> list[Heatmap]:
    """A matrix, which says all numbers, and what it is read against: its chance level and κ, else the untrained copy."""
    rows, columns = (DEPTH if dim == "depth" else dim for dim in result.dims)
    chance, kappa, fresh = (null_of(result, role) for role in ("other_token", "kappa", "untrained"))
    centred = result.settings.get("centred") is True  # a correlation, whichever sign it happens to have
    others = [each for each in ((chance,) if kappa is not None else (fresh,)) if each is not None]
    scale = SIGNED if centred else scale_of(result.array, *others)
    title = result.description.panel
    raw = "measured" if result.collapsed == "low" else RAW
    drawn = partial(Heatmap, rows=rows, columns=columns, phases=phases if rows == columns else ())
    maps = [drawn(result.array, title or raw, scale, beside=beside(result), name=raw)]
    if kappa is not None:
        if chance is not None:
            maps.append(drawn(chance, ROLES["other_token"].label, scale, name="chance level"))
        said = f"κ: agreement beyond chance{f', {title}' if title else ''}"
        return [*maps, drawn(kappa, said, SIGNED, name="κ")]
    return maps if fresh is None else [*maps, drawn(fresh, "untrained copy", scale, name="untrained copy")]


def beside(result: MetricResult) -> dict[str, Array]:
    """What the cells of a matrix say besides their values: the interval, what they are compared with, and κ with its own."""
    nulls = {ROLES[role].label: values for role, values in nulls_of(result).items()}
    kappa = null_of(result, "kappa")
    return _defined(
        {"95 % CI": result.ci95, **nulls, "κ": kappa, "κ 95 % CI": None if kappa is None else null_ci95(result, "kappa")}
    )


def _defined(parts: Mapping[str, Array | None]) -> dict[str, Array]:
    return {name: values for name, values in parts.items() if values is not None}


def _curves(findings: Findings, results: Mapping[str, MetricResult]) -> Sheet:
    base = next(iter(results)).partition("@")[0]
    relatives = {n: r for n, r in findings.metrics.items() if n.partition("@")[0] == base and kind(r) in ("heads", "curve")}
    every = {name: lines(result) for name, result in relatives.items() if result.values is not None}
    places = panels(len(results))
    for axes, (name, result) in zip(places, results.items(), strict=True):
        panel, x = every[name], np.arange(len(result.array), dtype=np.float64)
        if panel.dots is not None:
            dots_of_heads(axes, x, panel.dots)
        curve(axes, x, panel.values, ROLES["measured"], panel.ci95)
        for role, values in panel.others.items():
            curve(axes, x, values, ROLES[role])
        if panel.reference is not None and result.description.reference is not None:
            curve(axes, x, panel.reference, replace(REFERENCE, label=result.description.reference[1]))
        over_blocks(axes, x, panel.along, 12)
        axes.set(title=panel.title, ylabel=panel.unit)
        axes.grid(axis="y")
        _scale(axes, result.description, [other for other in every.values() if other.unit == every[name].unit])
    return charts(places)


def lines(result: MetricResult) -> Lines:
    """What the panel of a block × head, block or depth result shows."""
    title, unit = result.description.panel, result.description.unit
    along = DEPTH if "depth" in result.dims else result.dims[0]
    stored = result.details.get(result.description.reference[0]) if result.description.reference else None
    reference = None if stored is None else np.broadcast_to(np.array(stored, dtype=np.float64), len(result.array))
    if reference is not None and not np.isfinite(reference).any():
        reference = None
    if result.dims != ("block", "head"):
        return Lines(title, unit, along, result.array, result.ci95, nulls_of(result), reference=reference)
    average, ci95 = over_heads(result.array), None
    if result.head_mean is not None:
        average, ci95 = result.head_mean[0], result.head_mean[2]
    others = {role: over_heads(values) for role, values in nulls_of(result).items()}
    return Lines(title, unit, along, average, ci95, others, result.array, reference)


def _scale(axes: Axes, stated: Description, peers: Sequence[Lines]) -> None:
    """From 0 to a round number that holds every panel of that unit, or the metric's own end; ranks from 1, logarithmic."""
    points = np.concatenate([peer.points for peer in peers])
    if not stated.logarithmic:
        axes.set_ylim(round_ends(points, least=stated.top or 0.0))
        return
    highest = float(np.max(points, initial=0.0))
    top = next((tick for tick in TICKS if tick >= highest), highest)
    axes.set_yscale("log")
    axes.set_ylim(0.93, max(top, 2.0) * 1.07)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= top]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def round_ends(points: Array, least: float = 0.0) -> tuple[float, float]:
    """The ends of a scale from 0, or below the lowest point where that is negative, to a round number, `least` at least."""
    low, high = (float(choose(points, initial=0.0)) if points.size else 0.0 for choose in (np.min, np.max))
    top = max(ceiling(high), least)
    return (-ceiling(-low) if low < -1e-9 else 0.0) - 0.03 * top, 1.03 * top


def ceiling(value: float) -> float:
    """The next round number: 1, 1.5, 2, 3, 4, 5, 6 or 8 times a power of ten; 1 for what is not positive.

    >>> ceiling(32.1), ceiling(0.06), ceiling(1.0)
    (40.0, 0.06, 1.0)
    """
    if not value > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next((round(step * power, 12) for step in STEPS if value <= step * power * (1 + 1e-9)), 10 * power))


OF_WEIGHTS = {
    "weight-similarity": ("mean |cosine| between rows", "|cosine|"),
    "weight-rank": ("effective rank / full rank", "share"),
    "weight-orthogonality": ("gap of W Wᵀ: λmax − λmin", "squared units of the weights"),
    "hyperspherical-energy": ("energy of the rows on the sphere", "mean 1 / distance"),
}
LEAST_ENERGY = 0.5  # of rows on the sphere


@drawn
def weights(findings: Findings) -> Sheet | None:
    """Row similarity, effective rank, orthogonality gap and energy of q, k, v, proj, fc1, fc2 over the blocks."""
    results = {name: result for name in OF_WEIGHTS if (result := result_of(findings, name)) is not None}
    return matrix_lines(results) if results else None


def matrix_lines(results: Mapping[str, MetricResult]) -> Sheet:
    """A panel for each result: one line a matrix, thin dashed lines of the same colour for the untrained copy.

    Those of OF_WEIGHTS have titles of their own, and ranks among them are shares of the full one.
    """
    places = panels(len(results))
    for axes, (name, result) in zip(places, results.items(), strict=True):
        full = np.asarray(result.details.get("full_rank", 1.0) if name == "weight-rank" else 1.0, dtype=np.float64)
        twin = null_of(result, "untrained")
        values, fresh = result.array / full, None if twin is None else twin / full
        x = np.arange(len(values), dtype=np.float64)
        for at, matrix in enumerate(result.details.get("matrices", range(values.shape[1]))):
            look = Role(str(matrix), DISTINCT[at % len(DISTINCT)], marker=MARKERS[at % len(MARKERS)], width=1.6)
            curve(axes, x, values[:, at], look)
            if fresh is not None:
                curve(axes, x, fresh[:, at], replace(ROLES["untrained"], label="_", colour=look.colour, width=1.0))
        if fresh is not None:
            curve(axes, x[:0], x[:0], replace(ROLES["untrained"], width=1.0))  # one grey entry in the legend for all of them
        title, unit = OF_WEIGHTS.get(name, (result.description.panel, result.description.unit))
        axes.set(title=title, ylabel=unit, ylim=round_ends(Lines("", "", "", values, dots=fresh).points))
        if name == "hyperspherical-energy":
            axes.set_ylim(bottom=LEAST_ENERGY)
        axes.grid(axis="y")
        over_blocks(axes, x, "block", 9)
    return charts(places)
