"""Metrics of the weights against slow NumPy, worked values, their laws and their degenerate ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import plan_for
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.analysis.summary import summarise_weights
from collapse_probe.capture.weights.matrices import NAMES, Matrices, Matrix
from collapse_probe.metrics.metric import LEVELS, make, of_level
from collapse_probe.metrics.weight_metric import WeightMetric
from collapse_probe.metrics.weights.weight_orthogonality import relative_gap
from collapse_probe.metrics.weights.weight_similarity import between_blocks, read_directions, row_similarity
from collapse_probe.registry import METRICS

WEIGHTS = ("hyperspherical-energy", "weight-orthogonality", "weight-rank", "weight-similarity")
EVERY = [name + suffix for name in WEIGHTS for suffix in ("", *(f"@{v}" for v in METRICS[name].variants))]
SHAPES = {"q": (12, 10), "k": (12, 10), "v": (8, 10), "proj": (10, 8), "fc1": (24, 10), "fc2": (10, 24)}
HEADS = {"q": 4, "k": 4, "v": 2}


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def matrices_of(*blocks):
    """Matrices out of {name: array} a block."""
    found = [{n: Matrix(torch.as_tensor(w), "made here", HEADS.get(n, 1)) for n, w in held.items()} for held in blocks]
    missing = [{n: "not made here" for n in NAMES if n not in held} for held in blocks]
    return Matrices(tuple(f"blocks.{i}" for i in range(len(blocks))), tuple(found), tuple(missing))


def blocks(count=3, seed=0):
    return [{n: draw(*shape, seed=seed + 17 * i + j) for j, (n, shape) in enumerate(SHAPES.items())} for i in range(count)]


def read(name, *held):
    metric = make(name, plan_for(len(held), 4, 9))
    metric.matrices = matrices_of(*held)
    return metric.compute()


def one(name, matrix):
    """The metric of one matrix, standing as `proj` in one block; NaN where refused."""
    reading = read(name, {"proj": matrix})
    return float("nan") if reading.values is None else reading.values[0, NAMES.index("proj")]


def unit(w):
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def slow(name, w):
    """Every metric of one matrix by the shortest loop there is."""
    base, _, variant = name.partition("@")
    n, d = w.shape
    pairs = [(i, j) for i in range(n) for j in range(n) if i < j]
    rows = unit(w)
    cosines = np.array([rows[i] @ rows[j] for i, j in pairs])
    apart = np.array([np.linalg.norm(rows[i] - rows[j]) for i, j in pairs])
    sigma = np.linalg.svd(w, compute_uv=False)
    products = np.linalg.eigvalsh(w @ w.T)
    gap = products.max() - max(products.min() if n <= d else 0.0, 0.0)

    def rank(values):
        p = values / values.sum()
        return np.exp(-sum(x * np.log(x) for x in p if x > 0))

    variance = np.sort(np.linalg.eigvalsh(np.cov(w.T, bias=True).reshape(d, d)))[::-1][: min(n - 1, d)]
    if variant.startswith(("pca", "components")):
        share = int(variant[-2:]) / 100
        kept = int(np.ceil(share * len(variance) - 1e-9))
        held = np.cumsum(variance) / variance.sum()
        return variance[kept:].sum() / variance.sum() if variant[0] == "p" else 1 + (held < share - 1e-9).sum()
    kernel = np.exp(-((rows[:, None] - rows[None]) ** 2).sum(-1)) + 1e-6 * np.eye(n)
    return {
        "weight-similarity": lambda: np.abs(cosines).mean(),
        "weight-similarity@signed": lambda: cosines.mean(),
        "weight-rank": lambda: rank(sigma),
        "weight-rank@squared": lambda: rank(sigma**2),
        "weight-rank@stable": lambda: (sigma**2).sum() / sigma.max() ** 2,
        "weight-rank@share": lambda: rank(sigma) / min(n, d),
        "weight-orthogonality": lambda: gap,
        "weight-orthogonality@squared": lambda: gap**2,
        "weight-orthogonality@relative": lambda: gap / products.max(),
        "weight-orthogonality@soft": lambda: ((w @ w.T - np.eye(n)) ** 2).sum(),
        "hyperspherical-energy": lambda: (1 / apart).mean(),
        "hyperspherical-energy@squared": lambda: (1 / apart**2).mean(),
        "hyperspherical-energy@log": lambda: -np.log(apart).mean(),
        "hyperspherical-energy@separation": lambda: (apart**2).min(),
        "hyperspherical-energy@gram": lambda: -np.linalg.slogdet(kernel)[1],
    }[f"{base}@{variant}".strip("@")]()


ONE_MATRIX = [name for name in EVERY if not name.endswith(("@depth", "@directions", "@head"))]


@pytest.mark.parametrize("name", ONE_MATRIX)
def test_every_matrix_of_every_block_against_the_slow_way(name):
    held = blocks()
    reading = read(name, *held)
    assert reading.dims == ("block", "matrix")
    expected = [[slow(name, block[n].numpy()) for n in NAMES] for block in held]
    assert reading.values == pytest.approx(np.array(expected), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("shape", [(2, 1), (2, 600), (40, 3), (160, 160), (600, 24)])
@pytest.mark.parametrize("name", ["weight-similarity", "weight-rank", "weight-orthogonality", "hyperspherical-energy"])
def test_sizes_from_two_rows_to_hundreds(name, shape):
    w = draw(*shape, seed=3)
    if shape == (2, 1):
        w = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    assert one(name, w) == pytest.approx(slow(name, w.numpy()), rel=1e-8)


@pytest.mark.parametrize("name", WEIGHTS)
def test_by_head_is_the_mean_over_the_heads_rows(name):
    held = blocks(2)
    reading = read(f"{name}@head", *held)
    for b, block in enumerate(held):
        for n in "qkv":
            parts = np.split(block[n].numpy(), HEADS[n])
            assert reading.values[b, NAMES.index(n)] == pytest.approx(np.mean([slow(name, p) for p in parts]), rel=1e-8)
        assert np.isnan(reading.values[b, 3:]).all()


def golden():
    i, j = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    return torch.from_numpy(np.sin(0.4 + 0.9 * i + 0.7 * j + 0.35 * i * j))


def test_worked_values_of_the_weights():
    w = golden()
    assert one("weight-orthogonality@soft", w) == pytest.approx(12.7558555816, abs=1e-9)
    assert one("weight-orthogonality@squared", w) == pytest.approx(13.2178664971, abs=1e-9)
    assert one("weight-orthogonality", w) == pytest.approx(3.8048729267 - 0.1692345375, abs=1e-9)
    assert one("hyperspherical-energy@separation", w) == pytest.approx(1.4269400015, abs=1e-7)
    assert one("hyperspherical-energy@gram", w) == pytest.approx(0.1354976366, abs=1e-7)
    found, a = one("hyperspherical-energy@gram", torch.eye(4, dtype=torch.float64)), np.exp(-2)
    assert found == pytest.approx(-np.log((1 - a + 1e-6) ** 3 * (1 + 3 * a + 1e-6)), abs=1e-12)
    assert found == pytest.approx(0.0954833225, abs=1e-6)  # the released code lengthens the rows by 1e-8


@pytest.mark.parametrize("n", [2, 5, 30])
def test_orthogonal_rows_are_as_diverse_as_can_be(n):
    w = torch.linalg.qr(draw(n, n))[0]
    for size in (1.0, 3.0):
        assert one("weight-orthogonality", size * w) == pytest.approx(0, abs=1e-10)
        assert one("weight-similarity", size * w) == pytest.approx(0, abs=1e-10)
        assert one("weight-rank@share", size * w) == pytest.approx(1, abs=1e-10)
        assert one("hyperspherical-energy", size * w) == pytest.approx(0.5**0.5, abs=1e-10)
    assert one("weight-orthogonality@soft", w) == pytest.approx(0, abs=1e-10)
    assert one("weight-orthogonality@soft", 3 * w) == pytest.approx(64 * n)


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_duplicate_rows_read_at_the_collapsed_end(flip):
    w = draw(1, 16) * torch.tensor([[1.0], [flip], [2.5]], dtype=torch.float64)
    assert one("weight-similarity", w) == pytest.approx(1)
    assert one("weight-rank", w) == pytest.approx(1, abs=1e-6)
    assert one("weight-rank@stable", w) == pytest.approx(1, abs=1e-6)
    assert one("weight-orthogonality@relative", w) == pytest.approx(1)
    assert one("hyperspherical-energy@separation", w) == pytest.approx(0, abs=1e-12)
    assert one("hyperspherical-energy", w) > 100


@pytest.mark.parametrize("name", ONE_MATRIX)
def test_zeros_are_undefined_or_plainly_measured(name):
    reading = read(name, {"proj": torch.zeros(5, 4)})
    if name in ("weight-orthogonality", "weight-orthogonality@squared"):
        assert one(name, torch.zeros(5, 4)) == 0
    elif name == "weight-orthogonality@soft":
        assert one(name, torch.zeros(5, 4)) == 5
    else:
        assert reading.values is None
        assert "undefined under this definition" in reading.not_applicable


def test_one_row_has_no_pairs_and_a_zero_row_does_not_count():
    row = draw(1, 6)
    for name in ("weight-similarity", "weight-similarity@signed", "hyperspherical-energy", "hyperspherical-energy@separation"):
        assert np.isnan(one(name, row))
        w = draw(4, 6)
        assert one(name, torch.cat([w, torch.zeros(1, 6)])) == pytest.approx(one(name, w), rel=1e-12), name
    assert one("weight-rank", row) == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(1e-3, 1e3), st.integers(0, 2**16))
def test_rotation_scale_and_order_change_what_they_should(n, d, scale, seed):
    w = draw(n, d, seed=seed)
    turn = torch.linalg.qr(draw(d, d, seed=seed + 1))[0]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    for name in ("weight-similarity", "weight-rank", "weight-orthogonality", "hyperspherical-energy@separation"):
        for variant in (w @ turn, w[order]):
            assert one(name, variant) == pytest.approx(one(name, w), rel=1e-7, abs=1e-9)
    for name in ("weight-similarity", "weight-rank", "weight-orthogonality@relative", "hyperspherical-energy@separation"):
        assert one(name, scale * w) == pytest.approx(one(name, w), rel=1e-7, abs=1e-9)
    assert one("weight-orthogonality", scale * w) == pytest.approx(scale**2 * one("weight-orthogonality", w), rel=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**16))
def test_similarities_stay_in_their_range(n, d, seed):
    w = draw(n, d, seed=seed)
    plain, signed = row_similarity(w).item(), row_similarity(w, signed=True).item()
    assert abs(signed) <= plain + 1e-12
    assert plain <= 1 + 1e-12
    assert signed >= -1 / (n - 1) - 1e-12
    assert 0 <= relative_gap(w).item() <= 1


def test_the_same_matrix_in_two_blocks():
    first, second, third = blocks(3)
    turn = torch.linalg.qr(draw(12, 12))[0]
    reading = read("weight-similarity@depth", first, second, first, third)
    assert reading.dims == ("block", "block")
    assert np.diagonal(reading.values) == pytest.approx(1)
    assert reading.values[0, 2] == pytest.approx(1)
    flat = [np.concatenate([b[n].numpy().ravel()[None]], 0) for b in (first, second) for n in ("q",)]
    expected = (flat[0] @ flat[1].T).item() / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert reading.details["by_matrix"][0][0][1] == pytest.approx(expected, rel=1e-10)
    mean = np.mean([reading.details["by_matrix"][m][0][1] for m in range(6)])
    assert reading.values[0, 1] == pytest.approx(mean)
    turned = {**first, "q": turn @ first["q"], "fc1": first["fc1"].flip(0), "fc2": first["fc2"].flip(1)}
    by_entry, by_direction = (read(f"weight-similarity@{v}", first, turned) for v in ("depth", "directions"))
    assert by_direction.values[0, 1] == pytest.approx(1)
    assert by_entry.values[0, 1] < 0.9


def test_directions_against_the_slow_way():
    first, second = blocks(2)
    reading = read("weight-similarity@directions", first, second)
    for m, n in enumerate(NAMES):
        grams = []
        for block in (first, second):
            w = block[n].numpy()
            g = w @ w.T if n in ("proj", "fc2") else w.T @ w
            grams.append((g - np.trace(g) / len(g) * np.eye(len(g))).ravel())
        expected = grams[0] @ grams[1] / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1])
        assert reading.details["by_matrix"][m][0][1] == pytest.approx(expected, rel=1e-9), n


def test_unrelated_blocks_are_at_zero_and_isotropic_ones_undefined():
    wide = [draw(200, 40, seed=s) for s in (1, 2)]
    both = between_blocks([read_directions(w, writes=False) for w in wide])
    assert abs(both[0, 1]) < 0.15
    turn = torch.linalg.qr(draw(40, 40))[0]
    assert np.isnan(between_blocks([read_directions(turn, writes=False), read_directions(wide[0], writes=False)])[0]).all()


def test_blocks_of_different_width_are_not_compared():
    first, second = blocks(2)
    second = {**second, "q": draw(6, 5), "k": draw(6, 5)}
    reading = read("weight-similarity@depth", first, second)
    assert np.isnan(reading.details["by_matrix"][0][0][1])
    assert np.isfinite(reading.values[0, 1])


@pytest.mark.parametrize("name", EVERY)
def test_what_is_missing_stays_undefined_with_its_reason(name):
    first, second = blocks(2)
    reading = read(name, first, {n: second[n] for n in ("q", "fc2")})
    assert reading.details["missing"] == ["k, v, proj, fc1 of blocks.1: not made here"]
    assert reading.stderr is None
    assert "no sample" in reading.details["intervals"]
    if reading.dims == ("block", "matrix"):
        missing = [NAMES.index(n) for n in ("k", "v", "proj", "fc1")]
        assert np.isnan(reading.values[1, missing]).all()
        assert np.isfinite(reading.values[0, :3]).all()


@pytest.mark.parametrize("name", EVERY)
def test_without_a_single_matrix_the_metric_does_not_apply(name):
    reading = read(name, {}, {})
    assert reading.values is None
    assert "not made here" in reading.not_applicable
    assert "need" in make(name, plan_for(2, 4, 9)).compute().not_applicable


@pytest.mark.parametrize("name", EVERY)
def test_every_definition_names_what_it_measures(name):
    reading = read(name, *blocks(2))
    assert len(reading.definition) > 80
    assert reading.nulls.values.keys() == {"untrained"}
    low = name.startswith("weight-rank") or name.endswith("@separation")
    assert reading.collapsed == ("low" if low else "high")


def test_levels_hold_the_plain_metrics_of_their_folder():
    assert of_level("weights") == tuple(sorted((*WEIGHTS, "qk-spectrum")))  # that one has a test file of its own
    assert set(of_level("all")) == set(METRICS)
    assert set(of_level("attention")) | set(of_level("tokens")) | set(of_level("weights")) == set(METRICS)
    assert all(kind.level in LEVELS for kind in METRICS.values())
    assert all(kind.level == kind.__module__.split(".")[-2] for kind in METRICS.values())
    assert all(issubclass(METRICS[name], WeightMetric) for name in of_level("weights"))
    assert not any(issubclass(METRICS[name], WeightMetric) for name in of_level("attention", "tokens"))


def test_summary_is_the_mean_of_what_is_defined():
    first, second = blocks(2)
    names = ("weight-rank", "weight-similarity@depth")
    readings = {name: read(name, first, {"q": second["q"]}) for name in names}
    found = summarise_weights(readings)
    assert found["weight_rank_mean"] == pytest.approx(np.nanmean(readings["weight-rank"].values))
    assert found["weight_similarity_depth_adjacent"] == pytest.approx(readings[names[1]].values[1, 0])
