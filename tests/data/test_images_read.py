"""The record of which images were read is an exact set, and stays small for every way of sharing them out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.data.coverage import SHARD_BITS, Coverage
from collapse_probe.errors import SettingError

SHARD = 1 << SHARD_BITS
numbers = st.one_of(
    st.sets(st.integers(0, 60)),
    st.builds(lambda start, count, step: {*range(start, start + count * step, step)}, *[st.integers(1, 12)] * 3),
    st.sets(st.builds(lambda shard, i: shard * SHARD + i, st.integers(0, 3), st.integers(0, 9))),
    st.builds(lambda first, second: {*first, *second}, st.sets(st.integers(0, 3000)), st.just(range(0, 4000, 3))),
)


@given(st.lists(st.tuples(st.booleans(), numbers), max_size=8))
@settings(max_examples=400, deadline=None)
def test_it_is_the_set_of_all_that_was_added_or_merged(steps):
    coverage, plain = Coverage(), set()
    for merged, some in steps:
        coverage.merge(Coverage(some)) if merged else coverage.add(sorted(some))
        plain |= some
    assert len(coverage) == len(plain)
    assert [*coverage] == sorted(plain)
    assert all((i in coverage) == (i in plain) for i in range(70))
    assert Coverage.from_json(json.loads(json.dumps(coverage.to_json()))) == coverage == Coverage(plain)
    assert [*coverage.missing(50)] == sorted({*range(50)} - plain)
    assert len(coverage.ranges()) <= max(len(plain), 1)


@given(numbers, numbers)
def test_the_overlap_is_the_first_common_number(first, second):
    one, other = Coverage(first), Coverage(second)
    assert one.overlap(other) == other.overlap(one) == min(first & second, default=None)
    assert (one == other) == (first == second)


@given(numbers, st.integers(0, 5), st.integers(0, 70), st.integers(1, 7))
def test_what_is_outside_keeps_its_order(some, start, stop, step):
    places = range(start, stop, step)
    assert [*Coverage(some).outside(places)] == [i for i in places if i not in some]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_share_is_one_range_and_all_shares_too(batch):
    shares = [Coverage() for _ in range(7)]
    for rank, share in enumerate(shares):
        places = range(10_000)[rank::7]
        for at in range(0, len(places), batch):
            share.add(places[at : at + batch])
        assert share.ranges() == [places]
    whole = Coverage()
    for share in reversed(shares):
        whole.merge(share)
    assert whole.to_json() == [[0, 10_000, 1]]


def test_runs_that_go_on_with_other_numbers_of_processes_stay_few_ranges():
    done, total = Coverage(), 100_000
    random = np.random.default_rng(0)
    for world in (3, 2, 8, 5):
        left = done.outside(range(total))
        for rank in range(world):
            own = left[rank::world]
            for at in range(0, int(len(own) * random.uniform(0.28, 0.3)), 64):
                done.add(own[at : at + 64])
    assert 60_000 < len(done) < 90_000
    assert len(done.ranges()) < 100
    done.add(done.outside(range(total)))
    assert done.to_json() == [[0, total, 1]]


def test_a_million_images_in_any_order_of_a_window_end_as_one_range():
    coverage, random = Coverage(), np.random.default_rng(0)
    for at in range(0, 200_000, 1000):
        for part in np.array_split(at + random.permutation(1000), 16):
            coverage.add(part.tolist())
    assert coverage.to_json() == [[0, 200_000, 1]]


@pytest.mark.parametrize(
    "bad",
    [None, {}, [[0, 1]], [[0, 0, 1]], [[-1, 3, 1]], [[0, 3, 0]], [[0, 3.0, 1]], [[0, 5, 1], [4, 6, 1]], [[0, SHARD + 1, 1]]],
)
def test_a_damaged_record_is_refused(bad):
    with pytest.raises(SettingError, match="range"):
        Coverage.from_json(bad)


def test_negative_numbers_are_refused():
    with pytest.raises(SettingError, match="0 or more"):
        Coverage([3, -1])
