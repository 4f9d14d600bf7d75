"""How widely does each head spread its attention?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.metrics.accumulators import Means
from collapse_probe.metrics.map_metric import MapMetric
from collapse_probe.metrics.metric import DOTS, Need, mean_over_images, no_token_maps
from collapse_probe.metrics.nulls import untrained_only
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult
from collapse_probe.statistics.intervals import Array


def entropy(probs: Tensor) -> Tensor:
    """Shannon entropy of distributions along the last axis, [..., N] -> [...], in nats, 0 … log N; 0·log 0 is 0.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [0.6931471824645996, -0.0]
    """
    floor = torch.finfo(probs.dtype).tiny
    return -probs.clamp_min(floor).log_().mul_(probs).sum(-1)


class EntropySums(Means):
    """Per image the mean over queries of the entropy of their distributions over keys."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.shape = (len(plan.map_layers), max((heads for heads, _, _ in plan.groups()), default=1))
        self.add_means(value=self.shape, over_heads=self.shape[:1])

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        """Make room for a batch."""
        self._total = torch.zeros(trace.images, *self.shape)
        self._rows = torch.zeros(self.shape)

    def add_tile(self, tile: MapTile) -> None:
        """Add the rows of a tile."""
        if tile.whole_rows:
            sums_bLh = entropy(tile.probs).sum(-1).transpose(1, 2).cpu()
            place = torch.tensor(tile.positions)
            self._total[tile.images, place, tile.heads] += sums_bLh
            if tile.images.start == 0:
                self._rows[place, tile.heads] += tile.rows.stop - tile.rows.start

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Close the batch."""
        values = torch.where(self._rows > 0, self._total / self._rows, torch.nan)
        self.add_images("value", values)
        mean = values.nanmean(-1)
        self.add_images("over_heads", mean)
        return {"value": mean}


class AttentionEntropy(MapMetric):
    """Entropy of the attention distributions (Zhai et al., arXiv 2303.06296)."""

    name = "attention-entropy"
    summary = "entropy of each head's attention, in nats and as a share of log N"
    dims = ("block", "head")
    title = "Attention entropy"
    seen = f"Entropy of each head's attention. {DOTS}"
    limits = (
        "High entropy is not collapse by itself; low entropy says how sharp a head is, not whether it looks at the right place."
    )
    panel = "entropy"
    unit = "nats"
    defaults = {"point": "probs"}
    variants = {}

    def inapplicable(self) -> str:
        """Windowed, pooled and channel attention has no map over the image's tokens."""
        return no_token_maps(self.plan)

    @property
    def definition(self) -> str:
        """The definition in words."""
        return (
            "Mean over images and queries (prefix tokens included) of −Σ_j p_j log p_j over the keys, in nats, on the softmax "
            "(probs). details.tokens holds the number of keys N of each block and details.share the entropy over log N: 1 is "
            "uniform attention, 0 one key alone. Low is entropy collapse (arXiv 2303.06296), the opposite of near-uniform maps."
        )

    def needs(self) -> dict[str, Need]:
        """Entropies by block and head."""
        return {"entropy": (("entropy",), lambda: EntropySums(self.plan))}

    def read(self, folds: Mapping[str, Any], records: Mapping[str, Mapping[str, Array]]) -> MetricResult:
        """Entropies in nats with intervals, and as a share of log N."""
        facts = mean_over_images(folds["entropy"])
        means = mean_over_images(folds["entropy"], "over_heads")
        keys = np.array([self.plan.layers[i].keys for i in self.plan.map_layers], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(keys[:, None] > 1, facts["values"] / np.log(keys)[:, None], np.nan)
        return self.reading(
            **facts,
            point="probs",
            details={"unit": "nats", "tokens": keys.astype(int).tolist(), "share": share},
            head_mean=(means["values"], means["stderr"], means["ci95"]),
            nulls=untrained_only(),
        )

    def per_image(self, records: Mapping[str, Mapping[str, Array]]) -> Array | None:
        """Mean over heads, [images, blocks]."""
        return records["entropy"]["value"]


METRICS.add(AttentionEntropy.name, AttentionEntropy)
