"""What is kept of single images: all of them up to a limit, above it a random sample that every order and partition shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse_probe.errors import StateError
from collapse_probe.provenance import names_sha256
from collapse_probe.seeding import rank_of_name

RECORDS = 50_000
"""Images of which a run keeps what they said one by one, unless it is told otherwise."""
BY_CONTENT = "pixels-"
"""How the names of images begin that came without one, and were named by their pixels."""
SLACK = 1024
NO_NUMBER = -1
"""Stands for an image without a place in a listing, or without a label."""
State = dict[str, Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Table:
    """The images that are kept, in the order of their places, then of their names, with their columns [images, …]."""

    names: tuple[str, ...]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.names)

    def labels_by_name(self) -> dict[str, int]:
        """The labels that are known."""
        return {name: int(label) for name, label in zip(self.names, self.labels, strict=True) if label != NO_NUMBER}


class Records:
    """Names, labels and columns of values of the images of lowest `rank_of_name`, at most `most`; how many there were in all.

    So two halves of the images, brought together, keep what one pass over all of them keeps. The arrays have room for a few
    more than `most` images from the start, which takes no memory before it is used.
    """

    def __init__(self, most: int = RECORDS, seed: int = 0) -> None:
        self.most, self.seed, self.seen = most, seed, 0
        self._digest = 0
        self._names: list[str] = []
        self._room = max(most // 8, SLACK)
        self._ranks = np.empty(most + self._room, dtype=np.uint64)
        self._numbers = np.empty((most + self._room, 2), dtype=np.int64)
        self._columns: dict[str, NDArray[Any]] = {}
        self._highest: int | None = None

    def __len__(self) -> int:
        return len(self._names)

    def add(
        self, names: Sequence[str], columns: Mapping[str, NDArray[Any]], places: Sequence[int] = (), labels: Sequence[int] = ()
    ) -> None:
        """Take some images; `columns` hold a row for each, the same columns every time."""
        numbers = np.full((len(names), 2), NO_NUMBER, dtype=np.int64)
        if len(places):
            numbers[:, 0] = places
        if len(labels):
            numbers[:, 1] = labels
        self._digest = (self._digest + sum(_number_of(name) for name in names)) % 2**256
        self.seen += len(names)
        self._take(names, self._ranks_of(names), numbers, columns)

    def knows(self, names: Iterable[str]) -> str | None:
        """One of some names that is among those kept; None where none is."""
        ranks = {rank_of_name(name, self.seed): name for name in names}
        twice = np.intersect1d(self._ranks[: len(self)], np.fromiter(ranks, dtype=np.uint64))
        return ranks[int(twice[0])] if len(twice) else None

    def names_below(self, rank: int) -> set[str]:
        """The names that are kept with a lower rank."""
        return {name for name, own in zip(self._names, self._ranks, strict=False) if int(own) < rank}

    @property
    def reach(self) -> int:
        """Every image that came with a rank below this one is kept."""
        self._compact()
        return 2**64 if self._highest is None else self._highest + 1

    @property
    def sampled(self) -> bool:
        """Whether only a sample of the images is kept."""
        return self.seen > self.most

    def fingerprint(self, table: Table) -> str:
        """SHA-256 of the names of `table`, of all images, in their order; of a sample, of the sum of all names' own."""
        if not self.sampled:
            return names_sha256(table.names)
        return hashlib.sha256(f"{self.seen} {self._digest:x}".encode()).hexdigest()

    def table(self) -> Table:
        """The images that are kept; its arrays are good until the next image is added."""
        self._compact()
        numbers = self._numbers[: len(self)]
        order = np.lexsort((np.array(self._names, dtype=np.str_), numbers[:, 0]))
        self._reorder(order)
        columns = {key: column[: len(self)] for key, column in self._columns.items()}
        return Table(tuple(self._names), numbers[:, 0], numbers[:, 1], columns)

    def merge(self, other: Records) -> None:
        """Add the images of other records, of none that are in these."""
        other._compact()
        count = len(other)
        self.seen += other.seen
        self._digest = (self._digest + other._digest) % 2**256
        columns = {key: column[:count] for key, column in other._columns.items()}
        self._take(other._names, other._ranks[:count], other._numbers[:count], columns)

    def state(self) -> State:
        """All of it as tensors."""
        self._compact()
        columns = {f"column/{key}": torch.from_numpy(column[: len(self)].copy()) for key, column in self._columns.items()}
        return {"names": packed(self._names), "numbers": torch.from_numpy(self._numbers[: len(self)].copy()), **columns}

    def facts(self) -> dict[str, Any]:
        """What is no tensor."""
        return {"seen": self.seen, "digest": f"{self._digest:x}"}

    def load(self, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `state` and `facts` gave, in place of what is here."""
        fresh, names = Records(self.most, self.seed), unpacked(state["names"])
        columns = {key.removeprefix("column/"): x.numpy() for key, x in state.items() if key.startswith("column/")}
        fresh._take(names, self._ranks_of(names), state["numbers"].numpy(), columns)
        fresh.seen, fresh._digest = int(facts["seen"]), int(facts["digest"], 16)
        if fresh.sampled and len(fresh):
            fresh._highest = int(fresh._ranks[: len(fresh)].max())
        self.__dict__.update(fresh.__dict__)

    def _ranks_of(self, names: Sequence[str]) -> NDArray[np.uint64]:
        return np.array([rank_of_name(name, self.seed) for name in names], dtype=np.uint64)

    def _take(
        self,
        names: Sequence[str],
        ranks: NDArray[np.uint64],
        numbers: NDArray[np.int64],
        columns: Mapping[str, NDArray[Any]],
    ) -> None:
        """Add the images that may belong to those kept, in pieces for which there is room."""
        inside = np.arange(len(names)) if self._highest is None else np.flatnonzero(ranks <= np.uint64(self._highest))
        if self._columns and len(inside) and columns.keys() != self._columns.keys():
            raise StateError("the columns of the records are those of another measurement")
        for start in range(0, len(inside), self._room):
            piece = inside[start : start + self._room]
            if len(self) + len(piece) > len(self._ranks):
                self._compact()
            place = slice(len(self), len(self) + len(piece))
            self._ranks[place], self._numbers[place] = ranks[piece], numbers[piece]
            for key, part in columns.items():
                if key not in self._columns:
                    self._columns[key] = np.empty((len(self._ranks), *part.shape[1:]), dtype=part.dtype)
                self._columns[key][place] = part[piece]
            self._names += [names[i] for i in piece]

    def _compact(self) -> None:
        """Leave those of the lowest ranks."""
        if len(self) > self.most:
            self._reorder(np.sort(np.argsort(self._ranks[: len(self)], kind="stable")[: self.most]))
            self._highest = int(self._ranks[: len(self)].max())

    def _reorder(self, order: NDArray[np.int64]) -> None:
        """Leave the images at these places, in this order."""
        for array in (self._ranks, self._numbers, *self._columns.values()):
            array[: len(order)] = array[order]
        self._names = [self._names[i] for i in order]


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")


def packed(names: Sequence[str]) -> Tensor:
    """Names as bytes, one a line; they hold no line break (`provenance.escaped`)."""
    return torch.frombuffer(bytearray("".join(f"{name}\n" for name in names).encode()), dtype=torch.uint8) if names else EMPTY


EMPTY = torch.empty(0, dtype=torch.uint8)


def unpacked(names: Tensor) -> list[str]:
    """The names that were `packed`."""
    return names.numpy().tobytes().decode().split("\n")[:-1]


class Lowest(Generic[Item]):
    """Something of the `most` images of lowest rank, each a tuple of tensors: a small random sample that adds."""

    def __init__(self, most: int, seed: int = 0) -> None:
        self.most, self.seed = most, seed
        self.items: dict[str, tuple[int, Item]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        """Names and items by their rank."""
        return ((name, item) for name, (_, item) in sorted(self.items.items(), key=lambda each: (each[1][0], each[0])))

    def add(self, name: str, make: Callable[[], Item]) -> None:
        """Take an image where it belongs to the sample, with what `make` makes of it."""
        rank = rank_of_name(name, self.seed)
        if len(self.items) < self.most or (self.items and rank < max(rank for rank, _ in self.items.values())):
            self._insert(name, rank, make())

    def merge(self, other: Lowest[Item]) -> None:
        """Add another sample, of other images."""
        for name, (rank, item) in other.items.items():
            self._insert(name, rank, item)

    def _insert(self, name: str, rank: int, item: Item) -> None:
        self.items[name] = rank, item
        if len(self.items) > self.most:
            del self.items[max(self.items, key=lambda name: (self.items[name][0], name))]

    def state(self: Lowest[tuple[Tensor, ...]]) -> State:
        """All of it as tensors: the parts of the items, stacked."""
        names = [name for name, _ in self]
        parts = zip(*(item for _, item in self), strict=True)
        return {"names": packed(names), **{f"part/{i}": torch.stack(part) for i, part in enumerate(parts)}}

    def load(self: Lowest[tuple[Tensor, ...]], state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        names, parts = unpacked(state["names"]), [state[f"part/{i}"] for i in range(len(state) - 1)]
        rows = zip(*(part.unbind(0) for part in parts), strict=True) if names else iter(())
        self.items = {name: (rank_of_name(name, self.seed), row) for name, row in zip(names, rows, strict=True)}
