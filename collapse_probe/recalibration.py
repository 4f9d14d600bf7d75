"""Re-estimates the running statistics of BatchNorm over images, as DeepViT's official evaluation silently
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import DataError, ModelError, SettingError


def recalibrate(model: nn.Module, batches: Iterable[Any], n: int = 50) -> int:
    """Replace the running mean and variance of every BatchNorm2d by their plain average over up to `n`
    batches.

    `batches` yields images [B, C, height, width], or tuples that begin with them. Each batch weighs the
    same, as with `momentum=None`. Only the BatchNorm layers are in train mode meanwhile: dropout and
    stochastic depth are off. Afterwards every module's mode and momentum is as before; if anything fails,
    the statistics are too. Returns the number of batches used.

    Source: official DeepViT (dvit_repo), which calibrates on 50 batches of training images before each
    validation; it applies to the stem and to Re-attention alike.

    Raises ModelError for a model without BatchNorm2d statistics, DataError where there are no images.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    if not norms:
        raise ModelError(f"{type(model).__name__} has no BatchNorm2d with running statistics to recalibrate")
    if n < 1:
        raise SettingError(f"recalibration needs at least one batch, not {n}")
    device = next(model.parameters()).device
    used = 0
    with _averaging(model, norms), torch.no_grad():
        for batch in islice(batches, n):
            model(_images(batch).to(device))
            used += 1
        if not used:
            raise DataError("there are no images to recalibrate BatchNorm on")
    return used


def _images(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, Sequence) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise DataError(f"expected images [B, C, height, width] to recalibrate on, not {type(images).__name__}")
    return images


@contextmanager
def _averaging(model: nn.Module, norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum, {key: value.clone() for key, value in norm.named_buffers()}) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
    except BaseException:
        for norm, _, buffers in before:
            for key, value in buffers.items():
                norm.get_buffer(key).copy_(value)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
