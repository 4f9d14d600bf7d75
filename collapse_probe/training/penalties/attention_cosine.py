"""Attention cosine: keep the heads' maps of a block different."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from collapse_probe.capture.gradients import GradientTrace, Requests, ViTParts
from collapse_probe.metrics.functional.geometry import anchored, defined_mean, mean_cosine
from collapse_probe.metrics.tokens.patch_diversity import patch_cosine
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, Penalty


@dataclass(frozen=True)
class AttentionCosine(Penalty):
    """Mean cosine between the heads' maps of one block, or of two consecutive chosen blocks, each flattened to a vector.

    1/H² Σ_gh cos(A_g, A_h) (Diverse-ViT, arXiv 2203.06345). form="repository" is signed and holds the diagonal, a floor of
    1/H; form="paper" takes absolute values of different heads alone. pairs="across" compares every head of one chosen block
    with every head of the next, absolute, as the released code's unused regulariser does. `blocks`: None is the first
    (released), or for "across" all; `point` "probs" (the softmax before dropout, released) or "weights" (what multiplies V).
    """

    form: Literal["repository", "paper"] = "repository"
    pairs: Literal["within", "across"] = "within"
    blocks: tuple[int, ...] | None = None
    point: Literal["probs", "weights"] = "probs"

    name = "attention-cosine"
    summary = "the mean cosine between the heads' maps of a block"
    source = "Diverse-ViT, arXiv 2203.06345"
    metric = "head-similarity"
    direction = "down"
    needs = ("attention",)

    def _blocks_of(self, parts: ViTParts) -> tuple[int, ...]:
        if self.blocks is None and self.pairs == "within":
            return (0,)
        return parts.block_numbers(self.blocks)

    def requests(self, parts: ViTParts) -> Requests:
        return Requests(maps=frozenset(self._blocks_of(parts)))

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over images and blocks (or pairs of blocks); 0 where there is no pair."""
        maps = [trace.maps(i, self.point).flatten(2) for i in self._blocks_of(trace.parts)]
        if self.pairs == "across":
            values = [mean_cosine(a, b, absolute=True) for a, b in pairwise(maps)]
        elif self.form == "repository":
            values = [mean_cosine(a) for a in maps]
        else:
            values = [patch_cosine(anchored(a)) for a in maps]
        return torch.stack([defined_mean(each) for each in values]).mean() if values else maps[0].sum() * 0


PENALTIES.add(AttentionCosine.name, AttentionCosine)
