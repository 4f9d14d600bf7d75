"""Which images of a source were read: a set of whole numbers, kept as a few ranges with steps."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import SettingError

SHARD_BITS = 40
"""An image of a stream has the number shard << SHARD_BITS | its number inside the shard; no range crosses shards."""
SHORT = 1024  # numbers in a range that is taken apart where ranges are joined
FEW = 16  # ranges in one shard that are not joined
LARGEST_MASK = 1 << 22  # numbers between the first and the last of some that are looked up together
LARGEST = 1024  # number of ranges that are joined to one because they complete each other


class Coverage:
    """The numbers of the images that were read, exactly: of an ImageSet the places in its order, of a stream see SHARD_BITS.

    A share `rank, rank + world, …` that is added batch by batch is one range, however many images it has; shares that together
    hold all become one range.
    """

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._shards: dict[int, list[range]] = {}
        self._most: dict[int, int] = {}  # ranges of a shard above which they are joined
        self.add(numbers)

    def add(self, numbers: Iterable[int]) -> None:
        """These numbers too; SettingError for negative ones."""
        new = np.unique(np.fromiter(numbers, dtype=np.int64))
        if not len(new):
            return
        if new[0] < 0:
            raise SettingError(f"the number of an image must be 0 or more, not {new[0]}")
        for part in np.split(new, np.flatnonzero(np.diff(new >> SHARD_BITS)) + 1):
            self._append(_ranges(part[~self._held(part)]))

    def _held(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ascending numbers of one shard are held."""
        first, last = int(numbers[0]), int(numbers[-1])
        near = [each for each in self._shards.get(first >> SHARD_BITS, ()) if each.start <= last and each[-1] >= first]
        if last - first > LARGEST_MASK:
            held = np.zeros(len(numbers), dtype=np.bool_)
            for each in near:
                held |= (numbers >= each.start) & (numbers <= each[-1]) & ((numbers - each.start) % each.step == 0)
            return held
        mask = np.zeros(last - first + 1, dtype=np.bool_)
        for each in near:
            start = each.start - first
            mask[start if start >= 0 else start % each.step : each.stop - first : each.step] = True
        chosen: NDArray[np.bool_] = mask[numbers - first]
        return chosen

    def _append(self, new: Sequence[range]) -> None:
        """Add ranges of one shard that have no number in common with one another and with what is held."""
        for each in new:
            shard = each.start >> SHARD_BITS
            own = self._shards.setdefault(shard, [])
            _append(own, each)
            if len(own) > self._most.get(shard, FEW):
                self._shards[shard] = _joined(own)
                self._most[shard] = max(FEW, 2 * len(self._shards[shard]))

    def merge(self, other: Coverage) -> None:
        """The numbers of `other` too."""
        apart = self.overlap(other) is None
        for shard, ranges in other._shards.items():
            if apart:
                self._append(ranges)
            else:
                for each in ranges:
                    self.add(each)
            self._shards[shard] = _joined(self._shards[shard])

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, (int, np.integer)) or number < 0:
            return False
        return any(int(number) in each for each in self._shards.get(int(number) >> SHARD_BITS, ()))

    def __len__(self) -> int:
        return sum(len(each) for ranges in self._shards.values() for each in ranges)

    def __iter__(self) -> Iterator[int]:
        """The numbers in ascending order."""
        for shard in sorted(self._shards):
            yield from heapq.merge(*self._shards[shard])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coverage) and len(self) == len(other) == self._count_common(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Coverage({len(self)} images in {len(self.ranges())} ranges)"

    def _commons(self, other: Coverage) -> Iterator[range]:
        for shard in sorted(self._shards.keys() & other._shards.keys()):
            yield from (common for a in self._shards[shard] for b in other._shards[shard] if (common := _common(a, b)))

    def _count_common(self, other: Coverage) -> int:
        return sum(map(len, self._commons(other)))

    def overlap(self, other: Coverage) -> int | None:
        """The first number that both hold, or None."""
        return min((common.start for common in self._commons(other)), default=None)

    def outside(self, places: range) -> Sequence[int]:
        """Those of `places`, in order, that are not held."""
        if not self._shards or not places:
            return places
        left = np.ones(len(places), dtype=np.bool_)
        for each in (each for ranges in self._shards.values() for each in ranges):
            common = _common(each, places)
            if common:
                step = common.step // places.step
                left[places.index(common.start) : places.index(common[-1]) + 1 : step] = False
        rest: list[int] = (np.flatnonzero(left) * places.step + places.start).tolist()
        return rest

    def missing(self, total: int) -> Coverage:
        """The numbers from 0 to `total` − 1 that are not held."""
        return Coverage(self.outside(range(total)))

    def ranges(self) -> list[range]:
        """The numbers as ranges without common numbers, by where they start."""
        return _sorted(each for ranges in self._shards.values() for each in _joined(ranges))

    def to_json(self) -> list[list[int]]:
        """[start, stop, step] of each range."""
        return [[each.start, each.stop, each.step] for each in self.ranges()]

    @classmethod
    def from_json(cls, triples: Any) -> Coverage:
        """What `to_json` gave; SettingError for anything else, also for ranges with common numbers."""
        coverage = cls()
        for triple in triples if isinstance(triples, list) else [triples]:
            whole = isinstance(triple, list) and len(triple) == 3 and all(type(number) is int for number in triple)
            if not whole or triple[0] < 0 or triple[2] < 1 or triple[1] <= triple[0]:
                raise SettingError(f"{str(triple)[:100]} is no range of images; expected [start, stop, step]")
            one, each = cls(), range(*triple)
            one._append([each])
            if each.start >> SHARD_BITS != each[-1] >> SHARD_BITS:
                raise SettingError(f"the range of images {triple} crosses shards")
            if coverage.overlap(one) is not None:
                raise SettingError(f"the range of images {triple} has numbers of another one")
            coverage._append([each])
        return coverage


def _sorted(ranges: Iterable[range]) -> list[range]:
    return sorted(ranges, key=lambda each: (each.start, each.step))


def _common(one: range, other: range) -> range:
    """The numbers of two ranges, by the Chinese remainder theorem."""
    first, last = max(one.start, other.start), min(one[-1], other[-1])
    shared = math.gcd(one.step, other.step)
    apart = other.start - one.start
    if last < first or apart % shared:
        return range(0)
    step = one.step // shared * other.step
    rest = other.step // shared
    start = one.start + one.step * (apart // shared * pow(one.step // shared, -1, rest) % rest)
    start += max(0, -(-(first - start) // step)) * step
    return range(start, last + 1, step)


def _ranges(numbers: NDArray[np.int64]) -> list[range]:
    """Ascending numbers as ranges: two and more that follow each other, three and more at equal distances, others alone."""
    ranges: list[range] = []
    gaps = np.diff(numbers)
    starts = np.flatnonzero(np.diff(gaps, prepend=-1))
    lengths = np.diff(starts, append=len(gaps))
    at = 0  # the next number that has no range
    for gap_at, gaps_long in zip(starts.tolist(), lengths.tolist(), strict=True):
        first, last = max(at, gap_at), gap_at + gaps_long
        step = int(gaps[gap_at])
        if last - first + 1 >= (2 if step == 1 else 3):
            ranges += (range(i, i + 1) for i in numbers[at:first].tolist())
            ranges.append(range(int(numbers[first]), int(numbers[last]) + 1, step))
            at = last + 1
    return [*ranges, *(range(i, i + 1) for i in numbers[at:].tolist())]


def _append(ranges: list[range], new: range) -> None:
    """Add a range, as a continuation of the newest that it continues."""
    for at in range(len(ranges) - 1, max(len(ranges) - 1 - FEW, -1), -1):
        old = ranges[at]
        step = old.step if len(old) > 1 else new.step
        if new.start == old[-1] + step and (len(new) == 1 or new.step == step):
            ranges[at] = range(old.start, new[-1] + 1, step)
            return
    ranges.append(new)


def _joined(ranges: Sequence[range]) -> list[range]:
    """The same numbers in fewer ranges, where that can be."""
    few, short = ([each for each in ranges if (len(each) <= SHORT) is is_short] for is_short in (False, True))
    if short:
        apart = _ranges(np.sort(np.concatenate([np.arange(each.start, each.stop, each.step) for each in short])))
        few += apart if len(apart) < len(short) else short
    while True:
        before = len(few), sum(each.step for each in few)
        few = _complements(_chained(few))
        if (len(few), sum(each.step for each in few)) >= before:
            return few


def _chained(ranges: Iterable[range]) -> list[range]:
    """Ranges of one step and one remainder that follow each other as one."""
    chained: list[range] = []
    for each in sorted(ranges, key=lambda r: (r.step, r.start % r.step, r.start)):
        last = chained[-1] if chained else None
        if last is not None and last.step == each.step and each.start == last[-1] + last.step:
            chained[-1] = range(last.start, each.stop, each.step)
        else:
            chained.append(each)
    return chained


def _complements(ranges: Sequence[range]) -> list[range]:
    """Ranges of one step that together hold all numbers at a smaller step, as one range there; what is beyond stays."""
    result: list[range] = []
    for step, group in groupby(sorted(ranges, key=lambda r: r.step), key=lambda r: r.step):
        own = [*group]
        for factor in (f for f in range(2, min(step, LARGEST) + 1) if step % f == 0 and f <= len(own)):
            families: dict[int, list[range]] = {}
            for each in own:
                families.setdefault(each.start % (step // factor), []).append(each)
            own = [each for family in families.values() for each in _complement(family, step, factor)]
            result += (each for each in own if each.step < step)
            own = [each for each in own if each.step == step]
        result += own
    return result


def _complement(family: list[range], step: int, factor: int) -> list[range]:
    """Ranges of one step with one remainder by step / factor: those that complete each other joined, if that makes fewer."""
    firsts = {each.start % step: each for each in reversed(family)}
    if len(firsts) < factor:
        return family
    inner, members = step // factor, [*firsts.values()]
    start = max(each.start for each in members) - step + inner
    end = min(each[-1] for each in members) + step - inner
    if end <= start:
        return family
    before = [each[: max(-(-(start - each.start) // step), 0)] for each in members]
    after = [each[max((end - each.start) // step + 1, 0) :] for each in members]
    beyond = [part for part in (*before, *after) if part]
    rest = [each for each in family if each not in members]
    return [range(start, end + 1, inner), *beyond, *rest] if len(beyond) < len(members) else family
