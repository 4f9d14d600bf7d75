"""Targets of a batch: smoothed, mixed by timm's Mixup and CutMix, and for each patch where a penalty wants that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse_probe.recipe import Recipe
from collapse_probe.run_state import drawn_under, seed_of

MIX = 4  # what a random stream is for


@dataclass(frozen=True)
class Mixed:
    """A batch ready to be learned: `images` [B, C, height, width], `targets_BK`, and `patch_targets_BPK`
    where they were asked for.
    """

    images: Tensor
    targets_BK: Tensor
    patch_targets_BPK: Tensor | None = None


class Mixer:
    """Smooths and mixes batches as a recipe says; `patch` is the side of a patch in pixels where targets for
    each patch are wanted.
    """

    def __init__(self, recipe: Recipe, classes: int, patch: int | None = None) -> None:
        self.recipe, self.classes, self.patch = recipe, classes, patch
        self._mixup: Any = None
        if recipe.mixup > 0 or recipe.cutmix > 0:
            from timm.data import mixup

            make: Any = mixup.Mixup  # untyped
            settings = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix, "switch_prob": recipe.switch}
            self._mixup = make(**settings, label_smoothing=recipe.label_smoothing, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> Mixed:
        """The batch of a step, mixed as drawn under the recipe's seed and the step."""
        own_BK = smoothed(labels, self.classes, self.recipe.label_smoothing)
        if self._mixup is None:
            shares_BP = None if self.patch is None else torch.ones(len(images), self._patches(images), device=images.device)
            return Mixed(images, own_BK, self._patch_targets(own_BK, shares_BP))
        front_B111 = (torch.arange(len(images), device=images.device) < len(images) // 2).to(images.dtype)[:, None, None, None]
        marked = torch.cat((images, front_B111.expand(-1, 1, *images.shape[2:])), dim=1)
        with drawn_under(seed_of(self.recipe.seed, MIX, step)):
            mixed, targets_BK = self._mixup(marked, labels)
        shares_BP = None if self.patch is None else patch_shares(mixed[:, -1:], front_B111, self.patch)
        return Mixed(mixed[:, :-1], targets_BK.to(images.dtype), self._patch_targets(own_BK, shares_BP))

    def _patches(self, images: Tensor) -> int:
        assert self.patch is not None
        return int(images.shape[2] // self.patch) * int(images.shape[3] // self.patch)

    def _patch_targets(self, own_BK: Tensor, shares_BP: Tensor | None) -> Tensor | None:
        if shares_BP is None:
            return None
        shares_BP1 = shares_BP[..., None]
        return shares_BP1 * own_BK[:, None] + (1 - shares_BP1) * own_BK.flip(0)[:, None]


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot targets [B] -> [B, classes] with ε/classes off and 1 − ε + ε/classes on, as timm has them."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def patch_shares(marks_B1HW: Tensor, front_B111: Tensor, patch: int) -> Tensor:
    """What part of each patch is the image's own, [B, 1, height, width] -> [B, P].

    `marks_B1HW` is a channel that was 1 in the first half of the batch (`front_B111`) and 0 in the second
    before timm mixed each image with its mirror in the batch: x = λ·own + (1 − λ)·other, solved for λ.
    """
    own_B1HW = torch.where(front_B111 > 0, marks_B1HW, 1 - marks_B1HW)
    return F.avg_pool2d(own_B1HW, patch).flatten(1)
