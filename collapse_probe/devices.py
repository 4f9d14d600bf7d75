"""Where a run computes, how much memory it may hold there, and in which precision."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.distributed import local_rank
from collapse_probe.errors import ModelError, SettingError

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of control groups, version 2 and 1
FEW_BATCHES, MOST_WORKERS = 4, 16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT, MOST_KEPT = 32 * 2**20, 2**30
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


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU let glibc keep the memory of freed tensors for the next ones, instead of handing it back to be cleared again.

    Without it every image of a ViT causes thousands of page faults: 5 to 9 % of the forward pass where they are dear. It holds
    for the process; `give_back_memory` returns what is free. Nothing happens with another C library.
    """
    if device.type == "cpu" and (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def give_back_memory() -> None:
    """Return the free memory that `keep_freed_memory` kept to the system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


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


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The processor cores that this process may use: of those it is bound to what a container's quota allows, divided among the
    processes that a launcher started on this machine; at least 1.
    """
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [able, *filter(None, (_quota(root, names) for names in QUOTAS))]
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1"
    return max(int(min(quotas)) // max(int(local) if local.isdigit() else 1, 1), 1)


def _quota(root: Path, names: Sequence[str]) -> float | None:
    """Cores by the files of a control group, "quota period" in one or each in its own; None where it has none."""
    try:
        quota, period = " ".join((root / name).read_text().strip() for name in names).split()[:2]
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max"
        return None


def default_workers(device: torch.device, batch_size: int, images: int | None, from_memory: bool) -> int:
    """How many processes read ahead where nobody says: none where they cost more than they save.

    None for images `from_memory`, for fewer than FEW_BATCHES batches (`images`: their number, None where unknown), on one core,
    and where processes cannot be forked, for they would run the caller's program once more. Beside a GPU all cores but one,
    MOST_WORKERS at most; on a CPU, whose cores compute, a quarter of them and at least one.
    """
    few = images is not None and images < FEW_BATCHES * batch_size
    own = cores()
    start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if from_memory or few or own < 2 or start != "fork":
        return 0
    return min(own - 1, MOST_WORKERS) if device.type != "cpu" else max(own // 4, 1)


def default_batch_size(device: torch.device, size: tuple[int, int]) -> int:
    """Images in a batch where nobody says: 64; beside a CUDA GPU 256 of up to 224 × 224 pixels (`size` is height and width), of
    larger ones the power of two with as many pixels or fewer.
    """
    if device.type != "cuda":
        return 64
    fitting = 256 * 224 * 224 // max(size[0] * size[1], 224 * 224)
    return 1 << max(fitting, 1).bit_length() - 1


def default_amp_dtype(device: torch.device) -> str:
    """The type of automatic mixed precision where nobody says: bfloat16 where the device computes in it, else float16."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return "bfloat16" if device.type == "cpu" else "float16"
