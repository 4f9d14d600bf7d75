"""A model with its losses: one forward pass of training, as data parallelism wraps it; and how batches are mixed before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.devices import autocast
from collapse_probe.errors import ModelError
from collapse_probe.registry import PENALTIES
from collapse_probe.seeding import seed_of, seeded
from collapse_probe.training.penalties.base import MixedLabels, ModelPenalties
from collapse_probe.training.recipe import PenaltyTerm, Recipe

MIX = 4  # what a random stream is for


@dataclass(frozen=True)
class Mixed:
    """A batch as the loss takes it: `images` [B, C, height, width], `targets_BK`, and `patch_targets_BPK` or None."""

    images: Tensor
    targets_BK: Tensor
    patch_targets_BPK: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments of `TrainingLoss.forward`."""
        return tuple(x for x in (self.images, self.targets_BK, self.patch_targets_BPK) if x is not None)


class Mixer:
    """Smooths and mixes batches as a recipe says; with `patch`, the side of a patch in pixels, also makes targets by patch."""

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
            return Mixed(images, own_BK)  # every patch has the label of its image
        front_B111 = (torch.arange(len(images), device=images.device) < len(images) // 2).to(images.dtype)[:, None, None, None]
        marked = torch.cat((images, front_B111.expand(-1, 1, *images.shape[2:])), dim=1)
        with seeded(seed_of(self.recipe.seed, MIX, step)):
            mixed, targets_BK = self._mixup(marked, labels)
        patch_targets_BPK = None
        if self.patch is not None:
            shares_BP1 = patch_shares(mixed[:, -1:], front_B111, self.patch)[..., None]
            patch_targets_BPK = shares_BP1 * own_BK[:, None] + (1 - shares_BP1) * own_BK.flip(0)[:, None]
        return Mixed(mixed[:, :-1], targets_BK.to(images.dtype), patch_targets_BPK)


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


CROSS_ENTROPY = "cross entropy"


class TrainingLoss(nn.Module):
    """[B, C, height, width] and targets -> the loss terms [1 + penalties], unweighted and in float32.

    `terms` names them, `weights` are their coefficients: 1 for the cross entropy, 0 where a penalty contains it (Diverse-ViT's
    mixing). Penalties read the same forward pass as the cross entropy; their own parameters are part of this module.
    """

    weights: Tensor

    def __init__(self, model: nn.Module, penalties: Mapping[str, PenaltyTerm], amp: str | None = None) -> None:
        super().__init__()
        self.model, self.amp = model, amp
        self.terms = (CROSS_ENTROPY, *penalties)
        terms = {name: PENALTIES[name].with_settings(settings) for name, (_, settings) in penalties.items()}
        own = 0.0 if any(penalty.replaces_criterion for penalty in terms.values()) else 1.0
        weights = torch.tensor([own, *(weight for weight, _ in penalties.values())])
        self.register_buffer("weights", weights, persistent=False)
        self.penalties = ModelPenalties(model, terms) if terms else None

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers leave without weight decay, as the model says."""
        own = getattr(self.model, "no_weight_decay", None)
        return {f"model.{name}" for name in own()} if callable(own) else set()

    def forward(self, images: Tensor, targets_BK: Tensor, patch_targets_BPK: Tensor | None = None) -> Tensor:
        """The terms; ModelError where the model does not return logits [B, K]."""
        with autocast(images.device, self.amp):
            if self.penalties is None:
                return cross_entropy(self.model(images), targets_BK)[None]
            with self.penalties.recording():
                logits = self.model(images)
            terms = self.penalties.terms(MixedLabels(targets_BK, patch_targets_BPK))
        return torch.stack([cross_entropy(logits, targets_BK), *(terms[name].float() for name in self.terms[1:])])


def cross_entropy(logits: Any, targets_BK: Tensor) -> Tensor:
    """Mean cross entropy in nats, in float32: [B, K] twice -> []. Raises ModelError for logits of another shape."""
    if not isinstance(logits, Tensor) or logits.shape != targets_BK.shape:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"in training the model must return logits {list(targets_BK.shape)}, came {came}")
    return F.cross_entropy(logits.float(), targets_BK)


def needs_patch_targets(penalties: Mapping[str, PenaltyTerm]) -> bool:
    """Whether any of these penalties needs the labels of patches."""
    return any("labels" in PENALTIES[name].needs for name in penalties)
