"""The images at both ends of a number, with small pictures: exact over all images, whatever their order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.analysis.state.records import State, packed, unpacked
from collapse_probe.statistics.breakdowns import EACH_SIDE
from collapse_probe.statistics.intervals import Array

Pixels = NDArray[np.uint8]
NOTHING: Pixels = np.zeros((0, 0, 3), dtype=np.uint8)


class End(NamedTuple):
    """One image at an end: sorted by its value, then by its place and name."""

    value: float
    place: int
    name: str
    picture: Pixels

    @property
    def key(self) -> tuple[float, int, str]:
        """What it is sorted by."""
        return self.value, self.place, self.name


class Ends:
    """The `EACH_SIDE` images with the lowest values and those with the highest."""

    def __init__(self) -> None:
        self.lowest: list[End] = []
        self.highest: list[End] = []

    def add(self, values: Array, places: Sequence[int], names: Sequence[str], picture: Callable[[int], Pixels]) -> None:
        """Take the values [images] of some images, NaN where undefined; `picture(i)` is made of those that belong to an end."""
        for side in (self.lowest, self.highest):
            worst = None if len(side) < EACH_SIDE else side[-1].value
            beyond = np.isfinite(values)
            if worst is not None:
                beyond &= values <= worst if side is self.lowest else values >= worst
            for i in np.flatnonzero(beyond).tolist():
                end = End(float(values[i]), places[i], names[i], NOTHING)
                if len(side) < EACH_SIDE or self._before(side, end, side[-1]):
                    self._insert(side, end._replace(picture=picture(i)))

    def merge(self, other: Ends) -> None:
        """Add the ends of other images."""
        for side, others in ((self.lowest, other.lowest), (self.highest, other.highest)):
            for end in others:
                self._insert(side, end)

    def _before(self, side: list[End], one: End, other: End) -> bool:
        return one.key < other.key if side is self.lowest else one.key > other.key

    def _insert(self, side: list[End], end: End) -> None:
        best = heapq.nsmallest if side is self.lowest else heapq.nlargest
        side[:] = best(EACH_SIDE, [*side, end], key=lambda each: each.key)

    def state(self) -> State:
        """All of it as tensors."""
        ends = [*self.lowest, *self.highest]
        pictures = np.stack([end.picture for end in ends]) if ends else NOTHING[None][:0]
        return {
            "names": packed([end.name for end in ends]),
            "values": torch.tensor([end.value for end in ends], dtype=torch.float64),
            "places": torch.tensor([end.place for end in ends], dtype=torch.int64),
            "lowest": torch.tensor([len(self.lowest)]),
            "pictures": torch.from_numpy(pictures),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        columns = state["values"].tolist(), state["places"].tolist(), unpacked(state["names"]), [*state["pictures"].numpy()]
        ends, lowest = [End(*row) for row in zip(*columns, strict=True)], int(state["lowest"])
        self.lowest, self.highest = ends[:lowest], ends[lowest:]
