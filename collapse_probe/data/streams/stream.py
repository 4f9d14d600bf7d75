"""Images that come in shards, each read from its beginning: shared out, skipped, drawn and shuffled without a listing."""

from __future__ import annotations

import contextlib
import functools
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from collapse_probe.data.coverage import SHARD_BITS, Coverage
from collapse_probe.data.loading import WHOLE, Batch, Item, Part, check_share, collated, loader_of, read_all, reason_of
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.data.readers import (
    EIGHT_BITS,
    REMARK,
    LeftOut,
    Unreadable,
    decode,
    is_deep,
    opened,
    significant_bits,
    suffix_of,
)
from collapse_probe.data.streams.remote import public
from collapse_probe.errors import CollapseProbeError, DataError, SettingError
from collapse_probe.provenance import escaped

BUFFER = 1000
"""Images out of which the next one is drawn where a stream is shuffled; all processes' together."""
AT_ONCE = 8  # shards that a shuffled stream is read from in turn
LOOKED_AT = 64  # records that tell how many bits greys have
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One record of a shard: the name inside it, the picture's encoded bytes where they were wanted, or why there is none."""

    name: str
    content: bytes | None = None
    label: int | None = None
    reason: str = ""


Wanted = Callable[[int], bool]
"""Whether a record, by its number inside the shard, is to have its content; the others are passed over undecoded."""


