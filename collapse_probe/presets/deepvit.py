"""DeepViT's numbers: maps alike from block to block, from head to head, and features that stop changing."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

MAPS = {"axis": "column", "centred": False, "point": "weights"}

PRESETS.add(
    "deepvit",
    Preset(
        name="deepvit",
        version="1",
        summary="similarity of maps between blocks (Eq. 2), its ratio and count (Fig. 3), heads and features (Fig. 3, 4)",
        paper="DeepViT, arXiv 2103.11886",
        code="github.com/zhoudaquan/dvit_repo at 1ccb152, which computes none of these similarities",
        follows="paper",
        metrics={
            "attention-similarity": {**MAPS, "prefix": True},
            "similarity-ratio": {**MAPS, "k": 1, "threshold": 0.9, "direction": "before"},
            "similar-blocks": {**MAPS, "thresholds": [0.8, 0.9, 0.95]},
            "head-similarity": MAPS,
            "feature-similarity": {},
        },
        choices=(
            Choice("vectors compared", "columns A[h, :, t]: what token t gives to every query (Eq. 2)", "paper"),
            Choice("heads", "matched by index; one cosine for each head and token", "paper"),
            Choice("which map after Re-attention", "what multiplies V, so that cosines may be negative", "our reading"),
            Choice("tokens", "all, the class token included: nothing says that it is left out", "our reading"),
            Choice("images", "cosines of each image, then the mean over images", "our reading"),
            Choice("scalar for a pair of blocks", "the mean over heads and tokens", "our reading"),
            Choice("similarity-ratio: neighbours", "the one block before", "our reading"),
            Choice("similarity-ratio: threshold", "share of vectors with a cosine above 0.9, not above a mean", "our reading"),
            Choice("similarity-ratio: similar blocks", "blocks with a ratio above 0.9", "our reading"),
            Choice("similar-blocks", "blocks whose mean similarity with the block before is above 0.9", "our reading"),
            Choice("head-similarity", "mean cosine of the same column in different heads of one block", "our reading"),
            Choice("feature-similarity: vectors", "the same patch at two depths, before the final norm", "our reading"),
            Choice("feature-similarity: tokens", "patches alone, mean over patches and images", "our reading"),
        ),
    ),
)
