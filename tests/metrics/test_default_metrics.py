"""Every default metric against slow NumPy, and the laws that all metrics keep."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from factories import random_maps, readings, trace_of

from collapse_probe.analysis.measurement import DEFAULT_METRICS
from collapse_probe.metrics.tokens.patch_diversity import patch_cosine
from collapse_probe.registry import METRICS

B, L, H, N, D = 5, 4, 3, 9, 8
BUDGETS = [2**24, L * H * N * N * 4, L * N * N * 4 * 2, L * H * N * 4 * 2]


def draw(seed=0, images=B):
    rng = np.random.default_rng(seed)
    return random_maps((images, L, H, N, N), seed=seed), rng.normal(size=(images, L + 1, N, D)) + 0.5


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("variant", "axis", "centred"),
    [("", "column", False), ("@row", "row", False), ("@centred", "column", True), ("@row@centred", "row", True)],
)
def test_similarity_and_its_nulls_against_the_slow_way(variant, axis, centred, budget):
    maps, tokens = draw()
    name = f"attention-similarity{variant}"
    found, slow = readings([trace_of(maps, tokens)], [name], budget)[name], reference.similarity(maps, axis, centred)
    assert found.values == pytest.approx(slow["real"], abs=1e-6)
    assert found.stderr == pytest.approx(slow["stderr"], abs=1e-6)
    for null in ("other_token", "other_head", "other_image"):
        assert found.nulls.values[null] == pytest.approx(slow[null], abs=1e-6), null
    kappa = (slow["real"] - slow["other_token"]) / (1 - slow["other_token"])
    assert found.nulls.values["kappa"] == pytest.approx(kappa, abs=1e-5)


def test_prefix_tokens_out():
    maps, tokens = draw()
    name = "attention-similarity@patches"
    for budget in BUDGETS:
        found = readings([trace_of(maps, tokens, prefix=(0, 1))], [name], budget)[name]
        slow = reference.similarity(maps[..., 2:, 2:])
        assert found.values == pytest.approx(slow["real"], abs=1e-6)
        assert found.nulls.values["other_image"] == pytest.approx(slow["other_image"], abs=1e-6)


def test_the_other_metrics_against_the_slow_way():
    maps, tokens = draw()
    found = readings([trace_of(maps, tokens, prefix=(0,))], DEFAULT_METRICS)
    slow = reference.similarity(maps)
    assert found["head-similarity"].values == pytest.approx(np.diag(slow["other_head"]), abs=1e-6)
    assert found["image-similarity"].values == pytest.approx(np.diag(slow["other_image"]), abs=1e-6)
    assert found["attention-entropy"].values == pytest.approx(reference.entropy(maps), abs=1e-6)
    patches = tokens[:, :, 1:]
    assert found["patch-diversity"].values == pytest.approx(reference.patch_diversity(patches), abs=1e-6)
    assert found["feature-similarity"].values == pytest.approx(reference.feature_similarity(patches), abs=1e-6)
    assert found["similar-blocks"].values.tolist() == [(np.diag(slow["real"], -1) > t).sum() for t in (0.8, 0.9, 0.95)]


def test_wrong_token_null_is_the_mean_over_permutations():
    """The closed form against drawn permutations without fixed points."""
    maps, _ = draw(images=1)
    x = np.stack([reference.vectors(m, "column", False) for m in maps])[0]
    rng, total, draws = np.random.default_rng(1), np.zeros((L, L)), 0
    while draws < 4000:
        order = rng.permutation(N)
        if (order != np.arange(N)).all():
            total += np.einsum("phtv,qhtv->pq", x, x[:, :, order]) / (H * N)
            draws += 1
    found = readings([trace_of(maps)], ["attention-similarity"])["attention-similarity"]
    assert found.nulls.values["other_token"] == pytest.approx(total / draws, abs=5e-3)


@pytest.mark.parametrize("name", [*DEFAULT_METRICS, "attention-similarity@probs", "attention-similarity@patches"])
def test_batches_do_not_matter(name):
    maps, tokens = draw(images=7)
    whole = readings([trace_of(maps, tokens)], [name])[name]
    parts = [trace_of(maps[a:z], tokens[a:z]) for a, z in ((0, 1), (1, 3), (3, 7))]
    uneven = readings(parts, [name], budget=L * H * N * 4)[name]
    same(whole, uneven)


@pytest.mark.parametrize("name", DEFAULT_METRICS)
def test_order_of_images_does_not_matter(name):
    maps, tokens = draw(images=7)
    labels = [f"image {i}" for i in range(7)]
    order = [4, 2, 6, 0, 1, 5, 3]
    forward = readings([trace_of(maps, tokens)], [name], image_names=labels)[name]
    shuffled = readings([trace_of(maps[order], tokens[order])], [name], image_names=[labels[i] for i in order])[name]
    same(forward, shuffled, bootstrap=False)


def same(one, other, bootstrap=True):
    assert one.values == pytest.approx(other.values, abs=1e-6, nan_ok=True)
    if bootstrap or "threshold" not in one.dims:
        assert one.stderr == pytest.approx(other.stderr, abs=1e-6, nan_ok=True)
        assert one.ci95 == pytest.approx(other.ci95, abs=1e-5, nan_ok=True)
    for key, value in one.nulls.values.items():
        if value is None:
            assert other.nulls.values[key] is None
        else:
            assert value == pytest.approx(other.nulls.values[key], abs=1e-5, nan_ok=True), key


def test_collapsed_maps_and_tokens_read_at_the_declared_end():
    one_map, one_token = random_maps((1, 1, 1, N, N)), np.random.default_rng(0).normal(size=(1, 1, 1, D))
    maps, tokens = np.tile(one_map, (3, L, H, 1, 1)), np.tile(one_token, (3, L + 1, N, 1))
    found = readings([trace_of(maps, tokens)], DEFAULT_METRICS)
    ends = {"high": 1.0, "low": 0.0}
    for name, reading in found.items():
        if reading.collapsed is None:
            continue
        extreme = L - 1 if name == "similar-blocks" else ends[reading.collapsed]
        assert reading.values == pytest.approx(extreme, abs=1e-6), name


def test_every_metric_says_which_end_is_sick_or_that_none_is():
    assert {METRICS[name].collapsed for name in METRICS} <= {"high", "low", None}
    assert METRICS["attention-entropy"].collapsed is None


@pytest.mark.parametrize("name", DEFAULT_METRICS)
def test_zero_tokens_and_one_hot_maps_give_no_nonsense(name):
    maps = np.zeros((3, L, H, N, N))
    maps[..., 0] = 1  # every query attends to key 0: all other columns are zero
    found = readings([trace_of(maps, np.zeros((3, L + 1, N, D)))], [name])[name]
    defined = found.values[np.isfinite(found.values)]
    assert ((defined >= -1e-9) & (defined <= 4)).all()
    if name == "attention-similarity":
        assert found.values == pytest.approx(1.0)  # the one column that has a direction
        assert found.nulls.values["other_token"] is None
        assert found.nulls.values["kappa"] is None
    if name in ("attention-similarity@centred", "feature-similarity", "patch-diversity"):
        assert not np.isfinite(found.values).any()
    if name == "attention-entropy":
        assert found.values == pytest.approx(0.0, abs=1e-6)


def test_query_independent_maps_have_no_kappa():
    row = random_maps((3, L, H, 1, N))
    found = readings([trace_of(np.repeat(row, N, axis=3))], ["attention-similarity", "attention-similarity@row"])
    assert found["attention-similarity"].values == pytest.approx(1.0, abs=1e-6)
    assert found["attention-similarity"].nulls.values["other_token"] == pytest.approx(1.0, abs=1e-6)
    assert found["attention-similarity"].nulls.values["kappa"] is None
    assert "chance level is 1" in found["attention-similarity"].nulls.reasons["kappa"]
    assert found["attention-similarity@row"].values[1, 0] < 0.99


def test_weights_and_probs_are_told_apart():
    maps, tokens = draw()
    weights = np.random.default_rng(5).normal(size=maps.shape)
    names = ["attention-similarity", "attention-similarity@probs", "attention-entropy"]
    found = readings([trace_of(maps, tokens, weights=weights)], names)
    assert found["attention-similarity"].values == pytest.approx(reference.similarity(weights)["real"], abs=1e-6)
    assert found["attention-similarity@probs"].values == pytest.approx(reference.similarity(maps)["real"], abs=1e-6)
    assert found["attention-entropy"].values == pytest.approx(reference.entropy(maps), abs=1e-6)
    assert [found[name].point for name in names] == ["weights", "probs", "probs"]


def test_one_image_has_no_interval_and_no_other_image():
    maps, tokens = draw(images=1)
    found = readings([trace_of(maps, tokens)], DEFAULT_METRICS)
    similar = found["attention-similarity"]
    assert np.isnan(similar.stderr).all()
    assert similar.nulls.values["other_image"] is None
    assert similar.nulls.reasons["other_image"] == "needs two different images"
    assert found["image-similarity"].not_applicable == "needs two different images"


def test_sampled_tokens_when_the_sum_over_images_would_be_too_large(monkeypatch):
    maps, tokens = draw(images=6)
    exact = readings([trace_of(maps, tokens)], ["image-similarity", "attention-similarity"])
    monkeypatch.setattr("collapse_probe.metrics.pairwise_cosine.STATE_BUDGET", 1)
    monkeypatch.setattr("collapse_probe.metrics.pairwise_cosine.SAMPLED_TOKENS", 5)
    sampled = readings([trace_of(maps, tokens)], ["image-similarity", "attention-similarity"])
    chosen = sampled["image-similarity"].details["tokens"]
    assert chosen == [5]
    assert sampled["image-similarity"].values == pytest.approx(exact["image-similarity"].values, abs=0.15)
    assert not np.allclose(sampled["image-similarity"].values, exact["image-similarity"].values, atol=1e-9)
    assert sampled["attention-similarity"].values == pytest.approx(exact["attention-similarity"].values, abs=1e-9)


def test_patch_cosine_pair_by_pair():
    patches = np.random.default_rng(0).normal(size=(3, 6, 4))
    slow = [reference.patch_cosine(p) for p in patches]
    assert patch_cosine(torch.as_tensor(patches)).numpy() == pytest.approx(slow, abs=1e-12)


def test_patch_cosine_at_its_ends():
    same_or_opposite = torch.tensor([[[1.0, 2.0], [-2.0, -4.0], [3.0, 6.0]]])
    orthogonal = torch.eye(3)[None]
    assert patch_cosine(same_or_opposite).item() == pytest.approx(1, abs=1e-6)
    assert patch_cosine(orthogonal).item() == pytest.approx(0, abs=1e-7)
    assert torch.isnan(patch_cosine(torch.ones(1, 1, 4))).all()
