"""HSIC and CKA against slow loops, worked values and a published implementation; minibatches whatever the batches."""

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
    linear_gram,
    pairwise_hsic,
    u_centred,
)
from collapse_probe.metrics.minibatch_cka import MINIBATCH, SMALL_MINIBATCH, STRIDE, MinibatchHSIC, minibatch_for

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


def minibatch_cka(minibatches):
    """HSIC₁ is averaged over minibatches before the division (Nguyen et al., arXiv 2010.15327, Eq. 4)."""
    hsic = torch.stack([pairwise_hsic([linear_gram(x), linear_gram(y)]) for x, y in minibatches]).mean(0)
    return alignment(hsic[0, 1], hsic[0, 0], hsic[1, 1])


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


def slow_cka(minibatches):
    """Averages first, a minibatch of n images weighing n, then the division."""
    each = np.array([[slow_hsic(x, y), slow_hsic(x, x), slow_hsic(y, y)] for x, y in minibatches])
    found = np.average(each, axis=0, weights=[len(x) for x, _ in minibatches])
    return found[0] / np.sqrt(found[1] * found[2])


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
    assert minibatch_cka([(t(X[:4]), t(Y[:4])), (t(X[4:]), t(Y[4:]))]).item() == pytest.approx(-0.5855223101, abs=1e-9)


# Computed once with ckatorch 1.0.3 (PyPI; github.com/RistoAle97/centered-kernel-alignment), float64: cka_batch of the
# arrays reshaped to minibatches, cka_base with and without unbiased=True.
@pytest.mark.parametrize(
    ("x", "y", "size", "published"),
    [
        (X, Y, 8, -0.062123419324551704),
        (X, Y, 4, -0.5855223100612168),
        (V, W, 4, 0.38908753287164094),
        (V, W, 6, 0.2342705630623534),
        (V, W, 12, 0.4212946524166258),
    ],
)
def test_minibatch_cka_is_that_of_ckatorch(x, y, size, published):
    minibatches = [(t(x[k : k + size]), t(y[k : k + size])) for k in range(0, len(x), size)]
    assert minibatch_cka(minibatches).item() == pytest.approx(published, abs=1e-11)
    assert slow_cka([(p.numpy(), q.numpy()) for p, q in minibatches]) == pytest.approx(published, abs=1e-9)


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
    with pytest.raises(SettingError, match="4 images or more in a minibatch, not 3"):
        u_centred(torch.eye(3))


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    grams = [linear_gram(t(x)) for x in (X, Y, X @ X.T)]
    slow = [[hsic_unbiased(a, b).item() for b in grams] for a in grams]
    assert pairwise_hsic(grams).numpy() == pytest.approx(np.array(slow), abs=1e-12)


