"""How evenly rows spread: worked values, slow references, gradients, and everything degenerate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.orthogonality import (
    gram_log_determinant,
    hyperspherical_energy,
    hyperspherical_separation,
    orthogonality_gap,
    power_step_gap,
    soft_orthogonality,
)

ROW, COLUMN = np.ogrid[:4, :4]
WEIGHT = np.sin(0.4 + 0.9 * ROW + 0.7 * COLUMN + 0.35 * ROW * COLUMN)
EIGENVALUES = [0.1692345375, 1.3238258780, 3.0232421985, 3.8048729267]

ALL = {
    "soft_orthogonality": soft_orthogonality,
    "orthogonality_gap": orthogonality_gap,
    "power_step_gap": lambda rows: power_step_gap(rows, 3),
    "power_step_gap normal": lambda rows: power_step_gap(rows, 3, "normal"),
    "separation": hyperspherical_separation,
    "separation repository": lambda rows: hyperspherical_separation(rows, "repository"),
    "energy": hyperspherical_energy,
    "energy log": lambda rows: hyperspherical_energy(rows, 0),
    "energy squared": lambda rows: hyperspherical_energy(rows, 2),
    "gram_log_determinant": gram_log_determinant,
}
every = pytest.mark.parametrize("name", ALL)


def rows_of(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distances(rows):
    """Squared distances of unit rows, pair by pair."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.array([((a - b) ** 2).sum() for a, b in itertools.combinations(unit, 2)])


def reference(name, rows):
    """Slow and obvious, for one matrix without zero or duplicate rows."""
    eigenvalues = np.linalg.eigvalsh(rows @ rows.T)
    if name == "soft_orthogonality":
        return float(((rows @ rows.T - np.eye(len(rows))) ** 2).sum())
    if name == "orthogonality_gap":
        return float(eigenvalues[-1] - (eigenvalues[0] if rows.shape[0] <= rows.shape[1] else 0))
    if name.startswith("separation"):
        return float(distances(rows).min())
    if name.startswith("energy"):
        apart = np.sqrt(distances(rows))
        return float({"energy": 1 / apart, "energy log": -np.log(apart), "energy squared": apart**-2}[name].mean())
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    kernel = np.exp(-((unit[:, None] - unit[None]) ** 2).sum(-1)) + 1e-6 * np.eye(len(rows))
    return float(np.linalg.slogdet(kernel)[1])


@pytest.mark.parametrize("shape", [(4, 7), (6, 3), (2, 2)])
@pytest.mark.parametrize("name", [name for name in ALL if "power" not in name])
def test_agrees_with_the_slow_reference(name, shape):
    rows = rows_of(1, 3, *shape)
    expected = [reference(name, each.numpy()) for each in rows]
    assert ALL[name](rows).numpy() == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda w: soft_orthogonality(w), 12.7558555816),
        (lambda w: orthogonality_gap(w) ** 2, 13.2178664971),
        (lambda w: hyperspherical_separation(w), 1.4269400015),
        (lambda w: hyperspherical_separation(w, "repository"), 1.4269400015),
        (lambda w: -gram_log_determinant(w), 0.1354976366),
    ],
)
def test_worked_values_of_the_weight(value, expected):
    assert value(torch.as_tensor(WEIGHT)).item() == pytest.approx(expected, abs=1e-6)


def test_the_worked_gap_is_that_of_the_worked_eigenvalues():
    assert np.linalg.eigvalsh(WEIGHT @ WEIGHT.T) == pytest.approx(EIGENVALUES, abs=1e-9)
    assert orthogonality_gap(torch.as_tensor(WEIGHT)).item() == pytest.approx(EIGENVALUES[-1] - EIGENVALUES[0], abs=1e-9)


def test_the_identity_has_the_published_gram_determinant():
    alike, n = np.exp(-2), 4
    by_formula = np.log((1 - alike + 1e-6) ** (n - 1) * (1 + (n - 1) * alike + 1e-6))
    found = gram_log_determinant(torch.eye(4, dtype=torch.float64)).item()
    assert -found == pytest.approx(0.0954833225, abs=1e-6)  # the released code lengthens rows by 1e-8
    assert found == pytest.approx(by_formula, abs=1e-9)


