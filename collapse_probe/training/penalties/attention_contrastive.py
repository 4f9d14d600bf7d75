"""Attention contrastive: let each head still be itself in a later block, and no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from collapse_probe.capture.gradients import GradientTrace, Requests, ViTParts
from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.geometry import contrast
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, Penalty


@dataclass(frozen=True)
class AttentionContrastive(Penalty):
    """−log of how surely a head's map is nearer to the same head's map in another block than to the other heads'.

    −log[e^{s_hh} / (e^{s_hh} + e^{mean_{g≠h} s_hg})], s_hg the cosine of head h of the first and head g of the last of the two
    chosen `blocks` (None: the model's first and last), maps flattened; mean over images and heads. Diverse-ViT's released code
    (arXiv 2203.06345) has it, and does not train with it. `point` as in attention-cosine.
    """

    blocks: tuple[int, ...] | None = None
    point: Literal["probs", "weights"] = "probs"

    name = "attention-contrastive"
    summary = "each head's map must be nearer to its own in another block than to other heads'"
    source = "Diverse-ViT, arXiv 2203.06345 (released code)"
    metric = "head-similarity"
    direction = "down"
    needs = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and len(self.blocks) != 2:
            raise SettingError(f"{self.name}: blocks must be two block numbers, not {self.blocks!r}")

    def _pair(self, parts: ViTParts) -> tuple[int, int]:
        first, *_, last = parts.block_numbers(self.blocks or (0, parts.depth - 1))
        return first, last

    def requests(self, parts: ViTParts) -> Requests:
        if parts.depth < 2:
            raise SettingError(f"{self.name} compares two blocks; {parts.kind} has one")
        return Requests(maps=frozenset(self._pair(parts)))

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over images and heads."""
        first, last = (trace.maps(i, self.point).flatten(2) for i in self._pair(trace.parts))
        return contrast(first, last).mean()


PENALTIES.add(AttentionContrastive.name, AttentionContrastive)
