"""Comparison → matplotlib figures: the table of them, each a pure function that returns None where it has
nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from collapse_probe.captions import Caption
from collapse_probe.contrast_counts import course, similar_blocks
from collapse_probe.contrast_curves import adjacent_blocks, paired_differences, per_block
from collapse_probe.contrast_gallery import attention_gallery
from collapse_probe.contrast_heatmaps import cross_cka, difference_maps, matrices, probs_and_weights
from collapse_probe.side_by_side import Comparison

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


def draw_all(comparison: Comparison, *, narrow: bool = False) -> dict[str, Figure]:
    """Every figure that this comparison can fill, by name, in the order of the page; `narrow` for a phone."""
    made = {name: draw(comparison, narrow) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in made.items() if figure is not None}
