"""A model with its losses: what one forward pass of training computes, and what data parallelism wraps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.devices import autocast
from collapse_probe.errors import ModelError
from collapse_probe.mixing import Mixed
from collapse_probe.penalty import MixedLabels, Penalised
from collapse_probe.recipe import PenaltyTerm
from collapse_probe.sockets import PENALTIES

CROSS_ENTROPY = "cross entropy"


class Lesson(nn.Module):
    """[B, C, height, width] and targets -> the loss terms [1 + penalties], unweighted and in float32.

    `terms` names them, `weights` are their coefficients: 1 for the cross entropy, 0 where a penalty holds it
    already (Diverse-ViT's mixing). Penalties hear the very forward pass whose logits are judged; what they
    own is part of this module.
    """

    weights: Tensor

    def __init__(self, model: nn.Module, penalties: Mapping[str, PenaltyTerm], amp: str | None = None) -> None:
        super().__init__()
        self.model, self.amp = model, amp
        self.terms = (CROSS_ENTROPY, *penalties)
        made = {name: PENALTIES[name].with_settings(settings) for name, (_, settings) in penalties.items()}
        own = 0.0 if any(each.replaces_criterion for each in made.values()) else 1.0
        weights = torch.tensor([own, *(weight for weight, _ in penalties.values())])
        self.register_buffer("weights", weights, persistent=False)
        self.penalised = Penalised(model, made) if made else None

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers leave without weight decay, as the model says."""
        own = getattr(self.model, "no_weight_decay", None)
        return {f"model.{name}" for name in own()} if callable(own) else set()

    def forward(self, images: Tensor, targets_BK: Tensor, patch_targets_BPK: Tensor | None = None) -> Tensor:
        """The terms; ModelError where the model does not answer with logits [B, K]."""
        with autocast(images.device, self.amp):
            if self.penalised is None:
                return cross_entropy(self.model(images), targets_BK)[None]
            with self.penalised.listening():
                logits = self.model(images)
            found = self.penalised.terms(MixedLabels(targets_BK, patch_targets_BPK))
        terms = [cross_entropy(logits, targets_BK), *(found[name].float() for name in self.terms[1:])]
        return torch.stack(terms)

    def chosen(self, batch: Mixed) -> tuple[Tensor, ...]:
        """The arguments of `forward` for a mixed batch."""
        return (batch.images, batch.targets_BK, *(() if batch.patch_targets_BPK is None else (batch.patch_targets_BPK,)))


def cross_entropy(logits: Any, targets_BK: Tensor) -> Tensor:
    """Mean cross entropy in nats, in float32: [B, K] twice -> []. Raises ModelError for logits of another shape."""
    if not isinstance(logits, Tensor) or logits.shape != targets_BK.shape:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"in training the model must answer with logits {list(targets_BK.shape)}, came {came}")
    return F.cross_entropy(logits.float(), targets_BK)


def needs_patch_targets(penalties: Mapping[str, PenaltyTerm]) -> bool:
    """Whether any of these penalties judges patches by the labels of their pixels."""
    return any("labels" in PENALTIES[name].needs for name in penalties)
