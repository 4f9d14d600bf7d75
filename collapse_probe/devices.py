"""Where a run computes, how much memory it may hold there, and in which precision."""

from __future__ import annotations

import math
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from collapse_probe.errors import SettingError
from collapse_probe.processes import local_rank
from collapse_probe.trace import Plan, tile_shape

TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
TRACE_BYTES = {"cpu": 128 * 2**20, "cuda": 8 * 2**30, "mps": 1 * 2**30}
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto takes this process's GPU where there is one. Raises SettingError where it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank() % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise SettingError(f"the device {name!r} cannot be used here ({first}); try --device auto") from error
    return device


def budget_line(plan: Plan, device: torch.device) -> str:
    """One line on what listening costs in memory."""
    held = plan.bytes_per_image / 2**20
    tile = tile_bytes(plan, device) / 2**20
    step = micro_batch(plan, device)
    return f"maps are recomputed in tiles of {tile:.1f} MiB; {held:.1f} MiB are held per image, {step} images at a time"


def tile_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of the largest tile of maps."""
    largest = 0
    for signature, positions in plan.groups().items():
        images, heads, rows, columns = tile_shape(signature, len(positions), TILE_BYTES[device.type])
        largest = max(largest, images * heads * len(positions) * max(rows * signature[2], columns * signature[1]) * 4)
    return largest


def micro_batch(plan: Plan, device: torch.device, images: int | None = None) -> int:
    """How many images go through the model at a time, so that what is held of them stays within the budget; `images` are
    split evenly, because a few left over cost nearly as much as many.
    """
    most = max(1, TRACE_BYTES[device.type] // max(plan.bytes_per_image, 1))
    return most if images is None else math.ceil(images / math.ceil(images / most)) if images else 1


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager[Any]:
    """Automatic mixed precision in `dtype` ("float16", "bfloat16"), or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def device_name(device: torch.device) -> str:
    """The device, with the name of the GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT
