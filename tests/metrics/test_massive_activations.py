"""Massive activations: a planted one is found where it is, scaling moves nothing, and all of it against slow NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import random_maps, readings, trace_of

from collapse_probe.metrics.tokens.massive_activations import excess_kurtosis, largest_activations

B, DEPTHS, N, D = 5, 3, 10, 8
NAMES = ["massive-activations", *(f"massive-activations@{v}" for v in ("top1", "top2", "top3", "median", "kurtosis", "share"))]


def tokens_of(seed=0):
    return np.random.default_rng(seed).normal(size=(B, DEPTHS, N, D)).astype(np.float32).astype(np.float64)


def read(tokens, names=NAMES, prefix=(0,)):
    return readings([trace_of(random_maps((len(tokens), DEPTHS - 1, 2, N, N)), tokens, prefix=prefix)], names)


def slow(x):
    sizes = np.sort(np.abs(x).ravel())[::-1]
    median = sizes[len(sizes) // 2]  # the lower one of the two in the middle
    kurtosis = []
    for token in x:
        apart = token - token.mean()
        kurtosis.append((apart**4).mean() / (apart**2).mean() ** 2 - 3)
    massive = float(sizes[0] > 100 and sizes[0] > 1000 * median)
    return [sizes[0] / median, *sizes[:3], median, np.mean(kurtosis), massive]


def test_every_number_against_the_slow_way():
    tokens = tokens_of()
    tokens[:2, 1, 3, 4] = 5000.0
    found = read(tokens)
    expected = np.array([[slow(x) for x in image] for image in tokens])
    for place, name in enumerate(NAMES):
        assert found[name].values == pytest.approx(expected[..., place].mean(0), rel=1e-6), name
        stderr = expected[..., place].std(0, ddof=1) / np.sqrt(B)
        assert found[name].stderr == pytest.approx(stderr, rel=1e-5, abs=1e-12), name
    assert found["massive-activations@share"].values.tolist() == [0.0, pytest.approx(0.4), 0.0]


@pytest.mark.parametrize(("token", "kind"), [(0, 0), (1, 1), (6, 2)])
def test_a_planted_activation_is_found_at_its_channel_and_its_kind_of_token(token, kind):
    tokens = tokens_of()
    tokens[:, 1, token, 5] = -300.0
    details = read(tokens, NAMES[:1], prefix=(0, 1))["massive-activations"].details
    assert (details["channel"][1], details["channel_share"][1]) == (5, 1.0)
    assert details["kind_share"][1].tolist() == [float(k == kind) for k in range(3)]
    assert details["kinds"][kind].startswith(("first prefix", "other prefix", "patches")[kind])


def test_the_share_of_images_counts_those_with_that_channel():
    tokens = tokens_of()
    tokens[:4, 0, 7, 2], tokens[4, 0, 0, 6] = 90.0, 90.0
    details = read(tokens, NAMES[:1])["massive-activations"].details
    assert (details["channel"][0], details["channel_share"][0]) == (2, 0.8)
    assert details["kind_share"][0].tolist() == [0.2, 0.0, 0.8]


def test_without_prefix_tokens_theirs_do_not_count():
    tokens = tokens_of()
    tokens[:, :, 0, 3] = 1000.0
    found = read(tokens, ["massive-activations", "massive-activations@patches"])
    assert (found["massive-activations"].values > 500).all()
    patches = found["massive-activations@patches"]
    assert patches.values == pytest.approx(np.array([[slow(x[1:])[0] for x in image] for image in tokens]).mean(0), rel=1e-6)
    assert patches.details["kind_share"].tolist() == [[0.0, 0.0, 1.0]] * DEPTHS


def test_scaling_the_stream_changes_no_ratio_and_no_place():
    one, other = (read(tokens_of() * scale, NAMES) for scale in (1.0, 1024.0))
    for name in ("massive-activations", "massive-activations@kurtosis"):
        assert one[name].values == pytest.approx(other[name].values, rel=1e-12)
    assert one[NAMES[0]].details["channel"] == other[NAMES[0]].details["channel"]
    assert other["massive-activations@top1"].values == pytest.approx(1024 * one["massive-activations@top1"].values, rel=1e-12)


def test_one_channel_that_outweighs_all_has_the_largest_kurtosis():
    tokens = torch.zeros(1, 3, 16)
    tokens[0, :, 2] = 7.0
    p = 1 / 16  # of a Bernoulli variable: 1/(p(1 − p)) − 6
    assert excess_kurtosis(tokens.double()).item() == pytest.approx(1 / (p * (1 - p)) - 6)
    normal = torch.randn(1, 50, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(excess_kurtosis(normal).item()) < 0.05
    assert excess_kurtosis(torch.ones(1, 2, 4)).isnan().all()


def test_tokens_that_are_all_zero_have_no_ratio():
    found, _, _ = largest_activations(torch.zeros(1, 4, 4))
    assert found["ratio"].isnan().all()
    assert found["top1"].item() == 0.0


def test_feature_similarity_without_the_largest_channels_sees_what_they_hide():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(B, DEPTHS, N, 40)).astype(np.float32).astype(np.float64)
    tokens[..., 7], tokens[..., 11] = 900.0, -700.0  # at every depth
    found = read(tokens, ["feature-similarity", "feature-similarity@without-massive"])
    assert found["feature-similarity"].values[0, 1] > 0.99
    kept, patches = [], tokens[:, :, 1:]
    for image in patches:
        peaks = np.max([np.abs(x).max(0) / np.sort(np.abs(x).ravel())[(x.size - 1) // 2] for x in image], 0)
        kept.append(np.delete(image, np.argsort(peaks)[-3:], -1))
    kept = np.array(kept)
    unit = kept / np.linalg.norm(kept, axis=-1, keepdims=True)
    slow = np.einsum("bltd,bmtd->lm", unit, unit) / (B * (N - 1))
    assert found["feature-similarity@without-massive"].values == pytest.approx(slow, abs=1e-6)
    assert abs(slow[0, 1]) < 0.2