@dataclass(frozen=True)
class Shards:
    """The shards of a stream by name. `records(k, wanted)` gives all records of shard k from the beginning, in one order.

    It raises whatever it likes where the shard cannot be read to its end. It can be pickled, so that loader processes have it.
    """

    names: tuple[str, ...]
    records: Callable[[int, Wanted], Iterator[Record]]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Of one shard the records `first`, first + step, …"""

    shard: int
    first: int = 0
    step: int = 1

    def holds(self, number: int) -> bool:
        """Whether a record, by its number inside the shard, is one of these."""
        return number % self.step == self.first


def shared(slices: Sequence[Slice], index: int, count: int) -> list[Slice]:
    """The share of reader `index` of `count`: whole slices as long as there is one for every reader, of those left every
    count-th record.
    """
    whole = len(slices) // count * count
    strided = (Slice(each.shard, each.first + each.step * index, each.step * count) for each in slices[whole:])
    return [*slices[:whole][index::count], *strided]


class ImageStream:
    """The images of a stream, whose number is unknown (`count` is None) unless they were drawn.

    An image's number in a Coverage is shard << SHARD_BITS | its place in the shard. Its name is the path that unpacking would
    give where there are files, begins with the shard's where there are several, and is numbered where it repeats in its shard.
    """

    bundled = False
    shape = None
    content_sha256 = None
    from_memory = False

    def __init__(
        self,
        address: str,
        shards: Shards,
        max_pixels: int | None = None,
        *,
        drawn: Coverage | None = None,
        order_seed: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        prefix, slash, where = address.partition("/")
        self.address, self.max_pixels = escaped(f"{prefix}{slash}{public(where)}"), max_pixels
        self.shards, self.drawn, self.order_seed = shards, drawn, order_seed
        self.left_out, self._notes = LeftOut(), notes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class number; empty where unknown."""
        return self.shards.class_names

    @property
    def notes(self) -> tuple[str, ...]:
        """How the address is read, and what was drawn from it."""
        return (*self.shards.notes, *self._notes)

    @property
    def count(self) -> int | None:
        """The number of images, where it is known: of those that were drawn."""
        return None if self.drawn is None else len(self.drawn)

    def subset(self, count: int, seed: int = 0) -> ImageStream:
        """`count` images drawn under `seed`, the same in every process; see `_mixed` and `_shuffled`. Nothing is decoded.

        Raises SettingError if `count` < 1, DataError where a shard cannot be read.
        """
        if count < 1:
            raise SettingError(f"the number of images to take must be at least 1, not {count}; leave it out for all")
        if self.drawn is not None and count >= len(self.drawn):
            return self
        seen = 0

        def passing() -> Iterator[int]:
            nonlocal seen
            for number, _ in self._mixed(self._slices(), None, seed, lambda _: False):
                seen += 1
                yield number

        drawn = Coverage()
        numbers = [number for _, number in zip(range(count), _shuffled(passing(), BUFFER, seed), strict=False)]
        drawn.add(numbers)
        how = f"by a shuffle buffer of {BUFFER:,} from {len(self.shards.names):,} shards in random order"
        note = f"{len(drawn):,} images drawn under seed {seed}, out of the first {seen:,} that came {how}, {AT_ONCE} at a time"
        return ImageStream(self.address, self.shards, self.max_pixels, drawn=drawn, notes=(*self._notes, note))

    def shuffled(self, seed: int) -> ImageStream:
        """The same images, to be read in a random order that follows from `seed` and the number of readers."""
        how = f"by a shuffle buffer of {BUFFER:,} images, from shards in random order, {AT_ONCE} at a time"
        note = f"the stream is read in the order of seed {seed}, {how}"
        settings: dict[str, Any] = {"drawn": self.drawn, "order_seed": seed, "notes": (*self._notes, note)}
        return ImageStream(self.address, self.shards, self.max_pixels, **settings)

    def batches(
        self,
        preprocess: Preprocess,
        *,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        part: Part = WHOLE,
        done: Coverage | None = None,
        pin: bool = False,
    ) -> Iterator[Batch]:
        """The images of this process, every image once; see `data.images.batches`.

        `part`, then the processes, then the `workers` of each share the shards, see `shared`; images that are `done` are passed
        over undecoded. Raises DataError where a shard cannot be read to its end, naming it.
        """
        check_share(batch_size, workers, rank, world, part)
        slices = shared(shared(self._slices(), part[0] - 1, part[1]), rank, world)
        reader = _Reader(self, preprocess, slices, done, max(BUFFER // (world * max(workers, 1)), 1))
        shape = (preprocess.channels, *preprocess.size)
        collate = functools.partial(collated, shape)
        loader = loader_of(reader, batch_size=batch_size, workers=workers, pin=pin, collate_fn=collate)
        return read_all(loader, self.address, alone=world == 1 and part == WHOLE and not done)

    def _slices(self) -> list[Slice]:
        """All shards, or those out of which images were drawn."""
        drawn = None if self.drawn is None else {each.start >> SHARD_BITS for each in self.drawn.ranges()}
        return [Slice(shard) for shard in range(len(self.shards.names)) if drawn is None or shard in drawn]

    @functools.cached_property
    def bits(self) -> int:
        """The bits of grey that all pictures of more than 8 are read with: the most among the first LOOKED_AT records."""
        deepest = 8
        for shard in range(len(self.shards.names)):
            records = self._records(shard, lambda place: place < LOOKED_AT)
            first = [record for _, record in zip(range(LOOKED_AT), records, strict=False) if record.content is not None]
            for record in first:
                if suffix_of(record.name) not in EIGHT_BITS:
                    with contextlib.suppress(Exception):  # skipped when its turn comes
                        picture = opened(io.BytesIO(record.content or b""), self.max_pixels)
                        if is_deep(picture) and picture.mode != "F":
                            deepest = max(deepest, significant_bits(picture))
            if first:
                break
        return deepest

    def _records(self, shard: int, wanted: Wanted) -> Iterator[Record]:
        """The records of one shard; DataError where it cannot be read to its end."""
        try:
            yield from self.shards.records(shard, wanted)
        except CollapseProbeError:
            raise
        except Exception as error:  # each library has errors of its own
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            text = (
                f"cannot read shard {self.shards.names[shard]} of {self.address} to its end ({why}); make it or fetch it again"
            )
            raise DataError(escaped(text)) from error

    def _of_slice(self, each: Slice, done: Coverage | None, wanted: Wanted) -> Iterator[tuple[int, Record]]:
        """Number and record of the images of one slice that are drawn and not done."""
        base, names = each.shard << SHARD_BITS, set[str]()
        drawn = None if self.drawn is None else [i for i in self.drawn.ranges() if i.start >> SHARD_BITS == each.shard]
        last = None if drawn is None else max(i[-1] for i in drawn)

        def mine(place: int) -> bool:
            number = base | place
            drawn_too = drawn is None or any(number in i for i in drawn)
            return each.holds(place) and drawn_too and (done is None or number not in done)

        for place, record in enumerate(self._records(each.shard, lambda place: mine(place) and wanted(place))):
            name = _unique(escaped(record.name), names)
            if len(self.shards.names) > 1:
                name = f"{escaped(self.shards.names[each.shard])}/{name}"
            if mine(place):
                yield base | place, Record(name, record.content, record.label, record.reason)
            if last is not None and base | place >= last:
                return

    def _mixed(
        self, slices: Sequence[Slice], done: Coverage | None, seed: int | None, wanted: Wanted
    ) -> Iterator[tuple[int, Record]]:
        """Numbers and records of several slices, one after another; with a seed in random order, AT_ONCE in turn."""
        if seed is None:
            for each in slices:
                yield from self._of_slice(each, done, wanted)
            return
        order = np.random.default_rng(seed).permutation(len(slices)).tolist()
        waiting = deque(self._of_slice(slices[at], done, wanted) for at in order)
        turn: deque[Iterator[tuple[int, Record]]] = deque()
        while waiting or turn:
            while waiting and len(turn) < AT_ONCE:
                turn.append(waiting.popleft())
            records = turn.popleft()
            found = next(records, None)
            if found is not None:
                yield found
                turn.append(records)


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; then it is."""
    number, plain = 1, name
    while name in taken:
        number += 1
        name = f"{plain} ({number})"
    taken.add(name)
    return name


def _shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """The items in a random order: each time one of `size` that came and were not given, until none is left."""
    random, buffer = np.random.default_rng((seed, 1)), list[T]()
    for item in items:
        buffer.append(item)
        if len(buffer) >= size:
            place = int(random.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    yield from (buffer[place] for place in random.permutation(len(buffer)))


class _Reader(IterableDataset[Any]):
    """The items of some slices, or of a worker's share of them; its last is an error where one was met."""

    def __init__(
        self, stream: ImageStream, preprocess: Preprocess, slices: Sequence[Slice], done: Coverage | None, buffer: int
    ) -> None:
        self.stream, self.preprocess, self.slices, self.done, self.buffer = stream, preprocess, slices, done, buffer
        self.bits = stream.bits

    def __iter__(self) -> Iterator[Item | CollapseProbeError]:
        worker, seed = get_worker_info(), self.stream.order_seed
        slices = self.slices if worker is None else shared(self.slices, worker.id, worker.num_workers)
        records = self.stream._mixed(slices, self.done, seed, lambda _: True)
        try:
            for number, record in records if seed is None else _shuffled(records, self.buffer, seed):
                yield self._item(number, record)
        except CollapseProbeError as error:
            yield error

    def _item(self, number: int, record: Record) -> Item:
        try:
            if record.content is None:
                raise Unreadable(record.reason or "there is no picture in it")
            picture = decode(io.BytesIO(record.content), self.stream.max_pixels, self.bits)
            pixels, remark = self.preprocess.pixels_of(picture), str(picture.info.get(REMARK, ""))
            return Item(number, number, record.name, pixels, record.label, remark)
        except CollapseProbeError:  # of the model's, not of this picture
            raise
        except Exception as error:  # neither Pillow nor transforms have a common base for their errors
            return Item(number, number, record.name, reason_of(error))
