"""How the metrics of attention maps are told to a reader."""

from __future__ import annotations

from collapse_probe.captions import Caption
from collapse_probe.family import CENTRED, CURVE, DOTS, MATRICES, PATCHES, PROBS, ROWS, SIMILARITY, Family, other_readings

ATTENTION: dict[str, Family] = {
    "attention-distance": Family(
        Caption(
            "How far each head looks",
            f"Mean distance between a patch and the patches that it attends to, in pixels of the model's input. {DOTS} "
            "Dotted: what uniform attention gives.",
            "A head on the dotted line may attend uniformly, or to patches that lie as far away; only the entropy tells "
            "these apart. Nearness is not quality.",
        ),
        "attention",
        "prefix tokens left out, rows renormalised",
        "pixels",
        {"drop": "attention to prefix tokens counts as 0 pixels", "resoftmax": "softmax taken anew over the patches"},
        reference=("uniform", "uniform attention"),
    ),
    "attention-sink": Family(
        Caption(
            "How much attention one key receives",
            f"Share of all attention that goes to the key which receives most of it. {DOTS} Dotted: uniform attention.",
            "A sink is no collapse by itself: a head may park its attention on a token where it does nothing.",
        ),
        "attention",
        "the most attended key",
        "share of attention",
        {"prefix": "all prefix tokens together", "patches": "the most attended patch"},
        reference=("uniform", "uniform attention"),
    ),
    "distance-from-uniform": Family(
        Caption(
            "How far attention is from uniform",
            f"Total variation distance of the softmax from 1/N: 0 where a head averages all tokens. {DOTS} Dotted: one key "
            "alone, the largest distance that there is.",
            "Both ends can be ill: near 0 attention chooses nothing, near the dotted line it chooses a single token.",
        ),
        "attention",
        "all keys",
        "total variation distance",
        {"patches": "patch queries and keys alone"},
        top=1.0,
        reference=("largest", "one key alone"),
    ),
    "distance-from-image-mean": Family(
        Caption(
            "How much the maps depend on the image",
            "Spread of a head's maps over images, relative to their size: 0 where it attends alike whatever the picture, "
            f"1 where the maps of two images do not overlap. {DOTS}",
            "A map that follows the picture need not follow what matters in it.",
        ),
        "attention",
        "what multiplies the values (weights)",
        "relative distance",
        {"probs": PROBS},
        top=1.0,
    ),
    "map-rank": Family(
        Caption(
            "How many directions an attention map has",
            "Effective rank of the whole map of a head, on a logarithmic scale from 1: at 1 every query attends alike, up to "
            f"a factor. {DOTS} Dotted: the largest rank that the map could have.",
            "The rank is taken uncentred, so that a strong uniform part alone brings it near 1; a low rank is how "
            "query-independent attention looks, not how useless attention looks.",
        ),
        "attention",
        "effective rank of what multiplies the values (weights)",
        "rank",
        {"stable": "stable rank ‖A‖²/σ₁²", "residual": "distance to rank one", "probs": PROBS, "patches": PATCHES},
        {"residual": "relative distance"},
        logarithmic=True,
        reference=("largest", "largest possible"),
    ),
    "whole-map-similarity": Family(
        Caption(
            "How alike any two heads' whole maps are",
            "Mean absolute cosine between the whole maps of any two heads, in one block (diagonal) or in two (Diverse-ViT); "
            f"right, where there is one, the untrained twin. {MATRICES}",
            "Two maps that are both near uniform score near 1 whatever they attend to.",
        ),
        "attention",
        "what multiplies the values (weights)",
        "|cosine|",
        {"probs": PROBS},
    ),
    "similarity-ratio": Family(
        Caption(
            "What share of a block's attention vectors is like its neighbours'",
            f"A reading of DeepViT's Figure 3a: the share of (head, token) vectors whose cosine with those of the nearest "
            f"blocks is above a threshold. {CURVE} Dotted: 0.9, above which the block counts as similar.",
            "The paper leaves threshold, number and side of the neighbours open, and these decide the count: see the table. "
            "Raw cosines near 1 are also what near-uniform attention gives without any training.",
        ),
        "attention",
        "the nearest block before, cosine above 0.9",
        "share of vectors",
        {
            "mean": "threshold: the image's own mean",
            "both": "the nearest block on each side",
            "nearest-3": "the three nearest blocks before",
            "row": ROWS,
            "centred": CENTRED,
            "probs": PROBS,
        },
        top=1.0,
        reference=("ratio_above", "counted as similar above"),
    ),
    "attention-rollout": Family(
        Caption(
            "How alike the attention rollouts after two blocks are",
            "Rollout multiplies the maps of all blocks up to one, with the skip connections as identity (Abnar & Zuidema). "
            f"Left the raw cosine of two rollouts, right κ, what the other-token null leaves of it. {MATRICES}",
            "Products of stochastic maps settle in every deep network, so that late blocks look alike without any illness. "
            "Rollout ignores values and MLPs.",
        ),
        "attention",
        "mean over heads, by rows",
        "cosine",
        {"column": "by columns", "max": "largest over heads", "min": "smallest over heads", "patches": PATCHES},
    ),
    "attention-similarity": Family(other_readings("attention similarity"), "attention", "raw cosine", "cosine", SIMILARITY),
    "similar-blocks": Family(
        other_readings("similar blocks", "The counts of similar blocks with another similarity, one panel each."),
        "attention",
        "by columns",
        "adjacent pairs",
        SIMILARITY,
    ),
    "head-similarity": Family(
        other_readings("heads of one block", f"Cosine between the heads of one block, read in other ways. {CURVE}"),
        "attention",
        "by columns",
        "cosine",
        SIMILARITY,
        top=1.0,
    ),
    "image-similarity": Family(
        other_readings("maps of different images", f"Cosine between a block's maps of two images. {CURVE}"),
        "attention",
        "by columns",
        "cosine",
        SIMILARITY,
        top=1.0,
    ),
    "attention-entropy": Family(
        other_readings("attention entropy", f"Entropy of each head's attention. {DOTS}"), "attention", "entropy", "nats"
    ),
}
