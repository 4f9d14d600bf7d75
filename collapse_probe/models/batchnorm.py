"""Re-estimates the running statistics of BatchNorm over images, as DeepViT's official evaluation silently does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.data.images import ImageSet, batches
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.devices import choose_device, floating_like, moved
from collapse_probe.errors import DataError, ModelError, SettingError
from collapse_probe.models.loading import Subject


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]


def recalibrated(
    subject: Subject, images: Any, count: int, *, batch_size: int = 64, device: str = "auto", seed: int = 0
) -> Subject:
    """The subject with the BatchNorm statistics of its model re-estimated in place over `count` batches of the images.

    The batches are a seeded draw from `images`, an ImageSet. The untrained copy is treated alike. With `count` 0 nothing is
    done; the notes say what was done, also where a model has no BatchNorm2d. SettingError for images that can be run through
    only once, or a negative count.
    """
    norms = _norms(subject.model)
    if count < 0:
        raise SettingError(f"the number of batches to recalibrate on must be 0 or more, not {count}")
    if not (count and norms):
        note = "BatchNorm recalibration: there is no BatchNorm2d with running statistics, nothing was done"
        note = note if count else "BatchNorm statistics are those that were stored; nothing was recalibrated"
        return replace(subject, notes=(*subject.notes, note)) if count or norms else subject
    if not isinstance(images, (ImageSet, ImageStream)):
        raise SettingError("recalibration reads some images twice: give a data address or an ImageSet, not an iterable")
    few, before, place = images.subset(count * batch_size, seed), subject.fresh, choose_device(device)

    def run(model: nn.Module) -> int:
        stream = batches(few, subject.preprocess, batch_size=batch_size)
        return recalibrate(moved(model, place), (batch.pixels for batch in stream if batch.names), count)

    def fresh(s: int) -> nn.Module:
        assert before is not None
        twin = before(s)
        run(twin)
        return twin

    where = f"over {run(subject.model)} batches of up to {batch_size} images"
    note = f"BatchNorm statistics of {len(norms)} layers re-estimated {where}"
    return replace(subject, fresh=None if before is None else fresh, notes=(*subject.notes, note))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], n: int = 50) -> int:
    """Replace the running mean and variance of every BatchNorm2d by their plain average over up to `n` batches.

    `batches` yields images [B, C, height, width], or tuples that begin with them. Each batch weighs the same, as with
    `momentum=None`. Only the BatchNorm layers are in train mode meanwhile: dropout and stochastic depth are off. Afterwards
    every module's mode and momentum is as before; if anything fails, the statistics are too. Returns the count of batches used.

    Source: official DeepViT (dvit_repo), which calibrates on 50 batches of training images before each validation; it applies
    to the stem and to Re-attention alike.

    Raises ModelError for a model without BatchNorm2d statistics, DataError where there are no images.
    """
    norms = _norms(model)
    if not norms:
        raise ModelError(f"{type(model).__name__} has no BatchNorm2d with running statistics to recalibrate")
    if n < 1:
        raise SettingError(f"recalibration needs at least one batch, not {n}")
    like, used = floating_like(model), 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in islice(batches, n):
            images = batch[0] if isinstance(batch, Sequence) and batch else batch
            if not isinstance(images, Tensor) or images.ndim != 4:
                raise DataError(f"expected images [B, C, height, width] to recalibrate on, not {type(images).__name__}")
            model(images.to(like.device, like.dtype))
            used += 1
        if not used:
            raise DataError("there are no images to recalibrate BatchNorm on")
    except BaseException:
        for norm, buffers in zip(norms, statistics, strict=True):
            for key, value in buffers.items():
                norm.get_buffer(key).copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return used
