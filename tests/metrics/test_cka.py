"""HSIC and CKA against slow loops, worked values and a published implementation; one U-statistic over a sample by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from factories import random_maps, readings, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.cka import (
    alignment,
    hsic_unbiased,
    hsic_without_groups,
    linear_gram,
    u_centred,
)
from collapse_probe.metrics.sampled_images import SampledHSIC, sample_size
from collapse_probe.seeding import rank_of_name

i = np.arange(8)[:, None]
X = np.sin(0.5 + 1.7 * i + 0.6 * np.arange(3) + 0.9 * i * np.arange(3))
Y = np.cos(0.2 + 0.8 * i + 1.3 * np.arange(4) + 0.4 * i * np.arange(4))
j = np.arange(12)[:, None]
V = np.sin(0.3 + 1.1 * j + 0.7 * np.arange(5) + 0.6 * j * np.arange(5)) + 0.2 * j
W = np.cos(0.3 + 0.9 * j + 0.5 * np.arange(6) + 0.3 * j * np.arange(6)) + 0.1 * j


def t(array):
    return torch.as_tensor(np.asarray(array, dtype=np.float64))


def hsic_biased(gram_x, gram_y):
    """HSIC₀ = tr(KHLH)/(n−1)², H = I − 1/n 11ᵀ."""
    n = len(gram_x)
    h = torch.eye(n, dtype=gram_x.dtype) - 1 / n
    return torch.trace(gram_x @ h @ gram_y @ h) / (n - 1) ** 2


def linear_cka(x, y, biased=False):
    """Linear CKA of two sets of features of the same images (Kornblith et al., arXiv 1905.00414), from what the metric uses."""
    gram_x, gram_y = linear_gram(x), linear_gram(y)
    hsic = hsic_biased if biased else hsic_unbiased
    return alignment(hsic(gram_x, gram_y), hsic(gram_x, gram_x), hsic(gram_y, gram_y))


def slow_hsic(x, y):
    """HSIC₁ term by term from the published formula, diagonals zeroed."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    product = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return product / (n * (n - 3))


def by_quadruples(x, y):
    """HSIC₁ as the mean of its kernel over all ordered quadruples of different images (a U-statistic)."""
    k, m = x @ x.T, y @ y.T
    found = [k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in itertools.permutations(range(len(x)), 4)]
    return np.mean(found)


def slow_cka(x, y):
    """HSIC₁ term by term, then the division."""
    return slow_hsic(x, y) / np.sqrt(slow_hsic(x, x) * slow_hsic(y, y))


@pytest.mark.parametrize("n", [4, 5, 7])
def test_unbiased_hsic_is_the_published_formula_and_the_mean_over_quadruples(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 3)) + 2, rng.normal(size=(n, 5)) - 1
    found = hsic_unbiased(t(x @ x.T), t(y @ y.T)).item()
    assert found == pytest.approx(slow_hsic(x, y), abs=1e-9)
    assert found == pytest.approx(by_quadruples(x, y), abs=1e-9)


def test_unbiased_hsic_of_independent_features_averages_to_zero_and_the_biased_does_not():
    rng = np.random.default_rng(0)
    pairs = [(linear_gram(t(rng.normal(size=(5, 3)))), linear_gram(t(rng.normal(size=(5, 3))))) for _ in range(2000)]
    unbiased = np.array([hsic_unbiased(x, y).item() for x, y in pairs])
    biased = np.array([hsic_biased(x, y).item() for x, y in pairs])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / np.sqrt(len(pairs))
    assert (unbiased < 0).any()
    assert biased.mean() > 10 * biased.std() / np.sqrt(len(pairs))


def test_biased_hsic_with_the_centring_matrix_written_out():
    h = np.eye(8) - 1 / 8
    slow = np.trace(X @ X.T @ h @ Y @ Y.T @ h) / 49
    assert hsic_biased(t(X @ X.T), t(Y @ Y.T)).item() == pytest.approx(slow, abs=1e-12)


