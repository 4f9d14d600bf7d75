"""The form W_Qᵀ W_K of each head: hand-made matrices, the full D × D matrix in NumPy, random ones, gains of norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import small_vit

import collapse_probe as cp
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.weights.recording import record_matrices
from collapse_probe.metrics.metric import make
from collapse_probe.metrics.weights.qk_spectrum import MEASURES, bilinear_form, random_variance


def slow(q, k):
    """From all D eigenvalues and singular values of the whole matrix."""
    size, whole = len(q), q.T @ k
    eigenvalues = np.linalg.eigvals(whole)
    level = (whole**2).sum() / size
    singular = np.linalg.svd(whole, compute_uv=False)[: min(whole.shape)]
    shares = singular[singular > 1e-9 * singular[0]] / singular.sum()
    return {
        "variance": ((np.abs(eigenvalues) ** 2).sum() / size - abs(eigenvalues.sum() / size) ** 2) / level,
        "trace": (np.trace(whole) / size) / np.sqrt(level),
        "symmetric": (((whole + whole.T) / 2) ** 2).sum() / (whole**2).sum(),
        "rank": np.exp(-(shares * np.log(shares)).sum()),
        "largest": singular[0],
    }


def normal(*shape, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(4, 16), (8, 8), (6, 4)])
def test_every_measure_against_the_whole_matrix(measure, shape):
    q, k = normal(3, *shape), normal(3, *shape, seed=1) + normal(3, *shape)
    expected = [slow(one.numpy(), other.numpy())[measure] for one, other in zip(q, k, strict=True)]
    assert bilinear_form(q, k)[measure].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_hand_made_forms():
    eye = torch.eye(4, dtype=torch.float64)
    alternating = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))
    turn = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)] * 2)
    shift = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    cases = {  # variance, trace, symmetric, rank, largest
        "a token with itself": (eye, [0.0, 1.0, 1.0, 4.0, 1.0]),
        "both signs": (alternating, [1.0, 0.0, 1.0, 4.0, 1.0]),
        "a rotation": (turn, [1.0, 0.0, 0.0, 4.0, 1.0]),
        "nilpotent": (shift, [0.0, 0.0, 0.5, 3.0, 1.0]),
    }
    for name, (k, expected) in cases.items():
        assert [value.item() for value in bilinear_form(eye, k).values()] == pytest.approx(expected, abs=1e-6), name
    assert all(bilinear_form(0 * eye, eye)[name].isnan() for name in ("variance", "trace", "symmetric", "rank"))


def test_scaling_the_matrices_changes_the_size_alone():
    q, k = normal(4, 12), normal(4, 12, seed=1)
    one, other = bilinear_form(q, k), bilinear_form(3 * q, 3 * k)
    for name in ("variance", "trace", "symmetric", "rank"):
        assert other[name].item() == pytest.approx(one[name].item())
    assert other["largest"].item() == pytest.approx(9 * one["largest"].item())


def test_random_matrices_have_the_bulk_of_random_matrix_theory():
    size, width = 32, 192
    q, k = normal(200, size, width) / width**0.5, normal(200, size, width, seed=1) / width**0.5
    found = bilinear_form(q, k)
    assert found["variance"].mean().item() == pytest.approx(random_variance(size, width), rel=0.05)
    assert abs(found["trace"].mean().item()) < 0.01
    assert found["symmetric"].mean().item() == pytest.approx(0.5, abs=0.01)
    edge = 1 + (size / width) ** 0.5  # of Marchenko and Pastur, for each of the two
    assert found["largest"].amax().item() < 1.1 * edge**2
    spectrum = torch.linalg.svdvals(q).square().flatten()
    assert spectrum.mean().item() == pytest.approx(1.0, abs=0.01)
    assert spectrum.var().item() == pytest.approx(size / width, rel=0.05)


def matrices_of(model):
    plan = discover_plan(model, (64, 64))
    return plan, record_matrices(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), plan.blocks)


def test_the_gain_of_the_norm_stands_on_both_matrices():
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].norm1.weight.copy_(torch.linspace(0.1, 3.0, 64))
    plan, matrices = matrices_of(model)
    metric = make("qk-spectrum@largest", plan)
    values, facts = metric.values(matrices)
    assert facts["details"]["folded"] == facts["details"]["as_used"] == [0, 1, 2, 3]
    q, k, _ = model.blocks[1].attn.qkv.weight.detach().double().numpy().reshape(3, 4, 16, 64)
    gain = np.linspace(0.1, 3.0, 64)
    assert values[1] == pytest.approx([slow(a * gain, b * gain)["largest"] for a, b in zip(q, k, strict=True)], rel=1e-5)
    q, k, _ = model.blocks[0].attn.qkv.weight.detach().double().numpy().reshape(3, 4, 16, 64)
    assert values[0] == pytest.approx([slow(a, b)["largest"] for a, b in zip(q, k, strict=True)], rel=1e-5)


def test_without_a_norm_none_is_folded_and_norms_of_queries_are_told():
    model = small_vit(qk_norm=True)
    model.blocks[2].norm1 = torch.nn.Identity()
    plan, matrices = matrices_of(model)
    values, facts = make("qk-spectrum", plan).values(matrices)
    assert facts["details"]["folded"] == [0, 1, 3]
    assert facts["details"]["as_used"] == []
    assert np.isfinite(values).all()


def test_findings_hold_it_by_head_beside_the_untrained_copy():
    found = cp.analyze("ours:digits-mhsa", metrics=("qk-spectrum",)).metrics["qk-spectrum"]
    assert found.dims == ("block", "head")
    random = found.details["random"][0]
    assert found.nulls.values["untrained"].shape == found.values.shape
    assert found.nulls.values["untrained"].mean() == pytest.approx(random, rel=0.1)
    assert found.details["folded"] == found.details["as_used"] == list(range(len(found.values)))
