"""Findings → matplotlib figures: pure functions, each returning None where it has nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from collapse_probe.report.findings.curves import adjacent_blocks, convergence, entropy, per_block, similar_blocks, weights
from collapse_probe.report.findings.metric_figures import family_figure, family_figures, outlier_places, pair
from collapse_probe.report.gallery import attention_gallery, rollout_gallery
from collapse_probe.report.heatmaps import SIGNED, Panel, grid, scale_of
from collapse_probe.report.style import drawn, save
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import result_of
from collapse_probe.statistics.permutation import LEVEL, SHOWN, beyond_null, pairs_tested

VARIANTS = {
    "row": "by rows: where one query looks",
    "centred": "centred: each vector's mean taken off",
    "patches": "without prefix tokens",
    "probs": "of the softmax (probs)",
}
MARK = f"dot (below the diagonal): more alike than with the wrong tokens, q ≤ {LEVEL:g}"


def _similarity(findings: Findings, name: str, narrow: bool) -> Figure | None:
    reading = result_of(findings, name)
    if reading is None:
        return None
    panels = pair(reading, "raw cosine", "null-corrected κ (0: as alike as the null)")
    tested = pairs_tested(findings.sureness.get("tests") or {}, name)
    if panels[1] is not None and tested is not None and name == SHOWN:
        panels[1] = replace(panels[1], marked=np.tril(beyond_null(tested), -1), mark=MARK)
    return grid(panels, 2 if panels[1] else 1, narrow=narrow)


@drawn
def attention_similarity(findings: Findings, narrow: bool = False) -> Figure | None:
    """Cosine between the maps of every two blocks, raw and null-corrected side by side."""
    return _similarity(findings, "attention-similarity", narrow)


@drawn
def feature_similarity(findings: Findings, narrow: bool = False) -> Figure | None:
    """Cosine between the patch embeddings at every two depths, raw and null-corrected side by side."""
    return _similarity(findings, "feature-similarity", narrow)


@drawn
def attention_variants(findings: Findings, narrow: bool = False) -> Figure | None:
    """The other readings of attention similarity (rows, centred, …), one row each: raw, null-corrected."""
    panels: list[Panel | None] = []
    beside = "probs" if result_of(findings, "attention-similarity") is not None else ""
    for name, reading in findings.metrics.items():
        family, _, variant = name.partition("@")
        if family == "attention-similarity" and variant not in ("", beside) and reading.values is not None:
            words = "; ".join(VARIANTS.get(suffix, suffix) for suffix in variant.split("@"))
            panels += pair(reading, words, f"κ, {variant.replace('@', ', ')}")
    return grid(panels, 2, narrow=narrow) if panels else None


@drawn
def probs_and_weights(findings: Findings, narrow: bool = False) -> Figure | None:
    """What softmax gives beside what multiplies V, on one scale; drawn only where the two differ."""
    weights, probs = result_of(findings, "attention-similarity"), result_of(findings, "attention-similarity@probs")
    if weights is None or probs is None or weights.values is None or probs.values is None:
        return None
    scale = scale_of(weights.values, probs.values)
    panels = [
        Panel(probs.values, "probs: what softmax gives", scale),
        Panel(weights.values, "weights: what multiplies V", scale),
    ]
    return grid(panels, 2, narrow=narrow)


@drawn
def weights_depth(findings: Findings, narrow: bool = False) -> Figure | None:
    """The same weight matrix in every two blocks: entry by entry, and by the directions that it uses."""
    titles = {"depth": "entry by entry", "directions": "by the directions that are used"}
    found = {title: result_of(findings, f"weight-similarity@{suffix}") for suffix, title in titles.items()}
    panels = [Panel(r.values, title, SIGNED) for title, r in found.items() if r is not None and r.values is not None]
    return grid(panels, len(panels), narrow=narrow) if panels else None


FIGURES: dict[str, Callable[[Findings, bool], Figure | None]] = {
    "attention-similarity": attention_similarity,
    "attention-adjacent": adjacent_blocks,
    "similar-blocks": similar_blocks,
    "attention-gallery": attention_gallery,
    "rollout-gallery": rollout_gallery,
    "attention-variants": attention_variants,
    "probs-and-weights": probs_and_weights,
    "attention-entropy": entropy,
    "per-block": per_block,
    "feature-similarity": feature_similarity,
    "convergence": convergence,
    "token-norm-places": outlier_places,
    "weights": weights,
    "weights-depth": weights_depth,
}


def draw_all(findings: Findings, *, narrow: bool = False, names: Collection[str] | None = None) -> dict[str, Figure]:
    """Every figure (of `names`) that these findings fill; `narrow` for a phone.

    First those of FIGURES, then one for each family of readings that these leave out (`family_figures`).
    """
    families = family_figures(findings)
    wanted = {*FIGURES, *families} if names is None else set(names)
    made = {name: draw(findings, narrow) for name, draw in FIGURES.items() if name in wanted}
    made |= {key: family_figure(findings, shown, narrow) for key, shown in families.items() if key in wanted}
    return {name: figure for name, figure in made.items() if figure is not None}


def save_all(findings: Findings, folder: str | Path) -> dict[str, Figure]:
    """Write figures/NAME.png and figures/NAME.svg into `folder`, and return the figures."""
    figures = draw_all(findings)
    save(figures, folder)
    return figures
