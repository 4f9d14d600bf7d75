"""Parts, processes and runs that go on share the images of a set: every image once, whatever the numbers of each."""

import os
import signal
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collapse_probe.data.coverage import Coverage
from collapse_probe.data.images import batches, batches_of, images_from, seeded_order
from collapse_probe.data.loading import LoadTimes
from collapse_probe.data.preprocessing import Preprocess, from_timm_config, given_pixels
from collapse_probe.errors import DataError, SettingError

READY = given_pixels(1, (2, 2))


def images(count):
    return images_from(torch.arange(count * 4.0).reshape(count, 1, 2, 2))


def read(some, **share):
    return list(batches(some, READY, **{"batch_size": 3, **share}))


def names_of(got):
    return [name for batch in got for name in batch.names]


def covered(got):
    return Coverage(number for batch in got for number in batch.read)


@given(st.integers(1, 40), st.integers(1, 5), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_parts_that_are_stopped_and_go_on_read_every_image_once(count, parts, runs):
    some, seen, whole = images(count), [], Coverage()
    for k in range(1, parts + 1):
        done = Coverage()
        for number, (world, size) in enumerate(runs):
            part, last = Coverage(), number == len(runs) - 1
            for rank in range(world):
                got = read(some, part=(k, parts), rank=rank, world=world, done=done, batch_size=size)
                got = got if last else got[: (rank + 1) % 3]
                seen += names_of(got)
                part.merge(covered(got))
            assert done.overlap(part) is None
            done.merge(part)
        assert done == Coverage(range(k - 1, count, parts))
        assert whole.overlap(done) is None
        whole.merge(done)
    assert sorted(seen, key=int) == some.names
    assert not whole.missing(count)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("part", [(1, 1), (2, 3)])
def test_a_run_that_goes_on_reads_the_batches_of_an_unbroken_one(shuffled, part):
    some = images(20)
    order = seeded_order(some, 1) if shuffled else None
    whole = read(some, order=order, part=part)
    for stopped in range(len(whole)):
        rest = read(some, order=order, part=part, done=covered(whole[:stopped]))
        assert [batch.names for batch in rest] == [batch.names for batch in whole[stopped:]]
        assert [batch.read for batch in rest] == [batch.read for batch in whole[stopped:]]
    assert names_of(whole) == [some.names[i] for i in (order or range(20))[part[0] - 1 :: part[1]]]
    assert covered(whole).ranges() == [range(part[0] - 1, 20, part[1])]


def test_what_could_not_be_read_was_read(tmp_path):
    for i in range(4):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    ready = from_timm_config({"input_size": (3, 2, 2)})
    read = partial(batches, images_from(tmp_path), ready, batch_size=8)
    (batch,) = read()
    assert (batch.indices, batch.read) == ((0, 2, 3), (0, 1, 2, 3))
    (rest,) = read(done=Coverage([0, 2, 3]))
    assert (rest.names, [name for name, _ in rest.skipped]) == ((), ["1.png"])
    assert [*read(done=Coverage(range(4)))] == []


def die(picture):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_reads_and_is_killed_is_an_error(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"has died \(DataLoader worker .*try fewer of them \(--workers\)") as caught:
        list(batches(images_from(tmp_path), Preprocess(die, (2, 2), {}), batch_size=1, workers=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [(0, 3), (4, 3), (1, 0)])
def test_impossible_parts_are_refused(part):
    with pytest.raises(SettingError, match="expected K/N"):
        read(images(3), part=part)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_for_a_gpu_are_where_it_fetches_from(workers):
    got = read(images(5), pin=True, workers=workers)
    assert all(batch.pixels.is_pinned() for batch in got)
    assert names_of(got) == list("01234")


def test_an_iterable_has_no_parts_and_cannot_go_on():
    for share in ({"part": (1, 2)}, {"done": Coverage([0])}):
        with pytest.raises(SettingError, match="of a data address, not of an iterable"):
            batches_of(images_from([torch.zeros(2, 1, 2, 2)]), READY, 2, **share)


def test_waiting_is_told_from_computing(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("collapse_probe.data.loading.time.perf_counter", lambda: next(clock))
    times = LoadTimes()
    assert len(list(times.over(read(images(15))))) == times.batches == 5
    assert (times.waited, times.computed) == (4, 4)
    assert "50 % of 8 s were spent waiting" in times.sentence(0)
    times.computed = 100
    assert times.sentence(0) is None
