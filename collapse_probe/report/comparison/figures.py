"""Comparison → matplotlib figures: matrices side by side, and the table of all figures with their captions."""

from __future__ import annotations

import functools

import numpy as np

from collapse_probe.report.colours import VLAG
from collapse_probe.report.comparison.curves import (
    adjacent_blocks,
    course,
    paired_differences,
    per_block,
    similar_blocks,
    values_of,
)
from collapse_probe.report.comparison.gallery import attention_gallery
from collapse_probe.report.comparison.verdict import RAW
from collapse_probe.report.findings.metric_figures import beside
from collapse_probe.report.heatmaps import SIGNED, Heatmap, Scale, grid, scale_of
from collapse_probe.report.html import Drawing, draw_figures
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import evenly_spaced, printable
from collapse_probe.results.comparison import PROBS, Comparison
from collapse_probe.statistics.intervals import Array

MOST_IN_A_ROW = 4  # subjects
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # where the scale of differences may end


def _matrices(comparison: Comparison, name: str, null: str | None = None) -> dict[str, Array]:
    """A metric's matrix (or one of its nulls, or its kappa) by subject, for those that have it and find room in a row."""
    labels = evenly_spaced(list(comparison.subjects), MOST_IN_A_ROW)
    each = {label: values_of(comparison.subjects[label], name, null) for label in labels}
    return {label: values for label, values in each.items() if values is not None}


def matrices(comparison: Comparison) -> Sheet | None:
    """Cosine between the maps of every two blocks: a column a subject, raw above and κ beneath."""
    raw, kappa = _matrices(comparison, RAW), _matrices(comparison, RAW, "kappa")
    if not raw:
        return None
    scale = scale_of(*raw.values())
    upper = [
        Heatmap(matrix, f"{printable(label, 30)}: raw cosine", scale, beside=beside(comparison.subjects[label].metrics[RAW]))
        for label, matrix in raw.items()
    ]
    lower = [
        Heatmap(kappa[label], f"{printable(label, 30)}: κ", SIGNED, beside={"raw": raw[label]}) if label in kappa else None
        for label in raw
    ]
    return grid([*upper, *(lower if kappa else [])], len(raw))


def difference_maps(comparison: Comparison) -> Sheet | None:
    """Each subject less the first, raw and κ, all on one scale."""
    room = 22
    first = printable(comparison.first, room)
    places: list[tuple[str, Array | None, dict[str, Array]]] = []
    kinds = {"raw": _matrices(comparison, RAW), "κ": _matrices(comparison, RAW, "kappa")}
    for label in kinds["raw"]:
        differences = {kind: _less(each.get(label), each.get(comparison.first)) for kind, each in kinds.items()}
        if label != comparison.first and differences["raw"] is not None:
            for kind, matrix in differences.items():
                both = {printable(each, room): kinds[kind][each] for each in (label, comparison.first) if each in kinds[kind]}
                places.append((f"{printable(label, room)} − {first}, {kind}", matrix, both))
    if not places:
        return None
    scale = difference_scale([matrix for _, matrix, _ in places if matrix is not None])
    return grid([None if m is None else Heatmap(m, title, scale, beside=both) for title, m, both in places], 2)


