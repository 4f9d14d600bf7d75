"""Numbers over the blocks of a model, or over its images, as curves with their intervals and their nulls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from collapse_probe.report.findings.tables import words_of
from collapse_probe.report.heatmaps import UNSIGNED, Heatmap
from collapse_probe.report.sheet import MUTED, Sheet
from collapse_probe.report.style import (
    DEPTH,
    ROLES,
    beside,
    charts,
    curve,
    dots_of_heads,
    drawn,
    floor,
    mark_count,
    over_blocks,
    over_counts,
    panels,
)
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.readings import (
    adjacent,
    counts_of,
    entropy_share,
    null_ci95,
    null_of,
    nulls_of,
    pair_count,
    result_of,
)
from collapse_probe.results.rules import COUNT_THRESHOLDS, KAPPA_ABOVE
from collapse_probe.statistics.intervals import Array

DOTTED = (0, (1, 3))
OVER_BLOCKS = {
    "head-similarity": "between heads of one block",
    "image-similarity": "between images",
    "patch-diversity": "patch diversity",
}


@drawn
def adjacent_blocks(findings: Findings) -> Sheet | None:
    """Similarity of each block with the one before, with nulls and thresholds; kappa beneath. None where none is compared."""
    result = result_of(findings, "attention-similarity")
    if result is None or not np.isfinite(adjacent(result, result.array)).any():
        return None
    x, kappa = np.arange(1.0, len(result.array)), null_of(result, "kappa")
    axes = panels(1 if kappa is None else 2, tall=3.0)
    references = {role: adjacent(result, values) for role, values in nulls_of(result).items()}
    _with_references(axes[0], x, adjacent(result, result.array), _adjacent_or_none(result, result.ci95), references)
    _thresholds(axes[0], COUNT_THRESHOLDS)
    axes[0].set_ylabel("cosine with the block before")
    if kappa is not None:
        ci95 = _adjacent_or_none(result, null_ci95(result, "kappa"))
        curve(axes[1], x, adjacent(result, kappa), ROLES["measured"], ci95)
        look = ROLES["other_token"]
        axes[1].axhline(0.0, color=look.colour, linestyle=look.line, linewidth=look.width, zorder=1)
        _thresholds(axes[1], (KAPPA_ABOVE,))
        axes[1].set(ylabel="κ", ylim=(min(floor(_all(adjacent(result, kappa), ci95)), -0.25), 1.05))
        axes[1].grid(axis="y")
    for each in axes:
        over_blocks(each, x, "block b, compared with block b − 1", 12)
    return charts(axes)


def _adjacent_or_none(result: MetricResult, matrix: Array | None) -> Array | None:
    return None if matrix is None else adjacent(result, matrix)


def _all(values: Array, ci95: Array | None) -> list[Array]:
    """What is drawn of a curve: its values and the ends of its band."""
    return [values] if ci95 is None else [values, ci95]


def _with_references(axes: Axes, x: Array, values: Array, ci95: Array | None, others: Mapping[str, Array]) -> None:
    """The measured curve with its band and the references in `others`, from 0 (or the lowest) to 1."""
    curve(axes, x, values, ROLES["measured"], ci95)
    for role, line in others.items():
        curve(axes, x, line, ROLES[role])
    axes.set_ylim(floor([*_all(values, ci95), *others.values()]), 1.03)
    axes.grid(axis="y")


def _thresholds(axes: Axes, levels: Iterable[float]) -> None:
    place = blended_transform_factory(axes.transAxes, axes.transData)
    for level in levels:
        axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=DOTTED, zorder=0)
        axes.text(1.005, level, f"{level:g}", fontsize=7.5, color=MUTED, va="center", transform=place)


@drawn
def per_block(findings: Findings) -> Sheet | None:
    """Head similarity, image similarity and patch diversity over the blocks, each with its nulls."""
    results = {name: result for name in OVER_BLOCKS if (result := result_of(findings, name)) is not None}
    if not results:
        return None
    places = panels(len(results), columns=3)
    for axes, (name, result) in zip(places, results.items(), strict=True):
        x = np.arange(len(result.array), dtype=np.float64)
        _with_references(axes, x, result.array, result.ci95, nulls_of(result))
        over_blocks(axes, x, DEPTH if result.dims == ("depth",) else "block", 9)
        axes.set(title=OVER_BLOCKS[name], ylabel="1 − mean |cosine|" if name == "patch-diversity" else "cosine")
    return charts(places, 3)


@drawn
def entropy(findings: Findings) -> Sheet | None:
    """Attention entropy of every head as a share of log N, and beneath it the mean over heads."""
    share = entropy_share(findings)
    if share is None:
        return None
    blocks = len(share.heads)
    (axes,) = panels(1)
    x = np.arange(blocks, dtype=np.float64)
    _with_references(axes, x, share.mean, share.ci95, {} if share.untrained is None else {"untrained": share.untrained})
    dots_of_heads(axes, x, share.heads)
    over_blocks(axes, x, "block", 12)
    axes.set(ylabel="share of log N", title="mean over heads")
    title = f"entropy / {share.unit} (1: uniform attention)"
    heads = Heatmap(share.heads.T, title, UNSIGNED, "head", "block", square=False)
    return beside(heads, charts([axes]))


@drawn
def similar_blocks(findings: Findings) -> Sheet | None:
    """How many adjacent pairs pass each threshold, with intervals; last, how many pass by kappa."""
    return None if result_of(findings, "similar-blocks") is None else counts(findings, ["similar-blocks"])


def counts(findings: Findings, names: Sequence[str]) -> Sheet:
    """A panel for each of these similar-blocks results: a row for each threshold; last, how many pass by kappa."""
    places = panels(len(names), tall=2.5)
    for axes, name in zip(places, names, strict=True):
        each = counts_of(findings, name)
        for y, count in enumerate(each.values()):
            mark_count(axes, y, count, ROLES["measured"], ROLES["untrained"])
        over_counts(axes, list(each), pair_count(findings, name))
        if len(names) > 1 or name != "similar-blocks":
            axes.set_title(findings.metrics[name].description.panel)
    return charts(places, 1)


@drawn
def convergence(findings: Findings) -> Sheet | None:
    """Value and 95 % interval of each headline number over the first images; dotted: the end, with its tolerance."""
    stored: Mapping[str, Any] = findings.sureness.get("convergence") or {}
    numbers: Mapping[str, Any] = stored.get("numbers") or {}
    if not numbers or len(stored["sizes"]) < 2:
        return None
    places = panels(len(numbers), tall=2.5, columns=3)
    for axes, (name, entry) in zip(places, numbers.items(), strict=True):
        axes.set_title(words_of(name))
        sizes = np.array(stored["sizes"], dtype=np.float64)
        value, low, high = (np.array(entry[key], dtype=np.float64) for key in ("value", "ci_low", "ci_high"))
        ends = np.stack([low, high], -1)
        curve(axes, sizes, value, ROLES["measured"], np.where(np.isfinite(ends), ends, value[:, None]))
        last, tolerance = value[-1], float(entry["tolerance"])
        if np.isfinite(last):
            axes.axhspan(last - tolerance, last + tolerance, color=MUTED, alpha=0.12, linewidth=0, zorder=0, label="tolerance")
            axes.axhline(last, color=MUTED, linewidth=0.8, linestyle=DOTTED, zorder=0)
            later = ends[len(ends) // 3 :]  # room for these and three tolerances; the first few images may leave it
            reach = 1.1 * float(np.max(np.abs(later[np.isfinite(later)] - last), initial=3 * tolerance))
            axes.set_ylim(last - reach, last + reach)
        axes.set_xscale("log")
        ticks = [t for e in range(8) for m in (1, 2, 5) if sizes[0] <= (t := m * 10**e) <= sizes[-1]]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 if len(ticks) <= 6 else 2]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="images", xlim=(sizes[0] * 0.95, sizes[-1] * 1.05))
        axes.grid(axis="y")
    return charts(places, 3)
