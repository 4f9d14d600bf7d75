"""A figure for every reading that has none of its own: dots and curves over blocks, matrices, counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from collapse_probe.report.findings import curves as weight_curves
from collapse_probe.report.findings.curves import counts
from collapse_probe.report.heatmaps import SIGNED, UNSIGNED, Panel, grid, scale_of
from collapse_probe.report.style import (
    HATCH,
    MUTED,
    NARROW,
    PAPER,
    ROLES,
    WIDE,
    Role,
    curve,
    drawn,
    over_blocks,
    share_legend,
    sheet,
)
from collapse_probe.results.findings import Description, Findings, MetricResult
from collapse_probe.results.readings import entropy_share, null_of, nulls_of, over_heads, result_of
from collapse_probe.statistics.intervals import Array

OWN = {
    *("attention-similarity", "similar-blocks", "head-similarity", "image-similarity", "feature-similarity", "patch-diversity"),
    *("weight-similarity", "weight-similarity@depth", "weight-similarity@directions"),
    *("weight-rank", "weight-orthogonality", "hyperspherical-energy"),
}
"""Readings with a figure of their own; so have all attention-similarity variants."""
STEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
TICKS = [m * 10.0**e for e in range(7) for m in (1, 2, 5)]
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
    def highest(self) -> float:
        """The highest point that the panel must show."""
        return _extreme(np.max, *self._parts())

    @property
    def lowest(self) -> float:
        """The lowest point that the panel must show, 0 at most."""
        return _extreme(np.min, *self._parts(), np.zeros(1))

    def _parts(self) -> list[Array]:
        parts = [self.values, self.ci95, self.dots, self.reference, *self.others.values()]
        return [part for part in parts if part is not None]


def _extreme(choose: Callable[..., float], *parts: Array) -> float:
    flat = np.concatenate([part[np.isfinite(part)].ravel() for part in parts])
    return float(choose(flat)) if len(flat) else 0.0


def kind(reading: MetricResult) -> str:
    """How a reading is drawn: heads, curve, matrix, weights or counts; empty where no figure can show its axes."""
    dims = reading.dims
    if dims in (("block", "head"), ("block", "matrix"), ("threshold",)):
        return {"head": "heads", "matrix": "weights", "threshold": "counts"}[dims[-1]]
    if len(dims) == 1:
        return "curve"
    return "matrix" if len(dims) == 2 else ""


def own_figure(findings: Findings, name: str) -> bool:
    """Whether a figure made for this very reading shows it."""
    if name == "attention-entropy":
        return entropy_share(findings) is not None
    return name in OWN or name.startswith("attention-similarity@")


def family_figures(findings: Findings) -> dict[str, list[str]]:
    """The figures of families and the readings in each: the plain reading FAMILY, its variants FAMILY-variants."""
    found: dict[str, list[str]] = {}
    shapes: dict[str, str] = {}
    for name, reading in findings.metrics.items():
        shape = kind(reading)
        if reading.values is None or not shape or own_figure(findings, name):
            continue
        base = name.partition("@")[0]
        aside = base != name and (base in OWN or result_of(findings, base) is not None)
        key = f"{base}-variants" if aside else base
        key = key if shapes.setdefault(key, shape) == shape else f"{key}-{shape}"
        found.setdefault(key, []).append(name)
    return found


def undrawn(findings: Findings) -> list[tuple[str, str]]:
    """Readings that no figure can show, and why."""
    found = [(name, r) for name, r in findings.metrics.items() if r.values is not None and not kind(r)]
    return [(name, f"no figure shows the axes {' × '.join(r.dims)}; its numbers are in findings.json") for name, r in found]


@drawn
def family_figure(findings: Findings, names: Sequence[str], narrow: bool = False) -> Figure | None:
    """The readings `names` of one family and kind, a panel each; scales of one unit are shared."""
    readings = {name: reading for name in names if (reading := result_of(findings, name)) is not None}
    if not readings:
        return None
    shape = kind(next(iter(readings.values())))
    if shape == "matrix":
        return _matrices(readings, narrow)
    if shape == "counts":
        return _counts(findings, list(readings), narrow)
    if shape == "weights":
        return _weights(readings, narrow)
    return _curves(findings, readings, narrow)


def _matrices(readings: Mapping[str, MetricResult], narrow: bool) -> Figure:
    panels: list[Panel | None] = []
    for name, reading in readings.items():
        title = reading.description.panel
        panels += pair(reading, title, "κ, null-corrected" if "@" not in name else f"κ; {title}", twin=True)
    if not any(panels[1::2]):
        panels = panels[::2]
    return grid(panels, 4 if len(panels) > 4 else min(len(panels), 2), narrow=narrow)


def pair(reading: MetricResult, raw: str, corrected: str, twin: bool = False) -> list[Panel | None]:
    """A matrix and beside it its kappa; where there is none and `twin`, that of the untrained twin."""
    assert reading.values is not None
    rows, columns = ("depth (0: before block 0)" if dim == "depth" else dim for dim in reading.dims)
    kappa, fresh = null_of(reading, "kappa"), null_of(reading, "untrained") if twin else None
    centred = reading.settings.get("centred") is True  # a correlation, whichever sign it happens to have
    shown = [reading.values] if fresh is None or kappa is not None else [reading.values, fresh]
    scale = SIGNED if centred else scale_of(*shown)
    panels: list[Panel | None] = [Panel(reading.values, raw, scale, rows, columns), None]
    if kappa is not None:
        panels[1] = Panel(kappa, corrected, SIGNED, rows, columns)
    elif fresh is not None:
        panels[1] = Panel(fresh, "untrained twin", scale, rows, columns)
    return panels


def _counts(findings: Findings, names: list[str], narrow: bool) -> Figure:
    rows = 1.3 + 0.42 * 4
    figure = sheet(NARROW if narrow else 7.5, rows * len(names) + 0.3)
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        counts(axes, findings, name)
        axes.set_title(findings.metrics[name].description.panel)
    share_legend(figure, *figure.axes, columns=2)
    return figure


def _panels(count: int, narrow: bool) -> tuple[Figure, list[Axes]]:
    columns = 1 if narrow else min(2, count)
    rows = -(-count // columns)
    figure = sheet(NARROW if narrow else (WIDE if columns == 2 else 7.5), 2.9 * rows + 0.5)
    places = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in places[count:]:
        axes.remove()
    return figure, places[:count]


def _curves(findings: Findings, readings: Mapping[str, MetricResult], narrow: bool) -> Figure:
    base = next(iter(readings)).partition("@")[0]
    relatives = {n: r for n, r in findings.metrics.items() if n.partition("@")[0] == base and kind(r) in ("heads", "curve")}
    every = {name: lines(reading) for name, reading in relatives.items() if reading.values is not None}
    figure, places = _panels(len(readings), narrow)
    for axes, (name, reading) in zip(places, readings.items(), strict=True):
        one, stated = every[name], reading.description
        _draw(axes, one, stated.reference[1] if stated.reference else "")
        _scale(axes, stated, [other for other in every.values() if other.unit == one.unit])
    share_legend(figure, *places, columns=2 if narrow else 5)
    return figure


def lines(reading: MetricResult) -> Lines:
    """What the panel of a block × head, block or depth reading shows."""
    assert reading.values is not None
    title, unit = reading.description.panel, reading.description.unit
    along = "depth (0: before block 0)" if "depth" in reading.dims else reading.dims[0]
    reference = _reference(reading)
    if reading.dims != ("block", "head"):
        return Lines(title, unit, along, reading.values, reading.ci95, nulls_of(reading), reference=reference)
    average, ci95 = over_heads(reading.values), None
    if reading.head_mean is not None:
        average, ci95 = reading.head_mean[0], reading.head_mean[2]
    others = {role: over_heads(values) for role, values in nulls_of(reading).items()}
    return Lines(title, unit, along, average, ci95, others, reading.values, reference)


def _reference(reading: MetricResult) -> Array | None:
    if reading.description.reference is None or reading.values is None:
        return None
    stored = reading.details.get(reading.description.reference[0])
    found = None if stored is None else np.broadcast_to(np.array(stored, dtype=np.float64), len(reading.values))
    return None if found is None or not np.isfinite(found).any() else found


def _draw(axes: Axes, one: Lines, reference: str) -> None:
    x = np.arange(len(one.values), dtype=np.float64)
    if one.dots is not None:
        style = {"color": ROLES["measured"].colour, "alpha": 0.3, "markersize": 6, "markeredgewidth": 0, "zorder": 1}
        axes.plot(np.repeat(x, one.dots.shape[1]), one.dots.ravel(), ".", label="one head", **style)  # type: ignore[arg-type]
    curve(axes, x, one.values, ROLES["measured"], one.ci95)
    for role, values in one.others.items():
        curve(axes, x, values, ROLES[role])
    if one.reference is not None:
        curve(axes, x, one.reference, replace(REFERENCE, label=reference))
    over_blocks(axes, x, one.along, 12)
    axes.set(title=one.title, ylabel=one.unit)
    axes.grid(axis="y")


def _scale(axes: Axes, stated: Description, peers: Sequence[Lines]) -> None:
    """From 0 to a round number that holds every panel of that unit, or the metric's own end; ranks from 1, logarithmic."""
    high, low = max(one.highest for one in peers), min(one.lowest for one in peers)
    if stated.logarithmic:
        top = next((tick for tick in TICKS if tick >= high), high)
        axes.set_yscale("log")
        axes.set_ylim(0.93, max(top, 2.0) * 1.07)
        axes.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= top]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    top = max(ceiling(high), stated.top or 0.0)
    axes.set_ylim(_ends(low, top))


