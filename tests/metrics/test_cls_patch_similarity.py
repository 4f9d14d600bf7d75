"""The class token against the patches: a slow reference, its chance level over pairs of images, and cases made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from factories import random_maps, readings, small_vit, trace_of

from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.trace import Trace
from collapse_probe.metrics.accumulators import GROUPS, group_of
from collapse_probe.metrics.metric import make
from collapse_probe.statistics.intervals import jackknife

NAME = "cls-patch-similarity"
B, DEPTHS, N, D = 6, 3, 10, 8


def tokens_of(images=B, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(images, DEPTHS, N, D)) + rng.normal(size=D)
    return tokens.astype(np.float32).astype(np.float64)


def trace_with(tokens, prefix=(0,)):
    return trace_of(random_maps((len(tokens), tokens.shape[1] - 1, 2, N, N)), tokens, prefix=prefix)


def read(tokens, prefix=(0,), names=None):
    return readings([trace_with(tokens, prefix)], [NAME], image_names=names)[NAME]


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def across(tokens, images):
    pairs = [(a, b) for a, b in itertools.permutations(images, 2)]
    return [np.mean([cosine(tokens[a, d, 0], t) for a, b in pairs for t in tokens[b, d, 1:]]) for d in range(DEPTHS)]


def test_values_and_chance_level_against_the_slow_way():
    tokens, names = tokens_of(), [f"image {i}" for i in range(B)]
    found = read(tokens)
    slow = np.array([[np.mean([cosine(x[0], t) for t in x[1:]]) for x in image] for image in tokens])
    assert found.values == pytest.approx(slow.mean(0), abs=1e-7)
    assert found.stderr == pytest.approx(slow.std(0, ddof=1) / np.sqrt(B), abs=1e-7)
    assert found.nulls.values["other_image"] == pytest.approx(across(tokens, range(B)), abs=1e-7)
    groups = {group_of(name) for name in names}
    left_out = np.full((GROUPS, DEPTHS), np.nan)
    for group in groups:
        left_out[group] = across(tokens, [i for i in range(B) if group_of(names[i]) != group])
    half = (found.nulls.ci95["other_image"][:, 1] - found.nulls.ci95["other_image"][:, 0]) / 2
    assert len(groups) > 2
    assert (half / jackknife(left_out)[0] > 2).all()  # Student's t of so few groups
    assert half / half[0] == pytest.approx(jackknife(left_out)[0] / jackknife(left_out)[0][0], rel=1e-5)


def test_patches_that_are_copies_of_their_own_class_token():
    tokens = tokens_of()
    tokens[:, 1, 1:] = 3 * tokens[:, 1, :1]
    one, own = read(tokens), tokens[:, 1, 0]
    assert one.values[1] == pytest.approx(1.0, abs=1e-6)
    assert one.nulls.values["other_image"][1] == pytest.approx(
        np.mean([cosine(own[a], own[b]) for a, b in itertools.permutations(range(B), 2)]), abs=1e-6
    )


def test_one_direction_for_all_images_is_all_chance():
    tokens = np.ones((B, DEPTHS, N, D))
    found = read(tokens)
    assert found.values == pytest.approx(found.nulls.values["other_image"])


def test_the_class_token_is_the_first_prefix_token_wherever_it_stands():
    tokens = tokens_of()
    last = np.concatenate([tokens[:, :, 1:], tokens[:, :, :1]], 2)
    assert read(last, prefix=(N - 1,)).values == pytest.approx(read(tokens).values, abs=1e-12)


def test_without_a_class_token_it_does_not_apply_and_says_why():
    assert make(NAME, trace_with(tokens_of(), prefix=()).plan).inapplicable() == "the model has no class token among its tokens"
    plan = discover_plan(small_vit(class_token=False, global_pool="avg"), (64, 64))
    assert "no class token" in make(NAME, plan).inapplicable()


def test_depths_with_other_tokens_and_zero_tokens_are_undefined():
    tokens = tokens_of()
    tokens[0, 2, 0] = 0.0
    trace = trace_with(tokens)
    kept = (trace.tokens[0], trace.tokens[1][:, 1:], trace.tokens[2])  # as where the class token comes later
    found = readings([Trace(trace.plan, B, kept, trace.attention, None)], [NAME])[NAME]
    assert np.isfinite(found.values).tolist() == [True, False, True]
    slow = np.array([np.mean([cosine(x[2, 0], t) for t in x[2, 1:]]) for x in tokens[1:]])
    assert found.values[2] == pytest.approx(slow.mean(), abs=1e-7)


def test_one_image_has_no_other():
    found = read(tokens_of(1))
    assert found.nulls.values["other_image"] is None
    assert found.nulls.reasons["other_image"] == "needs two different images"
    assert torch.isfinite(torch.as_tensor(found.values)).all()
