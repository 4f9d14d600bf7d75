"""The sums of a run: parts add up to the whole, and what is stored goes on where it stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import random_maps, trace_of

from collapse_probe.metrics.metric import make
from collapse_probe.metrics.minibatch_cka import MinibatchHSIC
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
        if isinstance(state, torch.Tensor):
            np.testing.assert_allclose(state, theirs[name], atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "layer-cka"])
def test_two_halves_merge_into_the_whole(name):
    for whole, half, other in zip(*(accumulated(name, *ends) for ends in ((0, 8), (0, 4), (4, 8))), strict=True):
        half.merge(other)
        same(half, whole, 1e-5)  # vectors are added over a few images in float32


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_state_goes_on_where_it_stopped(name):
    stored = [accumulator.state_dict() for accumulator in accumulated(name, 0, 4)]
    fresh = accumulated(name, 0, 0)
    for accumulator, states in zip(fresh, stored, strict=True):
        accumulator.load_state_dict(states)
        same(accumulator, accumulator, 0)
    accumulated(name, 4, 8, into=fresh)
    for accumulator, whole in zip(fresh, accumulated(name, 0, 8), strict=True):
        same(accumulator, whole, 1e-5)


def test_a_copy_does_not_change_with_its_accumulator():
    (accumulator,) = accumulated("patch-diversity", 0, 2)
    before = accumulator.state_dict()["value_total"]
    kept = before.clone()
    accumulated("patch-diversity", 2, 4, into=[accumulator])
    assert torch.equal(before, kept)
    assert not torch.equal(accumulator.state("value_total"), kept)


def test_the_states_of_another_accumulator_are_refused():
    (one,), (other,) = accumulated("patch-diversity", 0, 2), accumulated("attention-entropy", 0, 2)
    with pytest.raises(AssertionError, match="another accumulator"):
        one.load_state_dict(other.state_dict())


def test_cka_of_merged_halves_with_full_minibatches_is_that_of_the_whole():
    x, y = np.random.default_rng(0).normal(size=(2, 128, 5))
    whole, *halves = MinibatchHSIC(2), MinibatchHSIC(2), MinibatchHSIC(2)
    for accumulator, images in ((whole, slice(None)), (halves[0], slice(0, 64)), (halves[1], slice(64, None))):
        accumulator.absorb([torch.tensor(x[images]), torch.tensor(y[images])])
    halves[0].merge(halves[1])
    assert halves[0].cka()[0] == pytest.approx(whole.cka()[0], abs=1e-12)
    assert halves[0].cka()[3] == whole.cka()[3] == 8


def test_images_in_no_minibatch_yet_come_along_when_halves_are_merged_or_stored():
    x = np.random.default_rng(0).normal(size=(2, 10, 5))
    one, other = MinibatchHSIC(2), MinibatchHSIC(2)
    one.absorb([torch.tensor(x[0, :5]), torch.tensor(x[1, :5])])
    other.absorb([torch.tensor(x[0, 5:]), torch.tensor(x[1, 5:])])
    stored = MinibatchHSIC(2)
    stored.load_state_dict(one.state_dict())
    stored.absorb([torch.tensor(x[0, 5:]), torch.tensor(x[1, 5:])])
    one.merge(other)
    assert one.cka()[0] == pytest.approx(stored.cka()[0], abs=1e-12)
    assert one.cka()[3] == stored.cka()[3] == 1
