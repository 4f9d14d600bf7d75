"""Where a run computes, how much memory it may hold there, and in which precision."""

from __future__ import annotations

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from collapse_probe.distributed import local_rank
from collapse_probe.errors import SettingError

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
