"""A device whose memory runs out: smaller tiles, then fewer images, and no sum, record or picture lost or counted twice."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from factories import small_vit
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.analysis.measurement import DEFAULT_METRICS, Measurement, RunSettings, make_metrics
from collapse_probe.analysis.state import memory
from collapse_probe.capture import trace as traces
from collapse_probe.capture.capture import discover_plan
from collapse_probe.data.loading import Batch
from collapse_probe.errors import SettingError
from collapse_probe.models.loading import resolve

IMAGES = 16


class Short(TorchDispatchMode):
    """Raises torch.OutOfMemoryError at the operators of the given numbers."""

    def __init__(self, *at):
        super().__init__()
        self.at, self.count, self.resting = at, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.resting
        if self.count in self.at and not self.resting:
            raise torch.OutOfMemoryError("CUDA out of memory: made up")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return small_vit(sharpness=6.0, depth=3)


@pytest.fixture(autouse=True)
def short_of_memory(monkeypatch):
    """A CPU that says when its memory runs out, with room for eight images in a tile."""
    monkeypatch.setattr(memory, "RUNS_OUT", ("cpu",))
    one_image = 3 * 4 * 17 * 17 * 4
    monkeypatch.setattr(memory, "SMALLEST_BYTES", 2 * one_image)
    monkeypatch.setitem(traces.TILE_BYTES, "cpu", 8 * one_image)


@cache
def plan_of(model):
    return discover_plan(model, (64, 64))


def measured(model, short, metrics=DEFAULT_METRICS, images=IMAGES):
    plan = plan_of(model)
    settings = RunSettings(device="cpu", null_images=4, gallery_images=2)
    run = Measurement(resolve(model), plan, make_metrics(plan, metrics), settings, keep_logits=True)
    keep = run._keep_ends

    def on_the_cpu(*args):  # of pixels and values that are there: no GPU takes part
        short.resting = True
        keep(*args)
        short.resting = False

    run._keep_ends = on_the_cpu
    generator = torch.Generator().manual_seed(0)
    for first in range(0, images, 8):
        pixels = torch.randn(8, 3, 64, 64, generator=generator)
        names = tuple(f"{first + i}.png" for i in range(8))
        with short:
            run.update(Batch((*range(first, first + 8),), names, pixels))
    return run


def same(run, whole, within=1e-12):
    assert run.tally.images == whole.tally.images == IMAGES
    table, expected = run.table(), whole.table()
    assert table.names == expected.names
    for name, column in expected.columns.items():
        np.testing.assert_allclose(table.columns[name], column, rtol=0, atol=within, err_msg=name)
    assert set(run.tally.glimpses.items) == set(whole.tally.glimpses.items)
    assert set(run.tally.twin_pixels.items) == set(whole.tally.twin_pixels.items)
    assert {n: e.state().keys() for n, e in run.tally.ends.items()} == {
        n: e.state().keys() for n, e in whole.tally.ends.items()
    }
    results = run.results(table)
    for name, result in whole.results(expected).items():
        found = results[name]
        for field in ("values", "stderr", "ci95"):
            np.testing.assert_allclose(getattr(found, field), getattr(result, field), rtol=0, atol=within, err_msg=name)
        for null, values in (result.nulls.values if result.nulls else {}).items():
            if values is not None:
                np.testing.assert_allclose(found.nulls.values[null], values, rtol=0, atol=within, err_msg=f"{name} {null}")
    assert not run.inconsistent


def operators(model, metrics=DEFAULT_METRICS):
    measured(model, short := Short(), metrics)
    return short.count


def check(model, places, metrics=DEFAULT_METRICS):
    whole, kinds = measured(model, Short(), metrics), set()
    for place in places:
        run = measured(model, Short(place), metrics)
        same(run, whole)
        (said,) = run.tally.remarks
        assert run.tally.remarks[said] == 8
        kinds.add("tiles" if "in tiles of" in said else "images")
    return kinds


def test_nothing_is_lost_or_doubled_wherever_memory_runs_out(model):
    total = operators(model)
    assert total > 500
    assert check(model, range(1, total + 1, total // 7)) == {"tiles", "images"}


def test_no_image_is_twice_in_a_sample(model):
    metrics = ("layer-cka", "map-rank", "patch-diversity")
    total = operators(model, metrics)
    assert check(model, range(1, total + 1, total // 7), metrics) == {"tiles", "images"}


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_at_any_operator(model):
    check(model, range(1, operators(model) + 1))


def test_a_sum_that_is_half_added_is_what_is_guarded_against(model, monkeypatch):
    monkeypatch.setattr(memory.Room, "restore", lambda self, accumulators, states: None)
    total = operators(model)
    with pytest.raises(AssertionError):
        check(model, range(total // 2 - 20, total // 2))


def test_memory_that_runs_out_again_and_again(model):
    total = operators(model)
    whole = measured(model, Short())
    places = [total * part // 8 for part in (1, 3, 4, 6, 7)]
    run = measured(model, Short(*places))
    same(run, whole, 1e-6)  # fewer than four images go through the model at a time, which rounds otherwise
    assert sum(run.tally.remarks.values()) >= 3 * 4
    assert len(run.tally.remarks) >= 2


def test_one_image_that_is_too_large_is_said(model):
    with pytest.raises(SettingError, match="one image alone does not fit into the memory of cpu: take smaller images"):
        measured(model, Short(*range(1, 10**5)))


def test_a_cpu_is_given_no_copies_to_keep(model, monkeypatch):
    monkeypatch.setattr(memory, "RUNS_OUT", ("cuda",))
    run = measured(model, Short())
    assert run.room.copied(run.tally.accumulators.values()) == []
    with pytest.raises(torch.OutOfMemoryError):
        measured(model, Short(100))