def test_worked_values():
    assert linear_cka(t(X), t(Y)).item() == pytest.approx(-0.0621234193, abs=1e-9)
    assert linear_cka(t(X), t(Y), biased=True).item() == pytest.approx(0.3543825589, abs=1e-9)


# Computed once with ckatorch 1.0.3 (PyPI; github.com/RistoAle97/centered-kernel-alignment), float64: cka_batch of the
# arrays as one minibatch, cka_base with and without unbiased=True.
@pytest.mark.parametrize(("x", "y", "published"), [(X, Y, -0.062123419324551704), (V, W, 0.4212946524166258)])
def test_unbiased_cka_is_that_of_ckatorch(x, y, published):
    assert linear_cka(t(x), t(y)).item() == pytest.approx(published, abs=1e-11)
    assert slow_cka(x, y) == pytest.approx(published, abs=1e-9)


def test_biased_cka_is_that_of_ckatorch():
    assert linear_cka(t(X), t(Y), biased=True).item() == pytest.approx(0.35438255891436343, abs=1e-11)
    assert linear_cka(t(V), t(W), biased=True).item() == pytest.approx(0.6072911723364522, abs=1e-11)


def test_unbiased_hsic_is_that_of_torch_cka():
    """Computed once with torch-cka 0.21 (PyPI; github.com/AntixK/PyTorch-Model-Compare), its _HSIC, in float64."""
    k, m = t(V @ V.T), t(W @ W.T)
    assert hsic_unbiased(k, m).item() == pytest.approx(1.3077632275066822, abs=1e-10)
    assert hsic_unbiased(k, k).item() == pytest.approx(5.566099270090355, abs=1e-10)
    assert hsic_unbiased(m, m).item() == pytest.approx(1.7311527984504054, abs=1e-10)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 30), scale=st.floats(1e-3, 1e3), biased=st.booleans())
def test_cka_knows_no_rotation_scale_shift_or_order(seed, n, scale, biased):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 7)), rng.normal(size=(n, 5))
    turn, _ = np.linalg.qr(rng.normal(size=(7, 7)))
    order = rng.permutation(n)
    plain = linear_cka(t(x), t(y), biased=biased).item()
    if np.isnan(plain) or abs(plain) > 5:  # a tiny own HSIC magnifies rounding
        return
    changed = linear_cka(t(scale * x[order] @ turn + 3), t(y[order]), biased=biased).item()
    assert changed == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("n", [4, 5, 40])
def test_features_agree_wholly_with_themselves_and_their_rotation(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 6))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    for biased in (False, True):
        assert linear_cka(t(x), t(x), biased=biased).item() == pytest.approx(1, abs=1e-12)
        assert linear_cka(t(x), t(x @ turn), biased=biased).item() == pytest.approx(1, abs=1e-9)


def test_a_large_common_part_costs_no_digits():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    assert linear_cka(t(x + 1e4), t(y - 1e4)).item() == pytest.approx(linear_cka(t(x), t(y)).item(), abs=1e-9)


def test_features_that_tell_no_images_apart_have_no_cka():
    same = t(np.ones((6, 3))) * 0.1 + 1e-9 * torch.rand(6, 3, dtype=torch.float64)
    assert linear_gram(same).abs().max() == 0
    assert torch.isnan(linear_cka(same, t(V[:6])))
    assert torch.isnan(linear_cka(t(np.zeros((6, 3))), t(V[:6])))
    assert torch.isnan(alignment(torch.tensor(0.1), torch.tensor(-1.0), torch.tensor(1.0)))


def test_fewer_than_four_images_are_refused_with_the_number():
    with pytest.raises(SettingError, match="4 images or more, not 3"):
        u_centred(torch.eye(3))


