"""Which family a metric belongs to, by its name."""

from __future__ import annotations

from collapse_probe.report.findings.captions import (
    CENTRED,
    CURVE,
    DOTS,
    MATRICES,
    ONE_HEAD,
    PATCHES,
    PROBS,
    ROWS,
    SIMILARITY,
    WITH_PREFIX,
    Family,
    other_readings,
)
from collapse_probe.report.html import Caption

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


TOKENS: dict[str, Family] = {
    "token-rank": Family(
        Caption(
            "In how many directions the tokens of an image differ",
            f"Rank of the matrix of all patch embeddings of one image, on a logarithmic scale from 1. {CURVE}",
            "Uncentred, a strong common part of all tokens lowers the rank even where they still differ; a few tokens of "
            "large norm lower it too.",
        ),
        "tokens",
        "effective rank",
        "rank",
        {"stable": "stable rank ‖X‖²/σ₁²", "centred": "effective rank, mean token taken off", "all": WITH_PREFIX},
        logarithmic=True,
    ),
    "rank-residual": Family(
        Caption(
            "How far the tokens are from one repeated vector",
            f"Distance of an image's patch embeddings from their mean, relative to their size: 0 is rank collapse. {CURVE}",
            "The skip connections carry a common part along: a low value alone does not show that attention made it.",
        ),
        "tokens",
        "Frobenius norm",
        "relative distance",
        {"composite": "ℓ1,∞ norm, as in the paper's code", "all": WITH_PREFIX},
        top=1.0,
    ),
    "token-frequency": Family(
        Caption(
            "How much of the tokens is not their mean",
            "Norm of what differs between the patches of an image, over the norm of what they share: falling towards 0 is "
            f"over-smoothing, a low-pass filter. {CURVE}",
            "The ratio has no upper end and grows where the common part happens to be small.",
        ),
        "tokens",
        "over the norm of the mean",
        "ratio",
        {"total": "over the norm of everything", "all": WITH_PREFIX},
        {"total": "share"},
    ),
    "token-norm": Family(
        Caption(
            "How long the patch embeddings are, and which stand out",
            f"Mean ℓ2 norm of the patch tokens on the residual stream. {CURVE}",
            "Norms grow along the residual stream of most networks. High-norm outliers are a known habit of large trained "
            "models; a threshold taken from one model does not fit another.",
        ),
        "tokens",
        "mean norm",
        "ℓ2 norm",
        {"outliers": "outliers above the image's own threshold", "150": "tokens with a norm above 150"},
        {"outliers": "share of tokens", "150": "share of tokens"},
    ),
    "dirichlet-energy": Family(
        Caption(
            "How much neighbouring patches differ",
            "Squared differences of patches beside one another over their squared norms: 0 where neighbours are equal, 1 "
            f"where they have nothing in common. {CURVE}",
            "Neighbours in a photograph are alike to begin with: compare with depth 0, not with 1.",
        ),
        "tokens",
        "neighbours on the grid, relative",
        "energy",
        {"complete": "every two patches, relative", "raw": "neighbours, not divided by norms", "all": "every two tokens"},
        {"raw": "squared units of the tokens"},
        top=1.0,
    ),
    "cross-patch-similarity": Family(
        Caption(
            "How alike any two patches at two depths are",
            "Mean absolute cosine between every patch at one depth and every patch at another, of one image; right, where "
            f"there is one, the untrained twin. {MATRICES}",
            "A common direction of all tokens alone makes it high.",
        ),
        "tokens",
        "patch tokens",
        "|cosine|",
        {"all": WITH_PREFIX},
    ),
    "layer-cka": Family(
        Caption(
            "Which depths tell the images apart in the same way",
            "Unbiased minibatch CKA between the patch embeddings at two depths; right, where there is one, the untrained twin. "
            f"{MATRICES}",
            "High values between neighbouring depths are usual, trained or not, and a few dominant directions can carry all "
            "of it. With few images the estimate is rough.",
        ),
        "tokens",
        "patch tokens",
        "CKA",
        {"all": WITH_PREFIX},
    ),
    "feature-similarity": Family(other_readings("feature similarity"), "tokens", "patch tokens", "cosine"),
    "patch-diversity": Family(
        other_readings("patch diversity", f"One minus the mean absolute cosine of two patches. {CURVE}"),
        "tokens",
        "patch tokens",
        "1 − mean |cosine|",
        top=1.0,
    ),
}


WEIGHTS: dict[str, Family] = {
    "weight-similarity": Family(
        other_readings("similarity of the rows of the weights"),
        "weights",
        "|cosine| between rows",
        "|cosine|",
        {"signed": "with its sign", "head": ONE_HEAD, "depth": "entry by entry", "directions": "by directions"},
        {"signed": "cosine"},
    ),
    "weight-rank": Family(
        other_readings("rank of the weights"),
        "weights",
        "effective rank",
        "rank",
        {
            "squared": "effective rank, squared singular values",
            "stable": "stable rank",
            "share": "effective rank over the full one",
            "head": f"effective rank, {ONE_HEAD}",
            **{f"pca{p}": f"left over by the leading {p} % of components" for p in (90, 95, 99)},
            **{f"components{p}": f"components that hold {p} % of the variance" for p in (90, 95, 99)},
        },
        {
            "share": "share",
            **{f"pca{p}": "share of variance" for p in (90, 95, 99)},
            **{f"components{p}": "components" for p in (90, 95, 99)},
        },
    ),
    "weight-orthogonality": Family(
        other_readings("orthogonality of the weights"),
        "weights",
        "λmax − λmin of W Wᵀ",
        "squared units",
        {
            "squared": "(λmax − λmin)² of W Wᵀ",
            "relative": "(λmax − λmin) / λmax",
            "soft": "‖W Wᵀ − I‖²",
            "head": f"λmax − λmin, {ONE_HEAD}",
        },
        {"squared": "fourth power of units", "relative": "share", "soft": "squared norm"},
    ),
    "hyperspherical-energy": Family(
        other_readings("rows of the weights on the sphere"),
        "weights",
        "mean 1 / distance",
        "mean 1 / distance",
        {
            "separation": "smallest squared distance of two rows",
            "gram": "−log det of the rows' kernel",
            "squared": "mean 1 / distance²",
            "log": "mean −log distance",
            "head": f"mean 1 / distance, {ONE_HEAD}",
        },
        {"separation": "squared distance", "gram": "nats", "squared": "1 / distance²", "log": "nats"},
    ),
}


FAMILIES: dict[str, Family] = {**ATTENTION, **TOKENS, **WEIGHTS}


def family_of(name: str) -> Family:
    """The family of metric `name`; a plain description for one that has no words here."""
    base = name.partition("@")[0]
    return FAMILIES.get(base) or Family(Caption(base, "Its definition is at the end of this page.", ""), "other", base, "value")
