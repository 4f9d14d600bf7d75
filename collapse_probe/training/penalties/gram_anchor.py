"""Gram anchor: the similarities between patches stay where they were in an earlier model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from collapse_probe.capture.gradients import GradientTrace, Place, Requests, ViTParts, record_with_gradients
from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.gram import gram_drift
from collapse_probe.models.checkpoints import load_checkpoint
from collapse_probe.registry import PENALTIES
from collapse_probe.training.penalties.base import Inputs, Penalty

START = "start"


class Anchor(nn.Module):
    """A frozen copy of a model in eval mode: its weights are buffers, so that they are saved and no optimizer sees them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        frozen: dict[int, Tensor] = {}
        for module in self.model.modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                delattr(module, name)
                module.register_buffer(name, frozen.setdefault(id(parameter), parameter.detach()))
        self.eval()

    def train(self, mode: bool = True) -> Anchor:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def patches(self, images: Tensor, place: Place) -> Tensor:
        """The patch tokens of images at a place, [B, C, height, width] -> [B, P, D]."""
        parts = ViTParts(self.model)
        with record_with_gradients(parts, Requests(places=frozenset({place}))) as traces:
            self.model(images)
        return traces[0].patches(place)


@dataclass(frozen=True)
class GramAnchor(Penalty):
    """mean over images and ij of (S_ij − T_ij)²: S the cosines between the patches, T those of a frozen anchor on these images.

    DINOv3's GramLoss (arXiv 2508.10104, dinov3/loss/gram_loss.py) at the level of images, behind the final norm, or where the
    patches leave block `depth` − 1. `negatives` "zero" takes negative cosines of both as 0, the default of that class; "keep"
    takes them as they are, as all released training configurations do. `anchor` is the model as it starts, or a checkpoint
    file of the same model; there it is an earlier state of the teacher. The anchor sees the images as the model gets them.
    """

    anchor: str = START
    negatives: Literal["zero", "keep"] = "zero"
    depth: int | None = None

    name = "gram-anchor"
    summary = "the cosines between patches stay near those of a frozen anchor"
    source = "DINOv3, arXiv 2508.10104"
    metric = "patch-diversity"
    direction = "between"
    needs = ("tokens",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None:
            self._whole("depth", 0)
        if self.anchor != START and not Path(self.anchor).exists():
            raise SettingError(f"{self.name}: anchor must be '{START}' or a checkpoint file, and there is no {self.anchor!r}")

    def _place(self) -> Place:
        return "normed" if self.depth is None else self.depth

    def requests(self, parts: ViTParts) -> Requests:
        return Requests(places=frozenset({self._place()}))

    def own(self, parts: ViTParts) -> nn.Module | None:
        """The anchor."""
        anchor: Any = copy.deepcopy(parts.model) if self.anchor != START else parts.model
        if self.anchor != START:
            load_checkpoint(anchor, self.anchor)
        return Anchor(anchor)

    def loss(self, trace: GradientTrace, inputs: Inputs) -> Tensor:
        """The mean over images."""
        assert isinstance(inputs.own, Anchor)
        held_BPD = inputs.own.patches(trace.images(), self._place())
        return gram_drift(trace.patches(self._place()), held_BPD, self.negatives).mean()


PENALTIES.add(GramAnchor.name, GramAnchor)
