"""Maps inside windows: every number is the mean over an image's windows of what each window by itself would give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import plan_for, random_maps, readings

from collapse_probe.capture.trace import Attention, Trace
from collapse_probe.metrics.map_metric import MapMetric
from collapse_probe.metrics.metric import make
from collapse_probe.registry import METRICS

IMAGES, WINDOWS, BLOCKS, HEADS, TOKENS = 3, 4, 3, 2, 6
BUDGETS = {"one row": 1, "one head": WINDOWS * BLOCKS * TOKENS * TOKENS * 4, "all": 2**24}
PER_WINDOW = (
    "attention-entropy",
    "distance-from-uniform",
    "attention-sink",
    "map-rank",
    "map-rank@residual",
    "head-similarity",
    "attention-similarity",
    "attention-similarity@row",
)
WITHOUT = [name for name, kind in METRICS.items() if issubclass(kind, MapMetric) and not kind.windowed]


def windowed_plan(partitions=("plain",) * BLOCKS, windows=WINDOWS):
    plan = plan_for(BLOCKS, HEADS, TOKENS, patches=WINDOWS * TOKENS)
    facts = {"reason": "attention inside windows", "windows": windows}
    layers = tuple(replace(a, partition=p, **facts) for a, p in zip(plan.layers, partitions, strict=True))
    return replace(plan, layers=layers, tokens=WINDOWS * TOKENS)


def maps_of(seed=0):
    """[images, windows, blocks, heads, tokens, tokens]; the maps of an image are sharper than those of the one before."""
    shape = (WINDOWS, BLOCKS, HEADS, TOKENS, TOKENS)
    return np.stack([random_maps(shape, 0.5 + image, 10 * seed + image) for image in range(IMAGES)])


def trace_of(maps, plan):
    """A trace whose tensors hold the windows of one image after those of another."""
    folded = torch.as_tensor(maps.reshape(-1, *maps.shape[2:]))
    attention = tuple(Attention(layer.owner, "softmax", probs=folded[:, i]) for i, layer in enumerate(plan.layers))
    tokens = tuple(
        torch.as_tensor(np.random.default_rng(d).normal(size=(len(maps), plan.tokens, 8))) for d in range(BLOCKS + 1)
    )
    return Trace(plan, len(maps), tokens, attention, None)


def single_windows(maps):
    """A trace of the same maps in which every window is an image by itself."""
    return trace_of(maps.reshape(-1, 1, *maps.shape[2:]), plan_for(BLOCKS, HEADS, TOKENS))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", PER_WINDOW)
def test_numbers_are_means_over_the_windows_of_each_image(name, budget):
    maps = maps_of()
    found = readings([trace_of(maps, windowed_plan())], [name], BUDGETS[budget])[name]
    expected = readings([single_windows(maps)], [name])[name]
    np.testing.assert_allclose(found.array, expected.array, rtol=0, atol=1e-6)
    assert found.nulls is not None
    assert expected.nulls is not None
    for role in ("other_token", "other_head"):
        if expected.nulls.values.get(role) is not None:
            np.testing.assert_allclose(found.nulls.values[role], expected.nulls.values[role], rtol=0, atol=1e-6)


def test_an_image_counts_once_however_many_windows_it_has():
    maps = maps_of()
    of_images = -(maps * np.log(maps)).sum(-1).mean((1, 4))  # images, blocks, heads
    found = readings([trace_of(maps, windowed_plan())], ["attention-entropy"])["attention-entropy"]
    np.testing.assert_allclose(found.stderr, of_images.std(0, ddof=1) / np.sqrt(IMAGES), atol=1e-6)


def test_batches_do_not_matter():
    maps, plan, names = maps_of(), windowed_plan(), [*PER_WINDOW, "image-similarity", "similar-blocks"]
    whole = readings([trace_of(maps, plan)], names)
    parts = readings([trace_of(maps[:1], plan), trace_of(maps[1:], plan)], names)
    for name in names:
        np.testing.assert_allclose(parts[name].array, whole[name].array, rtol=0, atol=1e-6)


def test_images_are_compared_window_by_window():
    maps = maps_of()
    columns = maps / np.linalg.norm(maps, axis=-2, keepdims=True)
    pairs = [(columns[a] * columns[b]).sum(-2).mean((0, 2, 3)) for a in range(IMAGES) for b in range(a)]
    found = readings([trace_of(maps, windowed_plan())], ["image-similarity"])["image-similarity"]
    np.testing.assert_allclose(found.array, np.mean(pairs, 0), atol=1e-6)
    same = readings([trace_of(np.repeat(maps[:1], 3, 0), windowed_plan())], ["image-similarity"])["image-similarity"]
    np.testing.assert_allclose(same.array, 1.0, atol=1e-6)
    assert np.nanmax(same.stderr) < 1e-6


@pytest.mark.parametrize(
    ("partitions", "compared"),
    [(("plain", "shifted", "plain"), {(0, 2)}), (("", "", ""), set()), (("plain", "plain", "shifted"), {(0, 1)})],
)
def test_only_equal_windows_are_compared(partitions, compared):
    plan = windowed_plan(partitions)
    found = readings([trace_of(maps_of(), plan)], ["attention-similarity"])["attention-similarity"].array
    pairs = {(a, b) for b in range(BLOCKS) for a in range(b) if np.isfinite(found[a, b])}
    assert pairs == compared
    assert np.isfinite(np.diagonal(found)).all()
    applies = not make("similar-blocks", plan).inapplicable()
    assert applies == any(b - a == 1 for a, b in compared)
    if not applies:
        assert "windows do not hold the same tokens" in make("similar-blocks", plan).inapplicable()


@pytest.mark.parametrize("name", WITHOUT)
def test_other_metrics_say_that_windows_are_not_for_them(name):
    assert "attention inside windows" in make(name, windowed_plan()).inapplicable()


def test_beside_whole_maps_they_say_which_blocks_they_are_of():
    plan = windowed_plan()
    whole = replace(plan.layers[2], windows=1, reason="", queries=plan.tokens, keys=plan.tokens)
    mixed = replace(plan, layers=(*plan.layers[:2], whole))
    assert make("attention-entropy", mixed).result(np.zeros((BLOCKS, HEADS))).covers == (
        "per window, averaged over the windows of an image, in blocks 0–1"
    )
    covers = make("distance-from-image-mean", mixed).result(np.zeros((BLOCKS, HEADS))).covers
    assert covers == "over 1 of 3 blocks; left out: blocks.0.attn, blocks.1.attn: attention inside windows"


@pytest.mark.parametrize("name", [n for n, kind in METRICS.items() if issubclass(kind, MapMetric)])
def test_a_metric_takes_windows_where_all_its_sums_do(name):
    metric = make(name, plan_for(BLOCKS, HEADS, TOKENS))
    takes = {build().windowed for _, build in metric.accumulators()}
    assert takes == {True} if metric.windowed else False in takes or name == "attention-distance"


def test_tokens_that_are_left_out_are_not_those_of_a_window():
    plan = replace(windowed_plan(), prefix=(0,))
    assert "attention inside windows" in make("attention-similarity@patches", plan).inapplicable()
    assert not make("attention-similarity@patches", windowed_plan()).inapplicable()


def test_metrics_that_take_no_windows_read_the_whole_maps_beside_them():
    plan, maps, names = windowed_plan(), maps_of(), ["distance-from-image-mean", "attention-distance", "whole-map-similarity"]
    whole = replace(plan.layers[2], windows=1, reason="", queries=plan.tokens, keys=plan.tokens)
    mixed = replace(plan, layers=(*plan.layers[:2], whole), grid=(4, 6), image_size=(64, 96))
    trace = trace_of(maps, mixed)
    large = torch.as_tensor(random_maps((IMAGES, HEADS, plan.tokens, plan.tokens), seed=7))
    attention = (*trace.attention[:2], Attention(whole.owner, "softmax", probs=large))
    found = readings([replace(trace, attention=attention)], names)
    alone = replace(mixed, blocks=mixed.blocks[:1], layers=(replace(whole, block=0),), adjacent=())
    expected = readings([replace(trace, plan=alone, attention=attention[2:])], names)
    for name in names:
        values = found[name].array
        assert np.isnan(values[:2]).all()
        last = values[2, 2] if values.shape == (BLOCKS, BLOCKS) else values[2]
        np.testing.assert_allclose(last, np.ravel(expected[name].array), atol=1e-6)
