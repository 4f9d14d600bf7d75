"""The number of the registers paper: how many patch tokens have an outstanding norm."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

ROBUST = {"deviations": 6.0, "threshold": None}

PRESETS.add(
    "registers",
    Preset(
        name="registers",
        version="1",
        summary="share of patch tokens with a norm above 150; beside it a threshold of the image's own, and mean norms",
        paper="Darcet et al., arXiv 2309.16588",
        code="none was read",
        follows="paper",
        metrics={
            "token-norm@150": {"value": "share", "deviations": 6.0, "threshold": 150.0},
            "token-norm@outliers": {"value": "share", **ROBUST},
            "token-norm": {"value": "norm", **ROBUST},
        },
        choices=(
            Choice("norm", "ℓ2 norm of the patch tokens", "paper"),
            Choice("threshold", "150, chosen by hand for DINOv2: other models have other scales", "paper"),
            Choice("second threshold", "the image's own median + 6 median absolute deviations", "our reading"),
            Choice("tokens", "patches alone; class token and registers are left out", "our reading"),
            Choice("place", "the residual stream at every depth, before the final norm", "our reading"),
        ),
    ),
)