def _less(one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None or one.shape != other.shape else one - other


def difference_scale(matrices: list[Array]) -> Scale:
    """From −limit to limit, the smallest of LIMITS that holds every value; never finer than the first."""
    reach = max(float(np.abs(m[np.isfinite(m)]).max(initial=0.0)) for m in matrices)
    limit = next((limit for limit in LIMITS if reach <= limit + 1e-9), LIMITS[-1])
    return Scale(-limit, limit, VLAG)


def probs_and_weights(comparison: Comparison) -> Sheet | None:
    """The softmax beside what multiplies V, a row a subject; drawn only where a subject changes its maps."""
    weights, probs = _matrices(comparison, RAW), _matrices(comparison, RAW + PROBS)
    if not weights or not any(findings.model.get("mixes_maps") for findings in comparison.subjects.values()):
        return None
    scale, places = scale_of(*weights.values(), *probs.values()), []
    for label, matrix in weights.items():
        name, same = printable(label, 22), "" if label in probs else " = probs"
        places += [Heatmap(probs.get(label, matrix), f"{name}: probs", scale), Heatmap(matrix, f"{name}: weights{same}", scale)]
    return grid(places, 2)


def cross_cka(comparison: Comparison) -> Sheet | None:
    """CKA between each depth of the first model and each of another's, a panel a subject."""
    cka = _matrices(comparison, "cross-cka")
    if not cka:
        return None
    scale, rows = scale_of(*cka.values()), f"depth of {printable(comparison.first, 22)}"
    places = [Heatmap(m, printable(label, 30), scale, rows=rows, columns="depth of this model") for label, m in cka.items()]
    return grid(places, min(len(places), 2))


FIGURES: dict[str, Drawing] = {
    "course": Drawing(
        "Over training",
        "The same quantities at every checkpoint, in the natural order of the file names: counts of similar blocks with "
        "intervals over images, raw similarity with its chance level and untrained copy, κ, patch diversity and, where "
        "there are labels, accuracy.",
        "It is one training run. A raw number that moves with its null says nothing about the maps agreeing more or less.",
        course,
    ),
    "matrices": Drawing(
        "How alike the attention maps of two blocks are, on one common scale",
        "First the raw cosine; then κ, what is left of it beyond the chance level, on a fixed scale from −1 to 1. With "
        "more than four subjects, four evenly spaced ones are drawn.",
        "A darker raw panel is no collapse by itself: near-uniform maps score near 1 without any training.",
        matrices,
    ),
    "difference-maps": Drawing(
        "Each subject less the first",
        "The matrix of each subject less that of the first, raw and κ, all on one scale.",
        "A difference in the raw panel that is missing beside it, in κ, is explained by the null.",
        difference_maps,
    ),
    "cross-cka": Drawing(
        "Which depths of two models tell the images apart alike",
        "Unbiased linear CKA over the same images, between each depth of the first model and each depth of "
        "the other; 1 where the patch embeddings are equal up to rotation, shift and scale.",
        "It compares what is told apart, not how maps look: a bright band off the diagonal means that the same state is "
        "reached at another depth. A few dominant directions can carry all of it.",
        cross_cka,
    ),
    "adjacent": Drawing(
        "Each block compared with the one before",
        "Measured similarity of every subject with its 95 % interval, its chance level (dotted) and its untrained copy "
        "(dashed) in the same colour; then κ, with its threshold.",
        "Overlapping intervals do not mean that there is no difference: the images are the same, and the paired "
        "differences below are sharper.",
        adjacent_blocks,
    ),
    "similar-blocks": Drawing(
        "How many blocks count as similar",
        "Adjacent pairs above each threshold, with 95 % intervals over images; hollow diamonds: the untrained copies.",
        "A count depends on its threshold. Where the hollow diamonds lie as far apart as the filled marks, the contrast "
        "needs no training.",
        similar_blocks,
    ),
    "paired-differences": Drawing(
        "Paired differences, block by block",
        "Subject less the first subject on the same images, with 95 % intervals over images. Filled marks: the test that "
        "belongs to the interval, with the false discovery rate held at 5 % over the blocks.",
        "With many images a filled mark can be a tiny difference. The intervals do not cover another training run.",
        paired_differences,
    ),
    "probs-and-weights": Drawing(
        "What softmax gives, and what multiplies the values",
        "First the softmax (probs), then what is used (weights), a row a subject, on one scale. A fix such as Re-attention "
        "changes only the second.",
        "Less similar weights can come from the mixing alone, also with random parameters; they do not show that the softmax "
        "has become more diverse.",
        probs_and_weights,
    ),
    "per-block": Drawing(
        "Heads, images, entropy and patches",
        "The other signs of collapse, every subject with its 95 % interval and its untrained copy.",
        "Patches can grow alike while attention stays diverse, and the other way round.",
        per_block,
    ),
    "attention-gallery": Drawing(
        "Where each subject looks",
        "The same pictures, a row a subject: the picture as that model sees it, then the map of every block at the "
        "softmax, as times uniform attention. All maps share one scale.",
        "A map is a mean over heads and can look flat although single heads are sharp.",
        attention_gallery,
    ),
}
draw_all = functools.partial(draw_figures, FIGURES)
"""Every figure (of `names`) that a comparison fills, by name, in the order of the page."""
