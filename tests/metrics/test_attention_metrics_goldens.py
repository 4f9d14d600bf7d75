"""The worked values of attention distance, rollout and rank, and where they lead in a whole reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import readings, trace_of
from test_worked_values import A1, A2

from collapse_probe.analysis.state.gallery import rollout_overlay
from collapse_probe.metrics.attention.attention_distance import attended_distance, uniform_distance
from collapse_probe.metrics.functional.rollout import rollouts, with_residual
from collapse_probe.metrics.map_metric import patch_distances

CLASS_TOKEN_ROW = [0.5395329533, 0.1754509231, 0.1163122201, 0.0902146366, 0.0784892669]


def heard(maps, grid, size, prefix=(0,)):
    trace = trace_of(maps, prefix=prefix)
    return replace(trace, plan=replace(trace.plan, grid=grid, image_size=size))


@pytest.mark.parametrize(
    ("side", "patch", "renormalised", "dropped"),
    [(14, 16, 116.492, 115.901), (7, 32, 115.503, 113.193), (24, 16, 200.048, 199.701)],
)
def test_distance_of_uniform_attention(side, patch, renormalised, dropped):
    distances = patch_distances((side, side), (patch, patch))
    assert uniform_distance(distances, side**2 + 1) == pytest.approx(renormalised, abs=5e-4)
    assert uniform_distance(distances, side**2 + 1, renormalise=False) == pytest.approx(dropped, abs=5e-4)
    tokens = side**2 + 1
    names = ["attention-distance", "attention-distance@drop", "attention-distance@resoftmax"]
    trace = heard(np.full((1, 1, 1, tokens, tokens), 1 / tokens), (side, side), (side * patch, side * patch))
    found = readings([trace], names)
    expected = [renormalised, dropped, renormalised]
    assert [found[name].values.item() for name in names] == pytest.approx(expected, abs=1e-3)
    assert [found[name].details["uniform"].item() for name in names] == pytest.approx(expected, abs=5e-4)


def test_distance_of_attention_to_oneself_and_to_the_far_corner():
    distances = patch_distances((14, 14), (16, 16))
    assert attended_distance(torch.eye(196, dtype=torch.float64), distances).tolist() == [0.0] * 196
    assert distances.max().item() == pytest.approx(294.156, abs=5e-4)
    far = torch.zeros(196, 196, dtype=torch.float64)
    far[:, -1] = 1
    assert attended_distance(far, distances)[0].item() == pytest.approx(294.156, abs=5e-4)


@pytest.mark.parametrize(
    ("convention", "expected"), [("", 12.9579964857), ("@drop", 9.8399599294), ("@resoftmax", 12.9579964857)]
)
@pytest.mark.parametrize("budget", [2**24, 1])
def test_distance_on_a_grid_of_two_by_two(convention, expected, budget):
    inside = torch.as_tensor(A1[..., 1:, 1:])
    pure = attended_distance(inside, patch_distances((2, 2), (16, 16)), renormalise=convention != "@drop").mean().item()
    assert pure == pytest.approx(expected, abs=1e-9)
    name = "attention-distance" + convention
    found = readings([heard(A1[:, None], (2, 2), (32, 32))], [name], budget)[name]
    assert found.values.mean() == pytest.approx(expected, abs=1e-5)


def test_rollout_of_two_blocks():
    maps = torch.as_tensor(np.stack([A1, A2], 1)[0].mean(1))
    followed = rollouts(maps)
    assert followed[1, 0].tolist() == pytest.approx(CLASS_TOKEN_ROW, abs=1e-9)
    assert followed.sum(-1).numpy() == pytest.approx(1)
    assert torch.equal(followed[0], with_residual(maps[0]))


def test_rollout_as_an_overlay():
    trace = heard(np.stack([A1, A2], 1), (2, 2), (32, 32))
    shown = rollout_overlay(trace, 0)
    assert shown.shape == (2, 2, 2)
    assert shown[1].flatten().tolist() == pytest.approx(CLASS_TOKEN_ROW[1:], abs=1e-6)
    everywhere = heard(np.stack([A1, A2], 1)[..., 1:, 1:], (2, 2), (32, 32), prefix=())
    maps = torch.as_tensor(np.stack([A1, A2], 1)[0, ..., 1:, 1:].mean(1))
    assert rollout_overlay(everywhere, 0)[1].flatten().tolist() == pytest.approx(rollouts(maps)[1].mean(0).tolist(), abs=1e-6)
    assert rollout_overlay(replace(trace, plan=replace(trace.plan, grid=None)), 0).numel() == 0


def test_a_query_without_mass_stays_where_it_is_in_a_rollout():
    assert rollouts(torch.zeros(2, 3, 3)).tolist() == [torch.eye(3).tolist()] * 2
