"""How the metrics of tokens are told to a reader."""

from __future__ import annotations

from collapse_probe.captions import Caption
from collapse_probe.family import CURVE, MATRICES, WITH_PREFIX, Family, other_readings

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
