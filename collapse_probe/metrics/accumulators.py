"""What a run keeps of the images it has seen: sums over images in float64, whatever the batch, order or process."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.distributed import gathered_tensors, rank_and_world
from collapse_probe.errors import SettingError
from collapse_probe.statistics.intervals import Array, interval, skewness_of

if TYPE_CHECKING:
    from typing_extensions import Self

GROUPS = 16
"""Images fall into this many groups by their name, for the jackknife of statistics over pairs of images."""


def group_of(name: str) -> int:
    """The jackknife group of an image: from its name alone, so that no order or batch enters."""
    return zlib.crc32(name.encode()) % GROUPS


class Accumulator:
    """Named sums over images: tensors that add across batches, parts of the data and processes.

    For each batch `start_batch` comes first, then `add_tile` for every tile of the maps, then `end_batch`, which returns
    per-image values [B, …] by name: the run keeps these beside the image names. Tiles of maps inside windows, in which an
    image has several maps of a head (`MapTile.over_windows`), come to those alone that are `windowed`.
    """

    windowed: bool = False

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}

    def start_batch(self, trace: Trace, names: Sequence[str]) -> None:
        """Make room for a batch."""

    def take(self, tile: MapTile) -> None:
        """Add a tile of the maps where it is one that this accumulator takes."""
        if self.windowed or tile.windows == 1:
            self.add_tile(tile)

    def add_tile(self, tile: MapTile) -> None:
        """Add what is wanted of a tile of the maps."""

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add the sums of the batch to the states; returns per-image values [B, …] by name."""
        return {}

    def add_state(self, name: str, *shape: int) -> None:
        """A new state of zeros in float64."""
        self.states[name] = torch.zeros(*shape, dtype=torch.float64)

    def state(self, name: str) -> Tensor:
        """A state by its name."""
        return self.states[name]

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` to a state."""
        state = self.states[name]
        state += value.to(state.device, torch.float64)

    def to(self, device: torch.device | str) -> Self:
        """Move the states; returns the accumulator itself."""
        self.states = {name: state.to(device) for name, state in self.states.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that was added: contiguous tensors on the CPU by name, and nothing else."""
        return {name: state.to("cpu", copy=True).contiguous() for name, state in self.states.items()}

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave for an accumulator of the same kind and settings; SettingError for any other."""
        self._check(states)
        for name, state in self.states.items():
            state.copy_(states[name])

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same kind and settings has seen, of other images; SettingError for any other."""
        self._check(other.states)
        for name, state in self.states.items():
            state += other.states[name].to(state.device)

    def all_reduce(self) -> None:
        """Replace the states by what `merge` makes of those of all processes in the order of their ranks; all call it."""
        _, world = rank_and_world()
        if world > 1:
            for name, state in self.states.items():
                first, *others = gathered_tensors(state)
                self.states[name] = sum(others, first)

    def _check(self, states: Mapping[str, Tensor]) -> None:
        """SettingError where the states are not of this kind and these settings; nothing was changed then."""
        if (difference := differing(self.states, states)) is not None:
            raise SettingError(f"these are the sums of another metric, model or version ({difference}): add like to like")


def differing(expected: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> str | None:
    """The first difference between the names, shapes and dtypes of two sets of states; None where there is none.

    >>> differing({"total": torch.zeros(2)}, {"total": torch.zeros(3)})
    'total is [3] in float32, not [2] in float32'
    """
    for name in (*expected, *came):
        if name not in came or name not in expected:
            return f"{name} is {'missing' if name in expected else 'not known here'}"
        shown = [f"[{', '.join(map(str, each.shape))}] in {str(each.dtype)[6:]}" for each in (expected[name], came[name])]
        if shown[0] != shown[1]:
            return f"{name} is {shown[1]}, not {shown[0]}"
    return None


class Means(Accumulator):
    """Means over images, with the sums for their standard errors and intervals; NaN marks an undefined value."""

    def add_means(self, **shapes: tuple[int, ...]) -> None:
        """New named quantities, each an array of the given shape per image."""
        for name, shape in shapes.items():
            for part in ("count", "total", "square", "cube"):
                self.add_state(f"{name}_{part}", *shape)

    def add_images(self, name: str, values: Tensor) -> None:
        """Add the per-image values [B, *shape] of a quantity."""
        values = values.to(torch.float64) if values.device.type != "mps" else values.cpu().to(torch.float64)
        defined = torch.isfinite(values)
        values = torch.where(defined, values, 0.0)
        self.add(f"{name}_count", defined.sum(0))
        self.add(f"{name}_total", values.sum(0))
        self.add(f"{name}_square", values.square().sum(0))
        self.add(f"{name}_cube", values.pow(3).sum(0))

    def mean(self, name: str = "value") -> tuple[Array, Array, Array]:
        """Mean, standard error and number of images of a quantity; NaN where no image defined it."""
        n, total, square = (self.array(f"{name}_{part}") for part in ("count", "total", "square"))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(n > 0, total / n, np.nan)
            spread = np.maximum(square / n - mean**2, 0.0) * n / (n - 1)
            stderr = np.where(n > 1, np.sqrt(spread / n), np.nan)
        return mean, stderr, n

    def bounds(self, name: str = "value", tail: float = 0.025) -> Array:
        """The interval of a quantity's mean that errs with `tail` on each side, [*shape, 2]; NaN with fewer than two images."""
        mean, stderr, n = self.mean(name)
        with np.errstate(invalid="ignore", divide="ignore"):
            square, cube = self.array(f"{name}_square") / n, self.array(f"{name}_cube") / n
        skewness = skewness_of(square - mean**2, cube - 3 * mean * square + 2 * mean**3, mean, n)
        return interval(mean, stderr, n, skewness, tail)

    def array(self, name: str) -> Array:
        """A state as a NumPy array."""
        return np.array(self.states[name].cpu().numpy(), dtype=np.float64)


class PerImage(Means):
    """The mean over images of a pure function of the trace, `values(trace)` -> [B, *shape]."""

    def __init__(self, values: Callable[[Trace], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.values = values
        self.add_means(value=shape)

    def end_batch(self, trace: Trace) -> dict[str, Tensor]:
        """Add one batch."""
        values = self.values(trace)
        self.add_images("value", values)
        return {"value": values}
