"""Patch contrastive: let each deep patch still tell which shallow patch it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.capture.gradients import GradientTrace, Place, Requests, ViTParts
from collapse_probe.metrics.functional.geometry import contrast
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, Penalty

WINDOW = 7
SMALLEST = 1e-8


def neighbourhood_mean(patches_BPD: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean of each patch's neighbours in a 7×7 window without itself, [B, P, D] -> [B, P, D].

    Patches beyond the border count as zero vectors among the 48 neighbours, as in the released code of Patch Diversification.
    """
    planes_BDhw = patches_BPD.mT.reshape(*patches_BPD.mT.shape[:2], *grid)
    pooled_BDhw = F.avg_pool2d(planes_BDhw, WINDOW, stride=1, padding=WINDOW // 2)
    return (WINDOW**2 * pooled_BDhw.flatten(2).mT - patches_BPD) / (WINDOW**2 - 1)


def released_contrast(first_BPD: Tensor, last_BPD: Tensor, grid: tuple[int, int]) -> Tensor:
    """−log(p + 1e-8) of each patch, [B, P, D] twice -> [B, P]; p: softmax of its own inner product among three.

    The others are its inner products with the mean of all other patches and with that of its neighbourhood.
    """
    n = first_BPD.shape[1]
    own_BP = (first_BPD * last_BPD).sum(-1)
    all_BP = (first_BPD * (last_BPD.sum(1, keepdim=True) - last_BPD)).sum(-1) / max(n - 1, 1)
    near_BP = (first_BPD * neighbourhood_mean(last_BPD, grid)).sum(-1)
    return -(torch.softmax(torch.stack((own_BP, all_BP, near_BP)), dim=0)[0] + SMALLEST).log()


@dataclass(frozen=True)
class PatchContrastive(Penalty):
    """−log of how surely a deep patch is nearer to its own shallow patch than to the others', the mean over patches.

    form="paper": Patch Diversification's equation (arXiv 2104.12753): inner products of the patches that leave the first and
    the last block, against the mean of the others; that the first is held fixed is our reading. form="repository": its
    released code: patch embeddings before CLS and positions, held fixed, against the final norm's output, and the mean of a
    7×7 neighbourhood as a second negative. form="diverse-vit": cosines between the patches that enter the first block and
    leave the last, gradients through both (arXiv 2203.06345, released code). Inner products grow with the width and overflow
    no softmax here, but the first two forms are as large as they are.
    """

    form: Literal["paper", "repository", "diverse-vit"] = "paper"

    name = "patch-contrastive"
    summary = "each deep patch must still be nearest to its own shallow patch"
    source = "Patch Diversification, arXiv 2104.12753; Diverse-ViT, arXiv 2203.06345"
    metric = "patch-diversity"
    direction = "up"
    needs = ("tokens",)

    def _places(self, parts: ViTParts) -> tuple[Place, Place]:
        if self.form == "repository":
            return "embedded", "normed"
        return (1 if self.form == "paper" else 0), parts.depth

    def requests(self, parts: ViTParts) -> Requests:
        return Requests(places=frozenset(self._places(parts)))

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over images and patches."""
        first_BPD, last_BPD = (trace.patches(place) for place in self._places(trace.parts))
        if self.form == "diverse-vit":
            return contrast(first_BPD, last_BPD).mean()
        if self.form == "paper":
            return contrast(first_BPD.detach(), last_BPD, directions=False).mean()
        return released_contrast(first_BPD.detach(), last_BPD, trace.parts.grid(last_BPD.shape[1])).mean()


PENALTIES.add(PatchContrastive.name, PatchContrastive)