def documented_minibatches(images, size, stride=STRIDE):
    """The rule in words: remainders by the stride fill their own minibatches; the rest is shared out in order."""
    filled, left = [], []
    for remainder in range(stride):
        mine = list(range(remainder, images, stride))
        whole = len(mine) // size * size
        filled += [mine[k : k + size] for k in range(0, whole, size)]
        left += mine[whole:]
    left.sort()
    shares = np.array_split(np.array(left, dtype=int), max(1, len(left) // size)) if len(left) >= 4 else []
    return [*filled, *(share.tolist() for share in shares)]


@pytest.mark.parametrize("images", [4, 6, 16, 23, 50, 64, 70, 131])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_minibatches_are_those_of_the_rule_whatever_the_batch(images, batch):
    rng = np.random.default_rng(images)
    x = rng.normal(size=(images, 6))
    y = x @ rng.normal(size=(6, 9)) + rng.normal(size=(images, 9))
    fold = MinibatchHSIC(2)
    for k in range(0, images, batch):
        fold.absorb([t(x[k : k + batch]).float(), t(y[k : k + batch]).float()])
    groups = documented_minibatches(images, MINIBATCH)
    values, _, _, count = fold.cka()
    assert count == len(groups)
    assert values[0, 1] == pytest.approx(slow_cka([(x[g], y[g]) for g in groups]), abs=1e-5)
    assert values[1, 0] == values[0, 1]
    assert np.diag(values).tolist() == [1, 1]


def from_processes(world, x, y, monkeypatch):
    """What `world` processes find together, process r having the images r, r + world, …."""
    folds = []
    for rank in range(world):
        monkeypatch.setattr("collapse_probe.metrics.minibatch_cka.rank_and_world", lambda rank=rank: (rank, world))
        folds.append(MinibatchHSIC(2))
        folds[-1].absorb([t(x[rank::world]), t(y[rank::world])])
    monkeypatch.undo()
    joined = MinibatchHSIC(2)
    for fold in reversed(folds):
        joined.merge(fold)
    return joined.cka()


def noisy_pair(images, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 6))
    return x, x @ rng.normal(size=(6, 9)) + noise * rng.normal(size=(images, 9))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_that_share_the_stride_find_the_same_minibatches(world, monkeypatch):
    x, y = noisy_pair(150)
    one = MinibatchHSIC(2)
    one.absorb([t(x), t(y)])
    for mine, other in zip(one.cka()[:3], from_processes(world, x, y, monkeypatch)[:3], strict=True):
        assert other == pytest.approx(mine, abs=1e-12)


@pytest.mark.parametrize(("world", "remainders"), [(3, 12), (5, 20), (6, 12), (8, 8)])
def test_other_processes_group_by_the_least_common_multiple(world, remainders, monkeypatch):
    x, y = noisy_pair(500)
    groups = documented_minibatches(500, MINIBATCH, remainders)
    values, _, _, count = from_processes(world, x, y, monkeypatch)
    assert count == len(groups)
    assert values[0, 1] == pytest.approx(slow_cka([(x[g], y[g]) for g in groups]), abs=1e-5)


def test_three_processes_find_another_estimate_within_the_interval_of_one(monkeypatch):
    within = []
    for seed in range(60):
        x, y = noisy_pair(150, seed)
        one = MinibatchHSIC(2)
        one.absorb([t(x), t(y)])
        low, high = one.cka()[2][0, 1]
        within.append(low <= from_processes(3, x, y, monkeypatch)[0][0, 1] <= high)
    assert np.mean(within) >= 0.95


def test_the_jackknife_leaves_out_one_group_of_minibatches_at_a_time():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 6))
    y = x @ rng.normal(size=(6, 9)) + 2 * rng.normal(size=(64, 9))
    fold = MinibatchHSIC(2)
    fold.absorb([t(x), t(y)])
    groups = documented_minibatches(64, MINIBATCH)
    assert len(groups) == 4
    left_out = [slow_cka([(x[g], y[g]) for k, g in enumerate(groups) if k != out]) for out in range(4)]
    expected = np.sqrt(3 / 4 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    values, stderr, ci95, _ = fold.cka()
    assert stderr[0, 1] == pytest.approx(expected, abs=1e-6)
    assert ci95[0, 1].mean() == pytest.approx(values[0, 1])
    assert stderr[0, 0] == 0


def test_the_interval_covers_the_value_of_many_images():
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(6, 9))

    def draw(images):
        x = rng.normal(size=(images, 6))
        fold = MinibatchHSIC(2)
        fold.absorb([t(x), t(x @ mix + 2 * rng.normal(size=(images, 9)))])
        return fold.cka()

    truth = draw(6000)[0][0, 1]
    covered = [bool(low <= truth <= high) for low, high in (draw(160)[2][0, 1] for _ in range(100))]
    assert sum(covered) >= 86


def test_one_minibatch_has_a_value_and_no_interval_and_three_images_have_neither():
    fold = MinibatchHSIC(2)
    fold.absorb([t(X), t(Y)])
    values, stderr, ci95, count = fold.cka()
    assert count == 1
    assert values[0, 1] == pytest.approx(-0.0621234193, abs=1e-6)
    assert np.isnan(stderr).all()
    assert np.isnan(ci95).all()
    few = MinibatchHSIC(2)
    few.absorb([t(X[:3]), t(Y[:3])])
    assert few.cka()[3] == 0
    assert np.isnan(few.cka()[0]).all()


def test_minibatches_shrink_where_the_kept_images_would_outgrow_memory():
    assert minibatch_for(13 * 49 * 768) == MINIBATCH
    assert minibatch_for(25 * 1369 * 1024) == SMALL_MINIBATCH


def depths_of(images, seed=0):
    return np.random.default_rng(seed).normal(size=(images, 3, 5, 6)).cumsum(1)


def test_layer_cka_against_the_slow_way_and_prefix_tokens_out():
    tokens = depths_of(21)
    trace = trace_of(random_maps((21, 2, 1, 5, 5)), tokens, prefix=(0,))
    for name, first in (("layer-cka", 1), ("layer-cka@all", 0)):
        found = readings([trace], [name])[name]
        flat = tokens[:, :, first:].reshape(21, 3, -1)
        groups = documented_minibatches(21, MINIBATCH)
        slow = [[slow_cka([(flat[g, a], flat[g, b]) for g in groups]) for b in range(3)] for a in range(3)]
        assert found.values == pytest.approx(np.array(slow), abs=1e-5)
        assert found.details["minibatch"] == MINIBATCH
        assert found.details["minibatches"] == len(groups) == 1


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
