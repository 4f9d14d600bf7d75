"""Ranks over images: streamed sums against the stacked matrix, published code's values, guards, and what LiDAR needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import random_maps, readings, trace_of

from collapse_probe.errors import SettingError
from collapse_probe.metrics.functional.embeddings import decay_exponent, lidar, rankme, spectrum
from collapse_probe.metrics.functional.spectra import effective_rank
from collapse_probe.metrics.metric import make
from collapse_probe.metrics.nulls import with_twins
from collapse_probe.metrics.tokens import embedding_rank
from collapse_probe.registry import METRICS

DEPTHS, N, D = 3, 10, 8
NAME = "embedding-rank"


def tokens_of(images, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.arange(1, D + 1) ** -0.7
    tokens = rng.normal(size=(images, DEPTHS, 1, D)) * scales + 0.1 * rng.normal(size=(images, DEPTHS, N, D)) + 0.5
    return tokens.astype(np.float32).astype(np.float64)


def traces(tokens, prefix=(0,), batch=16):
    parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    return [trace_of(random_maps((len(part), DEPTHS - 1, 2, N, N)), part, prefix=prefix) for part in parts]


def read(tokens, *names, **facts):
    return readings(traces(tokens, **facts), names or [NAME])


def slow_rankme(x, epsilon=1e-7):
    singular = np.linalg.svd(x, compute_uv=False)
    shares = singular / singular.sum() + epsilon
    return np.exp(-(shares * np.log(shares)).sum())


def slow_alpha(x, first=4, last=100):
    centred = x - x.mean(0)
    eigenvalues = np.sort(np.linalg.eigvalsh(centred.T @ centred))[::-1]
    ranks = np.arange(first, min(last, len(eigenvalues)) + 1)
    return -np.polyfit(np.log(ranks), np.log(eigenvalues[ranks - 1]), 1, w=np.sqrt(1 / ranks))[0]


def test_streamed_sums_give_the_numbers_of_the_stacked_matrix():
    tokens = tokens_of(150)
    found = read(tokens, NAME, f"{NAME}@cls", f"{NAME}@centred", f"{NAME}@alpha")
    patches, cls = tokens[:, :, 1:].mean(2), tokens[:, :, 0]
    by_name = {
        NAME: [slow_rankme(patches[:, d]) for d in range(DEPTHS)],
        f"{NAME}@cls": [slow_rankme(cls[:, d]) for d in range(DEPTHS)],
        f"{NAME}@centred": [slow_rankme(patches[:, d] - patches[:, d].mean(0)) for d in range(DEPTHS)],
        f"{NAME}@alpha": [slow_alpha(patches[:, d]) for d in range(DEPTHS)],
    }
    for name, slow in by_name.items():
        assert found[name].values == pytest.approx(slow, rel=1e-9), name
        assert (found[name].ci95[:, 0] < found[name].values).all()
        assert found[name].covers == ""


def test_without_epsilon_it_is_the_effective_rank_of_the_stacked_matrix():
    tokens = tokens_of(60)
    metric = METRICS[NAME](traces(tokens)[0].plan, epsilon=0.0)
    ((_, build),) = metric.accumulators()
    sums = build()
    for number, trace in enumerate(traces(tokens)):
        sums.start_batch(trace, [f"image {16 * number + i}" for i in range(trace.images)])
        sums.end_batch(trace)
    stacked = torch.as_tensor(tokens[:, :, 1:].mean(2)).transpose(0, 1)
    assert metric.compute([sums], []).values == pytest.approx(effective_rank(stacked).numpy(), rel=1e-9)


def test_the_jackknife_leaves_out_groups_of_images(monkeypatch):
    tokens = tokens_of(40)
    with_groups = read(tokens)[NAME]
    monkeypatch.setattr(embedding_rank, "GROUP_BYTES", 1)
    without = read(tokens)[NAME]
    assert without.values == pytest.approx(with_groups.values, rel=1e-12)
    assert np.isfinite(with_groups.stderr).all()
    assert np.isnan(without.ci95).all()
    assert "jackknife" in without.details["intervals"]
    assert "intervals" not in with_groups.details


def test_the_standard_error_is_about_what_other_samples_show():
    found = [read(tokens_of(200, seed))[NAME] for seed in range(30)]
    spread = np.std([each.values for each in found], axis=0, ddof=1)
    assert np.mean([each.stderr for each in found], axis=0) / spread == pytest.approx(np.ones(DEPTHS), abs=0.4)


def test_few_images_bound_the_rank_and_the_page_says_so():
    found = read(tokens_of(5))[NAME]
    assert found.covers == "of 5 images for 8 channels or more: the rank can be at most 5"
    assert found.details["most"].tolist() == [5.0] * DEPTHS
    assert (found.values <= 5 + 1e-5).all()
    assert read(tokens_of(1))[NAME].not_applicable == "a rank over images needs two images or more"


def test_images_with_one_embedding_have_rank_one_and_no_spread():
    tokens = np.repeat(tokens_of(1), 20, axis=0)
    found = read(tokens, NAME, f"{NAME}@centred", f"{NAME}@alpha")
    assert found[NAME].values == pytest.approx(np.ones(DEPTHS), abs=1e-4)
    assert np.isnan(found[f"{NAME}@centred"].values).all()
    assert np.isnan(found[f"{NAME}@alpha"].values).all()


def test_scale_and_rotation_change_nothing():
    tokens, turn = tokens_of(80), np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    one, other = (read(x, NAME, f"{NAME}@alpha") for x in (tokens, 1000 * tokens @ turn))
    for name, result in one.items():
        assert other[name].values == pytest.approx(result.values, rel=1e-4)


def test_a_power_law_gives_back_its_exponent():
    eigenvalues = 3.0 * torch.arange(1, 201, dtype=torch.float64) ** -1.2
    assert decay_exponent(eigenvalues).item() == pytest.approx(1.2, abs=1e-12)
    assert decay_exponent(eigenvalues[:7]).isnan()
    assert decay_exponent(eigenvalues[:8]).isfinite()
    assert decay_exponent(torch.cat([eigenvalues[:20], torch.zeros(9)])).item() == pytest.approx(1.2, abs=1e-12)


i, j = np.ogrid[:40, :6]
EMBEDDINGS = np.sin(1 + 0.37 * i + 0.9 * j + 0.11 * i * j) * (j + 1.0) ** -1.0
"""Values of published code on these: rbalestr-lab/stable-pretraining at 9aa93f8, callbacks/rankme.py (ε = 1e-5) and
callbacks/lidar.py (`_compute_lidar`, n_classes=10, samples_per_class=4) in float64; kumarkrishna/fastssl at 96dfa37,
fastssl/utils/powerlaw.py, stringer_get_powerlaw(get_eigenspectrum(EMBEDDINGS), np.arange(0, 6))."""
OFFICIAL = {"rankme": 4.341134151264337, "lidar": 3.2809082005987142, "alpha": 2.61345755367113}


def test_published_code_on_the_same_embeddings():
    x = torch.as_tensor(EMBEDDINGS)
    assert rankme(torch.linalg.svdvals(x), 1e-5).item() == pytest.approx(OFFICIAL["rankme"], rel=1e-9)
    assert lidar(x.view(10, 4, 6)).item() == pytest.approx(OFFICIAL["lidar"], rel=1e-6)
    centred = x - x.mean(0)
    assert decay_exponent(spectrum(centred.mT @ centred, 39), 1, 6).item() == pytest.approx(OFFICIAL["alpha"], rel=1e-6)


def test_lidar_of_views_that_do_not_differ_is_bounded_by_the_images():
    means = torch.eye(5, dtype=torch.float64)
    assert lidar(means[:, None].expand(5, 3, 5)).item() == pytest.approx(4.0, abs=1e-3)
    assert lidar(means[:1, None].expand(1, 3, 5)).isnan()
    assert lidar(means[:, None]).isnan()


def test_lidar_says_what_it_needs_and_the_class_token_that_it_is_missing():
    plan = traces(tokens_of(4), prefix=())[0].plan
    assert "several augmented views of each image" in make(f"{NAME}@lidar", plan).inapplicable()
    assert make(f"{NAME}@cls", plan).inapplicable() == "the model has no class token among its tokens"
    assert make(NAME, plan).inapplicable() == ""


def test_an_untrained_copy_of_fewer_images_is_not_set_beside_it():
    many, few = read(tokens_of(40))[NAME], read(tokens_of(16))[NAME]
    assert with_twins(many, {1: few}, 16).nulls.values["untrained"] is None
    assert "saw 16 images, these are of 40" in with_twins(many, {1: few}, 16).nulls.reasons["untrained"]
    same = with_twins(many, {1: replace(many, values=many.values + 1)}, 40)
    assert same.nulls.values["untrained"] == pytest.approx(many.values + 1)


@pytest.mark.parametrize("settings", [{"epsilon": -1.0}, {"first": 0}, {"first": 9, "last": 9}, {"token": "mean"}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(SettingError):
        METRICS[NAME](traces(tokens_of(4))[0].plan, **settings)
