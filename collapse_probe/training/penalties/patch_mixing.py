"""Patch mixing: let every patch name the image that it was cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from collapse_probe.capture.gradients import GradientTrace, Requests, ViTParts
from collapse_probe.errors import SettingError
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, MixedLabels, Penalty

RELEASED_DROPOUT = 0.2


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−Σ_k y_k log softmax(logits)_k, [..., K] twice -> [...], nats."""
    return -(targets * logits.log_softmax(-1)).sum(-1)


def two_regions(targets_BPK: Tensor) -> Tensor:
    """Which patches carry the label of the image's first patch, and which another, as 0 and 1, [B, P, K] -> [B, P, 2]."""
    alike_BP = torch.isclose(targets_BPK, targets_BPK[:, :1]).all(-1)
    return torch.stack((alike_BP, ~alike_BP), dim=-1).to(targets_BPK.dtype)


def region_divergence(logits_BRK: Tensor, targets_BRK: Tensor, shares_BR: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(y ‖ softmax(logits)) of each region, weighted by its share of the image, -> [B]."""
    entropy_BR = -torch.xlogy(targets_BRK, targets_BRK).sum(-1)
    return (shares_BR * (cross_entropy(logits_BRK, targets_BRK) - entropy_BR)).sum(-1)


def _mean_in(regions_BPR: Tensor, values_BPX: Tensor) -> Tensor:
    return regions_BPR.mT @ values_BPX / regions_BPR.sum(1).clamp_min(1)[..., None]


@dataclass(frozen=True)
class PatchMixing(Penalty):
    """Cross-entropy of the patches with the label of the image that they were cut from, behind the final norm.

    form="diverse-vit": the model's own head on CLS and all patches, (CE_cls + Σ_i CE_i) / (1 + n) (arXiv 2203.06345, released
    code); it holds the classification loss already (`replaces_criterion`). form="paper": a linear head of the penalty's own,
    shared by the patches, mean over patches (Patch Diversification, arXiv 2104.12753). form="repository": its released code:
    the mean patch of each of the two mixed regions, dropout, an own head, KL divergence weighted by area; regions are read from
    the patch labels, so the mix must keep to the grid of patches. Needs labels.
    """

    form: Literal["paper", "repository", "diverse-vit"] = "paper"

    name = "patch-mixing"
    summary = "every patch must name the image that it was cut from"
    source = "Patch Diversification, arXiv 2104.12753; Diverse-ViT, arXiv 2203.06345"
    metric = "patch-diversity"
    direction = "up"
    needs = ("tokens", "labels")

    @property
    def replaces_criterion(self) -> bool:
        """Diverse-ViT's form holds the loss of CLS."""
        return self.form == "diverse-vit"

    def requests(self, parts: ViTParts) -> Requests:
        parts.classes()
        return Requests(places=frozenset({"normed"}))

    def own(self, parts: ViTParts) -> nn.Module | None:
        """The head for patches."""
        if self.form == "diverse-vit":
            return None
        head = nn.Linear(parts.width, parts.classes())
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head if self.form == "paper" else nn.Sequential(nn.Dropout(RELEASED_DROPOUT), head)

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        if inputs.labels is None:
            raise SettingError("patch-mixing needs labels: call terms(MixedLabels(targets_BK, patch_targets_BPK))")
        patches_BPD = trace.patches("normed")
        if self.form == "diverse-vit":
            return self._with_cls(trace, inputs.labels)
        targets_BPK = inputs.labels.of_patches(patches_BPD.shape[1]).to(patches_BPD.dtype)
        assert inputs.own is not None
        if self.form == "paper":
            return cross_entropy(inputs.own(patches_BPD), targets_BPK).mean()
        regions_BPR = two_regions(targets_BPK)
        logits_BRK = inputs.own(_mean_in(regions_BPR, patches_BPD))
        return region_divergence(logits_BRK, _mean_in(regions_BPR, targets_BPK), regions_BPR.mean(1)).mean()

    def _with_cls(self, trace: GradientTrace, labels: MixedLabels) -> Tensor:
        """CLS, which is the first token, and the patches with the model's head."""
        tokens_BND, patches_BPD = trace.tokens("normed"), trace.patches("normed")
        if tokens_BND.shape[1] == patches_BPD.shape[1]:
            raise SettingError("patch-mixing: form 'diverse-vit' needs a class token, which this model has not; take 'paper'")
        logits_BNK = trace.parts.logits(torch.cat((tokens_BND[:, :1], patches_BPD), dim=1)).float()
        targets_BPK = labels.of_patches(patches_BPD.shape[1])
        targets_BNK = torch.cat((labels.targets_BK[:, None], targets_BPK), dim=1)
        return cross_entropy(logits_BNK, targets_BNK.to(logits_BNK.dtype)).mean()


PENALTIES.add(PatchMixing.name, PatchMixing)
