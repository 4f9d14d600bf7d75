"""Simulated coverage of intervals and errors of tests (docs/intervals.md), with fewer draws; fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import (
    MODELS,
    left_tails,
    made_up,
    measured,
    null_of,
    of_answers,
    of_comparisons,
    of_headline,
    of_kappa,
    of_means,
    of_tests,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME, NULL = "attention-similarity", "attention-similarity/other_token"
DRAWS = 300


@pytest.fixture(scope="module")
def tables():
    return {model: measured(model) for model in MODELS}


@pytest.fixture(scope="module")
def pairs(tables):
    return {model: (table[NAME], table[NULL]) for model, table in tables.items()}


@pytest.mark.parametrize(("images", "worst"), [(3, 0.8), (5, 0.8), (8, 0.8), (16, 0.8), (32, 0.9), (64, 0.9)])
@pytest.mark.parametrize("model", MODELS)
def test_the_interval_of_kappa_covers_the_bundled_models(pairs, model, images, worst):
    found = of_kappa(*pairs[model], images, DRAWS)
    assert found["covered"] >= 0.93
    assert found["worst"] >= worst
    assert found["covered"] >= found["before"] - 0.005


@pytest.mark.parametrize("images", [16, 32, 64])
@pytest.mark.parametrize("model", MODELS)
def test_from_16_images_no_pair_is_put_on_the_wrong_side(pairs, model, images):
    found = of_kappa(*pairs[model], images, DRAWS)
    assert found["false_high"] <= 0.01
    assert found["false_low"] <= 0.01
    assert found["open"] <= 0.05


@pytest.mark.parametrize("images", [16, 64])
@pytest.mark.parametrize("population", ["lognormal, spread 0.5", "lognormal, spread 1", "Student's t, 3 degrees"])
def test_the_interval_of_kappa_covers_skewed_and_heavy_tailed_rooms(population, images):
    found = of_kappa(*made_up()[population], images, DRAWS)
    assert found["covered"] >= 0.93
    assert found["worst"] >= 0.9
    assert max(found["false_high"], found["false_low"]) <= (0.08 if images < 64 else 0.05)


@pytest.mark.parametrize("images", [16, 32])
@pytest.mark.parametrize("model", MODELS)
def test_the_interval_of_the_headline_kappa_covers(pairs, model, images):
    found = of_headline(*pairs[model], images, DRAWS)
    assert found["covered"] >= 0.9
    assert found["none"] <= 0.05


@pytest.mark.parametrize("metric", [NAME, "attention-entropy", "patch-diversity"])
@pytest.mark.parametrize("model", MODELS)
def test_plain_means_are_covered_from_3_images_on(tables, model, metric):
    values = tables[model][metric]
    values = values[:, values.std(0) > 1e-6]
    for images in (3, 8, 16, 64):
        found = of_means(values, images, DRAWS)
        assert found["covered"] >= (0.9 if images < 8 else 0.93), images
        assert found["covered"] >= found["before"], images


@pytest.mark.parametrize("images", [16, 64, 200])
@pytest.mark.parametrize("model", MODELS)
def test_the_test_of_pairs_holds_its_level_on_the_bundled_models(pairs, model, images):
    found = of_tests(null_of(*pairs[model]), images, DRAWS)
    assert found["p"] <= 0.065
    assert found["any_q"] <= (0.16 if images < 64 else 0.1)


def test_the_test_of_pairs_errs_less_on_left_tails_than_sign_flips():
    for name, differences in left_tails().items():
        for images, most in ((16, 0.3), (64, 0.15), (200, 0.12)):
            found = of_tests(differences, images, DRAWS)
            assert found["any_q"] <= most, (name, images)
            if name.startswith("minus"):
                assert found["any_q"] < found["flips"], (name, images)


@pytest.mark.parametrize("images", [3, 5, 8, 16, 32])
def test_differences_of_two_models_are_covered(tables, images):
    found = of_comparisons(tables[MODELS[0]], tables[MODELS[2]], images, DRAWS)
    for kind in ("similarity", "entropy", "kappa"):
        assert found[kind][0] >= 0.9, kind


@pytest.mark.parametrize("images", [3, 5, 8, 20, 50])
def test_differences_of_accuracy_are_covered(images):
    found = of_answers(images)
    assert found["covered"] >= 0.95
    assert found["worst"] >= 0.92
    assert found["p"] <= 0.08


def test_normal_paired_differences_are_covered_with_three_images_and_more():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50_000, 20))
    for images in (2, 3, 5, 8, 16, 32):
        assert of_means(values, images, DRAWS)["covered"] >= 0.94, images
