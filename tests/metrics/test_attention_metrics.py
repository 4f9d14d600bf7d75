"""Every metric of attention maps against slow NumPy in float64, on ordinary maps and on degenerate ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import reference
from factories import plan_for, random_maps, readings, trace_of
from scipy.spatial.distance import cdist

from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.attention.map_rank import MapSpectra
from collapse_probe.metrics.metric import make
from collapse_probe.registry import METRICS
from collapse_probe.seeding import rank_of_name

B, L, H, N = 5, 4, 3, 10
BUDGETS = [2**24, L * H * N * N * 4, L * N * N * 4 * 2, L * H * N * 4 * 2, 1]
FAMILY = (
    "attention-distance",
    "attention-rollout",
    "attention-sink",
    "distance-from-image-mean",
    "distance-from-uniform",
    "map-rank",
    "similarity-ratio",
)
NAMES = [name for base in FAMILY for name in (base, *(f"{base}@{variant}" for variant in METRICS[base].variants))]


def on_grid(maps, grid=(3, 3), size=(48, 48), prefix=(0,), weights=None):
    """A trace of maps [B, L, H, N, N] whose patches form a grid on an image of so many pixels."""
    trace = trace_of(maps, prefix=prefix, weights=weights)
    return replace(trace, plan=replace(trace.plan, grid=grid, image_size=size))


def patches_of(maps, prefix):
    kept = [t for t in range(maps.shape[-1]) if t not in prefix]
    return maps[..., kept, :][..., kept]


def slow_distance(maps, grid, size, prefix, convention):
    rows, columns = np.indices(grid)
    centres = np.stack([rows.ravel() * size[0] / grid[0], columns.ravel() * size[1] / grid[1]], 1)
    inside = patches_of(maps, prefix)
    if convention == "resoftmax":
        raised = np.exp(np.log(inside) - np.log(inside).max(-1, keepdims=True))
        inside = raised / raised.sum(-1, keepdims=True)
    found = (inside * cdist(centres, centres)).sum(-1)
    return found / inside.sum(-1) if convention == "renormalise" else found


def slow_from_uniform(maps):
    n = maps.shape[-1]
    return 0.5 * np.abs(maps / maps.sum(-1, keepdims=True) - 1 / n).sum(-1)


def slow_rollout(maps, fusion=np.mean):
    """maps [L, H, N, N] -> [L, N, N], entry by entry."""
    n, found, held = maps.shape[-1], [], np.eye(maps.shape[-1])
    for heads in maps:
        step = fusion(heads, 0) + np.eye(n)
        for i in range(n):
            step[i] /= step[i].sum()
        held = np.array([[sum(step[i, k] * held[k, j] for k in range(n)) for j in range(n)] for i in range(n)])
        found.append(held)
    return np.array(found)


def slow_cosines(vectors):
    """Mean over t of the cosine of vectors [L, t, length] of two blocks, [L, L]."""
    scaled = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.einsum("ptv,qtv->pq", scaled, scaled) / vectors.shape[1]


def slow_rank(maps, measure):
    values = np.linalg.svd(maps, compute_uv=False)
    share = values / values.sum(-1, keepdims=True)
    if measure == "effective":
        return np.exp(-np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(-1))
    if measure == "stable":
        return np.linalg.norm(maps, axis=(-2, -1)) ** 2 / values[..., 0] ** 2
    left, _, right = np.linalg.svd(maps)
    best = values[..., :1, None] * left[..., :, :1] * right[..., :1, :]
    return np.linalg.norm(maps - best, axis=(-2, -1)) / np.linalg.norm(maps, axis=(-2, -1))


def agree(found, slow, abs=1e-6):
    """Values, standard errors and means over heads of a block × head reading against per-image values [B, L, H]."""
    assert found.values == pytest.approx(slow.mean(0), abs=abs)
    error = slow.std(0, ddof=1) / np.sqrt(len(slow))
    assert found.stderr == pytest.approx(error, abs=abs)
    ends = np.moveaxis(np.apply_along_axis(reference.interval_ends, 0, slow), 0, -1)
    assert found.ci95 == pytest.approx(ends, abs=4 * abs, rel=1e-3)
    over_heads = slow.mean(-1)
    assert found.head_mean[0] == pytest.approx(over_heads.mean(0), abs=abs)
    assert found.head_mean[1] == pytest.approx(over_heads.std(0, ddof=1) / np.sqrt(len(slow)), abs=abs)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("prefix", [(0,), (), (0, 1, 2, 3)])
@pytest.mark.parametrize("convention", ["renormalise", "drop", "resoftmax"])
def test_distance_against_the_slow_way(convention, prefix, budget):
    maps, grid, size = random_maps((B, L, H, N, N)), {0: (2, 5), 1: (3, 3), 4: (2, 3)}[len(prefix)], (32, 60)
    name = "attention-distance" + ("" if convention == "renormalise" else f"@{convention}")
    found = readings([on_grid(maps, grid, size, prefix)], [name], budget)[name]
    agree(found, slow_distance(maps, grid, size, prefix, convention).mean(-1), abs=2e-5)
    assert found.details["patch_size"] == [size[0] / grid[0], size[1] / grid[1]]


@pytest.mark.parametrize("budget", BUDGETS)
def test_sinks_against_the_slow_way(budget):
    maps, prefix = random_maps((B, L, H, N, N), sharpness=2), (0, 3)
    names = ["attention-sink", "attention-sink@patches", "attention-sink@prefix"]
    found = readings([on_grid(maps, (2, 4), prefix=prefix)], names, budget)
    column = maps.mean(-2)
    patches = np.delete(column, prefix, axis=-1)
    agree(found["attention-sink"], column.max(-1))
    agree(found["attention-sink@patches"], patches.max(-1))
    agree(found["attention-sink@prefix"], column[..., prefix].sum(-1))
    on_prefix = np.isin(column.argmax(-1), prefix).mean(0)
    assert found["attention-sink"].details["on_prefix"] == pytest.approx(on_prefix)
    assert 0 < on_prefix.mean() < 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_distance_from_uniform_against_the_slow_way(budget):
    maps = random_maps((B, L, H, N, N))
    found = readings([on_grid(maps)], ["distance-from-uniform", "distance-from-uniform@patches"], budget)
    agree(found["distance-from-uniform"], slow_from_uniform(maps).mean(-1))
    agree(found["distance-from-uniform@patches"], slow_from_uniform(patches_of(maps, (0,))).mean(-1))


@pytest.mark.parametrize("budget", BUDGETS)
def test_distance_from_the_image_mean_against_the_slow_way(budget):
    maps = random_maps((9, L, H, N, N))
    traces = [on_grid(maps[:4]), on_grid(maps[4:])]
    found = readings(traces, ["distance-from-image-mean"], budget)["distance-from-image-mean"]
    squares = np.square(maps - maps.mean(0)).sum((0, -1, -2)) / (len(maps) - 1)
    slow = np.sqrt(squares / np.square(maps).sum((-1, -2)).mean(0))
    assert found.values == pytest.approx(slow, abs=1e-7)
    assert found.head_mean[0] == pytest.approx(slow.mean(-1), abs=1e-7)
    assert (found.stderr > 0).all()
    assert (found.stderr < 0.1).all()


@pytest.mark.parametrize("point", ["weights", "probs"])
@pytest.mark.parametrize("measure", ["effective", "stable", "residual"])
def test_rank_against_the_slow_way(measure, point):
    maps = random_maps((B, L, H, N, N))
    weights = np.random.default_rng(5).normal(size=maps.shape)
    suffix = ("" if measure == "effective" else f"@{measure}") + ("" if point == "weights" else "@probs")
    found = readings([on_grid(maps, weights=weights)], ["map-rank" + suffix, "map-rank@patches" + suffix])
    heard = weights if point == "weights" else maps
    agree(found["map-rank" + suffix], slow_rank(heard, measure), abs=1e-5)
    agree(found["map-rank@patches" + suffix], slow_rank(patches_of(heard, (0,)), measure), abs=1e-5)
    assert found["map-rank" + suffix].point == point


def test_spectra_are_of_a_sample_of_images_by_their_names(monkeypatch):
    monkeypatch.setattr("collapse_probe.metrics.attention.map_rank.SPECTRA_IMAGES", 3)
    maps, names = random_maps((7, L, H, N, N)), [f"photo {i}" for i in range(7)]
    lowest = sorted(range(7), key=lambda i: rank_of_name(names[i]))[:3]
    found = readings([on_grid(maps)], ["map-rank"], image_names=names)["map-rank"]
    agree(found, slow_rank(maps[lowest], "effective"), abs=1e-5)
    assert (found.details["images"], found.details["of"]) == (3, 7)
    parts = readings([on_grid(maps[:2]), on_grid(maps[2:])], ["map-rank"], image_names=names)["map-rank"]
    np.testing.assert_array_equal(parts.values, found.values)
    np.testing.assert_array_equal(parts.ci95, found.ci95)


def test_a_batch_that_is_taken_again_is_in_the_sample_once():
    spectra = MapSpectra(on_grid(random_maps((4, L, H, N, N))).plan, "weights", ())
    trace = on_grid(random_maps((4, L, H, N, N)))
    spectra.start_batch(trace, ["a", "b", "c", "d"])
    before = spectra.snapshot()
    spectra.end_batch(trace)
    spectra.put_back(before)  # as after memory ran out
    spectra.end_batch(trace)
    assert spectra.means().mean("effective")[2].max() == spectra.details()["of"] == 4
    spectra.start_batch(trace, ["a", "e", "f", "g"])
    spectra.end_batch(trace)  # an image that is given twice counts twice, as in all other sums
    assert spectra.means().mean("effective")[2].max() == spectra.details()["of"] == 8


@pytest.mark.parametrize(("variant", "fusion"), [("", np.mean), ("@max", np.max), ("@min", np.min)])
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("prefix", [True, False])
def test_rollout_against_the_slow_way(axis, variant, fusion, prefix):
    maps = random_maps((3, L, H, 7, 7))
    name = "attention-rollout" + variant + ("" if axis == "row" else "@column") + ("" if prefix else "@patches")
    found = readings([on_grid(maps, (2, 3))], [name])[name]
    slow = []
    for image in maps:
        followed = slow_rollout(image, fusion)[:, 0 if prefix else 1 :, 0 if prefix else 1 :]
        slow.append(slow_cosines(followed if axis == "row" else np.swapaxes(followed, -1, -2)))
    assert found.values == pytest.approx(np.mean(slow, 0), abs=1e-6)
    assert found.stderr == pytest.approx(np.std(slow, 0, ddof=1) / np.sqrt(3), abs=1e-6)
    assert found.nulls.values["other_token"] is not None
    assert found.nulls.values["other_image"] is not None
    assert found.nulls.reasons["other_head"] == "a rollout has fused its heads"


def test_signed_weights_are_left_alone_where_a_distribution_is_needed():
    maps = random_maps((3, L, H, N, N))
    weights = np.random.default_rng(5).normal(size=maps.shape)
    names = [name for name in NAMES if METRICS[name.partition("@")[0]].defaults["point"] == "probs"]
    assert len(names) == 3 + 5 + 3 + 2
    mixed, plain = readings([on_grid(maps, weights=weights)], names), readings([on_grid(maps)], names)
    for name in names:
        assert mixed[name].point == "probs"
        assert mixed[name].values == pytest.approx(plain[name].values, abs=1e-12), name


def degenerate(kind, tokens):
    maps = random_maps((2, 2, 1, tokens, tokens))
    if kind == "uniform":
        maps[:] = 1 / tokens
    elif kind == "one-hot":
        maps[:] = np.eye(tokens)[np.zeros(tokens, dtype=int)]
    elif kind == "identity":
        maps[:] = np.eye(tokens)
    return maps


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [*itertools.product(["uniform", "one-hot", "identity", "random"], [1, 2, 50]), ("uniform", 600), ("random", 600)],
)
def test_every_size_and_degenerate_maps_give_no_nonsense(kind, tokens):
    grid = {1: (1, 1), 2: (1, 2), 50: (5, 10), 600: (20, 30)}[tokens]
    for name, found in readings([on_grid(degenerate(kind, tokens), grid, (40, 60), ())], NAMES).items():
        assert found.values is not None, name
        defined = found.values[np.isfinite(found.values)]
        largest = {"attention-distance": 80, "map-rank": tokens + 1e-3}.get(name.partition("@")[0], 1 + 1e-6)
        assert ((defined >= 0) & (defined <= largest)).all(), name
        constant = kind in ("uniform", "one-hot") or tokens == 1  # columns without a spread
        undefined_here = {"attention-sink@prefix"} | ({"similarity-ratio@centred"} if constant else set())
        assert defined.size or name in undefined_here, name


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("attention-distance", "identity", 0.0),
        ("attention-sink", "uniform", 1 / 9),
        ("attention-sink", "one-hot", 1.0),
        ("attention-sink", "identity", 1 / 9),
        ("attention-sink@patches", "one-hot", 1.0),
        ("distance-from-uniform", "uniform", 0.0),
        ("distance-from-uniform", "one-hot", 8 / 9),
        ("distance-from-uniform", "identity", 8 / 9),
        ("distance-from-image-mean", "uniform", 0.0),
        ("distance-from-image-mean", "same", 0.0),
        ("distance-from-image-mean", "apart", 1.0),
        ("map-rank", "uniform", 1.0),
        ("map-rank", "one-hot", 1.0),
        ("map-rank", "identity", 9.0),
        ("map-rank@stable", "identity", 9.0),
        ("map-rank@residual", "identity", np.sqrt(8 / 9)),
        ("map-rank@residual", "uniform", 0.0),
        ("map-rank@residual", "one-hot", 0.0),
        ("attention-rollout", "identity", 1.0),
    ],
)
def test_ends_of_the_scales(name, kind, expected):
    maps = random_maps((1, L, H, 9, 9)).repeat(3, axis=0)
    if kind == "apart":
        maps = np.zeros((3, L, H, 9, 9))
        for image in range(3):
            maps[image, ..., image] = 1
    elif kind != "same":
        one_hot = np.eye(9)[np.zeros(9, dtype=int)]
        maps[:] = {"uniform": np.full((9, 9), 1 / 9), "one-hot": one_hot, "identity": np.eye(9)}[kind]
    found = readings([on_grid(maps, prefix=())], [name])[name]
    assert found.values == pytest.approx(expected, abs=2e-5)


def test_queries_that_see_nothing_or_prefix_tokens_alone_do_not_count():
    maps = random_maps((3, 1, 1, N, N))
    kept = maps.copy()
    maps[..., 4, :] = 0  # a query whose mask hides every key
    maps[..., 5, :] = np.eye(N)[0]  # and one that sees the class token alone
    found = readings([on_grid(maps)], ["attention-distance", "distance-from-uniform", "distance-from-uniform@patches"])
    slow = np.delete(slow_distance(kept, (3, 3), (48, 48), (0,), "renormalise"), [3, 4], axis=-1)
    agree(found["attention-distance"], slow.mean(-1), abs=2e-5)
    slow = np.delete(slow_from_uniform(patches_of(kept, (0,))), [3, 4], axis=-1)
    agree(found["distance-from-uniform@patches"], slow.mean(-1))
    whole = slow_from_uniform(kept)
    whole[..., 5] = 1 - 1 / N
    agree(found["distance-from-uniform"], np.delete(whole, 4, axis=-1).mean(-1))


def test_each_metric_says_why_it_does_not_apply():
    plan = replace(plan_for(2, 1, 10, prefix=(0,)), image_size=(48, 48))
    window = replace(plan, layers=tuple(replace(layer, reason="attention inside windows") for layer in plan.layers))
    for name in NAMES:
        assert make(name, plan).inapplicable() == "", name
        assert "windows" in make(name, window).inapplicable(), name
    assert "rectangle" in make("attention-distance", replace(plan, grid=None)).inapplicable()
    assert "pixels" in make("attention-distance", replace(plan, image_size=None)).inapplicable()
    assert "no prefix" in make("attention-sink@prefix", replace(plan, prefix=(), grid=None)).inapplicable()
    narrow = replace(plan, layers=(plan.layers[0], replace(plan.layers[1], keys=5)))
    assert "same tokens" in make("attention-rollout", narrow).inapplicable()
    assert "no two neighbouring blocks" in make("similarity-ratio", narrow).inapplicable()
    assert "same tokens" in make("attention-rollout", replace(plan, layers=(replace(plan.layers[0], keys=5),))).inapplicable()


def test_one_image_has_no_mean_of_others():
    found = readings([on_grid(random_maps((1, L, H, N, N)))], ["distance-from-image-mean"])["distance-from-image-mean"]
    assert found.not_applicable == "needs two different images"


def test_layers_with_fewer_keys_are_left_undefined_not_misread():
    """A layer whose keys are a coarser grid has no place on the patches' own; its other readings stand."""
    maps = random_maps((3, 2, H, N, N))
    trace = on_grid(maps)
    narrow = replace(trace.attention[1], probs=trace.attention[1].probs[..., :4])
    layers = (trace.plan.layers[0], replace(trace.plan.layers[1], keys=4))
    trace = Trace(replace(trace.plan, layers=layers), 3, trace.tokens, (trace.attention[0], narrow), None)
    found = readings([trace], ["attention-distance", "distance-from-uniform", "attention-sink@patches", "map-rank"])
    agree_first = slow_distance(maps[:, :1], (3, 3), (48, 48), (0,), "renormalise").mean((0, -1))
    assert found["attention-distance"].values[:1] == pytest.approx(agree_first, abs=2e-5)
    assert np.isnan(found["attention-distance"].values[1]).all()
    assert np.isnan(found["attention-distance"].details["uniform"][1])
    assert np.isnan(found["attention-sink@patches"].values[1]).all()
    assert found["distance-from-uniform"].values[1] == pytest.approx(
        slow_from_uniform(maps[:, 1, ..., :4]).mean((0, -1)), abs=1e-6
    )
    assert found["map-rank"].values[1] == pytest.approx(slow_rank(maps[:, 1, ..., :4], "effective").mean(0), abs=1e-5)
