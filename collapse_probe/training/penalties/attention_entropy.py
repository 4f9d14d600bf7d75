"""Attention entropy: keep heads between seeing everything and seeing one key alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from collapse_probe.capture.gradients import GradientTrace, Requests, ViTParts
from collapse_probe.errors import SettingError
from collapse_probe.metrics.attention.attention_entropy import entropy
from collapse_probe.registry import PENALTIES
from collapse_probe.settings import between
from collapse_probe.training.penalties.base import Direction, Inputs, Penalty


@dataclass(frozen=True)
class AttentionEntropy(Penalty):
    """A hinge on the entropy of each head as a share of log N: max(0, low − share) + max(0, share − high).

    The share is that of the head's mean entropy over queries, per image; mean over images, heads and the chosen `blocks`
    (None: all). 0 inside the bounds. A `low` bound works against entropy collapse (arXiv 2303.06296, which bounds entropy by
    reparametrising weights, not by a loss), a `high` one against maps that are all near-uniform; None leaves that side open.
    The hinge is this project's own.
    """

    low: float | None = 0.1
    high: float | None = 0.9
    blocks: tuple[int, ...] | None = None

    name = "attention-entropy"
    summary = "a hinge that keeps each head's entropy between two bounds"
    source = "this project; entropy as in arXiv 2303.06296"
    metric = "attention-entropy"
    direction = "between"
    needs = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for bound in ("low", "high"):
            value = getattr(self, bound)
            if value is not None and not between(value, 0, 1):
                raise SettingError(f"{self.name}: {bound} must be a number in [0, 1] or None, not {value!r}")
        if self.low is None and self.high is None:
            raise SettingError(f"{self.name}: give low, high or both, as shares of log N from 0 to 1")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise SettingError(f"{self.name}: low {self.low} must not be above high {self.high}")

    def moves(self) -> tuple[str, Direction]:
        """Up with a lower bound alone, down with an upper bound alone."""
        direction: Direction = "up" if self.high is None else "down" if self.low is None else "between"
        return self.metric, direction

    def requests(self, parts: ViTParts) -> Requests:
        return Requests(maps=frozenset(parts.block_numbers(self.blocks)))

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over images, heads and blocks."""
        return torch.stack([self._of(trace.maps(i)) for i in trace.parts.block_numbers(self.blocks)]).mean()

    def _of(self, probs_BHNN: Tensor) -> Tensor:
        keys = probs_BHNN.shape[-1]
        share_BH = entropy(probs_BHNN).mean(-1) / math.log(max(keys, 2))
        below = torch.zeros_like(share_BH) if self.low is None else (self.low - share_BH).clamp_min(0)
        above = torch.zeros_like(share_BH) if self.high is None else (share_BH - self.high).clamp_min(0)
        return (below + above).mean()


PENALTIES.add(AttentionEntropy.name, AttentionEntropy)
