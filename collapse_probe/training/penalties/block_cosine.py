"""Block cosine: keep the maps of consecutive blocks different."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from collapse_probe.capture.gradients import GradientTrace, Requests, ViTParts
from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.geometry import axis_cosine
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, Penalty


@dataclass(frozen=True)
class BlockCosine(Penalty):
    """Mean cosine between the maps of consecutive blocks along the axis of heads, the first `pairs` pairs of blocks.

    mean over pairs, images, queries i and keys j of cos(A_l[:, i, j], A_{l+1}[:, i, j]): DeepViT's released code (arXiv
    2103.11886), on what multiplies V, with 12 pairs in its 32-block recipe; a shallower model has fewer. These vectors of H
    heads are not those of DeepViT's Eq. 2, which attention-similarity compares; axis="column" takes those instead (per head and
    key, along the queries), "row" those along the keys. `point` "weights" (what multiplies V, released) or "probs".
    """

    pairs: Annotated[int, "[1, inf)"] = 12
    axis: Literal["head", "column", "row"] = "head"
    point: Literal["weights", "probs"] = "weights"

    name = "block-cosine"
    summary = "the mean cosine between the maps of consecutive blocks"
    source = "DeepViT, arXiv 2103.11886 (released code)"
    metric = "attention-similarity"
    direction = "down"
    needs = ("attention",)

    def _blocks_of(self, parts: ViTParts) -> range:
        return range(min(self.pairs + 1, parts.depth))

    def requests(self, parts: ViTParts) -> Requests:
        if parts.depth < 2:
            raise SettingError(f"{self.name} compares two blocks; {parts.kind} has one")
        return Requests(maps=frozenset(self._blocks_of(parts)))

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over pairs of blocks, images, and vectors."""
        dim = {"head": 1, "column": 2, "row": 3}[self.axis]
        maps = [trace.maps(i, self.point) for i in self._blocks_of(trace.parts)]
        return torch.stack([axis_cosine(a, b, dim).mean() for a, b in pairwise(maps)]).mean()


PENALTIES.add(BlockCosine.name, BlockCosine)
