"""Spectra against slow NumPy, the laws of ranks, and matrices of every degenerate kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.spectra import (
    components_for,
    effective_rank,
    effective_rank_of,
    pca_error,
    singular_values,
    stable_rank,
    stable_rank_of,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 9), (9, 5), (40, 40), (600, 16), (16, 600)]


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def slow_rank(matrix, power=1):
    shares = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False) ** power
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def slow_variances(matrix):
    rows = np.asarray(matrix, dtype=np.float64)
    rows = rows - rows.mean(0)
    covariance = sum(np.outer(row, row) for row in rows)
    return np.sort(np.linalg.eigvalsh(covariance))[::-1]


def orthogonal(n, seed=0):
    return torch.linalg.qr(draw(n, n, seed=seed))[0]


def e1():
    b, t, c = np.meshgrid(np.arange(2), np.arange(6), np.arange(5), indexing="ij")
    return np.sin(1 + 0.7 * b + 1.3 * t + 0.9 * c + 0.5 * t * c)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_and_ranks_against_numpy(shape):
    matrices = draw(3, *shape)
    expected = np.stack([np.linalg.svd(m, compute_uv=False) for m in matrices.numpy()])
    assert singular_values(matrices).numpy() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert effective_rank(matrices).numpy() == pytest.approx([slow_rank(m) for m in matrices], rel=1e-10)
    assert effective_rank(matrices, squared=True).numpy() == pytest.approx([slow_rank(m, 2) for m in matrices], rel=1e-10)
    stable = (matrices.numpy() ** 2).sum((1, 2)) / expected[:, 0] ** 2
    assert stable_rank(matrices).numpy() == pytest.approx(stable, rel=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (40, 12), (3, 64)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.95, 0.99, 1.0])
def test_principal_components_against_the_covariance(shape, share):
    matrix = draw(*shape) * torch.linspace(1, 4, shape[1])
    variances = slow_variances(matrix)[: min(shape[0] - 1, shape[1])]
    kept = int(np.ceil(share * len(variances) - 1e-9))
    assert pca_error(matrix, share).item() == pytest.approx(variances[kept:].sum() / variances.sum(), abs=1e-12)
    held = np.cumsum(variances) / variances.sum()
    assert components_for(matrix, share).item() == 1 + int((held < share - 1e-9).sum())


def test_worked_values_of_the_tokens():
    tokens = torch.from_numpy(e1())
    assert effective_rank(tokens).mean().item() == pytest.approx(4.1567666746, abs=1e-9)
    assert stable_rank(tokens).mean().item() == pytest.approx(2.6333258117, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 9, 200])
def test_identity_has_full_rank_and_a_repeated_row_rank_one(n, dtype):
    row = draw(n).to(dtype) + 3
    assert effective_rank(torch.eye(n, dtype=dtype)).item() == pytest.approx(n, rel=1e-12)
    assert stable_rank(torch.eye(n, dtype=dtype)).item() == pytest.approx(n, rel=1e-12)
    for rank in (effective_rank, stable_rank):
        assert rank(row.expand(n + 3, n)).item() == pytest.approx(1, abs=1e-9)


def test_zeros_have_no_rank_and_no_components():
    zeros = torch.zeros(2, 4, 3)
    assert singular_values(zeros).abs().max() == 0
    for function in (effective_rank, stable_rank, lambda m: pca_error(m, 0.9), lambda m: components_for(m, 0.9)):
        assert torch.isnan(function(zeros)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_have_no_principal_components(dtype):
    rows = (draw(1, 30) + 5).to(dtype).expand(12, 30)
    assert torch.isnan(pca_error(rows, 0.9))
    assert torch.isnan(components_for(rows, 0.9))
    assert torch.isnan(pca_error(draw(1, 4), 0.9))


def test_empty_matrices_have_no_rank():
    assert singular_values(torch.zeros(2, 0, 3)).shape == (2, 0)
    assert torch.isnan(effective_rank(torch.zeros(0, 3)))
    assert torch.isnan(stable_rank(torch.zeros(0, 3)))
    assert torch.isnan(pca_error(torch.zeros(0, 3), 0.9))


def test_undefined_entries_spoil_their_own_matrix_alone():
    matrices = draw(3, 4, 4)
    matrices[0, 1, 1], matrices[2, 0, 0] = torch.nan, torch.inf
    found = effective_rank(matrices)
    assert torch.isnan(found).tolist() == [True, False, True]
    assert found[1].item() == pytest.approx(slow_rank(matrices[1]), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e20, 1e200])
def test_sizes_that_would_overflow_when_squared(scale):
    matrix = draw(6, 4)
    assert effective_rank(matrix * scale).item() == pytest.approx(effective_rank(matrix).item(), rel=1e-12)
    assert (singular_values(matrix * scale) / scale).numpy() == pytest.approx(singular_values(matrix).numpy(), rel=1e-12)


def test_a_small_singular_value_is_right_and_one_below_the_floor_is_zero():
    u, v = orthogonal(8), orthogonal(8, 1)
    for smallest, expected in ((1e-6, 1e-6), (1e-13, 0.0)):
        matrix = u @ torch.diag(torch.tensor([1.0] * 7 + [smallest], dtype=torch.float64)) @ v
        assert singular_values(matrix)[-1].item() == pytest.approx(expected, rel=1e-3)


def test_half_precision_and_grad_are_taken_as_they_come():
    matrix = draw(6, 5).half().requires_grad_()
    assert effective_rank(matrix).item() == pytest.approx(slow_rank(matrix.detach()), rel=1e-9)
    assert not effective_rank(matrix).requires_grad


def test_from_singular_values_in_any_order():
    values = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    assert effective_rank_of(values).item() == pytest.approx(slow_rank(np.diag([1, 2, 3])), rel=1e-12)
    assert stable_rank_of(values).item() == pytest.approx(14 / 9, rel=1e-12)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(SettingError, match=r"0 … 1"):
        pca_error(torch.eye(3), share)
    with pytest.raises(SettingError, match=r"0 … 1"):
        components_for(torch.eye(3), share)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3), st.integers(0, 2**16))
def test_ranks_do_not_change_with_scale_rotation_or_order(n, d, scale, seed):
    matrix = draw(n, d, seed=seed)
    turned = orthogonal(n, seed) @ (matrix * scale) @ orthogonal(d, seed + 1)
    for rank in (effective_rank, stable_rank):
        whole = rank(matrix).item()
        assert rank(turned).item() == pytest.approx(whole, rel=1e-8)
        assert rank(matrix.T).item() == pytest.approx(whole, rel=1e-8)
        assert 1 - 1e-9 <= whole <= min(n, d) + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 10), st.integers(1, 10), st.integers(0, 2**16))
def test_a_matrix_on_top_of_itself_has_the_same_rank_and_components(n, d, seed):
    matrix = draw(n, d, seed=seed)
    twice = torch.cat([matrix, matrix])
    assert effective_rank(twice).item() == pytest.approx(effective_rank(matrix).item(), rel=1e-8)
    assert components_for(twice, 0.9) == components_for(matrix, 0.9)
    errors = [pca_error(matrix, share).item() for share in (0.1, 0.5, 0.9, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def test_small_matrices_have_the_same_bits_for_any_number_of_threads_and_in_any_company():
    maps = torch.rand(7, 60, 60, generator=torch.Generator().manual_seed(0)).softmax(-1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [singular_values(maps), torch.cat([singular_values(one[None]) for one in maps])]
            assert torch.get_num_threads() == threads
        with torch.inference_mode():
            found.append(singular_values(maps))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], each) for each in found)


def test_the_number_of_threads_is_put_back_where_a_matrix_fails(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("no")

    before = torch.get_num_threads()
    monkeypatch.setattr("collapse_probe.metrics.functional.spectra._eigenvalues", fails)
    with pytest.raises(torch.linalg.LinAlgError):
        singular_values(torch.eye(3)[None])
    assert torch.get_num_threads() == before