def test_one_power_step_is_biased_low_as_the_released_estimator_is():
    squares = np.array([power_step_gap(torch.as_tensor(WEIGHT), seed).item() ** 2 for seed in range(400)])
    assert squares.mean() == pytest.approx(2.27, abs=0.5)
    assert squares.max() < 13.2178664971


def test_a_power_step_repeats_with_its_seed_and_changes_with_it():
    rows = rows_of(0, 5, 5)
    assert power_step_gap(rows, 7).item() == power_step_gap(rows, 7).item()
    assert power_step_gap(rows, 7).item() != power_step_gap(rows, 8).item()


def test_a_power_step_does_not_depend_on_what_else_is_in_the_stack():
    rows = rows_of(2, 3, 4, 6)
    assert power_step_gap(rows, 1)[2].item() == pytest.approx(power_step_gap(rows[2], 1).item(), abs=1e-12)


DEGENERATE = {
    "identity": torch.eye(4),
    "zero rows": torch.zeros(4, 3),
    "duplicates": torch.ones(4, 3),
    "one zero row": torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [3.0, 1.0, 0.0]]),
    "opposite": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
    "one row": torch.tensor([[1.0, 2.0]]),
    "tiny": torch.full((3, 3), 1e-20),
}


@every
@pytest.mark.parametrize("what", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_rows_give_no_nan_in_value_or_gradient(name, what, dtype):
    rows = DEGENERATE[what].clone().to(dtype).requires_grad_()
    found = ALL[name](rows)
    found.backward()
    assert found.isfinite()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_what_degenerate_rows_read():
    assert hyperspherical_separation(torch.ones(3, 2)).item() == 0
    assert hyperspherical_separation(torch.eye(4), "repository").item() == 12
    assert hyperspherical_separation(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), "repository").item() == 4
    assert hyperspherical_energy(torch.ones(3, 2)).item() == pytest.approx(1000, rel=1e-3)
    assert orthogonality_gap(torch.eye(3) * 5).item() == pytest.approx(0, abs=1e-5)
    assert soft_orthogonality(torch.eye(3) * 5).item() == pytest.approx(3 * 24**2)
    collapsed = gram_log_determinant(torch.ones(6, 3, dtype=torch.float64)).item()
    assert collapsed == pytest.approx(np.log(1e-6) * 5 + np.log(6), abs=1e-3)


@every
def test_gradients_agree_with_finite_differences(name):
    rows = rows_of(5, 2, 4, 5).requires_grad_()
    assert gradcheck(ALL[name], (rows,))


def test_a_step_down_the_gap_makes_rows_more_orthogonal():
    rows = rows_of(3, 5, 5).requires_grad_()
    before = orthogonality_gap(rows).item()
    for _ in range(50):
        orthogonality_gap(rows).square().backward()
        with torch.no_grad():
            rows -= 0.001 * rows.grad
            rows.grad = None
    assert orthogonality_gap(rows).item() < 0.6 * before


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_directions_ignore_the_length_of_rows_and_their_rotation(seed, scale):
    rows = rows_of(seed, 4, 6)
    rotation = torch.linalg.qr(rows_of(seed + 1, 6, 6))[0]
    for name in ("separation", "energy", "gram_log_determinant"):
        expected = ALL[name](rows).item()
        assert ALL[name](rows * scale).item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
        assert ALL[name](rows @ rotation).item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_scaled_orthogonal_rows_have_no_gap_and_are_soft_orthogonal_at_length_one_alone(seed, scale):
    rows = torch.linalg.qr(rows_of(seed, 5, 5))[0]
    assert orthogonality_gap(rows * scale).item() == pytest.approx(0, abs=1e-10 * scale**2)
    assert soft_orthogonality(rows * scale).item() == pytest.approx(5 * (scale**2 - 1) ** 2, abs=1e-9 * scale**4)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(SettingError, match="minimum"):
        hyperspherical_separation(torch.eye(2), "smallest")
    with pytest.raises(SettingError, match="power"):
        hyperspherical_energy(torch.eye(2), -1)
    with pytest.raises(SettingError, match="epsilon"):
        gram_log_determinant(torch.eye(2), 0)
