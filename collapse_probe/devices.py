"""Where a run computes, how much memory it may hold there, and in which precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.distributed import local_rank
from collapse_probe.errors import ModelError, SettingError

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

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


def floating_like(model: nn.Module) -> Tensor:
    """The first floating-point parameter of a model, else buffer: images go to its device, in its dtype.

    Types of 8 bits are passed over, for they store weights and compute nothing. An empty float32 tensor on the CPU where there
    is none.
    """
    tensors = (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point() and t.element_size() > 1)
    return next(tensors, torch.empty(()))


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After the `with` every module is in the mode, training or eval, in which it came."""
    modes = {part: part.training for part in model.modules() if hasattr(part, "training")}  # frozen TorchScript has none
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with all parameters and buffers on `device`; ModelError where it has no values or cannot be moved."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        raise ModelError(
            f"{type(model).__name__} is on the meta device, where its weights have no values: "
            "load them first (load_state_dict(…, assign=True), or from_pretrained without device_map)"
        )
    if all(t.device == device for t in tensors):
        return model
    try:
        return model.to(device)
    except Exception as error:  # quantised and dispatched models refuse in their own ways
        reason = " ".join(str(error).split())
        raise ModelError(f"{type(model).__name__} cannot be moved to {device} ({reason}); name its own device") from error


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager[Any]:
    """Automatic mixed precision in `dtype` ("float16", "bfloat16"), or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def device_name(device: torch.device) -> str:
    """The device, with the name of the GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: allocated on the GPU, else resident in this process (None where the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT
