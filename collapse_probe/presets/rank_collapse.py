"""The number of the rank-collapse paper: how far the tokens are from one vector repeated."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

PRESETS.add(
    "rank-collapse",
    Preset(
        name="rank-collapse",
        version="1",
        summary="‖X − 1x̄ᵀ‖/‖X‖ in the composite norm √(‖·‖₁·‖·‖_∞), all tokens",
        paper="Dong et al., arXiv 2103.03404",
        code="the authors' notebook and paper-plotting/utils.py; no commit is recorded",
        follows="code",
        metrics={"rank-residual@composite@all": {"norm": "composite", "prefix": True}},
        choices=(
            Choice("residual", "the tokens less one vector repeated, over the tokens", "paper"),
            Choice("the vector", "the mean token (the paper's is the best one in the composite norm)", "code"),
            Choice(
                "norm",
                "√(largest absolute column sum · largest absolute row sum); a second script of the authors leaves the root out",
                "code",
            ),
            Choice("tokens", "all, prefix tokens included", "code"),
            Choice("place", "what leaves each block", "code"),
            Choice("sequence before the first block", "measured too, as depth 0", "our reading"),
            Choice("rank along random paths of attention", "left out", "our reading"),
        ),
    ),
)
