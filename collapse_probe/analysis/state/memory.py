"""How much a measurement takes at a time, and what it does where memory runs out: less, and no sum half added."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import micro_batch
from collapse_probe.errors import SettingError
from collapse_probe.metrics.accumulators import Accumulator

RUNS_OUT = ("cuda",)
"""Devices that say by an exception that their memory has run out; a CPU's process is ended instead."""
SMALLEST = 1 / 16
"""The share of the tiles' first size down to which they are made smaller before fewer images are taken."""
SMALLEST_BYTES = 2**20
States = list[Any]
"""A snapshot of every accumulator."""

ALIKE, ALIKE_MIXED = 4, 16
"""A model computes the same of an image, to the last bit, in any batch of a multiple of so many, and one that mixes maps by a
convolution of as many more: measured on CPUs.
"""


def alike(plan: Plan, device: torch.device) -> int:
    """The number of images of which every batch is filled up to a multiple, so that no image's numbers depend on the others."""
    mixed = any(plan.layers[i].mixed for i in plan.map_layers)
    return min(ALIKE_MIXED if mixed else ALIKE, micro_batch(plan, device))


class Enough:
    """Whether what ran inside `Room.enough` found the memory that it needed."""

    def __init__(self) -> None:
        self.yes = True

    def __bool__(self) -> bool:
        return self.yes


class Room:
    """The bytes of a `tile` of maps and the `images` at a time that a measurement takes on a device; less once it ran out."""

    def __init__(self, device: torch.device, tile: int, images: int) -> None:
        self.device, self.tile, self.images = device, tile, images
        self.least = max(int(tile * SMALLEST), SMALLEST_BYTES)

    @contextmanager
    def enough(self) -> Iterator[Enough]:
        """Yields what is false after the `with` where the device ran out of memory inside; that exception goes no further."""
        found = Enough()
        try:
            yield found
        except torch.OutOfMemoryError:
            if self.device.type not in RUNS_OUT:
                raise
            found.yes = False
        if not found:  # the exception, whose frames held tensors, is gone by now
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def copied(self, accumulators: Iterable[Accumulator]) -> States:
        """Copies of all states, in order; none on a device that never says that its memory has run out."""
        if self.device.type not in RUNS_OUT:
            return []
        return [each.snapshot() for each in accumulators]

    def restore(self, accumulators: Iterable[Accumulator], states: States) -> None:
        """Put `copied` states back in place of those to which a batch was added in part."""
        for accumulator, own in zip(accumulators, states, strict=True):
            accumulator.put_back(own)

    def smaller_tiles(self) -> str | None:
        """Halve the tiles; returns what is to be said of it, None where they are as small as they get."""
        if self.tile // 2 < self.least:
            return None
        self.tile //= 2
        return f"the memory of {self.device} ran out: taken again in tiles of {self.tile / 2**20:.3g} MiB"

    def fewer_images(self, images: int) -> str:
        """Halve the number of `images` that were too many at a time; returns what is to be said of it.

        Raises SettingError where one image alone was too much.
        """
        if images == 1:
            raise SettingError(
                f"one image alone does not fit into the memory of {self.device}: take smaller images (--img-size), half "
                "precision (--amp), fewer metrics (neighbour-similarity takes the least) or another device (--device cpu)"
            )
        self.images = max(images // 2, 1)
        return f"the memory of {self.device} ran out: taken again {self.images} at a time"
