"""Two singular values of each map against the whole spectrum: hand-made maps, random ones, and what never converges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import random_maps, readings, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.metrics.attention.spectral_gap import gap_of
from collapse_probe.metrics.functional.spectra import RELATIVE, two_largest

KINDS = ("softmax", "sharp", "uniform", "permutation", "sink", "blocks", "zero", "signed", "identity and noise", "one row")


def matrix(kind, n, d, rng):
    logits = rng.normal(size=(n, d))
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if kind == "softmax":
        return softmax
    if kind == "sharp":
        raised = np.exp(9 * logits - 9 * logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)
    if kind == "uniform":
        return np.full((n, d), 1 / d)
    if kind == "permutation":
        return np.eye(max(n, d))[rng.permutation(max(n, d))][:n, :d]
    if kind == "sink":
        return 0.999 * np.eye(d)[[0] * n] + 0.001 * softmax
    if kind == "blocks":
        return np.kron(np.eye(2), np.full((n // 2 + 1, d // 2 + 1), 2 / (d + 2)))[:n, :d]
    if kind == "zero":
        return np.zeros((n, d))
    if kind == "signed":
        return logits
    if kind == "one row":
        return np.where(np.arange(n)[:, None] == n // 2, softmax, 0.0)
    return np.eye(n, d) + 1e-7 * logits


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 90), d=st.integers(1, 90))
def test_never_further_from_the_spectrum_than_it_says(kind, seed, n, d):
    rng = np.random.default_rng(seed)
    a = np.stack([matrix(kind, n, d, rng), matrix("softmax", n, d, rng)])
    true = np.stack([np.linalg.svd(x, compute_uv=False) for x in a])
    true = np.concatenate([true, np.zeros((2, 2))], 1)[:, :2]
    found, bounds = two_largest(torch.as_tensor(a))
    slack = 1e-6 * true[:, :1] + 1e-12
    assert (np.abs(found.numpy() - true) <= bounds.numpy() + slack).all()
    assert (bounds.numpy() <= RELATIVE * true + slack).all()
    assert (np.abs(found.numpy() - true) <= 1e-4 * true + slack).all()


def test_hand_made_maps():
    n = 30
    cases = {
        "uniform": (torch.full((n, n), 1 / n), 1.0, 0.0),
        "permutation": (torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))], 0.0, n**0.5),
        "one key": (torch.eye(n)[[3] * n], n**0.5, 0.0),
        "two halves that do not meet": (torch.block_diag(*[torch.full((15, 15), 1 / 15)] * 2), 0.0, n**0.5),
    }
    for name, (a, gap, second) in cases.items():
        found = gap_of(a)
        assert found["gap"].item() == pytest.approx(gap, abs=1e-6), name
        assert found["second"].item() == pytest.approx(second, abs=1e-5), name


def test_the_second_value_of_random_maps_falls_with_the_root_of_their_tokens():
    found = {n: gap_of(torch.as_tensor(random_maps((4, n, n), sharpness=0.5))) for n in (50, 100, 200, 400)}
    bulk = 2 * (np.exp(0.5**2) - 1) ** 0.5  # twice the standard deviation of an entry over its mean
    for n, numbers in found.items():
        assert numbers["second"].mean().item() == pytest.approx(bulk, rel=0.15), n
    assert (found[50]["gap"] < found[400]["gap"]).all()


def test_what_does_not_converge_gets_its_whole_spectrum():
    a = torch.as_tensor(random_maps((3, 60, 60)))
    for steps in (1, 2):
        found, bounds = two_largest(a, steps=steps, tolerance=1e-12)
        assert found.numpy() == pytest.approx(torch.linalg.svdvals(a)[:, :2].numpy(), rel=1e-9)
        assert (bounds == 0).all()


def test_a_matrix_that_is_not_finite_has_none_and_spoils_no_other():
    a = torch.as_tensor(random_maps((3, 40, 40)))
    alone = two_largest(a)[0]
    a[1, 0, 0] = torch.nan
    found = two_largest(a)[0]
    assert found[1].isnan().all()
    assert found[[0, 2]].numpy() == pytest.approx(alone[[0, 2]].numpy(), rel=1e-9)


@pytest.mark.parametrize("variant", ["", "@second", "@first", "@patches"])
def test_the_metric_against_numpy(variant):
    maps = random_maps((5, 2, 3, 40, 40))
    found = readings([trace_of(maps, prefix=(0,))], [f"spectral-gap{variant}"])[f"spectral-gap{variant}"]
    kept = maps[..., 1:, 1:] if variant == "@patches" else maps
    values = np.linalg.svd(kept, compute_uv=False)
    slow = {"@second": values[..., 1] * np.sqrt(40), "@first": values[..., 0]}.get(variant, values[..., 0] - values[..., 1])
    assert found.values == pytest.approx(slow.mean(0), abs=2e-6)
    assert found.head_mean[0] == pytest.approx(slow.mean((0, 2)), abs=2e-6)
    assert found.details["images"] == found.details["of"] == 5
    assert (found.details["bound"] <= RELATIVE).all()
