"""Patch cosine: keep the patches of an image different from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from collapse_probe.capture.gradients import GradientTrace, Requests, ViTParts
from collapse_probe.metrics.functional.geometry import anchored, defined_mean, mean_cosine
from collapse_probe.metrics.tokens.patch_diversity import patch_cosine
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, Penalty


@dataclass(frozen=True)
class PatchCosine(Penalty):
    """Mean cosine between the patches of an image, where they leave the last block (or at `depth`), before any final norm.

    form="paper": P(h) = 1/(n(n−1)) Σ_{i≠j} |cos(h_i, h_j)|, the metric itself (Patch Diversification, arXiv 2104.12753; its
    released code has no such term). form="repository": 1/n² Σ_ij cos(h_i, h_j), signed and with the diagonal, as Diverse-ViT
    (arXiv 2203.06345) trained; opposite patches cancel there, so that it can vanish while all patches lie on one line, which
    the metric calls collapse. Images without two patches that have a direction do not count.
    """

    form: Literal["paper", "repository"] = "paper"
    depth: int | None = None

    name = "patch-cosine"
    summary = "the mean cosine between different patches of an image"
    source = "Patch Diversification, arXiv 2104.12753; Diverse-ViT, arXiv 2203.06345"
    metric = "patch-diversity"
    direction = "up"
    needs = ("tokens",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None:
            self._whole("depth", 0)

    def _place(self, parts: ViTParts) -> int:
        return parts.depth if self.depth is None else self.depth

    def requests(self, parts: ViTParts) -> Requests:
        return Requests(places=frozenset({self._place(parts)}))

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        patches_BPD = trace.patches(self._place(trace.parts))
        if self.form == "repository":
            return mean_cosine(patches_BPD).mean()
        return defined_mean(patch_cosine(anchored(patches_BPD)))


PENALTIES.add(PatchCosine.name, PatchCosine)
