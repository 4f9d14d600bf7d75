"""Laws of the token metrics: what they must not notice, and where copies of a token drive them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.metrics.tokens.cross_patch_similarity import cross_patch_cosine
from collapse_probe.metrics.tokens.dirichlet_energy import dirichlet_energy
from collapse_probe.metrics.tokens.rank_residual import composite_norm, frobenius_norm, rank_residual
from collapse_probe.metrics.tokens.token_frequency import frequency_ratio
from collapse_probe.metrics.tokens.token_rank import token_ranks
from collapse_probe.outliers import outliers


def signs(rng, n):
    return np.diag(rng.choice([-1.0, 1.0], n))[rng.permutation(n)]


NUMBERS = {
    "effective": lambda x: token_ranks(x)["effective"],
    "stable": lambda x: token_ranks(x)["stable"],
    "effective centred": lambda x: token_ranks(x, centred=True)["effective"],
    "stable centred": lambda x: token_ranks(x, centred=True)["stable"],
    "residual": rank_residual,
    "composite residual": lambda x: rank_residual(x, composite=True),
    "frequency": frequency_ratio,
    "total frequency": lambda x: frequency_ratio(x, total=True),
    "complete energy": dirichlet_energy,
    "cross cosine": lambda x: cross_patch_cosine(x, x),
    "outlier share": lambda x: outliers(x.norm(dim=-1)).double().mean(-1),
}
BOUNDS = {
    "effective": lambda n, d: (1, min(n, d)),
    "stable": lambda n, d: (1, min(n, d)),
    "effective centred": lambda n, d: (1, min(n - 1, d)),
    "stable centred": lambda n, d: (1, min(n - 1, d)),
    "residual": lambda n, d: (0, 1),
    "composite residual": lambda n, d: (0, 2),
    "frequency": lambda n, d: (0, np.inf),
    "total frequency": lambda n, d: (0, 1),
    "complete energy": lambda n, d: (0, n / (n - 1)),
    "cross cosine": lambda n, d: (1 / n, 1),
    "outlier share": lambda n, d: (0, 0.5),
}

drawn = st.tuples(st.integers(0, 10**6), st.integers(3, 40), st.integers(2, 24), st.floats(0, 5))


def tokens(case):
    seed, n, d, shift = case
    rng = np.random.default_rng(seed)
    return rng, rng.normal(size=(2, n, d)) + shift * rng.normal(size=d)


def number(name, x):
    return NUMBERS[name](torch.as_tensor(np.ascontiguousarray(x))).numpy()


@pytest.mark.parametrize("name", NUMBERS)
@settings(deadline=None, max_examples=25)
@given(case=drawn)
def test_values_stay_within_their_bounds(name, case):
    _, x = tokens(case)
    low, high = BOUNDS[name](*x.shape[1:])
    found = number(name, x)
    assert ((found >= low - 1e-9) & (found <= high + 1e-9)).all()


@pytest.mark.parametrize("name", NUMBERS)
@settings(deadline=None, max_examples=25)
@given(case=drawn)
def test_the_order_of_tokens_does_not_matter(name, case):
    rng, x = tokens(case)
    assert number(name, x[:, rng.permutation(x.shape[1])]) == pytest.approx(number(name, x), rel=1e-7)


@pytest.mark.parametrize("name", NUMBERS)
@settings(deadline=None, max_examples=25)
@given(case=drawn, scale=st.floats(1e-3, 1e3))
def test_the_common_scale_of_tokens_does_not_matter(name, case, scale):
    _, x = tokens(case)
    assert number(name, scale * x) == pytest.approx(number(name, x), rel=1e-7)


@pytest.mark.parametrize("name", NUMBERS)
@settings(deadline=None, max_examples=25)
@given(case=drawn)
def test_rotations_of_the_width_do_not_matter(name, case):
    """The composite norm knows the axes, so that only their order and signs may change."""
    rng, x = tokens(case)
    d = x.shape[2]
    turn = signs(rng, d) if name.startswith("composite") else np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert number(name, x @ turn) == pytest.approx(number(name, x), rel=1e-6)


def test_the_composite_norm_does_know_the_axes():
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(1, 6, 5)))
    turn = torch.as_tensor(np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0])
    assert composite_norm(x @ turn).item() != pytest.approx(composite_norm(x).item(), rel=1e-3)
    assert composite_norm(3 * x).item() == pytest.approx(3 * composite_norm(x).item())  # squared without its root


@settings(deadline=None, max_examples=25)
@given(case=drawn)
def test_the_mean_is_the_best_constant_in_the_frobenius_norm(case):
    rng, x = tokens(case)
    x = torch.as_tensor(x)
    other = x.mean(1, keepdim=True) + 0.1 * torch.as_tensor(rng.normal(size=x.shape[2]))
    assert (frobenius_norm(x - x.mean(1, keepdim=True)) <= frobenius_norm(x - other)).all()


@settings(deadline=None, max_examples=25)
@given(case=drawn)
def test_positive_scaling_of_single_tokens_leaves_cosines_alone(case):
    rng, x = tokens(case)
    scaled = x * rng.uniform(0.5, 5, size=(*x.shape[:2], 1))
    assert number("cross cosine", scaled) == pytest.approx(number("cross cosine", x), rel=1e-9)


ENDS = {
    "effective": 1,
    "stable": 1,
    "residual": 0,
    "composite residual": 0,
    "frequency": 0,
    "total frequency": 0,
    "complete energy": 0,
    "cross cosine": 1,
    "outlier share": 0,
}


@pytest.mark.parametrize("n", [2, 17, 197, 600])
@pytest.mark.parametrize("name", ENDS)
def test_copies_of_one_token_reach_the_end(name, n):
    x = np.tile(np.random.default_rng(n).normal(size=(1, 1, 12)).astype(np.float32), (2, n, 1)).astype(np.float64)
    assert number(name, x) == pytest.approx(ENDS[name], abs=1e-9)


@pytest.mark.parametrize("name", ["effective centred", "stable centred"])
def test_copies_of_one_token_have_no_centred_rank(name):
    x = np.tile(np.random.default_rng(0).normal(size=(1, 1, 12)), (2, 50, 1))
    assert np.isnan(number(name, x + 1e-8 * np.random.default_rng(1).normal(size=x.shape))).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_orthogonal_tokens_have_full_rank_and_are_undone_by_their_mean(n):
    x = torch.eye(n, 6, dtype=torch.float64)[None] * 3
    assert token_ranks(x)["effective"].item() == pytest.approx(n)
    assert token_ranks(x)["stable"].item() == pytest.approx(n)
    assert rank_residual(x).item() == pytest.approx(np.sqrt(1 - 1 / n), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 49, 600])
def test_one_to_many_tokens_against_a_plain_singular_value_decomposition(n):
    x = np.random.default_rng(n).normal(size=(1, n, 32)) + 1
    values = np.linalg.svd(x[0], compute_uv=False)
    p = values / values.sum()
    assert number("effective", x)[0] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert number("stable", x)[0] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)


def test_tokens_whose_mean_is_zero_have_no_frequency_ratio():
    x = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert torch.isnan(frequency_ratio(x)).all()
    assert frequency_ratio(x, total=True).item() == 1
