"""Two models on the same images at the same time: the patch tokens of both, a few images after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee

import torch
from torch import Tensor, nn

from collapse_probe.analysis.measurement import Images, model_input, plan_of, with_input
from collapse_probe.analysis.state.memory import alike
from collapse_probe.capture.capture import record
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import micro_batch
from collapse_probe.data.images import OwnImages, batches_of, from_loader, images_from
from collapse_probe.data.loading import Batch
from collapse_probe.devices import autocast, choose_device, floating_like
from collapse_probe.models.loading import Subject

Patches = list[Tensor | None]
"""[B, P, D] in float32 at each depth; None where it has none."""


class JointPass:
    """Both models' plans, and an iteration over the images that both can read, each through its own model's preprocessing.

    `images` as `analyze` takes them (an iterable's pixels go to both models as they are); `limit` is a seeded subset. `amp` is
    a dtype of autocast. Raises SettingError for a limit of an iterable, CaptureError where a model cannot be captured.
    """

    def __init__(
        self,
        first: Subject,
        second: Subject,
        images: Images,
        *,
        batch_size: int = 64,
        device: str = "auto",
        limit: int | None = None,
        workers: int = 0,
        amp: str | None = None,
        seed: int = 0,
    ) -> None:
        self.device, self.amp, self.batch_size, self.workers = choose_device(device), amp, batch_size, workers
        self.images = images_from(images, limit=limit, seed=seed)
        self.subjects = with_input(first, self.images), with_input(second, self.images)
        self.plans = [plan_of(subject, device, seed) for subject in self.subjects]

    def __iter__(self) -> Iterator[tuple[list[str], Patches, Patches]]:
        """Names of some images, and their patches in the first and in the second model."""
        if isinstance(self.images, OwnImages):
            streams = [*tee(from_loader(self.images))]
        else:
            streams = [batches_of(self.images, each.preprocess, self.batch_size, self.workers) for each in self.subjects]
        step = min(micro_batch(plan, self.device) for plan in self.plans)
        for one, other in zip(*streams, strict=True):
            for names, *pixels in _pairs(one, other, step):
                with torch.no_grad():
                    first, second = (
                        patches_by_depth(subject.model, plan, x, self.amp, self.device)
                        for subject, plan, x in zip(self.subjects, self.plans, pixels, strict=True)
                    )
                yield names, first, second


def _pairs(one: Batch, other: Batch, step: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Names and pixels of the images that both batches hold, a few at a time."""
    places = {index: row for row, index in enumerate(other.indices)}
    rows = [(row, places[index]) for row, index in enumerate(one.indices) if index in places]
    for start in range(0, len(rows), step):
        mine, others = zip(*rows[start : start + step], strict=True)
        yield [one.names[row] for row in mine], one.pixels[list(mine)], other.pixels[list(others)]


def patches_by_depth(
    model: nn.Module, plan: Plan, pixels: Tensor, amp: str | None, device: torch.device
) -> list[Tensor | None]:
    """The patch tokens of one model at each depth."""
    count = len(pixels)
    if missing := -count % alike(plan, device):
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
    images = model_input(pixels, plan, floating_like(model))
    with record(model, plan) as recordings, autocast(images.device, amp):
        model(images)
    trace = recordings.take().first(count)
    return [trace.patches(depth) for depth in range(len(trace.tokens))]
