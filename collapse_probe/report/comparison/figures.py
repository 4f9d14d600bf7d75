"""Comparison → matplotlib figures: matrices side by side, and the table of all figures with their captions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from collapse_probe.report.colours import VLAG
from collapse_probe.report.comparison.curves import (
    adjacent_blocks,
    course,
    gram_drift,
    paired_differences,
    per_block,
    similar_blocks,
    values_of,
)
from collapse_probe.report.comparison.gallery import attention_gallery
from collapse_probe.report.comparison.verdict import RAW
from collapse_probe.report.heatmaps import SIGNED, Heatmap, Scale, Switch, grid, scale_of
from collapse_probe.report.html import Drawing, draw_figures
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import evenly_spaced, printable
from collapse_probe.results.comparison import PROBS, Comparison
from collapse_probe.statistics.intervals import Array

MOST_IN_A_ROW, ROOM = 4, 24  # subjects, and letters of a name
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # where the scale of differences may end


def _matrices(comparison: Comparison, name: str, null: str | None = None) -> dict[str, Array]:
    """A metric's matrix (or one of its nulls, or its kappa) by subject, for those that have it and find room in a row."""
    labels = evenly_spaced(list(comparison.subjects), MOST_IN_A_ROW)
    each = {label: values_of(comparison.subjects[label], name, null) for label in labels}
    return {label: values for label, values in each.items() if values is not None}


def matrices(comparison: Comparison) -> Sheet | None:
    """Cosine between the maps of every two blocks, raw and κ: each subject, and what it has more than the first, in one place.

    Subjects of another depth than the first have a place of their own.
    """
    raw, kappa = _matrices(comparison, RAW), _matrices(comparison, RAW, "kappa")
    if not raw:
        return None
    first = comparison.first if comparison.first in raw else next(iter(raw))
    alike = [label for label in raw if raw[label].shape == raw[first].shape]
    views = [*(printable(label, ROOM) for label in alike), *(_less_name(label, first) for label in alike if label != first)]
    kinds = {"raw similarity": (raw, scale_of(*raw.values())), "κ": (kappa, SIGNED)}
    if not all(label in kappa for label in alike):
        del kinds["κ"]
    places = [_one_place(kind, each, scale, first, alike) for kind, (each, scale) in kinds.items()]
    columns = len(places)
    for label in (label for label in raw if label not in alike):
        places.append(Heatmap(raw[label], f"{printable(label, ROOM)}: raw similarity", kinds["raw similarity"][1], name="raw"))
        if columns > 1:
            beyond = kappa.get(label)
            places.append(None if beyond is None else Heatmap(beyond, f"{printable(label, ROOM)}: κ", SIGNED, name="κ"))
    sheet = grid(places, columns, views if len(views) > 1 else ())
    return replace(sheet, blink=len(alike) > 1)


def _one_place(
    kind: str, values: Mapping[str, Array], scale: Scale, first: str, labels: Sequence[str]
) -> Heatmap | Switch | None:
    """The matrices of subjects, and the difference of each other one from the first, which the cells of the first say too."""
    differences = {_less_name(label, first): values[label] - values[first] for label in labels if label != first}
    apart = difference_scale(list(differences.values())) if differences else scale
    others = {printable(label, ROOM): values[label] for label in labels if label != first}
    own = printable(first, ROOM)
    maps = [Heatmap(values[first], f"{own}: {kind}", scale, beside={**others, **differences}, name=own)]
    maps += [Heatmap(matrix, f"{label}: {kind}", scale) for label, matrix in others.items()]
    maps += [Heatmap(matrix, f"{name}: {kind}", apart) for name, matrix in differences.items()]
    return Switch(tuple(maps)) if len(maps) > 1 else maps[0]


def _less_name(label: str, first: str) -> str:
    return f"{printable(label, ROOM)} − {printable(first, ROOM)}"


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
        name, same = printable(label, 22), "" if label in probs else " (the same)"
        places += [Heatmap(probs.get(label, matrix), f"{name}: softmax map", scale)]
        places += [Heatmap(matrix, f"{name}: final map{same}", scale)]
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
        "It is one training run. A raw number that moves with its chance level says nothing about maps agreeing more or less.",
        course,
    ),
    "matrices": Drawing(
        "How alike the attention maps of two blocks are",
        "Raw similarity, and κ: how much of the possible agreement beyond chance is reached. The switch shows one subject "
        "after the other in the same place, then what each has more than the first, on a scale as wide as these differences. "
        "With more than four subjects, four evenly spaced ones are drawn.",
        "A darker raw matrix is no collapse by itself: near-uniform maps score near 1 without any training. A difference in "
        "raw similarity that is missing in κ is one of the chance level.",
        matrices,
    ),
    "cross-cka": Drawing(
        "Which depths of two models tell the images apart alike",
        "Unbiased linear CKA over the same images, between each depth of the first model and each depth of "
        "the other; 1 where the patch embeddings are equal up to rotation, shift and scale.",
        "It compares what is told apart, not how maps look: a bright band off the diagonal means that the same state is "
        "reached at another depth. A few dominant directions can carry all of it.",
        cross_cka,
    ),
    "gram-drift": Drawing(
        "How far the similarities between patches have moved",
        "Mean squared difference of the cosines between the patches of an image, from the first subject to each other on the "
        "same images, with 95 % intervals over images; dash-dotted: from one image in the first to another image in the "
        "other, which is what no agreement at all would give.",
        "It says that they have moved, not that dense features have become worse. Depths are compared one by one; where "
        "patches are near one direction in both models, little can move.",
        gram_drift,
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
        "First the softmax map, then the final map, which multiplies the values; a row a subject, on one scale. A fix such as "
        "Re-attention changes only the second.",
        "Less similar final maps can come from the mixing alone, also with random parameters; they do not show that the "
        "softmax has become more diverse.",
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
