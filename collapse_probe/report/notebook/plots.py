"""One figure of matplotlib for any result, by name: for notebooks, and for papers in the reader's own hands."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from collapse_probe.errors import UnknownNameError
from collapse_probe.report.comparison.curves import colours
from collapse_probe.report.heatmaps import Scale, scale_of
from collapse_probe.report.style import in_style
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings, MetricResult, unknown
from collapse_probe.results.intervention import Interventions
from collapse_probe.results.readings import adjacent, null_ci95, null_of, over_heads
from collapse_probe.results.sweep import SHARE, Sweep, estimate
from collapse_probe.statistics.intervals import Array

WIDE, TALL = 4.6, 3.2  # inches of a panel
DOTS = 80  # an inch of a notebook's picture
MEASURED, CHANCE, FRESH = "#0b5fa5", "#d55e00", "#6b7680"
CYCLE = ("#0b5fa5", "#d55e00", "#01855f", "#b5579b", "#8a6d00", "#6b7680")
EFFECTS = {"kl": "KL of the outputs [nats]", "agreement": "top answers that stay", "accuracy_change": "change of accuracy"}


class Picture(Figure):
    """A figure that a notebook shows as it is, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DOTS, facecolor="white")
        return buffer.getvalue()


def plot(results: Any, name: str | None = None) -> Figure:
    """The figure of `results` called `name`, or its main one; UnknownNameError for a name that there is not."""
    kinds: tuple[tuple[type, Any], ...] = (
        (Findings, of_findings),
        (Comparison, of_comparison),
        (Interventions, of_interventions),
        (Sweep, of_sweep),
    )
    draw = next(draw for kind, draw in kinds if isinstance(results, kind))
    with in_style():
        figure: Figure = draw(results, name)
    return figure


def panels(count: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Picture(figsize=(WIDE * columns, TALL * rows), layout="constrained", facecolor="white")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def over_blocks(axes: Axes, what: str, title: str = "") -> None:
    """Axes along the blocks or depths."""
    axes.set(xlabel=what, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")


def of_findings(findings: Findings, name: str | None) -> Figure:
    """A metric: heatmaps where it pairs blocks, else a curve; without a name, neighbouring blocks and κ of all pairs."""
    if name is None:
        name = "attention-similarity"
        result = findings.metrics.get(name)
        if result is None or result.values is None:
            name = next((each for each, its in findings.metrics.items() if its.values is not None), name)
        elif len(result.values) > 2:
            figure, (left, right) = panels(2)
            curve(left, result, "raw similarity with the block before")
            kappa = null_of(result, "kappa")
            title = "raw similarity" if kappa is None else "κ between every two blocks"
            matrix(right, result.array if kappa is None else kappa, title)
            return figure
    result = findings[name]
    findings.matrix(name)  # raises where it has no values
    if len(result.dims) == 2 and result.dims[0] == result.dims[1]:
        kappa = null_of(result, "kappa")
        figure, axes = panels(1 if kappa is None else 2)
        matrix(axes[0], result.array, f"{name}: raw", scale_of(result.array), result.dims[0])
        if kappa is not None:
            matrix(axes[1], kappa, f"{name}: κ", scale_of(kappa), result.dims[0])
        return figure
    figure, (only,) = panels(1)
    curve(only, result, name)
    return figure


def matrix(axes: Axes, values: Array, title: str, scale: Scale | None = None, what: str = "block") -> None:
    """A matrix on a fixed scale, with its colour bar."""
    scale = scale_of(values) if scale is None else scale
    shades = ListedColormap(scale.colours.codes)
    axes.set_facecolor("#eef1f3")  # what is undefined
    image = axes.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=scale.low, vmax=scale.high)
    axes.set(title=title, xlabel=what, ylabel=what)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, shrink=0.85)


