"""Patch Diversification's number: how alike the patches of one image are."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

PRESETS.add(
    "patch-diversification",
    Preset(
        name="patch-diversification",
        version="1",
        summary="one minus P, the mean absolute cosine between different patches of an image",
        paper="Patch Diversification, arXiv 2104.12753",
        code="github.com/ChengyueGongR/PatchVisionTransformer at b70ee23, which holds no cosine term",
        follows="paper",
        metrics={"patch-diversity": {}},
        choices=(
            Choice("cosine", "its absolute value: opposite patches count as alike", "paper"),
            Choice("pairs", "all pairs of different patches; a patch with itself does not count", "paper"),
            Choice("sign", "1 − P is shown, so that low is ill", "our reading"),
            Choice("tokens", "patches alone, prefix tokens out", "our reading"),
            Choice(
                "place",
                "the residual stream at every depth, before the final norm (the released contrastive term reads the last "
                "layer after it)",
                "our reading",
            ),
        ),
    ),
)
