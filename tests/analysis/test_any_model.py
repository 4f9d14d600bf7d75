"""The intervals, simulated: 95 % of them contain the truth, give or take what 500 draws can tell."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from factories import readings, trace_of
from scipy import stats

from collapse_probe.metrics.attention.similarity_ratio import Choice, sensitivity
from collapse_probe.metrics.sampled_images import SampledHSIC
from collapse_probe.statistics.breakdowns import classes_of
from collapse_probe.statistics.estimates import PerImageValues, kappa_of, mean_of
from collapse_probe.statistics.intervals import (
    count_bounds,
    count_difference_bounds,
    interval,
    mean_parts,
    parts_interval,
    quotient_bounds,
)
from collapse_probe.statistics.kappa import PairMoments, kappa, kappa_interval

DRAWS = 500
LEAST, MOST = 0.92, 0.98
PAIRS = 6


def share(contains):
    """The share of seeded draws whose interval contains the truth."""
    return np.mean([contains(np.random.default_rng([7, draw])) for draw in range(DRAWS)])


def similarities(generator, images):
    """Real and wrong-token similarities [images, pairs] that share an image effect, skewed and correlated; and their means."""
    effect = generator.gamma(4.0, 0.25, (images, 1)) - 1.0
    own = generator.normal(size=(2, images, PAIRS))
    real_mean, null_mean = np.linspace(0.6, 0.9, PAIRS), np.linspace(0.4, 0.8, PAIRS)
    return real_mean + 0.03 * effect + 0.02 * own[0], null_mean + 0.02 * effect + 0.02 * own[1], real_mean, null_mean


def within(bounds, truth):
    return bounds[0] <= truth <= bounds[1]


def test_the_interval_of_a_headline_mean_contains_the_truth():
    def contains(generator):
        real, _, truth, _ = similarities(generator, 40)
        return within(mean_of(real).ci95, truth.mean())

    assert LEAST <= share(contains) <= MOST


def test_the_interval_of_a_headline_kappa_contains_the_truth():
    def contains(generator):
        real, null, r, t = similarities(generator, 60)
        return within(kappa_of(real, null).ci95, kappa(r, t).mean())

    assert LEAST <= share(contains) <= MOST


def test_the_interval_of_kappa_of_a_pair_contains_the_truth():
    def contains(generator):
        real, null, r, t = similarities(generator, 60)
        return within(kappa_interval(PairMoments.of(real, null))[0], kappa(r, t)[0])

    assert LEAST <= share(contains) <= MOST


def side(values):
    numbers = mean_parts(values)
    return numbers, partial(parts_interval, numbers)


NEAR = 0.9 + 0.02 / np.sqrt(40) * np.array([0.5] * 11)
"""Eleven pairs half a standard error above the threshold: the worst case for a bootstrap of the count."""


@pytest.mark.parametrize("common", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("truth", [NEAR, np.linspace(0.88, 0.92, 11)], ids=["all near the threshold", "spread around it"])
def test_the_interval_of_the_count_of_similar_blocks_contains_the_truth(truth, common):
    def contains(generator):
        own, effect = generator.normal(size=(40, len(truth))), generator.normal(size=(40, 1))
        (means, *_), bounds = side(truth + 0.02 * (np.sqrt(1 - common) * own + np.sqrt(common) * effect))
        return within(count_bounds(means, bounds, 0.9), (truth > 0.9).sum())

    assert share(contains) >= LEAST  # whole numbers that are seldom near the threshold are covered more often


@pytest.mark.parametrize("common", [0.0, 0.95])
@pytest.mark.parametrize(
    ("first", "second"),
    [(NEAR, NEAR), (NEAR, 1.8 - NEAR), (np.linspace(0.88, 0.92, 11), np.linspace(0.885, 0.93, 11))],
    ids=["all above the threshold by little", "on either side of it", "spread around it"],
)
def test_the_interval_of_the_difference_of_two_counts_contains_the_truth(first, second, common):
    truth = int((second > 0.9).sum() - (first > 0.9).sum())

    def contains(generator):
        own, shared = generator.normal(size=(2, 40, len(first))), generator.normal(size=(40, len(first)))
        noise = 0.02 * (np.sqrt(1 - common) * own + np.sqrt(common) * shared)
        return within(count_difference_bounds(side(first + noise[0]), side(second + noise[1]), 0.9), truth)

    assert share(contains) >= LEAST


def test_the_interval_of_a_quotient_of_two_means_contains_the_truth():
    def contains(generator):
        first, second = 1.2 + 0.8 * generator.normal(size=60), 2.0 + 1.5 * generator.normal(size=30)
        reach = [(ends[1] - ends[0]) / 2 for ends in (interval(x.mean(), stats.sem(x), len(x)) for x in (first, second))]
        return within(quotient_bounds(first.mean(), reach[0], second.mean(), reach[1]), 0.6)

    assert LEAST <= share(contains) <= MOST


RATIOS = np.array([0.9] * 3 + [0.905] * 4 + [0.6, 0.99])
"""Shares of vectors at and just above the threshold: 5 of 9 blocks are similar."""


def test_the_interval_of_the_count_of_similarity_ratios_contains_the_truth():
    def contains(generator):
        ratios = generator.binomial(200, RATIOS, size=(40, len(RATIOS))) / 200
        (means, *_), bounds = side(ratios)
        (row,) = sensitivity(means[None], lambda tail: bounds(tail)[None], [Choice()])
        return within(row["ci95"], (RATIOS > 0.9).sum())

    assert share(contains) >= LEAST


def test_the_intervals_of_classes_contain_their_truths():
    truths = np.array([0.3, 0.5, 0.8])
    labels = {str(i): i % 3 for i in range(90)}
    names = tuple(labels)

    def contains(generator):
        values = truths[np.arange(90) % 3] + 0.1 * (generator.gamma(4.0, 0.25, 90) - 1)
        kept = PerImageValues(names, {"patch-diversity": np.stack([values * 0, values], 1)})
        found = classes_of(kept, labels)["numbers"]["patch_diversity_last"]
        return np.mean([within(ends, t) for *ends, t in zip(found["ci_low"], found["ci_high"], truths, strict=True)])

    assert LEAST <= share(contains) <= MOST


def maps_of(generator, images, tokens=5):
    """Softmax maps [images, 1 block, 1 head, N, N] around one base map."""
    base = np.sin(np.arange(tokens * tokens)).reshape(tokens, tokens)
    logits = base + 0.8 * generator.normal(size=(images, 1, 1, tokens, tokens))
    raised = np.exp(logits)
    return raised / raised.sum(-1, keepdims=True)


@pytest.mark.slow
def test_the_interval_of_image_similarity_contains_the_truth():
    many = maps_of(np.random.default_rng(0), 400_000)
    directions = many / np.linalg.norm(many, axis=-2, keepdims=True)
    truth = float(np.square(directions.mean(0)).sum(-2).mean())
    names = [f"image {i}" for i in range(96)]

    def contains(generator):
        trace = trace_of(torch.tensor(maps_of(generator, 96)))
        found = readings([trace], ["image-similarity"], image_names=names)["image-similarity"]
        return within(found.ci95[0], truth)

    assert LEAST <= share(contains) <= MOST


@pytest.mark.slow
def test_the_interval_of_the_distance_from_the_image_mean_contains_the_truth():
    many = maps_of(np.random.default_rng(0), 400_000)
    truth = float(np.sqrt(np.square(many - many.mean(0)).sum() / np.square(many).sum()))
    names = [f"image {i}" for i in range(96)]

    def contains(generator):
        trace = trace_of(torch.tensor(maps_of(generator, 96)))
        found = readings([trace], ["distance-from-image-mean"], image_names=names)["distance-from-image-mean"]
        return within(found.ci95[0, 0], truth)

    assert LEAST <= share(contains) <= MOST


@pytest.mark.slow
def test_the_interval_of_cka_contains_the_truth():
    mixed = np.random.default_rng(3).normal(size=(4, 11)) * np.array([[2.0], [1.0], [0.7], [0.5]])
    first, second = mixed[:, :6], mixed[:, 6:]
    squares = [
        np.square(m).sum() for m in (first.T @ second, first.T @ first + 0.25 * np.eye(6), second.T @ second + np.eye(5))
    ]
    truth = squares[0] / np.sqrt(squares[1] * squares[2])
    names = [f"image {i}" for i in range(256)]

    def contains(generator):
        latent = generator.normal(size=(256, 4))
        x = latent @ first + 0.5 * generator.normal(size=(256, 6))
        y = latent @ second + generator.normal(size=(256, 5))
        fold = SampledHSIC(2)
        fold.absorb(names, [torch.tensor(x), torch.tensor(y)])
        _, _, ci95 = fold.cka()
        return within(ci95[0, 1], truth)

    assert LEAST <= share(contains) <= MOST