def curve(axes: Axes, result: MetricResult, title: str) -> None:
    """Values along the blocks with their 95 % interval, chance level and untrained copy."""
    values, ci95, dims = result.array, result.ci95, result.dims
    chance, fresh = null_of(result, "other_token"), null_of(result, "untrained")
    x: Array = np.arange(len(values), dtype=np.float64)
    if len(dims) == 2 and dims[0] == dims[1]:
        x, values, ci95 = x[1:], adjacent(result, values), None if ci95 is None else adjacent(result, ci95)
        chance, fresh = (None if null is None else adjacent(result, null) for null in (chance, fresh))
    elif dims == ("block", "head"):
        for head in values.T:
            axes.plot(x, head, ".", color=MEASURED, alpha=0.35, markersize=4)
        mean = result.head_mean
        values, ci95 = (over_heads(values), None) if mean is None else (mean[0], mean[2])
        chance, fresh = (None if null is None else over_heads(null) for null in (chance, fresh))
    elif dims == ("block", "matrix"):
        names = result.details.get("matrices", range(values.shape[1]))
        for at, each in enumerate(names):
            axes.plot(x, values[:, at], "o-", markersize=3, label=str(each), color=CYCLE[at % len(CYCLE)])
        over_blocks(axes, "block", title)
        axes.legend(frameon=False)
        return
    elif dims == ("threshold",):
        x = np.asarray(result.settings.get("thresholds", x), dtype=np.float64)
    elif len(dims) != 1:
        raise UnknownNameError(f"no figure shows the axes {' × '.join(dims)}; matrix({title!r}) has its numbers")
    line(axes, x, values, ci95, "measured, 95 % CI" if ci95 is not None else "measured", MEASURED)
    for label, null, colour, style in (("chance level", chance, CHANCE, ":"), ("untrained copy", fresh, FRESH, "--")):
        if null is not None:
            axes.plot(x, null, linestyle=style, color=colour, label=label)
    over_blocks(axes, dims[0], title)
    axes.set_ylabel(result.description.unit)
    if dims == ("threshold",):
        axes.set_xticks(x)
    axes.legend(frameon=False)


def line(axes: Axes, x: Array, values: Array, ci95: Array | None, label: str, colour: str) -> None:
    """One line with its interval as a band."""
    axes.plot(x, values, "o-", color=colour, markersize=3.5, label=label)
    if ci95 is not None:
        axes.fill_between(x, ci95[..., 0], ci95[..., 1], color=colour, alpha=0.2, linewidth=0)


def of_comparison(comparison: Comparison, name: str | None) -> Figure:
    """A metric of every subject: matrices side by side (κ where it was taken), else curves on one axis; without a name κ."""
    known = list(dict.fromkeys(metric for each in comparison.subjects.values() for metric in each.metrics))
    if name is not None and name not in known:
        raise unknown("metric", name, known, "these findings hold")
    wanted = name or "attention-similarity"
    held = {label: each.metrics[wanted] for label, each in comparison.subjects.items() if wanted in each.metrics}
    results = {label: result for label, result in held.items() if result.values is not None}
    if not results:
        raise UnknownNameError(f"no subject has values of {wanted!r}; they were measured with {', '.join(known)}")
    square = all(len(result.dims) == 2 and result.dims[0] == result.dims[1] for result in results.values())
    if name is not None and square:
        return _matrices(name, results)
    figure, (axes,) = panels(1)
    for label, colour in colours(comparison).items():
        if label in results:
            result = results[label]
            x, values, ci95 = _curve_of(result, kappa=name is None)
            line(axes, x, values, ci95, label, colour)
    first = next(iter(results.values()))
    over_blocks(axes, first.dims[0], "κ with the block before" if name is None else wanted)
    axes.set_ylabel("κ (0: chance level)" if name is None else first.description.unit)
    axes.legend(frameon=False)
    return figure


