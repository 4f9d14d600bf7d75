"""Anti-Oversmoothing's number: how much of the tokens is more than their mean."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

PRESETS.add(
    "anti-oversmoothing",
    Preset(
        name="anti-oversmoothing",
        version="1",
        summary="‖HC‖/‖DC‖ by depth, class token included; beside it ‖HC‖/‖X‖",
        paper="Anti-Oversmoothing, arXiv 2203.05962",
        code="github.com/VITA-Group/ViT-Anti-Oversmoothing at 989559f",
        follows="code",
        metrics={
            "token-frequency@all": {"over": "mean", "prefix": True},
            "token-frequency@total@all": {"over": "total", "prefix": True},
        },
        choices=(
            Choice("ratio", "‖HC‖ over ‖DC‖ in the Frobenius norm", "paper"),
            Choice("DC", "the mean token, repeated; HC is the rest", "paper"),
            Choice("tokens", "all, the class token included in the mean", "code"),
            Choice("second ratio", "‖HC‖ over ‖X‖ beside it, which stays within 0 and 1", "our reading"),
            Choice("place", "the residual stream at every depth, before the final norm", "our reading"),
            Choice("cosine curves of the figure", "left out: their exact definition is not settled", "our reading"),
        ),
    ),
)