def _ends(low: float, top: float) -> tuple[float, float]:
    """The ends of a scale from 0, or from below the lowest point where that is negative, to `top`, with a little room."""
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


def _weights(readings: Mapping[str, MetricResult], narrow: bool) -> Figure:
    """One panel a reading, one line a matrix."""
    panels = []
    for reading in readings.values():
        assert reading.values is not None
        fresh, stated = null_of(reading, "untrained"), reading.description
        one = Lines("", "", "", reading.values, others={} if fresh is None else {"untrained": fresh})
        words, ends = (stated.panel, stated.unit), _ends(one.lowest, ceiling(one.highest))
        panels.append(weight_curves.MatrixPanel(*words, weight_curves.matrices_in(reading), reading.values, fresh, ends))
    return weight_curves.matrix_lines(panels, narrow)


ENDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
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
    """The outliers of every token-norm reading, each rule once."""
    found: dict[str, Places] = {}
    for name, reading in findings.metrics.items():
        maps = reading.details.get("outlier_map")
        if name.partition("@")[0] != "token-norm" or reading.values is None or maps is None:
            continue
        shares = np.array(reading.details.get("outlier_share", [None] * len(maps)), dtype=np.float64)
        found.setdefault(_rule(reading), Places(_rule(reading), np.array(maps, dtype=np.float64), shares))
    return list(found.values())