def _matrices(name: str, results: Mapping[str, MetricResult]) -> Figure:
    shown = {label: (null_of(result, "kappa"), result.array) for label, result in results.items()}
    beyond = all(kappa is not None for kappa, _ in shown.values())
    values = {label: kappa if beyond and kappa is not None else raw for label, (kappa, raw) in shown.items()}
    figure, grid = panels(len(values))
    scale = scale_of(*values.values())
    for axes, (label, each) in zip(grid, values.items(), strict=True):
        matrix(axes, each, f"{label}: {'κ' if beyond else 'raw'}", scale, results[label].dims[0])
    figure.suptitle(name)
    return figure


def _curve_of(result: MetricResult, *, kappa: bool) -> tuple[Array, Array, Array | None]:
    values, ci95 = result.array, result.ci95
    if kappa and (beyond := null_of(result, "kappa")) is not None:
        values, ci95 = beyond, null_ci95(result, "kappa")
    x: Array = np.arange(len(values), dtype=np.float64)
    if len(result.dims) == 2 and result.dims[0] == result.dims[1]:
        return x[1:], adjacent(result, values), None if ci95 is None else adjacent(result, ci95)
    if values.ndim == 2:
        mean = result.head_mean
        return (x, over_heads(values), None) if mean is None else (x, mean[0], mean[2])
    return x, values, ci95


def of_interventions(interventions: Interventions, name: str | None) -> Figure:
    """What replacing the map of one block changes, block by block; by default KL of the outputs."""
    wanted = name or "kl"
    if wanted not in EFFECTS:
        raise unknown("effect", wanted, EFFECTS, "there are")
    figure, (axes,) = panels(1)
    for at, (kind, effects) in enumerate(interventions.single.items()):
        known = [effect for effect in effects if getattr(effect, wanted) is not None]
        x = np.array([effect.blocks[0] for effect in known], dtype=np.float64)
        values = np.array([getattr(effect, wanted) for effect in known], dtype=np.float64)
        ends = np.array([getattr(effect, f"{wanted}_ci95") or (np.nan, np.nan) for effect in known], dtype=np.float64)
        line(axes, x, values, ends.reshape(-1, 2), kind, CYCLE[at % len(CYCLE)])
    over_blocks(axes, "block that is changed", "one block at a time")
    axes.set_ylabel(EFFECTS[wanted])
    axes.legend(frameon=False)
    return figure


def of_sweep(sweep: Sweep, name: str | None) -> Figure:
    """A number of the cells along the first varied axis, a line for each other combination; by default κ."""
    numbers = _numbers(sweep)
    wanted = name or ("kappa_adjacent" if "kappa_adjacent" in numbers else SHARE)
    if wanted not in numbers:
        raise unknown("number", wanted, numbers, "there are")
    figure, (axes,) = panels(1)
    axis = sweep.axes[0] if sweep.axes else next(iter(sweep.varied))
    places = {str(value): float(value) if sweep.is_numeric(axis) else float(at) for at, value in enumerate(sweep.varied[axis])}
    for at, (label, points) in enumerate(sweep.series(axis).items()):
        for key, look in ((wanted, "o-"), (f"untrained.{wanted}", "--")):
            estimates = [estimate(cell.number(key) for cell in cells) for _, cells in points]
            y = np.array([each.mean for each in estimates])
            if not np.isfinite(y).any():
                continue
            reach = np.abs(np.array([each.ci95 or (each.mean, each.mean) for each in estimates]).T - y)
            words = f"{label or 'trained'}{', untrained copy' if key != wanted else ''}"
            x = [places[str(value)] for value, _ in points]
            axes.errorbar(
                x, y, yerr=reach if reach.any() else None, fmt=look, capsize=3, label=words, color=CYCLE[at % len(CYCLE)]
            )
    axes.set(xlabel=axis, ylabel=wanted.replace("_", " "), title="")
    axes.set_xticks(list(places.values()), list(places))
    axes.grid(axis="y")
    axes.legend(frameon=False)
    return figure


def _numbers(sweep: Sweep) -> Sequence[str]:
    found: Iterable[str] = (name for cell in sweep.finished for name in cell.numbers)
    return list(dict.fromkeys((*found, "accuracy", "loss", SHARE)))
