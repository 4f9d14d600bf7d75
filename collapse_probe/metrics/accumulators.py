"""What a run keeps of the images it has seen: sums over images in float64, whatever the batch, order or process."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.capture.trace import MapTile, Trace
from collapse_probe.distributed import gathered_tensors, rank_and_world
from collapse_probe.errors import SettingError
from collapse_probe.metrics.moments import ONE, joined, moments_of
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

    @property
    def takes_tiles(self) -> bool:
        """Whether it wants tiles of the maps at all."""
        return type(self).add_tile is not Accumulator.add_tile

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

    def snapshot(self) -> Any:
        """A copy of all that was added, for `put_back`; the tensors stay on their device."""
        return {name: state.clone() for name, state in self.states.items()}

    def put_back(self, snapshot: Any) -> None:
        """Forget what was added after a `snapshot`, which is used up by it."""
        self.states = snapshot

    def of_sample(self, names: Sequence[str]) -> NDArray[np.bool_] | None:
        """Which images' values count, [images]; None where all do. Values of others depend on what came before them."""
        return None

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
        for names in self.joint():
            self.join(names, [other.states[name].to(self.states[name].device) for name in names])

    def all_reduce(self) -> None:
        """Replace the states by what `merge` makes of those of all processes in the order of their ranks; all call it."""
        _, world = rank_and_world()
        for names in self.joint() if world > 1 else ():
            first, *others = zip(*(gathered_tensors(self.states[name]) for name in names), strict=True)
            self.states.update(zip(names, first, strict=True))
            for parts in others:
                self.join(names, parts)

    def joint(self) -> list[tuple[str, ...]]:
        """The states that are added together, each once."""
        return [(name,) for name in self.states]

    def join(self, names: Sequence[str], others: Sequence[Tensor]) -> None:
        """Add other images' states to those of these names, on the same device."""
        for name, other in zip(names, others, strict=True):
            self.states[name] += other

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


def vectors_of(accumulator: Accumulator) -> tuple[str, ...]:
    """Of which vectors of the maps it is: those of the same come one after the other, so that each is made once for a tile."""
    return tuple(str(getattr(accumulator, name, "")) for name in ("point", "axis", "centred"))


class Means(Accumulator):
    """Means over images, with what their standard errors and intervals need; NaN marks an undefined value."""

    def __init__(self) -> None:
        super().__init__()
        self._powers: dict[str, tuple[tuple[int, int], ...]] = {}

    def add_means(self, **shapes: tuple[int, ...]) -> None:
        """New named quantities, each an array of the given shape per image."""
        for name, shape in shapes.items():
            self.add_moments(name, shape, ONE)

    def add_moments(self, name: str, shape: tuple[int, ...], powers: tuple[tuple[int, int], ...]) -> None:
        """A new named quantity of these moments, or pair of quantities."""
        self._powers[name] = powers
        self.add_state(f"{name}_count", *shape)
        self.add_state(f"{name}_moments", len(powers), *shape)

    def add_images(self, name: str, *values: Tensor) -> None:
        """Add the per-image values [B, *shape] of a quantity, or of a pair of them."""
        device = self.states[f"{name}_count"].device
        powers = self._powers[name]
        self.join((f"{name}_count", f"{name}_moments"), moments_of([x.to(device).double() for x in values], powers))

    def joint(self) -> list[tuple[str, ...]]:
        """The moments of a quantity are joined with its count; all else is added."""
        pairs = [(f"{name}_count", f"{name}_moments") for name in self._powers]
        inside = {name for pair in pairs for name in pair}
        return [*pairs, *((name,) for name in self.states if name not in inside)]

    def join(self, names: Sequence[str], others: Sequence[Tensor]) -> None:
        if len(names) == 1:
            super().join(names, others)
            return
        (count, moments), powers = names, self._powers[names[0].removesuffix("_count")]
        self.states[count], self.states[moments] = joined((self.states[count], self.states[moments]), others, powers)

    def mean(self, name: str = "value") -> tuple[Array, Array, Array]:
        """Mean, standard error and number of images of a quantity; NaN where no image defined it."""
        n, (mean, square, _) = self.array(f"{name}_count"), self.array(f"{name}_moments")
        with np.errstate(invalid="ignore", divide="ignore"):
            stderr = np.where(n > 1, np.sqrt(square / (n - 1) / n), np.nan)
        return np.where(n > 0, mean, np.nan), stderr, n

    def bounds(self, name: str = "value", tail: float = 0.025) -> Array:
        """The interval of a quantity's mean that errs with `tail` on each side, [*shape, 2]; NaN with fewer than two images."""
        (mean, stderr, n), (_, square, cube) = self.mean(name), self.array(f"{name}_moments")
        with np.errstate(invalid="ignore", divide="ignore"):
            skewness = skewness_of(square / n, cube / n, mean, n)
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
