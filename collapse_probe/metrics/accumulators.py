"""What a run keeps of the images it has seen: sums over images in float64, whatever the batch, order or process."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric as StateHolder

from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.statistics.intervals import Array

GROUPS = 16
"""Images fall into this many groups by their name, for the jackknife of statistics over pairs of images."""


def group_of(name: str) -> int:
    """The jackknife group of an image: from its name alone, so that no order or batch enters."""
    return zlib.crc32(name.encode()) % GROUPS


class Accumulator(StateHolder):
    """One thing taken from every batch and added up. States are tensors that add across batches and processes.

    For each batch `begin` comes first, then `tile` for every tile of the maps, then `end`. What `end` returns are per-image
    values [B, …] by name, which the run keeps beside the image names.
    """

    full_state_update = False

    def begin(self, trace: Trace, names: Sequence[str]) -> None:
        """Make room for a batch."""

    def tile(self, tile: MapTile) -> None:
        """Take what this fold wants of a tile of the maps."""

    def end(self, trace: Trace) -> dict[str, Tensor]:
        """Close the batch: add its sums to the states; per-image values [B, …] by name."""
        return {}

    def settle(self) -> None:
        """After the last batch, before the states are read or brought together: bring in what was not added yet."""

    def update(self, *_: Any) -> None:
        """Unused: torchmetrics asks for it."""

    def compute(self) -> None:
        """Unused: metrics read the sums themselves."""

    def room(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """A state of zeros that adds across processes."""
        self.add_state(name, torch.zeros(*shape, dtype=dtype), dist_reduce_fx="sum")
        self._defaults[name] = torch.zeros((), dtype=dtype).expand(shape)  # torchmetrics keeps a copy as large as the state

    def state(self, name: str) -> Tensor:
        """A state by its name."""
        found: Tensor = getattr(self, name)
        return found

    def into(self, name: str, value: Tensor) -> None:
        """Add `value` to a state."""
        state = self.state(name)
        state += value.to(state.device, torch.float64)


class Means(Accumulator):
    """Means over images, with the sums for their standard errors and covariances; NaN marks an undefined value."""

    def means_of(self, **shapes: tuple[int, ...]) -> None:
        """Make room for the named quantities, each an array of the given shape per image."""
        for name, shape in shapes.items():
            self.room(f"{name}_count", *shape)
            self.room(f"{name}_total", *shape)
            self.room(f"{name}_square", *shape)

    def take(self, name: str, values: Tensor) -> None:
        """Add the per-image values [B, *shape] of a quantity."""
        values = values.to(torch.float64) if values.device.type != "mps" else values.cpu().to(torch.float64)
        defined = torch.isfinite(values)
        values = torch.where(defined, values, 0.0)
        self.into(f"{name}_count", defined.sum(0))
        self.into(f"{name}_total", values.sum(0))
        self.into(f"{name}_square", values.square().sum(0))

    def mean(self, name: str) -> tuple[Array, Array, Array]:
        """Mean, standard error and number of images of a quantity; NaN where no image defined it."""
        n, total, square = (self.array(f"{name}_{part}") for part in ("count", "total", "square"))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(n > 0, total / n, np.nan)
            spread = np.maximum(square / n - mean**2, 0.0) * n / (n - 1)
            stderr = np.where(n > 1, np.sqrt(spread / n), np.nan)
        return mean, stderr, n

    def array(self, name: str) -> Array:
        """A state as a NumPy array."""
        return np.array(self.state(name).cpu().numpy(), dtype=np.float64)


class PerImage(Means):
    """The mean over images of a pure function of the trace, `values(trace)` -> [B, *shape]."""

    def __init__(self, values: Callable[[Trace], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.values = values
        self.means_of(value=shape)

    def end(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch."""
        values = self.values(trace)
        self.take("value", values)
        return {"value": values}