def without_outliers(findings: Findings) -> list[str]:
    """The rules under which no token of any image stands out."""
    return [places.rule for places in places_of(findings) if not places.any]


def _rule(reading: MetricResult) -> str:
    fixed, deviations = reading.settings.get("threshold"), reading.settings.get("deviations")
    return f"norm above {fixed:g}" if fixed is not None else f"norm above the image's median + {deviations:g} · MAD"


@drawn
def outlier_places(findings: Findings, narrow: bool = False) -> Figure | None:
    """A small map for each depth and rule: the share of images with an outlier at each place."""
    found = [places for places in places_of(findings) if places.any]
    if not found:
        return None
    width, columns = (NARROW, 4) if narrow else (WIDE, 9)
    tile = (width - 0.3 - GAP * (columns - 1)) / columns
    tall = tile * min(found[0].maps.shape[1] / found[0].maps.shape[2], 3.0)
    rows = [-(-len(places.maps) // columns) for places in found]
    height = sum(HEAD + count * (tall + TITLE) for count in rows) + FOOT
    figure = Figure(figsize=(width, height))
    highest = max(float(np.nanmax(places.maps)) for places in found)
    scale = Normalize(0.0, next((end for end in ENDS if highest <= end + 1e-9), 1.0))
    top = 0.0
    for places, count in zip(found, rows, strict=True):
        figure.text(0.1 / width, 1 - (top + 0.2) / height, places.rule, fontsize=9, va="center")
        top += HEAD
        for depth, shares in enumerate(places.maps):
            row, column = divmod(depth, columns)
            left, down = 0.1 + column * (tile + GAP), top + row * (tall + TITLE) + TITLE
            axes = figure.add_axes((left / width, 1 - (down + tall) / height, tile / width, tall / height))
            _small(axes, shares, scale)
            axes.set_title(_title(depth, places.shares[depth], narrow), fontsize=7.5 if not narrow else 6.5, pad=2.5)
        top += count * (tall + TITLE)
    _bar(figure, scale, width, height)
    return figure


def _title(depth: int, share: float, narrow: bool) -> str:
    said = "–" if not np.isfinite(share) else f"{100 * share:.3g} %"
    return f"{depth}: {said}" if narrow else f"depth {depth}: {said}"


def _small(axes: Axes, grid: Array, scale: Normalize) -> None:
    axes.patch.set(facecolor=PAPER, edgecolor=HATCH, hatch="//////", linewidth=0)
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap=UNSIGNED.colours, norm=scale)
    axes.invert_yaxis()
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.5)


def _bar(figure: Figure, scale: Normalize, width: float, height: float) -> None:
    span = min(4.2, width - 0.5)
    bar = figure.add_axes(((width - span) / 2 / width, 0.42 / height, span / width, 0.11 / height))
    figure.colorbar(ScalarMappable(scale, UNSIGNED.colours), cax=bar, orientation="horizontal")
    bar.tick_params(length=2, labelsize=7.5)
    bar.set_xlabel("share of images with an outlier at this place", fontsize=8, color=MUTED, labelpad=2)
