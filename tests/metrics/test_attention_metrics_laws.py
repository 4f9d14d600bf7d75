"""Laws of the metrics of attention maps: what must not change them, and how much they may remember."""

from __future__ import annotations

import numpy as np
import pytest
from factories import plan_for, random_maps, readings, small_vit, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_metrics import NAMES, on_grid

from collapse_probe.analysis.analyze import analyze
from collapse_probe.capture.capture import discover_plan
from collapse_probe.errors import SettingError
from collapse_probe.metrics.attention.attention_distance import AttentionDistance
from collapse_probe.metrics.attention.attention_sink import AttentionSink
from collapse_probe.metrics.attention.similarity_ratio import Choice
from collapse_probe.metrics.metric import make

L, H, N = 3, 2, 7
PLAIN = ("attention-sink", "distance-from-uniform", "distance-from-image-mean", "map-rank", "map-rank@stable")
PLAIN += ("map-rank@residual", "attention-rollout", "attention-rollout@column", "similarity-ratio", "similarity-ratio@mean")


def close(one, other, names=None):
    for name in names or one:
        assert one[name].values == pytest.approx(other[name].values, abs=2e-5, nan_ok=True), name


@given(seed=st.integers(0, 2**16), order=st.permutations(range(N)), sharpness=st.floats(0.1, 4))
@settings(max_examples=8, deadline=None)
def test_names_of_the_tokens_do_not_matter(seed, order, sharpness):
    maps = random_maps((3, L, H, N, N), sharpness, seed)
    shuffled = maps[..., order, :][..., order]
    close(readings([trace_of(maps)], PLAIN), readings([trace_of(shuffled)], PLAIN))


@given(seed=st.integers(0, 2**16), order=st.permutations(range(H)))
@settings(max_examples=5, deadline=None)
def test_order_of_the_heads_moves_the_values_with_them(seed, order):
    maps = random_maps((3, L, H, N, N), 2.0, seed)
    one, other = (readings([on_grid(m, (2, 3))], NAMES) for m in (maps, maps[:, :, list(order)]))
    for name in NAMES:
        if one[name].dims == ("block", "head"):
            assert one[name].values[:, list(order)] == pytest.approx(other[name].values, abs=2e-5, nan_ok=True), name
        else:
            assert one[name].values == pytest.approx(other[name].values, abs=2e-5, nan_ok=True), name


@given(seed=st.integers(0, 2**16), flip=st.sampled_from([(0,), (1,), (0, 1)]))
@settings(max_examples=5, deadline=None)
def test_a_mirrored_image_has_the_same_distances_and_a_shuffled_one_has_not(seed, flip):
    maps = random_maps((3, L, H, N, N), 2.0, seed)
    names = ["attention-distance", "attention-distance@drop", "attention-distance@resoftmax"]
    whole = readings([on_grid(maps, (2, 3))], names)
    mirrored = [0, *(1 + np.flip(np.arange(6).reshape(2, 3), flip).ravel())]
    close(whole, readings([on_grid(maps[..., mirrored, :][..., mirrored], (2, 3))], names))
    shuffled = [0, 1, 6, 2, 3, 5, 4]
    other = readings([on_grid(maps[..., shuffled, :][..., shuffled], (2, 3))], names)
    assert np.abs(other["attention-distance"].values - whole["attention-distance"].values).max() > 1e-3


