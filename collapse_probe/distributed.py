"""One process or many: this process's rank, and how results of all processes come together."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collapse_probe.errors import ProcessError
from collapse_probe.processes import peers
from collapse_probe.processes.launchers import Launch, announced, exported
from collapse_probe.processes.peers import Peers

COLLECTIVE = timedelta(days=30)
"""How long an operation of the group may wait: a process that died is told of otherwise, and one that is slow is waited for."""

_peers: list[Peers] = []
_groups, _turns = itertools.count(), itertools.count()
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
    launch = announced()
    return int(os.environ.get("LOCAL_RANK", "0")) if launch is None else launch.local_rank


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group that torchrun, accelerate launch, srun or mpirun announces; nothing where there is none.

    When another process fails or dies, this one ends as well, with ProcessError: see `check_processes`. Raises ProcessError
    too where the others do not come.
    """
    launch = announced() if dist.is_available() else None
    if launch is None or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    with exported(launch.variables):
        store = _meeting_place(launch)
        group = Peers(launch, store.set, lambda key: store.get(key).decode() if store.check([key]) else None)
        _peers.append(group)
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=COLLECTIVE)
            yield
        except BaseException as error:
            if _of_the_group(error):
                group.explain(error)
            group.leave(error)
            raise
        else:
            group.leave(None)
        finally:
            _peers.remove(group)
            with group.closing():
                if dist.is_initialized():
                    dist.destroy_process_group()


def _meeting_place(launch: Launch) -> Any:
    """The store in which the processes of this group, and of no other, find one another."""
    c10d: Any = dist  # it exports its stores without saying so
    hosts, until = launch.rank == 0 and not launch.agent, time.monotonic() + peers.JOIN_SECONDS
    while not hosts:  # in steps that Ctrl-C can interrupt
        with suppress(OSError), socket.create_connection((launch.host, launch.port), timeout=5):
            break
        if time.monotonic() > until:
            raise ProcessError(peers.not_there(launch, [0]))
        time.sleep(0.2)
    try:
        limit = timedelta(seconds=peers.JOIN_SECONDS)
        store = c10d.TCPStore(launch.host, launch.port, None, hosts, limit, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes cannot meet at {launch.host}, port {launch.port} ({' '.join(str(error).split())[:200]}); set "
            "MASTER_ADDR and MASTER_PORT, in all of them, to the machine of the first process and a free port there"
        ) from error
    return c10d.PrefixStore(f"collapse-probe/{launch.job}/{next(_groups)}", store)


def check_processes() -> None:
    """Raise ProcessError where another process of this one's group has failed or is gone; to be called between steps of work.

    Work that does not call it is interrupted some seconds later; a process that cannot be interrupted is ended.
    """
    for group in _peers:
        group.check()


def _of_the_group(error: BaseException) -> bool:
    """Whether an error was raised by torch's communication between processes."""
    names = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in names)
    )


def _finished(operation: Callable[[], Any]) -> None:
    """Begin a collective operation and wait for its end, or for the news that another process has failed."""
    try:
        work, pause = operation(), 0.0002
        while not work.is_completed():
            check_processes()
            time.sleep(pause)
            pause = min(pause * 1.2, 0.05)
        work.wait()
    except RuntimeError as error:
        for group in _peers:
            group.explain(error)
        raise


def gathered_tensors(value: Tensor) -> list[Tensor]:
    """The tensor that every process passed, all of one shape and dtype, in the order of the ranks; on this one's device."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    place = value.device if f"{value.device.type}:" in dist.get_backend_config() else torch.device("cuda")
    place = torch.device("cpu") if "cpu:" in dist.get_backend_config() else place
    own = value.detach().to(place).contiguous()
    parts = [torch.empty_like(own) for _ in range(world)]
    _finished(lambda: dist.all_gather(parts, own, async_op=True))
    return [part.to(value.device) for part in parts]


def gathered(value: Any) -> list[Any]:
    """What every process passed, in the order of the ranks; the same on all of them."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    lengths = [int(length) for length in gathered_tensors(torch.tensor(len(own)))]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    parts = gathered_tensors(padded)
    return [pickle.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths, strict=True)]


def shared(value: Any, source: int) -> Any:
    """What process `source` passed, in all processes; the others' values are not looked at."""
    rank, world = rank_and_world()
    if world == 1:
        return value
    own = torch.frombuffer(bytearray(pickle.dumps(value if rank == source else None)), dtype=torch.uint8)
    length = int(gathered_tensors(torch.tensor(len(own)))[source])
    place = torch.device("cpu" if "cpu:" in dist.get_backend_config() else "cuda")
    buffer = (own if rank == source else torch.empty(length, dtype=torch.uint8)).to(place)
    _finished(lambda: dist.broadcast(buffer, source, async_op=True))
    return pickle.loads(buffer.cpu().numpy().tobytes())


def shared_out(count: int) -> Iterator[int]:
    """The numbers from 0 below `count`, each in one process only: whoever asks first gets the next. Alone, all of them.

    Every process calls it, and as often as the others.
    """
    if rank_and_world()[1] == 1:
        yield from range(count)
        return
    c10d: Any = dist.distributed_c10d
    store, name = c10d._get_default_store(), f"turn/{next(_turns)}"
    while (turn := store.add(name, 1) - 1) < count:
        yield turn


def told(name: str, text: str | None = None) -> str | None:
    """The text that the first process passes, in every process of the group that calls this with the same, unused, `name`.

    The first process waits for no other one, and the others wait for it: where it alone calls this, nothing hangs.
    """
    rank, world = rank_and_world()
    if world == 1:
        return text
    c10d: Any = dist.distributed_c10d
    store, pause = c10d._get_default_store(), 0.001
    if rank == 0:
        store.set(name, json.dumps(text))
        return text
    while not store.check([name]):
        check_processes()
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    content: str | None = json.loads(store.get(name))
    return content