@pytest.mark.parametrize(("images", "groups"), [(4, 4), (5, 5), (12, 5), (37, 16)])
def test_all_pairs_at_once_and_without_each_group_are_the_pairs_one_by_one(images, groups):
    rng = np.random.default_rng(images)
    views = [rng.normal(size=(images, f)) + 2 for f in (3, 5, 40)]
    grams = [linear_gram(t(x)) for x in views]
    whole, without = hsic_without_groups(torch.stack(grams), groups)
    assert whole.numpy() == pytest.approx(np.array([[hsic_unbiased(a, b) for b in grams] for a in grams]), rel=1e-11)
    for g, found in enumerate(without):
        rest = [i for i in range(images) if i % groups != g]
        if len(rest) < 4:
            assert torch.isnan(found).all()
        else:
            slow = [[slow_hsic(a[rest], b[rest]) for b in views] for a in views]
            assert found.numpy() == pytest.approx(np.array(slow), rel=1e-9)


def names_of(images):
    return [f"class {i % 3}/image {i}" for i in range(images)]


def by_rank(names, most):
    """The places of the names of lowest rank, in that order."""
    return sorted(range(len(names)), key=lambda i: rank_of_name(names[i]))[:most]


def sampled(x, y, most=1024, names=None, batch=64):
    fold, names = SampledHSIC(2, most), names or names_of(len(x))
    for k in range(0, len(x), batch):
        fold.absorb(names[k : k + batch], [t(x[k : k + batch]).float(), t(y[k : k + batch]).float()])
    return fold


def noisy_pair(images, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 6))
    return x, x @ rng.normal(size=(6, 9)) + noise * rng.normal(size=(images, 9))


@pytest.mark.parametrize("images", [4, 6, 16, 31, 32, 70])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_one_statistic_over_all_images_or_over_those_of_lowest_rank(images, batch):
    x, y = noisy_pair(images, images)
    fold = sampled(x, y, most=32, batch=batch)
    values, _, _ = fold.cka()
    kept = by_rank(names_of(images), 32)
    assert fold.details() == {"images": min(images, 32), "of": images}
    assert values[0, 1] == pytest.approx(slow_cka(x[kept], y[kept]), abs=1e-5)
    assert values[1, 0] == values[0, 1]
    assert np.diag(values).tolist() == [1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.data())
def test_any_order_batches_and_parts_find_the_same_to_the_bit(images, data):
    x, y = (each.astype(np.float32) for each in noisy_pair(images))
    names, order = names_of(images), data.draw(st.permutations(range(images)))
    expected = sampled(x, y, most=20)
    parts, left = [SampledHSIC(2, 20)], list(order)
    while left:
        part = SampledHSIC(2, 20)
        batch = [left.pop() for _ in range(data.draw(st.integers(1, len(left))))]
        part.absorb([names[i] for i in batch], [t(x[batch]), t(y[batch])])
        if data.draw(st.booleans()):
            stored = SampledHSIC(2, 20)
            stored.load_state_dict(part.state_dict())
            part = stored
        parts.insert(data.draw(st.integers(0, len(parts))), part)
    while len(parts) > 1:
        parts[0].merge(parts.pop())
    for mine, other in zip(parts[0].cka(), expected.cka(), strict=True):
        np.testing.assert_array_equal(mine, other)
    for name, state in expected.state_dict().items():
        assert torch.equal(parts[0].state_dict()[name], state)


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    x, y = noisy_pair(6)
    fold = sampled(x, y)
    before = fold.state_dict()
    ranks, features = before["ranks"], before["features_0"]
    for changed in (
        {"ranks": ranks[:5]},
        {"ranks": ranks.flip(0)},
        {"features_0": features[:5]},
        {"features_0": features.double()},
        {"features_0": features[0]},
        {"seen": torch.zeros(2, dtype=torch.float64)},
        {"features_2": features},
    ):
        with pytest.raises(SettingError, match=r"expected|add like to like"):
            fold.load_state_dict({**before, **changed})
    with pytest.raises(SettingError, match="not 6 ranks"):
        SampledHSIC(2, 5).load_state_dict(before)
    with pytest.raises(SettingError, match="add like to like"):
        fold.merge(sampled(y, x))
    with pytest.raises(SettingError, match="add like to like"):
        fold.merge(SampledHSIC(3))
    assert all(torch.equal(before[name], state) for name, state in fold.state_dict().items())


