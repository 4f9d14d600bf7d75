"""The verbs say which arguments they take, and an untrained copy is one model on the same path as the model itself."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

import collapse_probe as cp
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.models.loading import resolve

OPTIONS = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 3}}
MIXED = ("patch-diversity", "weight-rank")


@pytest.mark.parametrize("verb", [cp.analyze, cp.compare, cp.intervene])
def test_every_argument_has_a_name_and_a_type(verb):
    parameters = inspect.signature(verb).parameters.values()
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert all(p.annotation is not p.empty for p in parameters)
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("verb", [cp.analyze, cp.compare])
def test_the_defaults_are_those_of_the_settings(verb):
    parameters, settings = inspect.signature(verb).parameters, RunSettings()
    for name in vars(settings).keys() & parameters.keys():
        assert parameters[name].default == getattr(settings, name), name


def subject(made):
    """A small model that notes in `made` for which seeds it was made anew."""
    plain = resolve("timm:vit_tiny_patch16_224", **OPTIONS)
    return replace(plain, fresh=lambda seed: made.append(seed) or plain.fresh(seed))


def test_one_twin_a_seed_serves_maps_and_weights(photos):
    made = []
    found = cp.analyze(subject(made), str(photos), metrics=MIXED, null_images=2, null_seeds=2, seed=4)
    assert made == [5, 6]
    for name, images in zip(MIXED, (2, 0), strict=True):
        nulls = found.metrics[name].nulls
        assert nulls.values["untrained"].shape == found.metrics[name].values.shape
        assert nulls.images["untrained"] == images
        assert nulls.untrained_seeds["seeds"] == [5, 6]
    assert "untrained copies: fresh parameters with seeds [5, 6] on 2 images" in found.run["notes"]
    assert "untrained copies of the weights: fresh parameters with seeds [5, 6]" in found.run["notes"]


def test_a_twin_sees_the_images_of_a_loader_that_can_be_run_through_once():
    made = []
    found = cp.analyze(subject(made), iter([torch.randn(2, 3, 32, 32)]), metrics=MIXED)
    assert made == [1]
    for name in MIXED:
        assert found.metrics[name].nulls.values["untrained"] is not None
    assert found.metrics["patch-diversity"].nulls.images["untrained"] == 2


def test_why_there_is_no_twin(photos):
    made = []
    none = cp.analyze(subject(made), str(photos), metrics=MIXED, null_images=0)
    assert made == []
    for name in MIXED:
        assert none.metrics[name].nulls.reasons["untrained"] == "no null images were asked for"
    fixed = replace(subject(made), fresh=None)
    kept = cp.analyze(fixed, str(photos), metrics=MIXED)
    for name in MIXED:
        assert "cannot be made anew" in kept.metrics[name].nulls.reasons["untrained"]
