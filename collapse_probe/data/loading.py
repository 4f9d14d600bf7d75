"""Batches of pictures made ready: what one holds, how a loader makes them, and how long they are waited for."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from collapse_probe.data.readers import Skipped, Unreadable
from collapse_probe.distributed import check_processes
from collapse_probe.errors import CollapseProbeError, DataError, SettingError
from collapse_probe.provenance import escaped

Part = tuple[int, int]
"""K of N: the images whose number leaves the remainder K − 1 by N, as on the command line 3/8."""
WHOLE: Part = (1, 1)
PREFETCH = 2  # batches that each worker has ready
LIMITING = 0.3  # of the time spent waiting for images, from which on it is said
FEWEST_BATCHES = 4


@dataclass(frozen=True)
class Batch:
    """Some pictures made ready: `pixels` [B, channels, height, width] float32; row b is picture `indices[b]`.

    `labels` [B] int64 or None. `skipped` are the pictures of this batch that could not be read, each with its
    reason; they have no row, so B may be 0. `remarks` counts what was done to pictures besides decoding. `read` are the numbers
    by which all these pictures, also the skipped ones, are counted in a Coverage: places in the order in which an ImageSet is
    read, numbers in a stream; `numbers` are those of the rows. Both are empty for a caller's own batches.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    pixels: Tensor
    labels: Tensor | None = None
    skipped: tuple[Skipped, ...] = ()
    remarks: Counter[str] = field(default_factory=Counter)
    read: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def pin_memory(self) -> Batch:
        """The same with pixels that a GPU can fetch while the program goes on; DataLoader asks for it."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class Item:
    """One picture on its way into a batch: its number in a Coverage, its index, its name; pixels, or why it is skipped."""

    number: int
    index: int
    name: str
    pixels: Tensor | str
    label: int | None = None
    remark: str = ""


def collated(shape: tuple[int, int, int], items: Sequence[Item | CollapseProbeError]) -> Batch | CollapseProbeError:
    """A batch of items of one shape; the first error where there is one, which a process of a loader can only hand on."""
    failed = next((item for item in items if isinstance(item, CollapseProbeError)), None)
    if failed is not None:
        return failed
    whole = [item for item in items if isinstance(item, Item)]
    rows = [(item, item.pixels) for item in whole if isinstance(item.pixels, Tensor)]
    labels = [item.label for item, _ in rows if item.label is not None]
    return Batch(
        tuple(item.index for item, _ in rows),
        tuple(item.name for item, _ in rows),
        torch.stack([pixels for _, pixels in rows]) if rows else torch.empty(0, *shape),
        torch.tensor(labels, dtype=torch.int64) if rows and len(labels) == len(rows) else None,
        tuple((item.name, item.pixels) for item in whole if isinstance(item.pixels, str)),
        Counter(item.remark for item in whole if item.remark),
        tuple(item.number for item in whole),
        tuple(item.number for item, _ in rows),
    )


def reason_of(error: Exception) -> str:
    """Why a picture is skipped, on one line."""
    text = str(error) if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}"
    return escaped(" ".join(text.split()))[:200]


def check_share(batch_size: int, workers: int, rank: int, world: int, part: Part) -> None:
    """Raise SettingError for impossible settings of a reader."""
    if batch_size < 1:
        raise SettingError(f"the batch size must be at least 1, not {batch_size}")
    if workers < 0 or not 0 <= rank < world:
        raise SettingError(f"expected workers ≥ 0 and 0 ≤ rank < world, not {workers}, {rank}, {world}")
    if not 1 <= part[0] <= part[1]:
        raise SettingError(f"part {part[0]}/{part[1]} is none; expected K/N with 1 ≤ K ≤ N, as 3/8")


def loader_of(dataset: Any, *, batch_size: int, workers: int, pin: bool = False, **settings: Any) -> DataLoader[Any]:
    """A loader that draws nothing from the global generator; `pin`: pixels in memory that a GPU itself fetches from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        return DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=PREFETCH if workers else None,
            generator=torch.Generator(),  # DataLoader would draw its workers' seed from the global one
            **settings,
        )


def read_all(loader: DataLoader[Any], address: str, alone: bool) -> Iterator[Batch]:
    """The loader's batches; DataError where one process `alone` could read no picture, and what a worker handed on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fork in a process with threads
        iterator = iter(loader)
    first: dict[str, str] = {}
    read, failed = 0, 0
    error: CollapseProbeError | None = None
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except RuntimeError as died:
            if "DataLoader worker" not in str(died):
                raise
            why = " ".join(str(died).split())[:200]
            error = DataError(f"a process that reads images has died ({why}): short of memory? try fewer of them (--workers)")
            break
        if isinstance(batch, CollapseProbeError):
            error = batch
            break
        read += len(batch.indices)
        failed += len(batch.skipped)
        for name, reason in batch.skipped if not read else ():
            first.setdefault(reason, name)
        check_processes()
        yield batch
    del iterator  # before an error keeps it alive: workers are then waited for in vain, 5 s each
    if error is not None:
        raise error
    if alone and failed and not read:
        example = "; ".join(f"{name} ({reason})" for reason, name in islice(first.items(), 3))
        raise DataError(f"no image of {address} can be read: {failed} of {failed} failed, for example {example}")


@dataclass
class LoadTimes:
    """How long batches were waited for, and how long was computed with them, in seconds; the first, with which processes start
    and kernels are chosen, does not count.
    """

    waited: float = 0.0
    computed: float = 0.0
    batches: int = 0

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time measured on the way."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            came = time.perf_counter()
            yield batch
            if self.batches:
                self.waited += came - start
                self.computed += time.perf_counter() - came
            self.batches += 1

    def sentence(self, workers: int) -> str | None:
        """What to say where reading is what limits: it is waited for LIMITING of the time, over a few batches; else None."""
        total = self.waited + self.computed
        if self.batches < FEWEST_BATCHES or self.waited < LIMITING * total:
            return None
        way = f"more than {workers} workers (--workers)" if workers else "processes that read ahead (--workers)"
        share = f"{100 * self.waited / total:.0f} % of {total:.3g} s were spent waiting for them"
        return f"reading the images limits this run: {share}; {way}, smaller pictures or a faster disk make it faster"
