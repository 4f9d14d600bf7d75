"""How well a model in training does on the held-out images, with its BatchNorm statistics as they should be."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.devices import autocast
from collapse_probe.processes import gathered, rank_and_world
from collapse_probe.recalibration import recalibrate


@torch.no_grad()
def score(model: nn.Module, held_out: Iterable[tuple[Tensor, Tensor]], amp: str | None = None) -> tuple[float, float]:
    """Top-1 accuracy (a share) and mean cross entropy (nats) of a model in eval mode, over all processes."""
    right = images = 0
    loss = 0.0
    for pixels, labels in held_out:
        with autocast(pixels.device, amp):
            logits = model(pixels)
        right += int((logits.argmax(dim=-1) == labels).sum())
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        images += len(labels)
    found = gathered((right, loss, images))
    right, loss, images = (sum(each[i] for each in found) for i in range(3))
    return right / images, loss / images


def settled(model: nn.Module, plain: Iterable[Tensor], count: int) -> nn.Module:
    """A copy of the model in eval mode, with BatchNorm re-estimated over `count` plain batches where it has any.

    The model itself stays as it is. Processes agree on the statistics: they read the same batches, or take
    those of the first process.
    """
    twin = copy.deepcopy(model).eval()
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    if norms and count:
        recalibrate(twin, plain, count)
    elif norms and rank_and_world()[1] > 1:
        for norm in norms:
            for buffer in norm.buffers():
                dist.broadcast(buffer, src=0)
    return twin
