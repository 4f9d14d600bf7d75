"""How widely does each head spread its attention?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.map_metric import HeadMeans, HeadMetric
from collapse_probe.metrics.metric import DOTS, Need
from collapse_probe.registry import METRICS


def entropy(probs: Tensor) -> Tensor:
    """Shannon entropy of distributions along the last axis, [..., N] -> [...], in nats, 0 … log N; 0·log 0 is 0.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.6931471824645996, -0.0]
    """
    floor = torch.finfo(probs.dtype).tiny
    return -probs.clamp_min(floor).log_().mul_(probs).sum(-1)


class EntropySums(HeadMeans):
    """Per image the mean over queries (of all windows) of the entropy of their distributions over keys."""

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        self._total = torch.zeros(trace.images, *self.shape, device=trace.device)
        self._rows = torch.zeros(self.shape)

    def add_tile(self, tile: MapTile) -> None:
        if tile.whole_rows:
            place = torch.tensor(tile.positions)
            entropies = tile.over_windows((entropy(tile.probs) if tile.entropy is None else tile.entropy).sum(-1))
            self._total[tile.images, place, tile.heads] += entropies.transpose(1, 2)
            if tile.images.start == 0:
                self._rows[place, tile.heads] += tile.windows * (tile.rows.stop - tile.rows.start)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        rows = self._rows.to(self._total.device)
        return self.add_heads(value=torch.where(rows > 0, self._total / rows, torch.nan))


class AttentionEntropy(HeadMetric):
    """Entropy of the attention distributions (Zhai et al., arXiv 2303.06296)."""

    name = "attention-entropy"
    summary = "entropy of each head's attention, in nats and as a share of log N"
    title = "Attention entropy"
    seen = f"Entropy of each head's attention. {DOTS}"
    limits = (
        "High entropy is not collapse by itself; low entropy says how sharp a head is, not whether it looks at the right place."
    )
    failure_types = ("entropy",)
    formula = r"-\frac{1}{N} \sum_i \sum_j p_{ij} \log p_{ij}"
    value_range = "0 (one key alone) to log N nats (uniform; 5.28 for 197 tokens)"
    source = "Zhai et al., arXiv 2303.06296, and its code (apple/ml-sigma-reparam)"
    traps = (
        "log N grows with the input: between input sizes compare the share of log N. After Re-attention, Refiner or "
        "talking heads the final map is no distribution and has no entropy: this one is of the softmax map."
    )
    panel = "entropy"
    unit = "nats"
    defaults = {"point": "probs"}
    variants = {}
    windowed = True

    @property
    def definition(self) -> str:
        return (
            "Mean over images and queries (prefix tokens included) of −Σ_j p_j log p_j over the keys, in nats, on the softmax "
            "(probs). details.tokens holds the number of keys N of each block and details.share the entropy over log N: 1 is "
            "uniform attention, 0 one key alone. Low is entropy collapse (arXiv 2303.06296), the opposite of near-uniform maps."
        )

    def accumulators(self) -> list[Need]:
        return [(("entropy",), lambda: EntropySums(self.plan))]

    def details(self, accumulator: EntropySums) -> dict[str, Any]:
        """The number of keys of each block, and the entropy as a share of its logarithm."""
        keys = np.array([layer.keys for layer in self.layers], dtype=np.float64)
        values, _, _ = accumulator.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(keys[:, None] > 1, values / np.log(keys)[:, None], np.nan)
        return {"tokens": keys.astype(int).tolist(), "share": share}


METRICS.add(AttentionEntropy.name, AttentionEntropy)
