"""The sums of a run: parts add up to the whole, and what is stored goes on where it stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import random_maps, trace_of
from safetensors.torch import load, save

from collapse_probe.errors import SettingError
from collapse_probe.metrics.metric import make
from collapse_probe.registry import METRICS

IMAGES, L, H, N, D = 8, 3, 2, 9, 6
NAMES = [name for name, kind in METRICS.items() if kind.level != "weights"]
MAPS = random_maps((IMAGES, L, H, N, N), seed=1)
TOKENS = np.random.default_rng(2).normal(size=(IMAGES, L + 1, N, D)) + 0.3


def accumulated(name, first, last, into=None):
    """The accumulators of a metric after the images first … last, in batches of two."""
    metric = make(name, trace_of(MAPS[:1], TOKENS[:1]).plan)
    found = [build() for _, build in metric.accumulators()] if into is None else into
    for start in range(first, last, 2):
        trace = trace_of(MAPS[start : start + 2], TOKENS[start : start + 2])
        for accumulator in found:
            accumulator.start_batch(trace, [f"image {start}", f"image {start + 1}"])
        for tile in trace.tiles(2**24):
            for accumulator in found:
                accumulator.take(tile)
        for accumulator in found:
            accumulator.end_batch(trace)
    return found


def same(one, other, tolerance):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, state in mine.items():
        np.testing.assert_allclose(state, theirs[name], atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_two_halves_merge_into_the_whole(name):
    for whole, half, other in zip(*(accumulated(name, *ends) for ends in ((0, 8), (0, 4), (4, 8))), strict=True):
        half.merge(other)
        same(half, whole, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_state_goes_on_where_it_stopped(name):
    stored = [accumulator.state_dict() for accumulator in accumulated(name, 0, 4)]
    fresh = accumulated(name, 0, 0)
    for accumulator, states in zip(fresh, stored, strict=True):
        accumulator.load_state_dict(states)
        same(accumulator, accumulator, 0)
    accumulated(name, 4, 8, into=fresh)
    for accumulator, whole in zip(fresh, accumulated(name, 0, 8), strict=True):
        same(accumulator, whole, 1e-12)


def test_a_copy_does_not_change_with_its_accumulator():
    (accumulator,) = accumulated("patch-diversity", 0, 2)
    before = accumulator.state_dict()["value_moments"]
    kept = before.clone()
    accumulated("patch-diversity", 2, 4, into=[accumulator])
    assert torch.equal(before, kept)
    assert not torch.equal(accumulator.state("value_moments"), kept)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_tensors_that_safetensors_keeps_to_the_bit(name):
    for accumulator, empty in zip(accumulated(name, 0, 4), accumulated(name, 0, 0), strict=True):
        states = accumulator.state_dict()
        assert all(state.is_contiguous() and state.device.type == "cpu" for state in states.values())
        empty.load_state_dict(load(save(states)))
        again = empty.state_dict()
        assert [*again] == [*states]
        assert all(torch.equal(again[key], state) for key, state in states.items())


def test_the_states_of_another_accumulator_are_refused_and_change_nothing():
    (one,), (other,) = accumulated("patch-diversity", 0, 2), accumulated("attention-entropy", 0, 2)
    before = one.state_dict()
    states = other.state_dict()
    with pytest.raises(SettingError, match=r"value_count is \[3, 2\] in float64, not \[4\] in float64"):
        one.load_state_dict(states)
    with pytest.raises(SettingError, match="sums of another metric, model or version"):
        one.merge(other)
    for changed, said in (
        ({"value_count": None}, "value_count is missing"),
        ({"extra": torch.zeros(1)}, "extra is not known here"),
        ({"value_moments": before["value_moments"].float()}, "value_moments is .* in float32, not .* in float64"),
    ):
        wrong = {key: state for key, state in {**before, **changed}.items() if state is not None}
        wrong = {key: state + 1 if key == "value_count" else state for key, state in wrong.items()}
        with pytest.raises(SettingError, match=said):
            one.load_state_dict(wrong)
    assert all(torch.equal(before[key], state) for key, state in one.state_dict().items())
