"""One process or many: this process's rank, and how results of all processes come together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile wrappers, however they are nested.

    Hooks registered on a compiled module after its first call are never called; those on the plain module are.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside torchrun and inside `alone()`."""
    if not _alone.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one: it takes all images and waits for no other process."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def local_rank() -> int:
    """This process's place on its own machine, which names its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group that torchrun (or accelerate launch) announces; nothing where there is none."""
    announced = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if not announced or not dist.is_available() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """What every process passed, in the order of the ranks; the same on all of them."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
