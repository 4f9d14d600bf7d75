"""The number of the entropy-collapse paper: how many keys a query attends to."""

from __future__ import annotations

from collapse_probe.preset import Choice, Preset
from collapse_probe.sockets import PRESETS

PRESETS.add(
    "entropy-collapse",
    Preset(
        name="entropy-collapse",
        version="1",
        summary="entropy of the softmax rows in nats; low is ill",
        paper="Zhai et al., arXiv 2303.06296",
        code="github.com/apple/ml-sigma-reparam; no commit is recorded",
        follows="code",
        metrics={"attention-entropy": {"point": "probs"}},
        choices=(
            Choice("formula", "−Σ_j A_ij log A_ij of each row, in nats", "code"),
            Choice("averaging", "over queries and images; heads stay apart, with their mean beside them", "code"),
            Choice("0 · log 0", "0, with nothing added inside the logarithm", "our reading"),
            Choice("which map", "the softmax, also where a model mixes its maps afterwards", "our reading"),
            Choice("tokens", "all queries and keys, prefix tokens included", "our reading"),
        ),
    ),
)