def test_the_jackknife_leaves_out_one_group_of_images_at_a_time():
    x, y = noisy_pair(64, 1, noise=2.0)
    order = by_rank(names_of(64), 64)
    left_out = [slow_cka(x[rest], y[rest]) for g in range(16) if (rest := [i for k, i in enumerate(order) if k % 16 != g])]
    expected = np.sqrt(15 / 16 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    values, stderr, ci95 = sampled(x, y).cka()
    assert stderr[0, 1] == pytest.approx(expected, abs=1e-6)
    assert ci95[0, 1].mean() == pytest.approx(values[0, 1])
    assert stderr[0, 0] == 0


@pytest.mark.parametrize("images", [16, 40, 160])
def test_the_interval_covers_the_value_of_many_images(images):
    mix = np.random.default_rng(2).normal(size=(6, 9))
    rng = np.random.default_rng(images)

    def draw(count):
        x = rng.normal(size=(count, 6))
        return sampled(x, x @ mix + 2 * rng.normal(size=(count, 9)), most=6000).cka()

    truth = draw(4000)[0][0, 1]
    covered = [bool(low <= truth <= high) for low, high in (draw(images)[2][0, 1] for _ in range(200))]
    assert sum(covered) >= 176


def test_four_images_have_a_value_and_no_interval_and_three_have_neither():
    values, stderr, ci95 = sampled(X[:4], Y[:4]).cka()
    assert values[0, 1] == pytest.approx(slow_cka(X[:4], Y[:4]), abs=1e-5)
    assert np.isnan(stderr).all()
    assert np.isnan(ci95).all()
    few = sampled(X[:3], Y[:3])
    assert np.isnan(few.cka()[0]).all()
    assert sampled(X, Y).cka()[0][0, 1] == pytest.approx(-0.0621234193, abs=1e-6)


def test_as_many_images_are_kept_as_fit_in_the_budget():
    assert sample_size(2 * 49 * 64) == 1024
    assert sample_size(13 * 49 * 768) == 512 * 2**20 // (4 * 13 * 49 * 768) == 274
    assert sample_size(25 * 1369 * 1024) == 32


def depths_of(images, seed=0):
    return np.random.default_rng(seed).normal(size=(images, 3, 5, 6)).cumsum(1)


def test_layer_cka_against_the_slow_way_and_prefix_tokens_out():
    tokens = depths_of(21)
    trace = trace_of(random_maps((21, 2, 1, 5, 5)), tokens, prefix=(0,))
    for name, first in (("layer-cka", 1), ("layer-cka@all", 0)):
        found = readings([trace], [name])[name]
        flat = tokens[:, :, first:].reshape(21, 3, -1)
        slow = [[slow_cka(flat[:, a], flat[:, b]) for b in range(3)] for a in range(3)]
        assert found.values == pytest.approx(np.array(slow), abs=1e-5)
        assert (found.details["images"], found.details["of"]) == (21, 21)


def test_layer_cka_compares_depths_of_any_shape_and_skips_missing_ones():
    trace = trace_of(random_maps((8, 2, 1, 5, 5)), depths_of(8), prefix=(0,))
    other = torch.as_tensor(np.random.default_rng(3).normal(size=(8, 3, 11)))
    plan = trace.plan
    trace = type(trace)(plan, 8, (trace.tokens[0], None, other), trace.attention, None)
    found = readings([trace], ["layer-cka"])["layer-cka"].values
    assert np.isfinite(found).tolist() == [[True, False, True], [False, False, False], [True, False, True]]


def test_three_images_are_refused_by_layer_cka():
    trace = trace_of(random_maps((3, 2, 1, 5, 5)), depths_of(3), prefix=(0,))
    assert readings([trace], ["layer-cka"])["layer-cka"].not_applicable == "unbiased CKA needs four images or more"