@given(factor=st.integers(2, 9))
@settings(max_examples=4, deadline=None)
def test_distances_grow_with_the_pixels(factor):
    maps = random_maps((3, L, H, N, N))
    small, large = (
        readings([on_grid(maps, (2, 3), size)], ["attention-distance"])["attention-distance"]
        for size in ((20, 30), (20 * factor, 30 * factor))
    )
    assert large.values == pytest.approx(factor * small.values, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_one_seven_and_sixty_four_give_the_same(name):
    maps = random_maps((70, 2, 2, 5, 5), 2.0)
    labels = [f"picture {i}" for i in range(70)]
    whole = readings([on_grid(maps, (2, 2))], [name], image_names=labels)[name]
    for size in (1, 7, 64):
        parts = [on_grid(maps[start : start + size], (2, 2)) for start in range(0, 70, size)]
        found = readings(parts, [name], budget=2 * 2 * 5 * 5 * 4 * size, image_names=labels)[name]
        for part in ("values", "stderr", "ci95"):
            assert getattr(found, part) == pytest.approx(getattr(whole, part), abs=2e-6, nan_ok=True), (size, part)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_does_not_grow_with_the_images(name):
    held = []
    for count in (2, 20):
        trace = on_grid(random_maps((count, 2, 2, 5, 5)), (2, 2))
        folds = [build() for _, build in make(name, trace.plan).accumulators()]
        for fold in folds:
            for _ in range(2):
                fold.start_batch(trace, [f"image {i}" for i in range(count)])
                for tile in trace.tiles(2**20):
                    fold.take(tile)
                fold.end_batch(trace)
        held.append([tuple(value.shape) for fold in folds for value in fold.states.values()])
    assert held[0] == held[1]
    assert held[0]


def test_sampled_queries_where_the_sum_over_images_would_be_too_large(monkeypatch):
    maps = random_maps((20, L, H, N, N), 2.0)
    name = "distance-from-image-mean"
    exact = readings([trace_of(maps)], [name])[name]
    monkeypatch.setattr("collapse_probe.metrics.attention.distance_from_image_mean.STATE_BUDGET", 1)
    monkeypatch.setattr("collapse_probe.metrics.attention.distance_from_image_mean.SAMPLED_TOKENS", 4)
    for budget in (2**20, 1):
        sampled = readings([trace_of(maps)], [name], budget)[name]
        assert sampled.details["queries"] == [4]
        assert sampled.values == pytest.approx(exact.values, abs=0.1)
        assert not np.allclose(sampled.values, exact.values, atol=1e-6)


def test_standard_error_from_groups_of_images_is_about_right():
    """The jackknife's error against the spread of the estimate over fresh draws of images."""
    draws, errors = [], []
    for seed in range(40):
        base = random_maps((1, 1, 1, N, N), 1.0, seed=99)
        maps = 0.7 * base + 0.3 * random_maps((48, 1, 1, N, N), 2.0, seed=seed)
        found = readings([trace_of(maps)], ["distance-from-image-mean"])["distance-from-image-mean"]
        draws.append(found.values.item())
        errors.append(found.stderr.item())
    assert 0.7 < np.mean(errors) / np.std(draws, ddof=1) < 2.0


def test_collapsed_maps_read_at_the_declared_end():
    maps = np.tile(random_maps((1, 1, 1, 1, 9)), (3, L, H, 9, 1))
    found = readings([on_grid(maps, (2, 4))], NAMES)
    for name, reading in found.items():
        if reading.collapsed is None or name == "similarity-ratio@centred":
            continue
        end = {"high": 1.0, "low": 1.0 if name.startswith("map-rank") and "residual" not in name else 0.0}[reading.collapsed]
        defined = reading.values[np.isfinite(reading.values)]
        assert defined.size, name
        assert defined == pytest.approx(end, abs=2e-4), name


def test_a_setting_that_nobody_knows_is_an_error_in_words():
    plan = plan_for(2, 1, 10)
    with pytest.raises(SettingError, match="prefix must be one of renormalise, drop, resoftmax"):
        AttentionDistance(plan, prefix="keep")
    with pytest.raises(SettingError, match="keys must be one of any, patch, prefix"):
        AttentionSink(plan, keys="all")
    with pytest.raises(SettingError, match="direction from"):
        Choice(direction="after")
    with pytest.raises(SettingError, match="it has @drop, @resoftmax"):
        make("attention-distance@keep", plan)


def test_a_real_model_from_end_to_end(photos):
    model = small_vit(sharpness=4.0, img_size=(64, 96), patch_size=16, depth=3, embed_dim=32)
    plan = discover_plan(model, (64, 96))
    assert plan.image_size == (64, 96)
    assert plan.grid == (4, 6)
    one, other = (
        analyze(small_vit(sharpness=4.0, depth=3, embed_dim=32), str(photos), metrics=tuple(NAMES), batch_size=size)
        for size in (1, 4)
    )
    for name in NAMES:
        assert one.metrics[name].values == pytest.approx(other.metrics[name].values, abs=1e-5, nan_ok=True), name
        assert np.isfinite(one.metrics[name].values).any(), name
    assert one.metrics["attention-distance"].details["patch_size"] == [16.0, 16.0]
    assert one.to_json()["metrics"]["similarity-ratio"]["details"]["sensitivity"][0]["k"] == 1
