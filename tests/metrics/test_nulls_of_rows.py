"""The level of other keys, the best order of heads, and vectors so small that their squares vanish, against slow NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from factories import random_maps, readings, trace_of

from collapse_probe.metrics.functional.geometry import centred_unit, unit
from collapse_probe.metrics.nulls import with_twins

B, L, H, N = 4, 3, 3, 7
COLUMN, ROW = "attention-similarity", "attention-similarity@row"
BUDGETS = [2**24, L * H * N * N * 4]


def measured(maps, name, budget=2**24):
    return readings([trace_of(maps)], [name], budget)[name]


def units(maps, axis="row"):
    x = maps if axis == "row" else np.swapaxes(maps, -1, -2)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_wrong_keys_are_every_permutation_of_a_row_without_fixed_points():
    maps = random_maps((B, L, H, 4, 4))
    x = units(maps)
    moved = [p for p in itertools.permutations(range(4)) if all(i != k for i, k in enumerate(p))]
    slow = np.mean([np.einsum("bphtv,bqhtv->pq", x, x[..., list(p)]) / (B * H * 4) for p in moved], axis=0)
    assert measured(maps, ROW).nulls.values["other_key"] == pytest.approx(slow, abs=1e-6)
    assert "other_key" not in measured(maps, COLUMN).nulls.values


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("name", "axis"), [(COLUMN, "column"), (ROW, "row")])
def test_the_best_order_of_heads_is_that_of_all_orders(name, axis, budget):
    maps = random_maps((B, L, H, N, N))
    maps[:, 2] = maps[:, 1][:, [1, 2, 0]]
    x = units(maps, axis)
    found = measured(maps, name, budget)
    for pair in range(L - 1):
        between = np.einsum("bgtv,bhtv->gh", x[:, pair], x[:, pair + 1]) / (B * N)
        order = max(itertools.permutations(range(H)), key=lambda p: sum(between[g, h] for g, h in enumerate(p)))
        assert found.details["head_order"][pair].tolist() == list(order)
        paired = between[range(H), order]
        null = (between.sum() - paired.sum()) / (H * H - H)
        if axis == "column":
            every = np.einsum("bgsv,bhtv->gh", x[:, pair], x[:, pair + 1])[range(H), order] / B
            null = ((every - N * paired) / (N * (N - 1))).mean()
        share = np.nan if order == tuple(range(H)) else (paired.mean() - null) / (1 - null)
        assert found.details["head_order_share"][pair] == pytest.approx(share, abs=1e-5, nan_ok=True)
    assert found.details["head_order"][1].tolist() == [2, 0, 1]
    assert found.details["head_order_share"][1] == pytest.approx(1, abs=1e-5)


def test_heads_in_their_own_order_have_no_share():
    maps = random_maps((B, L, H, N, N))
    maps[:, 1:] = maps[:, :1]
    details = measured(maps, ROW).details
    assert details["head_order"].tolist() == [[0, 1, 2]] * (L - 1)
    assert np.isnan(details["head_order_share"]).all()


@pytest.mark.parametrize("size", [1e30, 1e15, 1.0, 1e-12, 1e-18, 3e-22, 1e-30, 1e-37])
@pytest.mark.parametrize("scaled", [unit, centred_unit])
def test_directions_are_those_of_float64_at_every_size(size, scaled):
    vectors = torch.tensor(np.random.default_rng(0).uniform(0.1, 1, (5, 17)) * size, dtype=torch.float32)
    exact, _ = scaled(vectors.double().clone())
    found, valid = scaled(vectors.clone())
    assert valid.all()
    assert (found.double() - exact).abs().max() < 3e-7


def test_vectors_of_subnormal_numbers_have_no_direction():
    found, valid = unit(torch.tensor([[1e-39, 2e-39], [0.0, 0.0], [1e-39, 1.0]]))
    assert valid.tolist() == [False, False, True]
    assert found[:2].tolist() == [[0, 0], [0, 0]]


def test_similarities_of_columns_next_to_a_sink_are_those_of_float64():
    logits = np.random.default_rng(1).normal(size=(B, L, H, N, N))
    logits[..., 0] += 60
    exact = np.exp(logits - logits.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    x = units(exact, "column")
    slow = np.einsum("bphtv,bqhtv->pq", x, x) / (B * H * N)
    found = measured(exact.astype(np.float32), COLUMN)
    assert found.values == pytest.approx(slow, abs=1e-5)
    assert "left_out" not in found.details


def test_what_has_no_direction_is_counted():
    maps = random_maps((B, L, H, N, N))
    maps[:, 1, :, :, :2] = 0
    assert measured(maps, COLUMN).details["left_out"] == pytest.approx([0, 2 / N, 0])


def test_the_twins_own_shares_are_kept_beside_their_nulls():
    real, *twins = (measured(random_maps((B, L, H, N, N), seed=seed), ROW) for seed in range(3))
    beyond = with_twins(real, dict(enumerate(twins)), B).nulls.untrained_beyond
    assert set(beyond) == {"other_token", "other_head", "other_key"}
    for name, highest in beyond.items():
        shares = [(twin.values - null) / (1 - null) for twin in twins for null in [twin.nulls.values[name]]]
        assert highest == pytest.approx(np.max(shares, axis=0))
