"""What a model costs to run: parameters, floating-point operations of one image, images in a second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from collapse_probe.devices import floating_like

RUNS, SECONDS, MOST_RUNS = 5, 1.0, 20
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
UNCOUNTED: dict[Any, Any] = {}
"""Fused attention on a CPU, where this release of torch leaves it out of its count."""
if _CPU_ATTENTION not in flop_registry:
    UNCOUNTED[_CPU_ATTENTION] = lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Cost:
    """`flops` of one image (a multiplication and an addition are two; None with the reason in `note`).

    `images_per_second` is the median of `runs` plain forward passes without gradients, after one to warm
    up, on noise in batches of `batch_size` on `device`.
    """

    parameters: int
    flops: int | None
    images_per_second: float
    batch_size: int
    device: str
    runs: int
    note: str = ""


def measure_cost(model: nn.Module, shape: tuple[int, int, int], batch_size: int) -> Cost:
    """Count and time a model in eval mode, where it lies, on images of `shape` (channels, height, width)."""
    like = floating_like(model)
    device = like.device
    noise = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device, like.dtype)
    flops, note = count_flops(model, noise[:1])
    seconds: list[float] = []
    with torch.no_grad():
        model(noise)
        while len(seconds) < RUNS or (sum(seconds) < SECONDS and len(seconds) < MOST_RUNS):
            _synchronize(device)
            start = time.perf_counter()
            model(noise)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops,
        images_per_second=batch_size / float(np.median(seconds)),
        batch_size=batch_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {threads_in_words()}",
        runs=len(seconds),
        note=note,
    )


def threads_in_words() -> str:
    """How many threads compute on a CPU."""
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


@torch.no_grad()
def count_flops(model: nn.Module, images: Tensor) -> tuple[int | None, str]:
    """Operations of one forward pass of `images` [B, C, height, width]; None and the reason where they cannot be counted."""
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    try:
        with counter:
            model(images)
    except Exception as error:  # models with operations of their own fail in many ways under a dispatch mode
        return None, f"operations cannot be counted: {type(error).__name__}"
    return int(counter.get_total_flops()), ""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
